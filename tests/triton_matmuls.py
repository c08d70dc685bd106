"""Matrix products in Triton, in the forms that Hopper kernels come in: what the emulator's tests compile."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def matmul_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    M,
    N,
    K,
    stride_am,
    stride_bk,
    stride_bn,
    stride_cm,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ACC: tl.constexpr,
):
    """c = a @ b by pointers with masks; with SPLIT_K > 1 each of axis 1's programs adds its share of K atomically."""
    pid_m, pid_n = tl.program_id(0) // tl.cdiv(N, BLOCK_N), tl.program_id(0) % tl.cdiv(N, BLOCK_N)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + rows[:, None] * stride_am + depth[None, :]
    b_ptrs = b_ptr + depth[:, None] * stride_bk + cols[None, :] * stride_bn
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for k in range(0, tl.cdiv(K, BLOCK_K * SPLIT_K)):
        left = K - k * BLOCK_K * SPLIT_K
        a = tl.load(a_ptrs, (rows[:, None] < M) & (depth[None, :] < left), 0.0)
        b = tl.load(b_ptrs, (depth[:, None] < left) & (cols[None, :] < N), 0.0)
        acc = tl.dot(a, b, acc, out_dtype=ACC)
        a_ptrs += BLOCK_K * SPLIT_K
        b_ptrs += BLOCK_K * SPLIT_K * stride_bk
    c_ptrs = c_ptr + rows[:, None] * stride_cm + cols[None, :]
    inside = (rows[:, None] < M) & (cols[None, :] < N)
    if SPLIT_K == 1:
        tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), inside)
    else:
        tl.atomic_add(c_ptrs, acc, inside, sem="relaxed")


@triton.jit
def matmul_tma_kernel(
    a, b, c, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, B_ROWS: tl.constexpr
):
    """c = a @ b.T by descriptors from the host; B_ROWS: b has the rows of b.T, not those of b."""
    row, col = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        right = b.load([k, col]) if B_ROWS else tl.trans(b.load([col, k]))
        acc = tl.dot(a.load([row, k]), right, acc)
    c.store([row, col], acc.to(c.dtype))


@triton.jit
def matmul_device_tma_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """c = a @ b.T by descriptors that each program makes for itself."""
    a = tl.make_tensor_descriptor(a_ptr, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    b = tl.make_tensor_descriptor(b_ptr, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    c = tl.make_tensor_descriptor(c_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    row, col = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        acc = tl.dot(a.load([row, k]), tl.trans(b.load([col, k])), acc)
    c.store([row, col], acc.to(c_ptr.dtype.element_ty))


@triton.jit
def matmul_persistent_kernel(
    a,
    b,
    c,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FLATTEN: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
):
    """c = a @ b.T; each program walks tiles a grid apart."""
    columns = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(M, BLOCK_M) * columns
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN, warp_specialize=WARP_SPECIALIZE):
        row, col = tile // columns * BLOCK_M, tile % columns * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            acc = tl.dot(a.load([row, k]), tl.trans(b.load([col, k])), acc)
        c.store([row, col], acc.to(c.dtype))


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, scale, LENGTH, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD: tl.constexpr
):
    """Causal attention of one head a program on axis 1, by an online softmax in base 2. ``scale`` includes log2(e)."""
    start, head = tl.program_id(0) * BLOCK_M, tl.program_id(1) * LENGTH * HEAD
    rows, cols, dims = start + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, HEAD)
    q = tl.load(q_ptr + head + rows[:, None] * HEAD + dims[None, :])
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, HEAD), tl.float32)
    for first in range(0, start + BLOCK_M, BLOCK_N):
        k = tl.load(k_ptr + head + (first + cols[None, :]) * HEAD + dims[:, None])
        v = tl.load(v_ptr + head + (first + cols[:, None]) * HEAD + dims[None, :])
        scores = tl.dot(q, k) * scale
        scores = tl.where(rows[:, None] >= first + cols[None, :], scores, float("-inf"))
        new = tl.maximum(highest, tl.max(scores, 1))
        p = tl.exp2(scores - new[:, None])
        shrink = tl.exp2(highest - new)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        highest = new
    tl.store(out_ptr + head + rows[:, None] * HEAD + dims[None, :], (acc / total[:, None]).to(out_ptr.dtype.element_ty))
