"""The ops that quantise, move or update in one pass: their arguments, and what the same in steps would move.

``traffic.py`` counts their bytes on the emulator, ``fused.py`` times them on a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

import fastfp8
from fastfp8.layout import BLOCK, BLOCKS, Block, grouped_tokens, scale_shape_of
from fastfp8.reference.adamw import factors

OPS = torch.ops.fastfp8
TOP_K, EXPERTS, GROUPS = 8, 256, 4
ROUTE: dict[str, Any] = {"top_k": TOP_K, "groups": 8, "top_groups": 4, "score": "sigmoid", "scale": 2.5}
ADAMW = (1, 1e-3, (0.9, 0.95), 1e-8, 0.1)  # step, rate, betas, eps, weight decay
ROW: Block = (1, BLOCK)
EPS = 1e-6
BF16 = torch.bfloat16


def tensors_in(things: Any) -> list[Tensor]:
    return [t for t in _pytree.tree_leaves(things) if isinstance(t, Tensor)]


def nbytes(things: Any) -> int:
    """Of all tensors in it, without the padding between rows."""
    return sum(t.numel() * t.element_size() for t in tensors_in(things))


@dataclasses.dataclass(frozen=True)
class Fusion:
    """A call of an op. ``chain`` has the bytes of the steps that it replaces, each with reads and writes of its own."""

    #: Its Triton kernels are in this module, beside a host function of the op's name.
    module: str
    op: Any
    args: tuple[Any, ...]
    chain: dict[str, float]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    #: Where the host function has another name than the op, or is one that gets the module first; and where it takes
    #: other arguments.
    host: str | Callable[..., Any] = ""
    host_args: tuple[Any, ...] | None = None
    #: Bytes of the results that the op leaves as they are.
    unwritten: int = 0
    #: Where arguments are both read and written: the least bytes of all.
    in_place: float | None = None

    def least(self, results: Any) -> float:
        """Each input read once, each result written once."""
        return self.in_place or nbytes(self.args) + nbytes(results) - self.unwritten


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def quantize(block: Block, rows: int, cols: int) -> Fusion:
    n, x = rows * cols, randn(rows, cols).bfloat16()
    steps = {"amax": 2.0 * n, "multiply and cast": 3.0 * n}
    return Fusion("quantize", OPS.quantize.default, (x, block, False, 0.0), steps)


def dequantize(block: Block, rows: int, cols: int) -> Fusion:
    n, t = rows * cols, fastfp8.quantize(randn(rows, cols), block)
    steps = {"cast": 3.0 * n, "multiply": 4.0 * n}
    return Fusion("dequantize", OPS.dequantize.default, (t.data, t.scale, block, BF16), steps)


def _gates(fp8: bool, rows: int, cols: int) -> tuple[Tensor, Tensor | None, dict[str, float]]:
    """Gate and up [rows, 2 * cols] with the scale of FP8, and the step that makes it BF16."""
    gate_up = randn(rows, 2 * cols).bfloat16()
    if not fp8:
        return gate_up, None, {}
    t = fastfp8.quantize(gate_up)
    return t.data, t.scale, {"dequantize": 6.0 * rows * cols}


def swiglu_quantize(fp8: bool, rows: int, cols: int) -> Fusion:
    n, (gate_up, scale, first) = rows * cols, _gates(fp8, rows, cols)
    steps = {**first, "silu": 4.0 * n, "multiply": 6.0 * n, "quantize": 3.0 * n}
    return Fusion("swiglu_quantize", OPS.swiglu_quantize.default, (gate_up, None, None, False, 0.0, scale), steps)


def swiglu_backward_quantize(fp8: bool, grouped: bool, rows: int, cols: int) -> Fusion:
    """With the weights of rows and the gradient of these."""
    n, (gate_up, scale, first) = rows * cols, _gates(fp8, rows, cols)
    groups, spare = _groups(rows, 3 * cols) if grouped else ((None, None), 0)
    grad, weight = randn(rows, cols).bfloat16(), randn(rows)
    steps = {
        **first,
        "weight": 8.0 * n,  # of the gradient and of the value
        "silu again": 4.0 * n,
        "multiply": 6.0 * n,
        "gradient of weight": 4.0 * n,
        "gradient of the product": 10.0 * n,
        "gradient of silu": 6.0 * n,
        "quantize": 6.0 * n,
        **{step: 3 * moved for step, moved in _turned(n, grouped).items()},
    }
    args = (grad, gate_up, scale, weight, None, *groups, False, 0.0, False)
    return Fusion("swiglu_backward_quantize", OPS.swiglu_backward_quantize.default, args, steps, unwritten=spare)


def dequantize_add(rows: int, cols: int) -> Fusion:
    n, t = rows * cols, fastfp8.quantize(randn(rows, cols))
    args = (t.data, t.scale, ROW, BF16, randn(cols, rows).view(rows, cols).bfloat16())
    return Fusion("dequantize", OPS.dequantize.default, args, {"dequantize": 3.0 * n, "add": 6.0 * n})


def rmsnorm_quantize(residual: bool, rows: int, cols: int) -> Fusion:
    """With ``residual``, the pre-norm of a transformer."""
    n, x, weight = rows * cols, randn(rows, cols).bfloat16(), randn(cols).bfloat16()
    added = randn(cols, rows).view(rows, cols).bfloat16() if residual else None
    steps = {"mean of squares": 2.0 * n, "normalize": 4.0 * n, "quantize": 3.0 * n}
    args = (x, weight, EPS, added, False, 0.0)
    return Fusion("rmsnorm", OPS.rmsnorm_quantize.default, args, {"add": 6.0 * n, **steps} if residual else steps)


def rmsnorm_both_ways(residual: bool, rows: int, cols: int) -> Fusion:
    """What ``fastfp8.rmsnorm_quantize(..., transpose=True)`` calls."""
    first = rmsnorm_quantize(residual, rows, cols)
    steps = {**first.chain, **_turned(rows * cols, False)}
    return Fusion("rmsnorm", functools.partial(_both_ways, OPS), first.args, steps, host=_both_ways)


def _both_ways(ops: Any, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, *options: Any) -> Any:
    """``ops`` are those of torch, or the module with their host functions."""
    *quantized, rstd, summed = ops.rmsnorm_quantize(x, weight, eps, residual, *options)
    given = x if residual is None else summed
    return *quantized, rstd, summed, *ops.rmsnorm_quantize_transpose(given, weight, rstd, *options)


def rmsnorm_quantize_transpose(rows: int, cols: int) -> Fusion:
    n, x, weight = rows * cols, randn(rows, cols).bfloat16(), randn(cols).bfloat16()
    args = (x, weight, _rstd(x), False, 0.0)
    steps = {"normalize": 4.0 * n, **_turned(n, False)}
    return Fusion("rmsnorm", OPS.rmsnorm_quantize_transpose.default, args, steps)


def rmsnorm_backward(residual: bool, rows: int, cols: int) -> Fusion:
    """``residual``: the gradient of the new residual is added."""
    n, x, weight = rows * cols, randn(rows, cols).bfloat16(), randn(cols).bfloat16()
    grad, *more = (randn(cols, rows + i).flatten()[:n].view(rows, cols).bfloat16() for i in range(1 + residual))
    steps = {"normalize": 4.0 * n, "mean": 4.0 * n, "dx": 6.0 * n, "products for dweight": 6.0 * n, "sum": 2.0 * n}
    args = (grad, x, weight, _rstd(x), *(more or (None,)))
    return Fusion("rmsnorm", OPS.rmsnorm_backward.default, args, steps | ({"add": 6.0 * n} if residual else {}))


def _rstd(x: Tensor) -> Tensor:
    return torch.rsqrt(x.float().square().mean(1) + EPS)


def _turned(n: int, grouped: bool) -> dict[str, float]:
    pad = {"pad each group": 4.0 * n} if grouped else {}
    return {**pad, "transpose": 4.0 * n, "quantize the transpose": 3.0 * n}


def _groups(rows: int, cols: int) -> tuple[tuple[Tensor, Tensor], int]:
    """Ends of groups of equally many rows, an error word, and what of a transpose no row fills."""
    ends = (torch.arange(1, GROUPS + 1) * (rows // GROUPS)).int()
    # A multiple of 128 rows is a multiple of blocks; fewer are one block each.
    blocks = (grouped_tokens(rows, GROUPS) - GROUPS * (-(-rows // GROUPS // BLOCK) * BLOCK)) // BLOCK
    return (ends, torch.zeros(1, dtype=torch.int32)), blocks * cols * (BLOCK + 4)


def quantize_both(grouped: bool, rows: int, cols: int) -> Fusion:
    n, x = rows * cols, randn(rows, cols).bfloat16()
    steps = {"quantize": 3.0 * n, **_turned(n, grouped)}
    if not grouped:
        return Fusion("quantize_both", OPS.quantize_both.default, (x, False, 0.0), steps)
    groups, spare = _groups(rows, cols)
    op = OPS.quantize_grouped_both.default
    return Fusion("quantize_both", op, (x, *groups, False, 0.0), steps, unwritten=spare)


def requantize_transpose(grouped: bool, rows: int, cols: int) -> Fusion:
    n, t = rows * cols, fastfp8.quantize(randn(rows, cols), pow2=True)
    steps = {"dequantize": 3.0 * n, **_turned(n, grouped)}
    module, op = "requantize_transpose", OPS.requantize_transpose
    if not grouped:
        return Fusion(module, op.default, (t.data, t.scale), steps)
    groups, spare = _groups(rows, cols)
    args, host = (t.data, t.scale, *groups), "requantize_grouped_transpose"
    return Fusion(module, op.grouped, args, steps, host=host, unwritten=spare)


def _routes(tokens: int) -> tuple[Tensor, Tensor]:
    """The rows of each token for its experts, and their weights."""
    idx, weights, *_ = OPS.route(randn(tokens, EXPERTS), torch.zeros(EXPERTS), top_k=TOP_K)
    return OPS.row_map(idx, EXPERTS, None)[1], weights


def permute(what: str, rows: int, cols: int) -> Fusion:
    """To ``rows`` rows, TOP_K of each token."""
    tokens, n = rows // TOP_K, rows * cols
    to, x = _routes(tokens)[0], randn(tokens, cols).bfloat16()
    if what == "FP8":
        t = fastfp8.quantize(x)
        return Fusion("permute", OPS.permute_scaled.default, (t.data, t.scale, to), {"index_select": 2.0 * n})
    if what == "quantize":
        steps = {"index_select": 4.0 * n, "quantize": 3.0 * n}
        return Fusion("permute", OPS.permute_quantize.default, (x, to, False, 0.0), steps)
    return Fusion("permute", OPS.permute.default, (x, to), {"index_select": 4.0 * n})


def unpermute(fp8: bool, rows: int, cols: int) -> Fusion:
    tokens, n = rows // TOP_K, rows * cols
    at, weights = _routes(tokens)
    y = randn(rows, cols).bfloat16()
    steps = {"index_select": 4.0 * n, "multiply": 4.0 * n, "sum": 2.0 * (n + tokens * cols)}
    if not fp8:
        return Fusion("permute", OPS.unpermute.default, (y, None, at, weights, BF16), steps)
    t = fastfp8.quantize(y)
    args = (t.data, t.scale, at, weights, BF16)
    return Fusion("permute", OPS.unpermute.default, args, {"dequantize": 3.0 * n, **steps})


def unpermute_backward(rows: int, cols: int) -> Fusion:
    tokens, n = rows // TOP_K, rows * cols
    at, weights = _routes(tokens)
    args = (randn(tokens, cols).bfloat16(), randn(rows, cols).bfloat16(), at, weights)
    steps = {"index_select": 4.0 * n, "multiply": 4.0 * n, "product with y": 6.0 * n, "sum": 2.0 * n}
    return Fusion("permute", OPS.unpermute_backward.default, args, steps)


def route(rows: int, cols: int) -> Fusion:
    """Of ``rows`` tokens; ``cols`` does not matter."""
    n, args = rows * EXPERTS, (randn(rows, EXPERTS), randn(EXPERTS))
    steps = {"sigmoid": 8.0 * n, "bias": 8.0 * n, "sums of groups": 4.0 * n, "mask": 8.0 * n, "topk": 4.0 * n}
    return Fusion("route", OPS.route.default, args, steps, kwargs=ROUTE)


def pack_e5m6(per_row: bool, rows: int, cols: int) -> Fusion:
    n, x = rows * cols, randn(rows, cols).bfloat16()
    steps = {"amax": 2.0 * n, "multiply": 4.0 * n, "pack": 3.5 * n}
    return Fusion("e5m6", OPS.pack_e5m6.default, (x, True, 0.0, per_row), steps)


def unpack_e5m6(requantize: bool, rows: int, cols: int) -> Fusion:
    n, t = rows * cols, fastfp8.pack_e5m6(randn(rows, cols))
    kept, steps = (t.words, t.scale, cols, False), {"unpack": 3.5 * n, "multiply": 4.0 * n}
    if requantize:
        return Fusion("e5m6", OPS.requantize_e5m6.default, (*kept, True), {**steps, "quantize": 3.0 * n})
    return Fusion("e5m6", OPS.unpack_e5m6.default, (*kept, BF16), steps)


def adamw(fp8: bool, rows: int, cols: int) -> Fusion:
    """A BF16 weight with its FP32 master and gradient, and BF16 moments."""
    n, master, grad = rows * cols, randn(rows, cols), randn(cols, rows).view(rows, cols)
    moments = (0.1 * grad).bfloat16(), (0.01 * grad * grad).bfloat16()
    copies: list[Tensor] = []
    for shape in ((rows, cols), (cols, rows)) if fp8 else ():
        copies += [torch.empty(shape, dtype=torch.float8_e4m3fn), torch.empty(scale_shape_of(shape, (BLOCK, BLOCK)))]
    lists = ([master.bfloat16()], [grad], [master], *([t] for t in moments), copies, [], [0])
    step, *numbers = ADAMW
    steps = {"update": 4.0 * n + 2 * (4 + 2 + 2) * n, "cast to BF16": 6.0 * n}
    return Fusion(
        "adamw",
        OPS.adamw.default,
        (*lists, step, *numbers),
        steps | ({"quantize": 3.0 * n, "transpose": 2.0 * n} if fp8 else {}),
        host_args=(*lists, step, factors(*ADAMW), False, 0),
        # The gradient is read, the weight in BF16 and in FP8 written, master and moments are both.
        in_place=4.0 * n + 2 * n + nbytes(copies) + 2 * (4 + 2 + 2) * n,
    )


def _name(block: Block) -> str:
    return f"{block[0]}x{block[1]}"


#: By the name of a row: makes the call for BF16 [rows, cols], rows a multiple of 8 and cols of 128.
FUSIONS: dict[str, Callable[[int, int], Fusion]] = {
    **{f"quantize {_name(block)}": functools.partial(quantize, block) for block in BLOCKS},
    **{f"dequantize {_name(block)}": functools.partial(dequantize, block) for block in BLOCKS},
    "dequantize, add": dequantize_add,
    "quantize_both": functools.partial(quantize_both, False),
    "quantize_grouped_both": functools.partial(quantize_both, True),
    "requantize_transpose": functools.partial(requantize_transpose, False),
    "requantize_transpose, grouped": functools.partial(requantize_transpose, True),
    "swiglu_quantize": functools.partial(swiglu_quantize, False),
    "swiglu_quantize, FP8": functools.partial(swiglu_quantize, True),
    "swiglu_backward_quantize": functools.partial(swiglu_backward_quantize, False, False),
    "swiglu_backward_quantize, FP8": functools.partial(swiglu_backward_quantize, True, False),
    "swiglu_backward_quantize, FP8, grouped": functools.partial(swiglu_backward_quantize, True, True),
    "rmsnorm_quantize": functools.partial(rmsnorm_quantize, False),
    "rmsnorm_quantize, residual": functools.partial(rmsnorm_quantize, True),
    "rmsnorm_quantize_transpose": rmsnorm_quantize_transpose,
    "rmsnorm_backward": functools.partial(rmsnorm_backward, False),
    "rmsnorm_backward, residual": functools.partial(rmsnorm_backward, True),
    "permute": functools.partial(permute, ""),
    "permute, FP8": functools.partial(permute, "FP8"),
    "permute_quantize": functools.partial(permute, "quantize"),
    "unpermute": functools.partial(unpermute, False),
    "unpermute, FP8": functools.partial(unpermute, True),
    "unpermute_backward": unpermute_backward,
    "route": route,
    "pack_e5m6": functools.partial(pack_e5m6, False),
    "pack_e5m6, per row": functools.partial(pack_e5m6, True),
    "unpack_e5m6": functools.partial(unpack_e5m6, False),
    "requantize_e5m6": functools.partial(unpack_e5m6, True),
    "adamw": functools.partial(adamw, False),
    "adamw, FP8 too": functools.partial(adamw, True),
}
#: As FUSIONS, but they read something twice, so their goal is no share of a copy's rate.
TWO_PASSES: dict[str, Callable[[int, int], Fusion]] = {
    "rmsnorm_quantize, both ways": functools.partial(rmsnorm_both_ways, False),
    "rmsnorm_quantize, residual, both ways": functools.partial(rmsnorm_both_ways, True),
}
