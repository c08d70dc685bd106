"""A Linear whose three GEMMs (Fprop, Dgrad, Wgrad) run in FP8 and which keeps its input for backward in FP8 only.

With gemm(a, b) = a @ b.T, M tokens, K in_features, N out_features, and each operand in FP8:

    Fprop  y  [M, N] = gemm(x 1x128, w 128x128) + bias
    Dgrad  dx [M, K] = gemm(dy 1x128, w.T 128x128)                   w.T is exact: its blocks are square
    Wgrad  dw [N, K] = gemm(dy.T 1x128, x.T 1x128), both along M     x.T: the saved x, re-tiled from 1x128 to 128x1

Gradients never get 128x128 blocks: with them a 16B model diverged (DeepSeek-V3 report, appendix B.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..counters import Counted
from ..errors import ArgumentTypeError, check_device, check_dtype, check_value, message
from ..layout import BLOCK, Block
from ..ops.dequantize import dequantize
from ..ops.gemm import A_BLOCK, K_ALIGNMENT, gemm
from ..ops.quantize import INPUT_DTYPES, quantize
from ..scaled_tensor import ScaledTensor

_OP = "nn.Linear"
_WEIGHT_BLOCK: Block = (BLOCK, BLOCK)
_TOKEN_BLOCK: Block = (BLOCK, 1)
_FROZEN_BUFFERS = ("weight_data", "weight_scale")


def _pad(x: Tensor, *, rows: bool, cols: bool) -> Tensor:
    """``x`` [R, C] with zeros up to multiples of 16 rows and columns, one at least: each extent is the K of one of the
    three GEMMs. Zeros change neither an amax nor a product."""
    extra_rows, extra_cols = (
        (-size % K_ALIGNMENT if size else K_ALIGNMENT) if wanted else 0
        for size, wanted in zip(x.shape, (rows, cols), strict=True)
    )
    return F.pad(x, (0, extra_cols, 0, extra_rows)) if extra_rows or extra_cols else x


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast computes in on such a device; None where it is off."""
    # torch.amp.is_autocast_available would say it of meta too, but Dynamo of torch 2.11 cannot trace it.
    on = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if on else None


def _product(a: ScaledTensor, b: ScaledTensor, out_dtype: torch.dtype, c: Tensor | None = None) -> Tensor:
    """``gemm``, in float16 too."""
    out = gemm(a, b, out_dtype=torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32, c=c)
    return out if out.dtype == out_dtype else out.to(out_dtype)


def _crop(t: Tensor, rows: int, cols: int) -> Tensor:
    """The first ``rows`` and ``cols`` of ``t``, contiguous: ``t`` itself or a copy where columns go."""
    # No op here may return its own input, as contiguous() and a slice of all do: where such a result leaves the forward
    # of an autograd.Function, torch.compile in 2.11 gives gradients of zero, silently.
    if t.shape[1] != cols:
        t = t[:, :cols].clone(memory_format=torch.contiguous_format)
    return t if t.shape[0] == rows else t[:rows]


class _LinearFunction(torch.autograd.Function):
    """y = x @ weight.T + bias. ``weight`` only routes its gradient: its value comes as ``w8``, data and scale."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        w8_data: Tensor,
        w8_scale: Tensor,
        out_features: int,
        out_dtype: torch.dtype,
        pow2: bool,
        counters: dict[str, Tensor],
    ) -> Tensor:
        w8 = ScaledTensor._trusted(w8_data, w8_scale, _WEIGHT_BLOCK)
        x8 = quantize(_pad(x, rows=False, cols=True), A_BLOCK, pow2=pow2, counters=counters.get("activation"))
        c = None
        if bias is not None:
            c = bias.float() if bias.dtype == torch.float16 else bias
            c = F.pad(c, (0, w8.shape[0] - out_features)).expand(x.shape[0], w8.shape[0])
        y = _crop(_product(x8, w8, out_dtype, c), x.shape[0], out_features)

        needs_x, needs_weight, _ = ctx.needs_input_grad[:3]
        ctx.save_for_backward(
            *((x8.data, x8.scale) if needs_weight else (None, None)),
            *((w8_data, w8_scale) if needs_x else (None, None)),
        )
        ctx.shape, ctx.x_dtype, ctx.pow2 = (x.shape[0], out_features, x.shape[1]), x.dtype, pow2
        ctx.weight_dtype = None if weight is None else weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.counters = counters  # not saved for backward: that would forbid the next forward to write them
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        x8_data, x8_scale, w8_data, w8_scale = ctx.saved_tensors
        m, n, k = ctx.shape
        dx = dw = db = None
        if needs_bias:
            db = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        dy = _pad(dy, rows=True, cols=True)
        if needs_x:
            w8_t = ScaledTensor._trusted(w8_data, w8_scale, _WEIGHT_BLOCK).t().contiguous()
            dy8 = quantize(dy, A_BLOCK, pow2=ctx.pow2, counters=ctx.counters.get("gradient"))
            dx = _crop(_product(dy8, w8_t, ctx.x_dtype), m, k)
        if needs_weight:
            x = dequantize(ScaledTensor._trusted(x8_data, x8_scale, A_BLOCK), torch.float32)
            of_x, of_dy = (ctx.counters.get(f"{role}, transposed") for role in ("activation", "gradient"))
            x8_t = quantize(_pad(x, rows=True, cols=False), _TOKEN_BLOCK, pow2=ctx.pow2, counters=of_x)
            dy8_t = quantize(dy, _TOKEN_BLOCK, pow2=ctx.pow2, counters=of_dy)
            dw = _product(dy8_t.t().contiguous(), x8_t.t().contiguous(), torch.float32)
            dw = _crop(dw, n, k).to(ctx.weight_dtype)
        return dx, dw, db, None, None, None, None, None, None


class Linear(Counted, torch.nn.Linear):
    """``y = x @ weight.T + bias`` in FP8, forward and backward: a drop-in for :class:`torch.nn.Linear`.

    Args:
        in_features, out_features: any sizes; one that is not a multiple of 16 is padded with zeros inside.
        bias: whether there is one. It is added in FP32 before the result is rounded.
        device, dtype: of the parameters, the master weights: float32, bfloat16 or float16.
        pow2: round the scales of activations and gradients up to powers of two. Backward re-tiles the saved input from
            1x128 to 128x1 blocks, which then loses nothing but subnormals: 31.5 dB of signal to noise on normal data
            stay 31.5, while FP32 scales fall from 31.8 to 28.8. The weight keeps FP32 scales: its transpose is exact.

    ``forward`` takes [..., in_features] of bfloat16, float16 or float32 and returns [..., out_features] of the same
    dtype, or of autocast's where that is on. Zero tokens are fine. Gradients come in the dtypes of their inputs.

    The input is saved for backward in FP8 alone (DeepSeek-V3 report, section 3.3.3), and only if the weight needs a
    gradient; the FP8 weight only if the input needs one. The state_dict is that of torch.nn.Linear. An infinity in a
    gradient saturates, as in :func:`fastfp8.quantize`, and a NaN stays one.

    A weight that is not being trained (it needs no gradient; or grad mode is off, in eval mode) is quantised once and
    kept in FP8 beside the parameter while its address and version stay. The version is no proof: torch's fused Adam and
    ``weight.data.add_`` leave it (seen in 2.13). So any other forward quantises anew and drops the copy, and so do
    ``train()``, ``eval()`` and ``to()``; after a write through ``weight.data`` between two such forwards call one of
    them. torch.compile quantises at each call. For inference alone, :meth:`freeze`.

    Raises:
        TypeError: the input or a parameter has another dtype.
        ValueError: the input's last dimension is not ``in_features``, or it is on another device.
    """

    ROLES: ClassVar = ("activation", "weight", "gradient", "activation, transposed", "gradient, transposed")
    frozen: bool
    pow2: bool
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
        pow2: bool = True,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        check_dtype(self.weight.dtype, _OP, "dtype", INPUT_DTYPES)
        self.pow2, self.frozen = pow2, False
        self._kept: tuple[tuple[int, int], ScaledTensor] | None = None

    @classmethod
    def from_float(cls, linear: torch.nn.Linear, *, pow2: bool = True) -> Linear:
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
        new = cls(linear.in_features, linear.out_features, has_bias, device="meta", dtype=dtype, pow2=pow2)
        new.weight, new.bias = linear.weight, linear.bias
        new.training = linear.training
        return new

    def roles(self) -> dict[str, torch.device]:
        """See :class:`fastfp8.counters.Counted`."""
        return dict.fromkeys(self.ROLES, (self.weight_data if self.frozen else self.weight).device)

    def freeze(self) -> Linear:
        """Keep the FP8 weight only, as the buffers ``weight_data`` and ``weight_scale``, and drop the master weight.

        Outputs and input gradients stay the same bit for bit. The bias stays a Parameter that needs no gradient.
        ``to(dtype)`` then changes the bias alone. There is no way back: :meth:`requires_grad_` and ``weight`` raise.
        To load a frozen state_dict, freeze a Linear of the same sizes first. Returns itself.
        """
        if not self.frozen:
            with torch.inference_mode(False):  # input gradients may be wanted later
                w8 = self._quantize_weight()
            self._kept = None
            del self.weight
            self.register_buffer("weight_data", w8.data)
            self.register_buffer("weight_scale", w8.scale)
            self.frozen = True
            super().requires_grad_(False)
        return self

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch.nn.Linear's name: callers may pass it by keyword)
        x = input
        self._check_input(x)
        lead = x.shape[:-1]
        w8 = self._fp8_weight()
        y: Tensor = _LinearFunction.apply(  # type: ignore[no-untyped-call]
            x.reshape(math.prod(lead), self.in_features),
            None if self.frozen else self.weight,
            self.bias,
            w8.data,
            w8.scale,
            self.out_features,
            _autocast_dtype(x.device.type) or x.dtype,
            self.pow2,
            self.counters or {},
        )
        return y.reshape(*lead, self.out_features)

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise ArgumentTypeError(message(_OP, "input", "a torch.Tensor", type(x).__name__))
        check_dtype(x.dtype, _OP, "input", INPUT_DTYPES)
        fits = x.dim() >= 1 and x.shape[-1] == self.in_features
        check_value(fits, _OP, "input", f"a last dimension of {self.in_features}", f"shape {tuple(x.shape)}")
        check_device(x, _OP, "input", self.weight_data if self.frozen else self.weight, "weight")

    def _fp8_weight(self) -> ScaledTensor:
        """The weight in FP8, kept while it is sure to be unchanged: see the class."""
        if self.frozen:
            return ScaledTensor._trusted(self.weight_data, self.weight_scale, _WEIGHT_BLOCK)
        weight = self.weight
        may_train = weight.requires_grad and (self.training or torch.is_grad_enabled())
        if may_train or torch.compiler.is_compiling() or not _can_keep(weight):
            self._kept = None
            return self._quantize_weight()
        key = (weight.data_ptr(), weight._version)
        if self._kept is None or self._kept[0] != key:
            with torch.inference_mode(False):  # what is kept may be saved for a backward later
                self._kept = (key, self._quantize_weight())
        return self._kept[1]

    def _quantize_weight(self) -> ScaledTensor:
        counters = (self.counters or {}).get("weight")
        return quantize(_pad(self.weight.detach(), rows=True, cols=True), _WEIGHT_BLOCK, counters=counters)

    def train(self, mode: bool = True) -> Linear:
        self._kept = None
        super().train(mode)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Linear:
        """As in torch.nn.Module. Raises ValueError where a frozen Linear is to be trained."""
        expected = f"False, as this Linear is frozen ({_FROZEN_REASON})"
        check_value(not (self.frozen and requires_grad), f"{_OP}.requires_grad_", "requires_grad", expected, True)
        super().requires_grad_(requires_grad)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pow2={self.pow2}" + (", frozen" if self.frozen else "")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        self._kept = None
        before = {name: getattr(self, name) for name in _FROZEN_BUFFERS if self.frozen}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            moved = getattr(self, name)
            if moved.dtype != old.dtype:  # to(dtype) takes FP8 codes and their scales for numbers that it may round
                setattr(self, name, old.to(moved.device))
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_kept": None, "counters": None}
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


def _can_keep(weight: Tensor) -> bool:
    """Whether address and version tell that ``weight`` changed, and a copy of it may outlive this call."""
    if type(weight) is not torch.nn.Parameter or weight.is_inference():
        return False
    # A captured graph would hold the address of a copy that may be freed before the replay.
    return not (weight.is_cuda and torch.cuda.is_current_stream_capturing())
