"""AdamW in Triton: one launch for many tensors, each with its FP8 copies if wanted.

The kernel finds its tensors in a table of addresses and extents, a row of int64 each, and a program finds its row in a
list with an entry for each tile. Both are built on the host and copied from pinned memory at each step: gradients may
lie elsewhere from step to step.

A tile is one block of 128 x 128 where FP8 is written, so that its amax is at hand, and a stretch of the flat tensor
elsewhere. Numerics and random bits depend on the element alone, see ``fastfp8/reference/adamw.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import BLOCK, ceil_div
from ..reference.adamw import Factors
from ..reference.quantize import AMAX_FLOOR
from . import require_fp8
from .counters import count
from .quantize import FP16_CAPABILITY, finite_magnitude, scale_and_multiplier, to_e4m3

# What a row of the table holds: ten addresses (0 where there is none), then rows, columns, first tile and index.
FIELDS = 14
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}
# Of a tile without FP8: 16 values a thread. Untuned.
FLAT_TILE, FLAT_WARPS = 2048, 4
# A block is updated in strips of 32 rows, for all its values of four tensors are more than registers hold. The new
# weights stay there until its amax is known: 64 a thread. Untuned.
BLOCK_STRIPS, BLOCK_WARPS = 4, 8
# An alignment, in bytes and in elements, with which all loads and stores take the widest form.
WIDE = 16
# Below as many rows and columns 32 bits count the elements within a block; with 64 a thread would spill registers.
NARROW = 1 << 24


@triton.jit
def address(tensors, FIELD: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The tensor at ``FIELD`` of a row of the table."""
    pointer = tl.load(tensors + FIELD).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def philox(c0, c1, c2, c3, key0, key1):
    """Four random words for each counter: Philox-4x32-10. All are uint32."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high2, low2 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high2 ^ c1 ^ key0, low2, high0 ^ c3 ^ key1, low0
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def random_words(start, step, index, key0, key1, QUADS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The word of each element of a tile [ROWS, COLS] whose rows start at elements ``start`` [ROWS, 1].

    Four elements share a counter. Where tiles cut no such four (``QUADS``) each counter is computed once.
    """
    GROUP: tl.constexpr = 4 if QUADS else 1
    element = start + GROUP * tl.arange(0, COLS // GROUP)[None, :]
    zero = tl.zeros([ROWS, COLS // GROUP], tl.uint32)
    low, high = (element >> 2).to(tl.uint32) + zero, (element >> 34).to(tl.uint32) + zero
    w0, w1, w2, w3 = philox(low, high, zero + step, zero + index, key0, key1)
    if QUADS:
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [ROWS, COLS])
    else:
        which = element & 3
        words = tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
    return words


@triton.jit
def round_stochastically(values, random):
    """FP32 to BF16: upwards in magnitude if the 16 bits that go and 16 ``random`` ones carry. A NaN stays one."""
    rounded = (values.to(tl.uint32, bitcast=True) + random) >> 16
    rounded = tl.where(values != values, 0x7FC0, rounded)
    return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit(do_not_specialize=["step", "key0", "key1"])
def adamw_kernel(
    tensors,
    tiles,
    decay,
    beta1,
    rest1,
    beta2,
    rest2,
    root,
    eps,
    rate,
    step,
    key0,
    key1,
    floor,
    FIELDS: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    FP8: tl.constexpr,
    COUNTED: tl.constexpr,
    ALIGNED: tl.constexpr,
    STICKY: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    STRIPS: tl.constexpr,
):
    tensors += tl.load(tiles + tl.program_id(0)) * FIELDS
    rows, cols = tl.load(tensors + 10), tl.load(tensors + 11)
    tile = tl.program_id(0) - tl.load(tensors + 12)
    if ALIGNED:
        rows, cols = tl.multiple_of(rows, 16) if FP8 else rows, tl.multiple_of(cols, 16)
    down, across = tl.cdiv(rows, TILE_ROWS), tl.cdiv(cols, TILE_COLS)
    matrix, within = tile // (down * across), tile % (down * across)
    i, j = within // across, within % across
    first = matrix * rows * cols  # element of this matrix
    col_start = j * TILE_COLS
    # 16 bytes of FP32 a thread, and 8 of BF16, in all loads and stores: see tile_indices.
    lane = tl.max_contiguous(tl.arange(0, TILE_COLS), 4)[None, :]
    col = col_start + lane
    ROWS: tl.constexpr = TILE_ROWS // STRIPS

    param = address(tensors, 0, PARAM, ALIGNED)
    grad = address(tensors, 1, GRAD, ALIGNED)
    master = address(tensors, 2, tl.float32, ALIGNED)
    exp_avg = address(tensors, 3, MOMENT, ALIGNED)
    exp_avg_sq = address(tensors, 4, MOMENT, ALIGNED)
    index = tl.load(tensors + 13).to(tl.uint32)
    origin = first + i * TILE_ROWS * cols + col_start
    pitch = cols.to(tl.int32) if ALIGNED else cols
    pitch_t = rows.to(tl.int32) if ALIGNED else rows
    values = ()  # of each strip
    amax = tl.zeros([ROWS, TILE_COLS], tl.float32)
    for strip in tl.static_range(STRIPS):
        row = i * TILE_ROWS + strip * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (col < cols)
        at = (strip * ROWS + tl.arange(0, ROWS)[:, None]) * pitch + lane
        g = tl.load(grad + origin + at, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(exp_avg + origin + at, mask=inside, other=0.0).to(tl.float32) * beta1 + g * rest1
        v = tl.load(exp_avg_sq + origin + at, mask=inside, other=0.0).to(tl.float32) * beta2 + (g * g) * rest2
        p = tl.load(master + origin + at, mask=inside, other=0.0) * decay
        p -= tl.div_rn(m, tl.sqrt_rn(v) * root + eps) * rate
        if STOCHASTIC:
            start, key = first + row * cols + col_start, (key0.to(tl.uint32), key1.to(tl.uint32))
            words = random_words(start, step.to(tl.uint32), index, *key, ALIGNED or not FP8, ROWS, TILE_COLS)
            m = round_stochastically(m, words & 0xFFFF)
            v = round_stochastically(v, words >> 16)
        tl.store(exp_avg + origin + at, m.to(MOMENT), mask=inside)
        tl.store(exp_avg_sq + origin + at, v.to(MOMENT), mask=inside)
        tl.store(master + origin + at, p, mask=inside)
        if tl.float32 != PARAM:
            tl.store(param + origin + at, p.to(PARAM), mask=inside)
        if FP8:
            # Outside p is 0 / eps, a NaN where eps is 0: that is none of an amax either.
            amax = tl.maximum(amax, finite_magnitude(p))
            values = values + (p,)  # type: ignore[assignment]

    if FP8:
        block_scale, multiplier = scale_and_multiplier(tl.max(tl.max(amax, 1), 0), floor, False)
        tl.store(address(tensors, 6, tl.float32, False) + (matrix * down + i) * across + j, block_scale)
        tl.store(address(tensors, 8, tl.float32, False) + (matrix * across + j) * down + i, block_scale)
        data = address(tensors, 5, tl.float8e4nv, ALIGNED) + first
        data_t = address(tensors, 7, tl.float8e4nv, ALIGNED) + first
        counters = address(tensors, 9, tl.int64, False) if COUNTED else None
        for strip in tl.static_range(STRIPS):
            row = i * TILE_ROWS + strip * ROWS + tl.arange(0, ROWS)[:, None]
            inside = (row < rows) & (col < cols)
            codes = to_e4m3(values[strip] * multiplier, STICKY)
            count(counters, values[strip], multiplier, inside)
            down_tile = strip * ROWS + tl.arange(0, ROWS)[:, None]
            tl.store(data + (i * TILE_ROWS * cols + col_start) + (down_tile * pitch + lane), codes, mask=inside)
            at_t = tl.trans(lane) * pitch_t + tl.trans(down_tile)
            tl.store(data_t + (col_start * rows + i * TILE_ROWS) + at_t, tl.trans(codes), mask=tl.trans(inside))


def _rows(
    params: list[Tensor],
    grads: list[Tensor],
    masters: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    fp8: list[Tensor],
    counters: list[Tensor],
    indices: list[int],
) -> Iterator[tuple[tuple[Any, ...], list[int], int]]:
    """For each tensor that is not empty: what decides its kernel, its row of the table and how many tiles it has."""
    for i, param in enumerate(params):
        if param.numel() == 0:
            continue
        held = [param, grads[i], (masters or params)[i], exp_avgs[i], exp_avg_sqs[i], *fp8[4 * i : 4 * i + 4]]
        addresses = [t.data_ptr() for t in (*held, *counters[i : i + 1])]
        addresses += [0] * (10 - len(addresses))
        matrices, rows, cols = 1, 1, param.numel()
        if fp8:
            rows, cols = param.shape[-2:]
            matrices = param.numel() // (rows * cols)
            tiles = matrices * ceil_div(rows, BLOCK) * ceil_div(cols, BLOCK)
        else:
            tiles = ceil_div(cols, FLAT_TILE)
        # Scales and counters are written one by one, wherever they are.
        wide = [*addresses[:6], addresses[7], cols, rows if fp8 else 0]
        aligned = all(value % WIDE == 0 for value in wide) and (not fp8 or max(rows, cols) < NARROW)
        key = (_DTYPES[grads[i].dtype], _DTYPES[exp_avgs[i].dtype], aligned)
        yield key, [*addresses, rows, cols, 0, indices[i]], tiles


def _to_device(table: Tensor, device: torch.device) -> Tensor:
    """Without waiting for the copy: torch keeps pinned memory until the stream has read it."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


def _signed(word: int) -> int:
    """The low 32 bits of ``word`` as Triton's int32, whatever they are."""
    return (word + 0x80000000 & 0xFFFFFFFF) - 0x80000000


def adamw(
    params: list[Tensor],
    grads: list[Tensor],
    masters: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    fp8: list[Tensor],
    counters: list[Tensor],
    indices: list[int],
    step: int,
    f: Factors,
    stochastic_rounding: bool,
    seed: int,
) -> None:
    """See :func:`fastfp8.ops.adamw.adamw`; arguments are checked already.

    A launch for each combination of the dtypes and of whether all is aligned, most often one.
    """
    if not params:
        return
    device = params[0].device
    capability = require_fp8("adamw", device) if fp8 else None
    launches: dict[tuple[Any, ...], tuple[list[list[int]], list[int]]] = {}
    for key, fields, tiles in _rows(params, grads, masters, exp_avgs, exp_avg_sqs, fp8, counters, indices):
        table, counts = launches.setdefault(key, ([], []))
        if table:
            fields[12] = table[-1][12] + counts[-1]  # its first tile
        table.append(fields)
        counts.append(tiles)
    with torch.cuda.device_of(params[0]):
        for (grad, moment, aligned), (table, counts) in launches.items():
            tiles_of = torch.repeat_interleave(torch.tensor(counts))
            adamw_kernel[(len(tiles_of),)](
                _to_device(torch.tensor(table), device),
                _to_device(tiles_of, device),
                *f,
                _signed(step),
                _signed(seed),
                _signed(seed >> 32),
                AMAX_FLOOR,
                FIELDS=FIELDS,
                PARAM=_DTYPES[params[0].dtype],
                GRAD=grad,
                MOMENT=moment,
                STOCHASTIC=stochastic_rounding and moment == tl.bfloat16,
                FP8=bool(fp8),
                COUNTED=bool(counters),
                ALIGNED=aligned,
                STICKY=capability == FP16_CAPABILITY,
                TILE_ROWS=BLOCK if fp8 else 1,
                TILE_COLS=BLOCK if fp8 else FLAT_TILE,
                STRIPS=BLOCK_STRIPS if fp8 else 1,
                num_warps=BLOCK_WARPS if fp8 else FLAT_WARPS,
                enable_fp_fusion=False,
            )
