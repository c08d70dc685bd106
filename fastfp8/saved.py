"""What a forward pass keeps for backward, in bytes, by module and by dtype."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import check_type, check_value

_OP = "numerics.memory"


@dataclass(frozen=True)
class Saved:
    """What :func:`memory` found.

    Attributes:
        tokens: in the batch.
        by_module: bytes by the module that made them, numbers in its name as ``*``.
        by_dtype: the same bytes by dtype.
    """

    tokens: int
    by_module: dict[str, int]
    by_dtype: dict[torch.dtype, int]

    @property
    def total(self) -> int:
        """Bytes that live until backward."""
        return sum(self.by_module.values())

    @property
    def per_token(self) -> float:
        return self.total / self.tokens

    def beside(self, other: Saved, names: tuple[str, str] = ("fp8", "bf16")) -> str:
        """A table of bytes a token of both, by module, and their ratio."""
        rows: list[tuple[str, ...]] = [("module", *names, "ratio")]
        modules = sorted({*self.by_module, *other.by_module}, key=lambda m: -other.by_module.get(m, 0))
        for module in (*modules, "all"):
            ours, theirs = (
                (saved.total if module == "all" else saved.by_module.get(module, 0)) / saved.tokens
                for saved in (self, other)
            )
            rows.append((module, f"{ours:,.0f}", f"{theirs:,.0f}", f"{ours / theirs:.2f}" if theirs else "-"))
        return _table(rows)

    def __str__(self) -> str:
        modules = sorted(self.by_module.items(), key=lambda item: -item[1])
        sizes = [*modules, ("all", self.total)]
        sizes += [(f"in {dtype}".replace("torch.", ""), size) for dtype, size in self.by_dtype.items()]
        rows: list[tuple[str, ...]] = [("module", "bytes a token")]
        rows += [(name, f"{size / self.tokens:,.0f}") for name, size in sizes]
        return _table(rows)


def memory(model: torch.nn.Module, *batch: Any, run: Callable[..., Any] | None = None) -> Saved:
    """Run a forward pass and count what of it is there for backward.

    Counted are the storages that operators have made and that are alive when the forward is over, each once and whole:
    what autograd has saved, what checkpointing holds of its inputs, what a module keeps in between. Not counted are
    parameters, buffers, the batch itself and what lives in attributes of modules, as FP8 weights that several
    micro-batches share. The result of the forward is counted: pass ``run`` if it is not a loss.

    Args:
        model: a Module in the state in which it trains.
        batch: what it is called with; the tokens are the elements of the first tensor, or its rows if it is floating.
        run: called in place of ``model``, with ``batch``, as ``model.loss``.

    Returns:
        A :class:`Saved`, to be printed, or compared: ``ours.beside(theirs)``.

    Raises:
        TypeError: ``model`` is no Module.
        ValueError: there is no tensor in ``batch``, or nothing that needs a gradient in the result.
    """
    check_type(model, torch.nn.Module, _OP, "model", "a torch.nn.Module")
    given = [t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor)]
    check_value(bool(given), _OP, "batch", "a tensor", "none")
    first = given[0]
    tokens = first.numel() // first.shape[-1] if first.is_floating_point() else first.numel()
    tracker = _Made(model, [*model.parameters(), *model.buffers(), *given])
    with tracker:
        out = (run or model)(*batch)
    tracked = any(isinstance(t, Tensor) and t.requires_grad for t in pytree.tree_leaves(out))
    check_value(tracked, _OP, "model", "a result that needs a gradient", "none: is grad mode off?")
    return tracker.alive(tokens)


class _Made(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The storages that operators make, and the module in which they do."""

    def __init__(self, model: torch.nn.Module, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = model
        self._known = {_key(t): _weak(t) for t in known}
        # A weak reference keeps the address of a storage from being used again.
        self._made: dict[int, tuple[Any, int, str, torch.dtype]] = {}
        self._stack = ["model"]
        self._hooks: list[Any] = []

    def __enter__(self) -> Any:
        for name, module in self._model.named_modules():
            if name:
                shown = re.sub(r"\b\d+\b", "*", name)
                self._hooks += [
                    module.register_forward_pre_hook(lambda *_, shown=shown: self._stack.append(shown)),
                    module.register_forward_hook(lambda *_: self._leave(), always_call=True),
                ]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def _leave(self) -> None:
        self._stack.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(out):
            if isinstance(t, Tensor):
                key, size = _key(t), t.untyped_storage().nbytes()
                if key not in self._known and key not in self._made:
                    self._made[key] = _weak(t), size, self._stack[-1], t.dtype
        return out

    def alive(self, tokens: int) -> Saved:
        held = [vars(module) for module in self._model.modules()]
        attributes = {_key(t) for t in pytree.tree_leaves(held) if isinstance(t, Tensor)}
        by_module, by_dtype = defaultdict[str, int](int), defaultdict[torch.dtype, int](int)
        for key, (storage, size, module, dtype) in self._made.items():
            if key not in attributes and not storage.expired():
                by_module[module] += size
                by_dtype[dtype] += size
        return Saved(tokens, dict(by_module), dict(by_dtype))


def _key(t: Tensor) -> int:
    address: int = _weak(t).cdata
    return address


def _weak(t: Tensor) -> Any:
    return StorageWeakRef(t.untyped_storage())  # type: ignore[no-untyped-call]


def _table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
