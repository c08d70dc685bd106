"""row_map, permute, permute_quantize and unpermute on every backend, against oracles in plain Python and NumPy."""

from __future__ import annotations

import groups
import numpy as np
import pytest
import torch
from backends import assert_same_bits, backend_params
from groups import scaled, untouched
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_backends import NAMES, emulated, interpreted, routing
from torch import Tensor

import fastfp8
from fastfp8 import RowMap, ScaledTensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Tokens, top_k, experts. The sixth and seventh need several programs, and 2 and 3 of a scan's steps.
SIZES = [(1, 1, 1), (5, 2, 3), (0, 4, 7), (20, 8, 256), (37, 3, 1), (300, 4, 9), (130, 8, 1024), (3, 2, 1024)]


def indices(tokens: int, top_k: int, experts: int, kind: str = "some", seed: int = 0) -> Tensor:
    """``kind`` says how many (token, k) have an expert: some, all, one (all to a single one) or none."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-1 if kind == "some" else 0, experts, (tokens, top_k))
    if kind == "one":
        values[:] = experts - 1
    elif kind == "none":
        values[:] = -1
    return torch.from_numpy(values)


def oracle(topk_idx: Tensor, experts: int) -> RowMap:
    """A list for each expert, filled token by token."""
    lists: list[list[int]] = [[] for _ in range(experts)]
    for slot, expert in enumerate(topk_idx.flatten().tolist()):
        if expert >= 0:
            lists[expert].append(slot)
    order = [slot for of_expert in lists for slot in of_expert]
    rows = torch.full(topk_idx.shape, -1, dtype=torch.int32)
    for row, slot in enumerate(order):
        rows.view(-1)[slot] = row
    slots = torch.tensor(order + [-1] * (topk_idx.numel() - len(order)), dtype=torch.int32)
    return RowMap(torch.tensor(np.cumsum([len(of) for of in lists]), dtype=torch.int32), rows, slots)


def check_map(got: RowMap, topk_idx: Tensor, experts: int) -> None:
    for name, part, expected in zip(RowMap._fields, got, oracle(topk_idx, experts), strict=True):
        assert_same_bits(part, expected, name)


@pytest.mark.parametrize("kind", ["some", "all", "one", "none"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", backend_params(NAMES))
def test_row_map(monkeypatch: pytest.MonkeyPatch, name: str, sizes: tuple[int, int, int], kind: str) -> None:
    monkeypatch.setattr(groups, "POISON", 0x5A)  # not that of -1
    for dtype in (torch.int64, torch.int32) if name != "emulator" or kind == "some" else (torch.int64,):
        topk_idx = indices(*sizes, kind).to(dtype)
        check_map(routing(name).row_map(topk_idx, sizes[2]), topk_idx, sizes[2])


@pytest.mark.parametrize("name", backend_params(NAMES[1:3]))
def test_indices_out_of_range_have_no_row_and_are_reported(name: str) -> None:
    for dtype, bad in ((torch.int64, [1 << 32, -(1 << 32), 5, -2]), (torch.int32, [1 << 30, -(1 << 31), 5, -2])):
        topk_idx = indices(130, 4, 5)
        b = routing(name)
        b.error.zero_()
        b.row_map(topk_idx.to(dtype), 5)
        assert b.error.item() == 0
        # In both programs, and in the second alone.
        for places in ([0, 3, 511, 519], [519]):
            given, cleaned = topk_idx.clone(), topk_idx.clone()
            given.view(-1)[places], cleaned.view(-1)[places] = torch.tensor(bad[-len(places) :]), -1
            check_map(b.row_map(given.to(dtype), 5), cleaned, 5)
            assert b.error.item() == fastfp8.error_word.TOPK_IDX
            b.error.zero_()


def test_the_cpu_refuses_indices_out_of_range() -> None:
    topk_idx = indices(5, 2, 3)
    topk_idx[3, 1] = 3
    with pytest.raises(
        ValueError,
        match=r"row_map: argument 'topk_idx': expected experts from 0 to below num_experts = "
        r"3, or -1, got 3 for token 3",
    ):
        fastfp8.row_map(topk_idx, 3)


def rows_used(where: RowMap) -> Tensor:
    """bool [T * top_k]."""
    return where.slots >= 0


def source(where: RowMap) -> Tensor:
    """The token of each row that is used."""
    return where.slots[rows_used(where)].long() // where.rows.shape[1]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def is_poisoned(name: str) -> bool:
    return name in ("triton_interpreter", "emulator")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", backend_params(NAMES))
def test_permute(name: str, dtype: torch.dtype) -> None:
    for tokens, top_k, experts, cols in ((5, 2, 3, 264), (37, 3, 4, 1), (18, 8, 9, 128), (0, 2, 3, 8), (3, 2, 3, 0)):
        where = oracle(indices(tokens, top_k, experts), experts)
        big = randn(tokens, 2 * cols + 4).to(dtype)
        for x in (big[:, :cols], big[:, 3 : 2 * cols + 3 : 2], big[:, :cols].t().contiguous().t()):
            got = routing(name).permute(x, where)
            used = rows_used(where)
            assert got.shape == (tokens * top_k, cols)
            assert got.is_contiguous()
            assert_same_bits(got[used], x[source(where)], f"{tokens} tokens")
            if is_poisoned(name) and len(used):
                assert untouched(got, used)


@pytest.mark.parametrize("name", backend_params(NAMES))
def test_permute_moves_codes_and_scales_as_they_are(name: str) -> None:
    """NaN codes and any scales too."""
    for tokens, top_k, cols in ((5, 2, 264), (18, 8, 128), (0, 2, 8), (3, 2, 0)):
        where = oracle(indices(tokens, top_k, 4), 4)
        x = scaled((tokens, cols), (1, 128), 0, pitch=cols + 16)
        x.data.view(torch.uint8)[::3] = 0xFF
        x.scale[1::2] = float("nan")
        got = routing(name).permute(x, where)
        used = rows_used(where)
        assert_same_bits(got.data[used], x.data[source(where)], "codes")
        assert_same_bits(got.scale[used], x.scale[source(where)], "scales")
        assert got.data.is_contiguous()
        if is_poisoned(name) and len(used):
            assert untouched(got.data, used)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("name", backend_params(NAMES))
def test_permute_quantize_is_both_in_turn(name: str, pow2: bool, dtype: torch.dtype) -> None:
    for tokens, top_k, cols, eps in ((5, 2, 264, 0.0), (37, 3, 130, 1e-4), (0, 2, 8, 0.0), (3, 2, 0, 0.0)):
        where = oracle(indices(tokens, top_k, 4), 4)
        x = (randn(tokens, cols) * 2.0 ** torch.randint(-140, 100, (tokens, 1))).to(dtype)
        x[::4, ::7] = float("nan")
        x[1::4, ::5] = float("inf")
        got = routing(name).permute_quantize(x, where, pow2=pow2, eps=eps)
        rows, used = x[source(where)], rows_used(where)
        expected = fastfp8.quantize(rows, pow2=pow2, eps=eps)
        assert got.block == (1, 128)
        assert_same_bits(got.data[used], expected.data, "codes")
        assert_same_bits(got.scale[used], expected.scale, "scales")
        if is_poisoned(name) and len(used):
            assert untouched(got.data, used)


def test_permute_leaves_other_scales_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of rows of no expert, and the padding."""
    pytest.importorskip("triton")
    from fastfp8.triton_kernels import permute

    storage = torch.full((3 * 12,), -7.0)
    monkeypatch.setattr(permute, "empty_scale", lambda *_: storage.as_strided((10, 3), (1, 12)))
    where = oracle(torch.tensor([[0, 1], [-1, 1], [2, -1], [-1, -1], [0, 0]]), 3)
    got = routing("triton_interpreter").permute_quantize(randn(5, 300), where)
    assert (got.scale[:6] > 0).all()
    got.scale[:6] = -7.0
    assert (storage == -7.0).all()


def expected_sum(y: Tensor, where: RowMap, weights: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """A token and a k at a time, in FP32."""
    values, rows = y.float().numpy(), where.rows.numpy()
    out = np.zeros((rows.shape[0], y.shape[1]), np.float32)
    for (token, k), row in np.ndenumerate(rows):
        if row >= 0:
            term = values[row] if weights is None else values[row] * weights[token, k].numpy()
            out[token] = out[token] + term
    return torch.from_numpy(out).to(out_dtype)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", backend_params(NAMES))
def test_unpermute(name: str, weighted: bool) -> None:
    for tokens, top_k, cols in ((5, 2, 264), (37, 3, 1), (18, 8, 128), (0, 2, 8), (3, 2, 0)):
        where = oracle(indices(tokens, top_k, 4), 4)
        weights = randn(tokens, top_k, seed=1) if weighted else None
        if weights is not None:
            weights[where.rows < 0] = float("nan")
        big = randn(tokens * top_k, 2 * cols + 4, seed=2)
        big[~rows_used(where)] = float("nan")
        views = (big[:, :cols], big[:, 3 : 2 * cols + 3 : 2], big[:, :cols].t().contiguous().t())
        for dtype, out_dtype, y in zip(DTYPES, DTYPES[1:] + DTYPES[:1], views, strict=True):
            y = y.to(dtype)
            got = routing(name).unpermute(y, where, weights, out_dtype=out_dtype)
            assert_same_bits(got, expected_sum(y, where, weights, out_dtype), f"{tokens} tokens, {out_dtype}")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", backend_params(NAMES))
def test_unpermute_of_a_scaled_tensor(name: str, weighted: bool) -> None:
    """Bit for bit what the dequantised rows give."""
    for tokens, top_k, cols in ((5, 2, 264), (18, 8, 128), (0, 2, 8)):
        where = oracle(indices(tokens, top_k, 4), 4)
        weights = randn(tokens, top_k, seed=1) if weighted else None
        y = scaled((tokens * top_k, cols), (1, 128), 3, pitch=cols + 16)
        y.data.view(torch.uint8)[~rows_used(where)] = 0x7F
        y.scale[~rows_used(where)] = float("nan")
        got = routing(name).unpermute(y, where, weights, out_dtype=torch.float32)
        expected = expected_sum(y.dequantize(torch.float32), where, weights, torch.float32)
        assert_same_bits(got, expected, f"{tokens} tokens")


@pytest.mark.parametrize("name", backend_params(NAMES))
def test_rows_that_no_map_has_are_no_rows(name: str) -> None:
    """Lest anything lies out of bounds, on a device that cannot raise."""
    where = oracle(indices(5, 2, 3, "all"), 3)
    rows, fewer = where.rows.clone(), where.rows.clone()
    rows.view(-1)[:3], fewer.view(-1)[:3] = torch.tensor([10, -(1 << 31), (1 << 31) - 1]), -1
    x, y, weights = randn(5, 24), randn(10, 24), randn(5, 2)
    wild, tame = (RowMap(where.offsets, r, where.slots) for r in (rows, fewer))
    b = routing(name)
    assert_same_bits(b.unpermute(y, wild, weights), b.unpermute(y, tame, weights), "sum")
    written = torch.zeros(10, dtype=torch.bool)
    written[fewer[fewer >= 0].long()] = True
    assert_same_bits(b.permute(x, wild)[written], b.permute(x, tame)[written], "rows")
    for got, expected in zip(
        b.unpermute_backward(x, y, rows, weights), b.unpermute_backward(x, y, fewer, weights), strict=True
    ):
        written = written if len(got) == 10 else torch.ones(5, dtype=torch.bool)
        assert_same_bits(got[written], expected[written], "gradient")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", backend_params(NAMES[1:]))
def test_gradient_bits(name: str, dtype: torch.dtype) -> None:
    for tokens, top_k, cols in ((5, 2, 264), (4, 8, 1000), (3, 3, 1), (0, 2, 8), (3, 2, 0)):
        where = oracle(indices(tokens, top_k, 4), 4)
        y, weights = randn(tokens * top_k, cols, seed=1).to(dtype), randn(tokens, top_k, seed=2)
        y[~rows_used(where)] = float("nan")
        for grad in (randn(tokens, cols).to(dtype), torch.ones(1, 1).expand(tokens, cols), randn(cols, tokens).t()):
            expected = routing("reference").unpermute_backward(grad, y, where.rows, weights)
            got = routing(name).unpermute_backward(grad, y, where.rows, weights)
            used = rows_used(where)
            assert_same_bits(got[0][used], expected[0][used], "y")
            assert_same_bits(got[1], expected[1], "weights")
            if is_poisoned(name) and len(used):
                assert untouched(got[0], used)


def plain(x: Tensor, weights: Tensor | None, topk_idx: Tensor, experts: Tensor) -> Tensor:
    """Each token through a factor of each of its experts, added up: no permutation at all."""
    out = torch.zeros_like(x)
    for k in range(topk_idx.shape[1]):
        y = x * experts[topk_idx[:, k]] * (topk_idx[:, k] >= 0)[:, None]
        out = out + (y if weights is None else y * weights[:, k, None])
    return out


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_gradients_are_those_of_float64(dtype: torch.dtype, tolerance: float, weighted: bool) -> None:
    topk_idx = indices(40, 3, 5)
    factors, up = randn(5, 300, seed=3), randn(40, 300, seed=4)
    x = randn(40, 300).to(dtype).requires_grad_()
    weights = randn(40, 3, seed=1).requires_grad_() if weighted else None
    rows, where = fastfp8.permute(x, topk_idx, 5)
    assert isinstance(rows, Tensor)
    expert = topk_idx.flatten()[where.slots.clamp(min=0).long()]
    y = torch.where(rows_used(where)[:, None], rows, 0) * factors[expert].to(dtype)
    out = fastfp8.unpermute(y, where, weights, out_dtype=torch.float32)
    (out * up).sum().backward()

    exact = x.detach().double().requires_grad_()
    exact_weights = weights.detach().double().requires_grad_() if weights is not None else None
    expected = plain(exact, exact_weights, topk_idx, factors.to(dtype).double())
    (expected * up).sum().backward()
    pairs = [(out, expected), (x.grad, exact.grad)]
    if weights is not None and exact_weights is not None:
        pairs.append((weights.grad, exact_weights.grad))
    for got, want in pairs:
        assert (got.double() - want).norm() / want.norm() < tolerance
    assert x.grad.dtype == dtype


def test_gradient_of_weights_with_a_scaled_tensor() -> None:
    where = oracle(indices(6, 2, 3), 3)
    y, weights = scaled((12, 264), (1, 128), 0), randn(6, 2).requires_grad_()
    up = randn(6, 264, seed=1)
    fastfp8.unpermute(y, where, weights, out_dtype=torch.float32).backward(up)
    dense = weights.detach().clone().requires_grad_()
    rows = y.dequantize(torch.float32)
    fastfp8.unpermute(rows, where, dense, out_dtype=torch.float32).backward(up)
    assert_same_bits(weights.grad, dense.grad, "weights")
    assert ((weights.grad != 0) == (where.rows >= 0)).all()


def test_unpermute_without_weights_keeps_no_rows() -> None:
    """What backward needs is the map alone; and permute keeps no tokens."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rows, where = fastfp8.permute(randn(6, 24).requires_grad_(), indices(6, 2, 3), 3)
        fastfp8.unpermute(rows, where)
    assert {t.dtype for t in kept} == {torch.int32}


def test_a_map_serves_again() -> None:
    topk_idx, x = indices(6, 2, 3), randn(6, 130)
    first, where = fastfp8.permute_quantize(x, topk_idx, 3)
    again, same = fastfp8.permute_quantize(x, where)
    moved, _ = fastfp8.permute(fastfp8.quantize(x), where)
    assert same is where
    used = rows_used(where)
    for other in (again, moved):
        assert isinstance(other, ScaledTensor)
        assert_same_bits(other.data[used], first.data[used], "codes")
        assert_same_bits(other.scale[used], first.scale[used], "scales")


def test_into_a_grouped_gemm_and_back() -> None:
    """Tokens to experts and back, beside each expert's own product with its tokens."""
    x, topk_idx, weights = randn(20, 256), indices(20, 2, 3), torch.rand(20, 2, generator=torch.Generator())
    experts = fastfp8.quantize(randn(3, 128, 256, seed=1), (128, 128))
    rows, where = fastfp8.permute_quantize(x, topk_idx, 3)
    y = fastfp8.grouped_gemm(rows, experts, where.offsets, out_dtype=torch.float32)
    out = fastfp8.unpermute(y, where, weights, out_dtype=torch.float32)
    products = [fastfp8.gemm(fastfp8.quantize(x), experts[e], out_dtype=torch.float32) for e in range(3)]
    for t in range(20):
        total = torch.zeros(128)
        for k, e in enumerate(topk_idx[t].tolist()):
            total = total + products[e][t] * weights[t, k] if e >= 0 else total
        torch.testing.assert_close(out[t], total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", backend_params(NAMES[:2]))
def test_any_shape(name: str) -> None:
    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(st.integers(0, 200), st.integers(1, 9), st.integers(1, 300), st.integers(0, 300), st.integers(0, 1 << 20))
    def run(tokens: int, top_k: int, experts: int, cols: int, seed: int) -> None:
        topk_idx, b = indices(tokens, top_k, experts, seed=seed), routing(name)
        where = b.row_map(topk_idx, experts)
        check_map(where, topk_idx, experts)
        x = randn(tokens, cols, seed=seed)
        count = (topk_idx >= 0).sum(1, keepdim=True)
        rows = b.permute(x, where)
        torch.testing.assert_close(b.unpermute(rows, where, out_dtype=torch.float32), x * count, rtol=1e-6, atol=0)

    run()


def test_the_backends_put_nan_where_nothing_is_written() -> None:
    """Else `untouched` would prove nothing."""
    for running in (interpreted, emulated):
        pytest.importorskip("triton")
        with running():
            assert torch.empty(3).isnan().all()
