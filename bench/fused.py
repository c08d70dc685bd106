"""The fused ops beside what torch.compile makes of plain torch, torchao and TransformerEngine, on the same tensors.

The bytes of a row are the least: each input read once, each result written once. So its share of the measured copy
bandwidth says how close an op is to what memory allows, whatever it really moved (``traffic.py`` counts that).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfp8.layout import BLOCK, Block

from . import device
from .case import Case, Contestant, Subject, Work
from .device import require
from .fusions import FUSIONS, ROUTE, TOP_K, Fusion, tensors_in
from .peers import contestants_of
from .quantize import FP8_MAX, plain

# Tokens by DeepSeek-V3's hidden size.
SHAPE, TINY = (8192, 7168), (128, 256)
OURS = "fastfp8 Triton"
ROW: Block = (1, BLOCK)
#: Of another's codes, and of its values by a step of BF16.
LEAST_SAME, TOLERANCE = 0.99, 2.0**-6


# Plain torch, for torch.compile: the arguments are those of the op.


def widened(data: Tensor, scale: Tensor, block: Block) -> Tensor:
    rows, cols = data.shape
    tiles = data.float().view(rows // block[0], block[0], cols // block[1], block[1])
    return (tiles * scale[:, None, :, None]).view(rows, cols)


def both(x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return *plain(x, ROW), *plain(x.t(), ROW)


def turned(data: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    tiles = widened(data, scale, ROW).t().reshape(data.shape[1], -1, BLOCK)
    amax = tiles.abs().amax(2).clamp(min=2.0**-110)
    of_blocks = torch.exp2(torch.ceil(torch.log2(amax / FP8_MAX)))
    codes = (tiles / of_blocks[:, :, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return codes.view(data.shape[1], -1), of_blocks


def gates(gate_up: Tensor, scale: Tensor | None) -> tuple[Tensor, ...]:
    return (gate_up.float() if scale is None else widened(gate_up, scale, ROW)).chunk(2, 1)


def activated(gate_up: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    gate, up = gates(gate_up, rest[-1])
    return plain(F.silu(gate) * up, ROW)


def derived(grad: Tensor, gate_up: Tensor, scale: Tensor | None, weight: Tensor, *_: Any) -> tuple[Tensor, ...]:
    """The activation, then the gradient of gate and up, then that of weight, in the op's order."""
    gate, up = gates(gate_up, scale)
    sigmoid, given = gate.sigmoid(), grad.float() * weight[:, None]
    silu = gate * sigmoid
    gradient = torch.cat([given * up * (sigmoid * (1 + gate * (1 - sigmoid))), given * silu], 1)
    turned_value = plain((silu * up * weight[:, None]).t(), ROW)
    return *turned_value, *plain(gradient, ROW), *plain(gradient.t(), ROW), (grad.float() * silu * up).sum(1)


def added(data: Tensor, scale: Tensor, block: Block, dtype: torch.dtype, residual: Tensor) -> Tensor:
    return (widened(data, scale, block) + residual.float()).to(dtype)


def normed(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    given = x if residual is None else (x.float() + residual.float()).to(residual.dtype)
    values = given.float()
    rstd = torch.rsqrt(values.square().mean(1) + eps)
    found = *plain(values * rstd[:, None] * weight.float(), ROW), rstd
    return found if residual is None else (*found, given)


def normed_again(x: Tensor, weight: Tensor, rstd: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return plain((x.float() * rstd[:, None] * weight.float()).t(), ROW)


def norm_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual_grad: Tensor | None
) -> tuple[Tensor, Tensor]:
    g, of_rows = grad.float(), rstd[:, None]
    values, weighted = x.float() * of_rows, g * weight.float()
    dx = (weighted - values * (weighted * values).mean(1, keepdim=True)) * of_rows
    if residual_grad is not None:
        dx = dx + residual_grad.float()
    return dx.to(x.dtype), (g * values).sum(0)


def gathered(y: Tensor, _: None, rows: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    return (y[rows].float() * weights[:, :, None]).sum(1).to(dtype)


def gathered_fp8(data: Tensor, scale: Tensor, rows: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    tokens, cols = rows.shape[0], data.shape[1]
    tiles = data[rows].float().view(tokens, TOP_K, cols // BLOCK, BLOCK) * scale[rows][:, :, :, None]
    return (tiles.view(tokens, TOP_K, cols) * weights[:, :, None]).sum(1).to(dtype)


def scattered(x: Tensor, rows: Tensor) -> Tensor:
    """Each row of the result is in ``rows`` once."""
    return x[rows.flatten().argsort() // TOP_K]


def scattered_fp8(data: Tensor, scale: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    return scattered(data.view(torch.uint8), rows).view(torch.float8_e4m3fn), scattered(scale, rows)


def gradients(grad: Tensor, y: Tensor, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    order = rows.flatten().argsort()
    given = (grad.float()[order // TOP_K] * weights.flatten()[order][:, None]).to(y.dtype)
    return given, (grad.float()[:, None] * y[rows].float()).sum(2)


def routed(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Without the counts of experts."""
    groups, top_groups, scale = ROUTE["groups"], ROUTE["top_groups"], ROUTE["scale"]
    scores = logits.sigmoid()
    biased = (scores + bias).view(len(logits), groups, -1)
    of_groups = biased.topk(TOP_K // top_groups, 2).values.sum(2)
    kept = torch.zeros_like(of_groups).scatter(1, of_groups.topk(top_groups, 1).indices, 1.0)
    idx = torch.where(kept[:, :, None] > 0, biased, -torch.inf).flatten(1).topk(TOP_K, 1).indices
    chosen = scores.gather(1, idx)
    return idx, chosen / chosen.sum(1, keepdim=True) * scale


PLAIN: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("quantize 1x128", "quantize 128x1", "quantize 128x128"), lambda x, block, *_: plain(x, block)),
    **dict.fromkeys(
        ("dequantize 1x128", "dequantize 128x1", "dequantize 128x128"),
        lambda data, scale, block, dtype: widened(data, scale, block).to(dtype),
    ),
    "dequantize, add": added,
    "quantize_both": both,
    **dict.fromkeys(("rmsnorm_quantize", "rmsnorm_quantize, residual"), normed),
    "rmsnorm_quantize_transpose": normed_again,
    **dict.fromkeys(("rmsnorm_backward", "rmsnorm_backward, residual"), norm_gradients),
    "requantize_transpose": turned,
    **dict.fromkeys(("swiglu_quantize", "swiglu_quantize, FP8"), activated),
    **dict.fromkeys(("swiglu_backward_quantize", "swiglu_backward_quantize, FP8"), derived),
    "permute": scattered,
    "permute, FP8": scattered_fp8,
    "permute_quantize": lambda x, rows, *_: plain(scattered(x, rows), ROW),
    "unpermute": gathered,
    "unpermute, FP8": gathered_fp8,
    "unpermute_backward": gradients,
    "route": routed,
}


# Other libraries: each gets the op's arguments and returns the call that is timed, its output as the op's results.


def transformer_engine(columns: bool, x: Tensor, *_: Any) -> Callable[[], object]:
    """TransformerEngine's 1x128 blocks, FP32 scales, with or without the transposed copy from the same read."""
    require(importlib.util.find_spec("transformer_engine"), "transformer_engine is not installed")
    tensors = importlib.import_module("transformer_engine.pytorch.tensor.float8_blockwise_tensor")
    types = importlib.import_module("transformer_engine_torch").DType
    quantizer = tensors.Float8BlockQuantizer(
        fp8_dtype=types.kFloat8E4M3,
        rowwise=True,
        columnwise=columns,
        amax_epsilon=0.0,
        force_pow_2_scales=False,
        block_scaling_dim=1,
    )
    return lambda: quantizer(x)


def torchao(names: tuple[str, ...], x: Tensor, *_: Any) -> Callable[[], object]:
    """Its kernels of blockwise FP8 training, one after the other."""
    require(importlib.util.find_spec("torchao"), "torchao is not installed")
    kernels = importlib.import_module("torchao.prototype.blockwise_fp8_training.kernels")
    found = [getattr(kernels, f"triton_fp8_blockwise_{name}") for name in names]
    return lambda: [kernel(x) for kernel in found]


def two_quantize(x: Tensor, pow2: bool, eps: float) -> Callable[[], object]:
    """Of ours: what the fused op replaces."""
    op = torch.ops.fastfp8.quantize.default
    return lambda: (op(x, ROW, pow2, eps), op(x.t(), ROW, pow2, eps))


ROWS, TURNED, SQUARES = "act_quant_lhs", "act_quant_transposed_lhs", "weight_quant_rhs"
PEERS: dict[str, dict[str, Callable[..., Callable[[], object]]]] = {
    "quantize 1x128": {
        "TransformerEngine": functools.partial(transformer_engine, False),
        "torchao": functools.partial(torchao, (ROWS,)),
    },
    "quantize 128x128": {"torchao": functools.partial(torchao, (SQUARES,))},
    "quantize_both": {
        "TransformerEngine": functools.partial(transformer_engine, True),
        "torchao": functools.partial(torchao, (ROWS, TURNED)),
        "quantize twice": two_quantize,
    },
}


def check_exact(fusion: Fusion, rows: int, expected: list[Tensor], got: Any) -> None:
    """Ours, bit for bit where the op writes: of a grouped transpose the columns of groups."""
    for mine, right in zip(tensors_in(got), expected, strict=True):
        if fusion.unwritten and right.dim() == 2:
            written = rows if right.dtype == torch.float8_e4m3fn else rows // BLOCK
            mine, right = mine[:, :written], right[:, :written]
        same = torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (mine, right)))
        assert same, "other bits than the CPU's"


def check_near(expected: list[Tensor], got: Any) -> None:
    """Of plain torch: nearly all codes, and values to a few steps of BF16."""
    for other, right in zip(tensors_in(got), expected, strict=False):
        if right.dtype == torch.float8_e4m3fn:
            codes = (t[:, : other.shape[1]].contiguous().view(torch.uint8) for t in (other, right))
            same = torch.eq(*codes).float().mean().item()
            assert same >= LEAST_SAME, f"only {same:.2%} of the codes are ours, {LEAST_SAME:.0%} expected"
        elif right.dtype == torch.bfloat16:
            apart = ((other.float() - right.float()).norm() / right.float().norm()).item()
            assert apart <= TOLERANCE, f"differs from ours by {apart:.2g}, more than {TOLERANCE:g}"


def subject(name: str, rows: int, cols: int) -> Subject:
    fusion = FUSIONS[name](rows, cols)
    in_place = fusion.in_place is not None
    exact = None if in_place else fusion.op(*fusion.args, **fusion.kwargs)
    moved = fusion.least(exact)
    copies = [device.elsewhere(fusion.args) for _ in range(device.copies_for(int(moved)))]
    expected = [] if in_place else tensors_in(device.elsewhere(exact))
    # A step of an optimizer has no result that stays the same from call to call.
    check = None if in_place else functools.partial(check_exact, fusion, rows, expected)
    ours = Contestant(OURS, lambda i: fusion.op(*copies[i], **fusion.kwargs), check)
    makers: dict[str, Sequence[Callable[[], Callable[[], Any]]]]
    makers = {peer: [functools.partial(make, *copy) for copy in copies] for peer, make in PEERS.get(name, {}).items()}
    peers, missing = contestants_of(makers)
    found = [ours, *peers]
    if name in PLAIN:
        compiled = torch.compile(PLAIN[name], dynamic=False)
        near = functools.partial(check_near, expected)
        found.insert(1, Contestant("torch.compile", lambda i: compiled(*copies[i]), near))
    else:
        missing["torch.compile"] = "no few lines of torch do the same"
    return Subject(found, len(copies), moved, missing=missing)


def works(tiny: bool) -> list[Work]:
    """The ops that have no family of their own come first."""
    rows, cols = TINY if tiny else SHAPE
    return [
        Case("fused", name, f"{rows}x{cols}", "gpu", functools.partial(subject, name, rows, cols), priority, "us")
        for name in FUSIONS
        for priority in (1 if "quantize " in name else 0,)
    ]
