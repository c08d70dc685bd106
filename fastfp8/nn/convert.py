"""Apply a Recipe to a model: FP8 where it says so, and an account of what was left and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import ArgumentTypeError, check_type, message
from ..ops.quantize import INPUT_DTYPES
from ..recipe import Recipe
from .convertible import Convertible
from .linear import Linear

_OP = "nn.convert"
Filter = Callable[[str, torch.nn.Module], bool]
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_NORMS = (torch.nn.RMSNorm, torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.modules.batchnorm._NormBase)


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert` did. ``print`` it for a table.

    Attributes:
        module: the model; the replacement, if it was a torch.nn.Linear itself.
        recipe: what was applied.
        changed: what each module that computes in FP8 now is, by its qualified name.
        left: why each module with weights of its own that does not was left as it is, by its qualified name.
    """

    module: torch.nn.Module
    recipe: Recipe | None
    changed: dict[str, str]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.changed)} modules in FP8, {len(self.left)} left in high precision"]
        rows = [("fp8", *row) for row in self.changed.items()] + [("left", *row) for row in self.left.items()]
        width = max((len(name) for _, name, _ in rows), default=0)
        return "\n".join([*lines, *(f"  {kind:<6}{name or '(root)':<{width}}  {why}" for kind, name, why in rows)])


def convert(
    module: torch.nn.Module,
    recipe: Recipe | None = Recipe(),  # noqa: B008  (frozen)
    *,
    filter: Filter | None = None,  # noqa: A002
    freeze: bool = False,
) -> Conversion:
    """Let ``module`` compute by ``recipe``, in place: DeepSeek-V3 report, section 3.3.

    Every torch.nn.Linear is swapped for a :class:`fastfp8.nn.Linear` over the same Parameters, so that an optimizer
    that holds them goes on; every :class:`fastfp8.nn.Convertible` (fastfp8's own modules) gets the recipe, and none
    (high precision) where the recipe keeps its name. In FP8 a Linear after attention keeps its input as
    ``recipe.cached_after_attention`` says.

    Left as they are, and told with the reason: what the recipe keeps in high precision by name; embeddings, norms
    (section 3.3.1); Linears with hooks, with a computed weight (weight_norm) or of another dtype; subclasses of
    torch.nn.Linear, because their owner may read the weight without calling them, as torch.nn.MultiheadAttention does.
    torch.nn.TransformerEncoderLayer does so with plain Linears in its inference fast path;
    ``torch.backends.mha.set_fastpath_enabled(False)`` makes it call them.

    Args:
        module: the model.
        recipe: see :class:`fastfp8.Recipe`. None takes FP8 out of Convertibles and swaps nothing.
        filter: called once with the qualified name and each module that would be changed; false leaves it alone.
            None changes all. A module that appears several times has the first name, and stays shared.
        freeze: drop the master weights of the Linears: see :meth:`Linear.freeze`.

    Returns:
        A :class:`Conversion`. Its ``module`` is ``module``, or the replacement of a Linear.

    Raises:
        TypeError: ``module`` is no Module, ``recipe`` no Recipe or ``freeze`` no bool.
    """
    if not isinstance(module, torch.nn.Module):
        raise ArgumentTypeError(message(_OP, "module", "a torch.nn.Module", type(module).__name__))
    check_type(recipe, (Recipe, type(None)), _OP, "recipe", "a fastfp8.Recipe or None")
    check_type(freeze, bool, _OP, "freeze", "a bool")
    changed: dict[str, str] = {}
    left: dict[str, str] = {}
    replacements: dict[torch.nn.Module, Linear] = {}
    for name, child in list(module.named_modules()):
        convertible = isinstance(child, Convertible) or type(child) is torch.nn.Linear
        if not convertible:
            reason = _reason_for_others(child)
        else:
            reason = _reason(name, child, recipe) or ("filter" if filter and not filter(name, child) else None)
            if reason is None:
                reason = _apply(name, child, recipe, freeze, changed, replacements)
            elif isinstance(child, Convertible) and reason not in ("filter", _FROZEN):
                child.set_recipe(None)
        if reason is not None:
            left[name] = reason
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]
    return Conversion(replacements.get(module, module), recipe, changed, left)


_FROZEN = "frozen: it has no master weight"


def _reason(name: str, module: torch.nn.Module, recipe: Recipe | None) -> str | None:
    """Why a Linear or a Convertible is not to be changed; None if it is."""
    if getattr(module, "frozen", False):
        return _FROZEN
    if recipe is None:
        return "the recipe is None"
    pattern = recipe.kept_by(name)
    if pattern is not None:
        return f"high_precision pattern {pattern!r}: section 3.3.1"
    if type(module) is torch.nn.Linear:
        if "weight" not in module._parameters:
            return "its weight is computed"
        if module.weight.dtype not in INPUT_DTYPES:
            return f"dtype {module.weight.dtype}"
        if any(getattr(module, kind) for kind in _HOOKS):
            return "has hooks: register them after the conversion"
    return None


def _reason_for_others(module: torch.nn.Module) -> str | None:
    """Why a module that is neither Linear nor Convertible stays; None if it has no weights of its own to tell of."""
    if isinstance(module, torch.nn.Linear):
        return f"{type(module).__name__}, a subclass of Linear: its owner may read the weight without calling it"
    if isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)):
        return "embedding: section 3.3.1"
    if isinstance(module, _NORMS):
        return "norm: section 3.3.1"
    if any(True for _ in module.parameters(recurse=False)):
        return f"{type(module).__name__} is no Linear"
    return None


def _apply(
    name: str,
    module: torch.nn.Module,
    recipe: Recipe | None,
    freeze: bool,
    changed: dict[str, str],
    replacements: dict[torch.nn.Module, Linear],
) -> str | None:
    """Convert one module; the reason if it cannot compute by this recipe."""
    assert recipe is not None
    cache = recipe.cache_of(name)
    if isinstance(module, Convertible):
        try:
            module.set_recipe(recipe, cache)
        except ValueError as error:
            return str(error)
        changed[name] = module.describe()
        converted: torch.nn.Module = module
    else:
        assert isinstance(module, torch.nn.Linear)
        converted = replacements[module] = Linear.from_float(module, recipe, cache)
        changed[name] = replacements[module].describe()
    if freeze and isinstance(converted, Linear):
        converted.freeze()
    return None
