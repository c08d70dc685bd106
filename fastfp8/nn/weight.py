"""FP8Weight: the weight of a module in FP8, quantised no more often than it changes, and its gradient in FP32."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..errors import check_type
from ..observation import Watched
from ..ops.quantize import quantize
from ..optim.adamw import AdamW
from ..recipe import Recipe
from ..scaled_tensor import ScaledTensor
from .convertible import Convertible
from .operands import SQUARE
from .products import pad


class _Kept(NamedTuple):
    """A weight in FP8, and where and in which version the weight was when it was quantised."""

    key: tuple[int, int] | None
    weight: ScaledTensor
    transposed: ScaledTensor | None


class FP8Weight(Watched, Convertible):
    """A module whose ``weight`` [N, K], or a stack [G, N, K], is multiplied in FP8.

    :meth:`_fp8_weight` gives it to forward; :func:`save_for_dgrad` and :func:`dgrad_weight` give it to backward.
    """

    ROLES: ClassVar = ("activation", "weight", "gradient", "activation, transposed", "gradient, transposed")
    weight: Tensor
    _kept: _Kept | None = None
    _sharing: SharedWeights | None = None

    def roles(self) -> dict[str, torch.device]:
        """See :class:`fastfp8.counters.Counted`."""
        return dict.fromkeys(self.ROLES, self.weight.device)

    def _fp8_weight(self) -> tuple[ScaledTensor, ScaledTensor | None]:
        """The weight padded to multiples of 16 rows and columns, and its transpose where that is kept too.

        Shared weights (:func:`share_weights`) are quantised after each step of the optimizer, or here if somebody else
        wrote to them. A weight that is not being trained (it needs no gradient; or grad mode is off, in eval mode) is
        quantised once and kept while its address and version stay. All others are quantised here.
        """
        weight, kept, shares = self.weight, self._kept, self._sharing is not None
        fixed = torch.compiler.is_compiling() or _capturing(weight)  # an address or version would be that of today
        if shares and fixed and kept is not None:
            return kept.weight, kept.transposed
        may_train = weight.requires_grad and (getattr(self, "training", True) or torch.is_grad_enabled())
        if fixed or not _identifiable(weight) or (may_train and not shares):
            if not shares:
                self._kept = None
            return self._quantize_weight(), None
        if kept is None or kept.key != (weight.data_ptr(), weight._version):
            kept = self._keep_weight()
        return kept.weight, kept.transposed

    def _keep_weight(self, stepped: bool = False) -> _Kept:
        """Quantise the weight and keep it; with its transpose if it is shared.

        ``stepped``: the last to write it was the optimizer's step, which may have written it in FP8 too.
        """
        weight, before, made, transposed = self.weight, self._kept, None, None
        with torch.inference_mode(False), torch.no_grad():  # what is kept may be saved for a backward later
            if stepped and self._sharing is not None:
                made, transposed = self._sharing.emitted(self) or (None, None)
            if made is None:
                made = self._quantize_weight()
                if self._sharing is not None:
                    # The memory stays: a captured CUDA graph has its address.
                    transposed = _into(None if before is None else before.transposed, made.t().contiguous())
                    made = _into(None if before is None else before.weight, made)
        self._kept = _Kept((weight.data_ptr(), weight._version), made, transposed)
        return self._kept

    def _forget_weight(self) -> None:
        """What the weight is may have changed in a way that neither address nor version tells."""
        if self._kept is not None:
            self._kept = self._kept._replace(key=None) if self._sharing is not None else None

    def _quantize_weight(self) -> ScaledTensor:
        assert self.recipe is not None
        return _quantized(self.weight.detach(), self.recipe, (self.counters or {}).get("weight"))

    def set_recipe(self, recipe: Recipe | None, cache: str | None = None) -> None:
        super().set_recipe(recipe, cache)
        self._kept = None
        if self._sharing is not None and recipe is not None:
            self._keep_weight()

    def train(self, mode: bool = True) -> Any:
        self._forget_weight()
        return super().train(mode)  # type: ignore[misc]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._forget_weight()
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None, "_sharing": None, "counters": None, "statistics": None}


def _quantized(weight: Tensor, recipe: Recipe, counters: Tensor | None = None) -> ScaledTensor:
    return quantize(pad(weight, rows=True, cols=True), SQUARE, pow2=recipe.weight.pow2, counters=counters)


def _identifiable(weight: Tensor) -> bool:
    """Whether address and version tell that ``weight`` changed."""
    return type(weight) is torch.nn.Parameter and not weight.is_inference()


def _capturing(weight: Tensor) -> bool:
    """Whether a CUDA graph is being captured: it would hold the address of a copy that may be freed before a replay."""
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


def _into(room: ScaledTensor | None, made: ScaledTensor) -> ScaledTensor:
    """``made``, in the memory of ``room`` if it fits."""
    if room is None or room.shape != made.shape or room.device != made.device:
        return made
    room.data.copy_(made.data)
    room.scale.copy_(made.scale)
    return room


# --- in backward


def save_for_dgrad(
    weight: Tensor | None, w8: ScaledTensor, w8_t: ScaledTensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """What to save for :func:`dgrad_weight`: the shared transpose; else ``weight``, None if it is not being trained,
    because it lives anyway and an FP8 copy until backward would not; else ``w8``, which is kept then."""
    if w8_t is not None:
        return w8_t.data, w8_t.scale
    return (w8.data, w8.scale) if weight is None else (weight, None)


def dgrad_weight(saved: tuple[Tensor, Tensor | None], recipe: Recipe, *, is_transposed: bool) -> ScaledTensor:
    """The operand of Dgrad: [K, N], or a stack [G, K, N], padded to multiples of 16.

    ``is_transposed`` tells whether there was a ``w8_t`` to save. Square blocks are transposed exactly.
    """
    data, scale = saved
    if scale is None:
        if data.dim() == 2:
            return _quantized(data.t(), recipe)
        return _quantized(data, recipe).t().contiguous()  # matrices of a stack lie one below the other
    t = ScaledTensor._trusted(data, scale, SQUARE)
    return t if is_transposed else t.t().contiguous()


# --- once an optimizer step


class SharedWeights:
    """The modules whose FP8 weights live from one step of an optimizer to the next: see :func:`share_weights`."""

    def __init__(self, modules: list[FP8Weight], optimizer: torch.optim.Optimizer) -> None:
        self._modules = weakref.WeakSet(modules)
        self._optimizer = weakref.ref(optimizer)
        self._hook = optimizer.register_step_post_hook(lambda *_: self._refresh(stepped=True))

    def refresh(self) -> None:
        """Quantise all weights again: after a write to them that was no step, as ``weight.data.copy_``."""
        self._refresh(stepped=False)

    def _refresh(self, *, stepped: bool) -> None:
        for module in list(self._modules):
            if module.recipe is not None and _identifiable(module.weight):
                module._keep_weight(stepped)

    def remove(self) -> None:
        """Back to quantising at each forward."""
        self._hook.remove()
        for module in list(self._modules):
            module._sharing = module._kept = None

    def emitted(self, module: FP8Weight) -> tuple[ScaledTensor, ScaledTensor] | None:
        """The FP8 weight and its transpose that the optimizer's last step wrote, if that is what ``module`` needs."""
        optimizer, weight = self._optimizer(), module.weight
        assert module.recipe is not None
        if not isinstance(optimizer, AdamW) or module.recipe.weight.pow2:
            return None
        group = next((g for g in optimizer.param_groups if any(p is weight for p in g["params"])), None)
        sizes_fit = weight.numel() > 0 and not any(size % 16 for size in weight.shape[-2:])
        return optimizer.quantized(weight) if group is not None and group["emit_fp8"] and sizes_fit else None


def share_weights(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> SharedWeights:
    """Quantise the weights of the FP8 modules of ``model`` once an optimizer step, for all micro-batches between two.

    After each ``optimizer.step()`` the weights that it holds are quantised, with their transposes for Dgrad;
    ``fastfp8.optim.AdamW(emit_fp8=True)`` has written them already, from its FP32 masters, where their sizes are
    multiples of 16. Modules without it quantise at each forward, and again, transposed, in backward. It costs two bytes
    an element from step to step, and pays from the first micro-batch on. Compiled modules read the shared weights too.

    A write to a weight by anybody else (``load_state_dict``, ``copy_``) is seen at the next forward by its version;
    one through ``weight.data`` is not, nor is any by a compiled module: call :meth:`SharedWeights.refresh`. Weights
    that FSDP has sharded are left out, for these copies would undo the sharding. Copies of the model share nothing.

    Args:
        model: a Module with FP8 modules (:class:`fastfp8.nn.Linear`, RMSNormLinear, GroupedLinear) in it.
        optimizer: the one that steps their weights. Call this once for each, if there are several.

    Returns:
        What ends it: :meth:`SharedWeights.remove`.

    Raises:
        TypeError: an argument is of another type.
    """
    op = "nn.share_weights"
    check_type(model, torch.nn.Module, op, "model", "a torch.nn.Module")
    check_type(optimizer, torch.optim.Optimizer, op, "optimizer", "a torch.optim.Optimizer")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    modules = [m for m in fp8_modules(model) if id(m.weight) in held and type(m.weight) is torch.nn.Parameter]
    shared = SharedWeights(modules, optimizer)
    for module in modules:
        module._sharing = shared
    shared.refresh()
    return shared


def fp8_modules(model: torch.nn.Module) -> list[Any]:
    """The modules of ``model`` that are an :class:`FP8Weight` and have a weight: no frozen ones."""
    return [m for m in model.modules() if isinstance(m, FP8Weight) and hasattr(m, "weight")]


def use_main_grad(model: torch.nn.Module) -> None:
    """Let the gradients of FP8 modules' weights accumulate in FP32: ``weight.main_grad``, zeroed, made where missing.

    Backward then adds Wgrad to ``main_grad`` within the GEMM and leaves ``weight.grad`` None; whatever waits for
    ``weight.grad``, as DistributedDataParallel does, does not see it. ``fastfp8.optim.AdamW`` takes ``main_grad``.
    Call it again before each step's first backward, beside ``optimizer.zero_grad()``. DeepSeek-V3 report, section
    3.3.3: weight gradients are accumulated in FP32.

    Raises:
        TypeError: ``model`` is no Module.
    """
    check_type(model, torch.nn.Module, "nn.use_main_grad", "model", "a torch.nn.Module")
    for module in fp8_modules(model):
        weight = module.weight
        if getattr(weight, "main_grad", None) is None:
            weight.main_grad = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        else:
            weight.main_grad.zero_()
