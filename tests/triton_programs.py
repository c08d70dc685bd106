"""Everyday Triton kernels that are no matrix products: what the emulator's tests compile."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def softmax_kernel(x_ptr, y_ptr, cols, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * cols + at, at < cols, float("-inf"))
    e = tl.exp(x - tl.max(x, 0))
    tl.store(y_ptr + tl.program_id(0) * cols + at, e / tl.sum(e, 0), at < cols)


@triton.jit
def layer_norm_kernel(x_ptr, w_ptr, b_ptr, y_ptr, mean_ptr, rstd_ptr, cols, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * cols + at, at < cols, 0.0).to(tl.float32)
    mean = tl.sum(x, 0) / cols
    centred = tl.where(at < cols, x - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 0) / cols + eps)
    w, b = tl.load(w_ptr + at, at < cols, 0.0), tl.load(b_ptr + at, at < cols, 0.0)
    tl.store(y_ptr + row * cols + at, (centred * rstd * w + b).to(y_ptr.dtype.element_ty), at < cols)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def layer_norm_backward_kernel(
    x_ptr, w_ptr, dy_ptr, mean_ptr, rstd_ptr, dx_ptr, dw_ptr, db_ptr, lock_ptr, cols, BLOCK: tl.constexpr
):
    """The gradients of weight and bias are summed over rows under a lock, as in Triton's tutorial."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * cols + at, at < cols, 0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * cols + at, at < cols, 0.0).to(tl.float32)
    w = tl.load(w_ptr + at, at < cols, 0.0)
    rstd = tl.load(rstd_ptr + row)
    normal = tl.where(at < cols, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
    wdy = w * dy
    along, mean = tl.sum(normal * wdy, 0) / cols, tl.sum(wdy, 0) / cols
    tl.store(dx_ptr + row * cols + at, ((wdy - normal * along - mean) * rstd).to(dx_ptr.dtype.element_ty), at < cols)
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    dw = tl.load(dw_ptr + at, at < cols, 0.0) + dy * normal
    db = tl.load(db_ptr + at, at < cols, 0.0) + dy
    tl.store(dw_ptr + at, dw, at < cols)
    tl.store(db_ptr + at, db, at < cols)
    tl.debug_barrier()
    tl.atomic_xchg(lock_ptr, 0)


@triton.jit
def group_quantize_kernel(x_ptr, q_ptr, scale_ptr, cols, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Each 1 x GROUP of x to e4m3 codes and a scale that multiplies them."""
    row, group = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    at = row[:, None] * cols + group * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(x_ptr + at).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), 1), 1e-4) / 448.0
    tl.store(q_ptr + at, (x / scale[:, None]).to(tl.float8e4nv))
    tl.store(scale_ptr + row * (cols // GROUP) + group, scale)


@triton.jit
def histogram_kernel(x_ptr, count_ptr, n, BINS: tl.constexpr, BLOCK: tl.constexpr, BY_ELEMENT: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, at < n, 0)
    if BY_ELEMENT:
        tl.atomic_add(count_ptr + x, 1, at < n, sem="relaxed")
    else:
        tl.atomic_add(count_ptr + tl.arange(0, BINS), tl.histogram(x, BINS, at < n))


@triton.jit
def reduce_kernel(x_ptr, sum_ptr, max_ptr, argmax_ptr, argmin_ptr, xor_ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Along rows and columns of one tile, over lanes and warps."""
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    x = tl.load(x_ptr + rows[:, None] * COLS + cols[None, :])
    tl.store(sum_ptr + rows, tl.sum(x, 1))
    tl.store(max_ptr + cols, tl.max(x, 0))
    tl.store(argmax_ptr + rows, tl.argmax(x, 1))
    tl.store(argmin_ptr + cols, tl.argmin(x, 0))
    tl.store(xor_ptr, tl.xor_sum(tl.xor_sum(x.to(tl.int32), 0), 0))


@triton.jit
def linear_step(decay, value, next_decay, next_value):
    return decay * next_decay, value * next_decay + next_value


@triton.jit
def scan_kernel(x_ptr, decay_ptr, sum_ptr, back_ptr, state_ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Running sums from both ends, and the linear recurrence s = decay * s + x."""
    at = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    x, decay = tl.load(x_ptr + at), tl.load(decay_ptr + at)
    tl.store(sum_ptr + at, tl.cumsum(x, 1))
    tl.store(back_ptr + at, tl.cumsum(x, 1, reverse=True))
    _, state = tl.associative_scan((decay, x), 1, linear_step)
    tl.store(state_ptr + at, state)


@triton.jit
def sort_kernel(x_ptr, up_ptr, down_ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(up_ptr + at, tl.sort(x))
    tl.store(down_ptr + at, tl.sort(x, descending=True))


@triton.jit
def dropout_kernel(x_ptr, y_ptr, bits_ptr, seed, p, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, at < n, 0.0)
    keep = tl.rand(seed, at) > p
    tl.store(y_ptr + at, tl.where(keep, x / (1 - p), 0.0), at < n)
    tl.store(bits_ptr + at, tl.randint(seed, at), at < n)


@triton.jit
def gather_kernel(x_ptr, index_ptr, out_ptr, scattered_ptr, cols, BLOCK: tl.constexpr):
    """Rows by index, both ways, and elements within the row by tl.gather."""
    row = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    source = tl.load(index_ptr + row)
    x = tl.load(x_ptr + source * cols + at, at < cols, 0.0)
    tl.store(scattered_ptr + source * cols + at, x, at < cols)
    tl.store(out_ptr + row * cols + at, tl.gather(x, cols - 1 - at & BLOCK - 1, 0), at < cols)


@triton.jit
def maths_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """One row of the output a function."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    out = out_ptr + at
    tl.store(out, tl.exp(x))
    tl.store(out + n, tl.exp2(x))
    tl.store(out + 2 * n, tl.log(tl.abs(x)))
    tl.store(out + 3 * n, tl.log2(tl.abs(x)))
    tl.store(out + 4 * n, tl.sin(x))
    tl.store(out + 5 * n, tl.cos(x))
    tl.store(out + 6 * n, tl.sqrt(tl.abs(x)))
    tl.store(out + 7 * n, tl.sqrt_rn(tl.abs(x)))
    tl.store(out + 8 * n, tl.rsqrt(tl.abs(x)))
    tl.store(out + 9 * n, tl.erf(x))
    tl.store(out + 10 * n, tl.sigmoid(x))
    tl.store(out + 11 * n, x / y)
    tl.store(out + 12 * n, tl.div_rn(x, y))
    tl.store(out + 13 * n, tl.fma(x, y, x))
    tl.store(out + 14 * n, tl.floor(x))
    tl.store(out + 15 * n, tl.ceil(x))
