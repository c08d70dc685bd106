"""A Linear whose three GEMMs (Fprop, Dgrad, Wgrad) run in FP8 and which keeps its input for backward in FP8 only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentTypeError, check_dtype, check_value, message
from ..ops.quantize import INPUT_DTYPES
from ..recipe import Recipe
from ..scaled_tensor import ScaledTensor
from .dense import call_dense, check_input
from .operands import SQUARE
from .weight import FP8Weight

_OP = "nn.Linear"
_FROZEN_BUFFERS = ("weight_data", "weight_scale")
_DEFAULT = Recipe()


class Linear(FP8Weight, torch.nn.Linear):
    """``y = x @ weight.T + bias`` in FP8, forward and backward: a drop-in for :class:`torch.nn.Linear`.

    Args:
        in_features, out_features, bias, device, dtype: as for torch.nn.Linear; any sizes; dtype bfloat16, float16 or
            float32.
        recipe: the formats of input, weight and gradients: see :class:`fastfp8.Recipe`. None computes in high
            precision, as torch.nn.Linear does.
        cache: in what the input is saved for backward, and only if the weight needs a gradient: "e4m3", the codes and
            scales of Fprop, 8.25 bits an element; "e5m6", 12.25 bits and less noise in the gradient of the weight;
            "bf16", the input itself. DeepSeek-V3 report, section 3.3.3.

    The input is a tensor [..., in_features] of bfloat16, float16 or float32 and returns [..., out_features] of the same
    dtype, or of autocast's where that is on. Zero tokens are fine. Gradients come in the dtypes of their inputs. If
    ``weight.main_grad`` is a float32 tensor, backward adds the gradient of the weight to it and leaves ``weight.grad``
    alone: :func:`fastfp8.nn.use_main_grad`.

    The state_dict is that of torch.nn.Linear. An infinity in a gradient saturates, as in :func:`fastfp8.quantize`, and
    a NaN stays one. Backward reads the weight again, so it must not have changed since, as with torch.nn.Linear.

    A weight that is being trained is quantised at each forward and, transposed, at each backward; with
    :func:`fastfp8.nn.share_weights` once an optimizer step. One that is not being trained (it needs no gradient; or
    grad mode is off, in eval mode) is quantised once and kept in FP8 beside the parameter while its address and version
    stay. The version is no proof: torch's fused Adam and ``weight.data.add_`` leave it (seen in 2.13). So any other
    forward quantises anew and drops the copy, and so do ``train()``, ``eval()`` and ``to()``; after a write through
    ``weight.data`` between two such forwards call one of them. torch.compile quantises such a weight at each call. For
    inference alone, :meth:`freeze`.

    Under FSDP2 (``torch.distributed.fsdp.fully_shard``) the weight is gathered as torch does it, in the dtype of the
    parameter or of the MixedPrecisionPolicy, and then quantised: blocks of 128 x 128 do not fit a shard of any size.
    Nothing of a gathered weight lives from forward to backward, not in FP8 either.

    Raises:
        TypeError: the input, the recipe or a parameter has another type or dtype.
        ValueError: the cache is another; the input's last dimension is not ``in_features``, or it is on another device;
            ``weight.main_grad`` does not fit.
    """

    frozen: bool
    weight_data: Tensor
    weight_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        recipe: Recipe | None = _DEFAULT,
        cache: str = "e4m3",
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        check_dtype(self.weight.dtype, _OP, "dtype", INPUT_DTYPES)
        self.frozen = False
        self.set_recipe(recipe, cache)

    @classmethod
    def from_float(cls, linear: torch.nn.Linear, recipe: Recipe | None = _DEFAULT, cache: str = "e4m3") -> Linear:
        """An FP8 Linear over the very Parameters of ``linear``, so that an optimizer that holds them goes on.

        Raises:
            TypeError: ``linear`` is not exactly a torch.nn.Linear, or its dtype is another than Linear takes.
            ValueError: it has hooks or no plain ``weight`` Parameter (weight_norm), which would be lost.
        """
        op = f"{_OP}.from_float"
        if type(linear) is not torch.nn.Linear:
            raise ArgumentTypeError(message(op, "linear", "a torch.nn.Linear, no subclass", type(linear).__name__))
        check_dtype(linear.weight.dtype, op, "linear", INPUT_DTYPES)
        check_value("weight" in linear._parameters, op, "linear", "a Parameter 'weight'", "a computed one")
        for kind in ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"):
            hooks = getattr(linear, kind)
            check_value(not hooks, op, "linear", "no hooks: register them after the swap", f"{len(hooks)} in {kind}")
        dtype, has_bias = linear.weight.dtype, linear.bias is not None
        sizes = linear.in_features, linear.out_features
        new = cls(*sizes, has_bias, device="meta", dtype=dtype, recipe=recipe, cache=cache)
        new.weight, new.bias = linear.weight, linear.bias
        new.training = linear.training
        return new

    def roles(self) -> dict[str, torch.device]:
        """See :class:`fastfp8.counters.Counted`."""
        return dict.fromkeys(self.ROLES, self.weight_data.device) if self.frozen else super().roles()

    def freeze(self) -> Linear:
        """Keep the FP8 weight only, as the buffers ``weight_data`` and ``weight_scale``, and drop the master weight.

        Outputs and input gradients stay the same bit for bit. The bias stays a Parameter that needs no gradient.
        ``to(dtype)`` then changes the bias alone. There is no way back: :meth:`requires_grad_` and ``weight`` raise.
        To load a frozen state_dict, freeze a Linear of the same sizes first. Returns itself.

        Raises:
            ValueError: the recipe is None: there is no FP8 weight.
        """
        if not self.frozen:
            check_value(self.recipe is not None, f"{_OP}.freeze", "recipe", "a Recipe", None)
            with torch.inference_mode(False):  # input gradients may be wanted later
                w8 = self._quantize_weight()
            self._kept = self._sharing = None
            del self.weight
            self.register_buffer("weight_data", w8.data)
            self.register_buffer("weight_scale", w8.scale)
            self.frozen = True
            super().requires_grad_(False)
        return self

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch.nn.Linear's name: callers may pass it by keyword)
        check_input(_OP, input, self.in_features, self.weight_data if self.frozen else self.weight)
        weight = None if self.frozen else self.weight
        return call_dense(_OP, self, input, None, weight, self.bias, self.out_features)

    def _fp8_weight(self) -> tuple[ScaledTensor, ScaledTensor | None]:
        if self.frozen:
            return ScaledTensor._trusted(self.weight_data, self.weight_scale, SQUARE), None
        return super()._fp8_weight()

    def set_recipe(self, recipe: Recipe | None, cache: str | None = None) -> None:
        check_value(not self.frozen, f"{_OP}.set_recipe", "self", "a Linear that is not frozen", _FROZEN_REASON)
        super().set_recipe(recipe, cache)

    def requires_grad_(self, requires_grad: bool = True) -> Linear:
        """As in torch.nn.Module. Raises ValueError where a frozen Linear is to be trained."""
        expected = f"False, as this Linear is frozen ({_FROZEN_REASON})"
        check_value(not (self.frozen and requires_grad), f"{_OP}.requires_grad_", "requires_grad", expected, True)
        super().requires_grad_(requires_grad)
        return self

    def extra_repr(self) -> str:
        how = f"cache={self.cache!r}" if self.recipe is not None else "recipe=None"
        return f"{super().extra_repr()}, {how}" + (", frozen" if self.frozen else "")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        before = {name: getattr(self, name) for name in _FROZEN_BUFFERS if self.frozen}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            moved = getattr(self, name)
            if moved.dtype != old.dtype:  # to(dtype) takes FP8 codes and their scales for numbers that it may round
                setattr(self, name, old.to(moved.device))
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        if self.frozen:  # as bytes: pickle writes FP8 tensors that it cannot read (seen in torch 2.13)
            state["_buffers"] = {**self._buffers, "weight_data": self.weight_data.view(torch.uint8)}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self.frozen:
            self._buffers["weight_data"] = self.weight_data.view(torch.float8_e4m3fn)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.__dict__.get("frozen", False):
            raise AttributeError(f"fastfp8.{_OP}: no attribute 'weight': this Linear is frozen ({_FROZEN_REASON})")
        return super().__getattr__(name)


_FROZEN_REASON = "freeze() dropped the master weight; the FP8 one is in 'weight_data' and 'weight_scale'"
