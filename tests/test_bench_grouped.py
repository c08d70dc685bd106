"""The grouped families without a GPU: ours and peers on CPU tensors, stand-ins for libraries and ops not there."""

from __future__ import annotations

import dataclasses
import sys
import types
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_bench_device import on_cpu, session  # noqa: F401  (a fixture)
from torch import Tensor

import fastfp8
from bench import grouped, peers, shapes, swiglu, wgrad
from bench.case import Case, Subject
from fastfp8 import ScaledTensor

pytestmark = pytest.mark.usefixtures("on_cpu")

ALIGNMENT = 128


class DeepGemm(types.SimpleNamespace):
    """With the signatures of the library's calls on sm_90; computes from what it is given and asks what it asks."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def get_mk_alignment_for_contiguous_layout(self) -> int:
        return ALIGNMENT

    def m_grouped_fp8_gemm_nt_contiguous(self, a: Any, b: Any, d: Tensor, grouped_layout: Tensor) -> None:
        self.calls.append("contiguous")
        rows = a[0].shape[0]
        assert rows % ALIGNMENT == 0
        assert grouped_layout.shape == (rows,)
        assert grouped_layout.dtype == torch.int32
        assert a[1].stride() == (1, rows)
        for block in grouped_layout.split(ALIGNMENT):  # type: ignore[no-untyped-call]
            assert len(set(block.tolist()) - {-1}) == 1, "a tile of rows has one group's weight"
        left, right = (t.dequantize(torch.float32) for t in (ScaledTensor(*a, (1, 128)), ScaledTensor(*b, (128, 128))))
        for row, group in enumerate(grouped_layout.tolist()):
            d[row] = torch.nan if group < 0 else left[row] @ right[group].t()

    def m_grouped_fp8_gemm_nt_masked(self, a: Any, b: Any, d: Tensor, masked_m: Tensor, expected_m: int) -> None:
        self.calls.append("masked")
        groups, room, _ = a[0].shape
        pitch = -(-room // 4) * 4
        assert a[1].stride() == (pitch * a[1].shape[2], 1, pitch), "column-major, matrix by matrix"
        assert expected_m == -(-int(masked_m.sum()) // groups)
        d.fill_(torch.nan)
        for group, count in enumerate(masked_m.tolist()):
            scale = a[1][group].t().contiguous().t()
            left = (a[0][group].float().view(room, -1, 128) * scale[:, :, None]).flatten(1)
            d[group, :count] = (left @ ScaledTensor(*b, (128, 128))[group].dequantize(torch.float32).t())[:count]

    def k_grouped_fp8_gemm_nt_contiguous(
        self, a: Any, b: Any, d: Tensor, ks: list[int], grouped_layout: Tensor, c: Tensor | None = None
    ) -> None:
        self.calls.append("k-grouped")
        assert c is not None, "c is mandatory"
        assert (d.dtype, c.dtype) == (torch.float32, torch.float32)
        assert grouped_layout.tolist() == ks
        assert grouped_layout.dtype == torch.int32
        assert all(k % 128 == 0 for k in ks)
        _, m, n = d.shape
        assert (a[0].dim(), b[0].dim()) == (1, 1), "codes of one group behind those of another"
        if c.data_ptr() != d.data_ptr():
            d.copy_(c)
        begin = 0
        for group, k in enumerate(ks):
            parts = []
            for (codes, scale), rows in ((a, m), (b, n)):
                assert scale.shape == (rows, sum(ks) // 128)
                own = codes[begin * rows : (begin + k) * rows].view(rows, k)
                parts.append(own.float() * scale[:, begin // 128 : (begin + k) // 128].repeat_interleave(128, 1))
            d[group] += parts[0] @ parts[1].t()
            begin += k


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> DeepGemm:
    found = DeepGemm()
    monkeypatch.setitem(sys.modules, "deep_gemm", found)  # type: ignore[arg-type]
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object())
    return found


def backends(work: Any) -> list[str]:
    return [row.backend for row in work.measure(session())]


def check_all(subject: Subject) -> None:
    for contestant in subject.contestants:
        assert contestant.check is not None
        for copy in range(subject.copies):
            contestant.check(contestant.run(copy))


# grouped_gemm and masked_grouped_gemm


def test_grouped_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unaligned, empty and masked groups; a wrong row is seen, one that is in no group is not looked at."""
    rows = [row for work in grouped.works(True) for row in work.measure(session())]
    assert [r.backend for r in rows] == ["fastfp8", "gemm a group", "BF16 grouped_mm", "fastfp8", "gemm a group"]
    blocks, n, k = 2, 128, 256
    moved = 75 * (k + 4 * blocks + 2 * n) + 3 * (n * k + 4 * blocks)
    assert rows[0].intensity == pytest.approx(2 * 75 * n * k / moved)
    assert "without BF16 grouped_mm: torch has none" in (rows[3].note or "")
    assert "without DeepGEMM: deep_gemm is not installed" in (rows[3].note or "")
    right = fastfp8.masked_grouped_gemm

    def wrong(a: ScaledTensor, b: ScaledTensor, counts: Tensor) -> Tensor:
        out = right(a, b, counts)
        out[2, 6] = 0
        return out

    monkeypatch.setattr(fastfp8, "masked_grouped_gemm", wrong)
    with pytest.raises(AssertionError, match="fastfp8: differs"):
        grouped.works(True)[1].measure(session())


@pytest.mark.parametrize("room", [None, 70, 97])
def test_deep_gemm_gets_its_groups(library: DeepGemm, room: int | None) -> None:
    subject = grouped.subject([5, 0, 70], room, 128, 256)
    assert "DeepGEMM" in [c.backend for c in subject.contestants]
    check_all(subject)
    assert set(library.calls) == {"contiguous" if room is None else "masked"}


def test_a_wrong_row_of_deep_gemm_is_seen(library: DeepGemm, monkeypatch: pytest.MonkeyPatch) -> None:
    right = library.m_grouped_fp8_gemm_nt_contiguous

    def wrong(a: Any, b: Any, d: Tensor, grouped_layout: Tensor) -> None:
        right(a, b, d, grouped_layout)
        d[130] = 0  # the third group's third row

    library.m_grouped_fp8_gemm_nt_contiguous = wrong  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="differs"):
        check_all(grouped.subject([5, 0, 70], None, 128, 256))


def test_tables_of_deep_gemms_tests() -> None:
    """Their groups, rows and weights (tests/generators.py there) are among the cases, and DeepSeek-V3's come first."""
    told = [work for work in grouped.works(False) if isinstance(work, Case)]
    weights = {(w.n, w.k) for w in shapes.GROUPED_WEIGHTS}
    assert weights == {(6144, 7168), (7168, 3072), (4096, 4096), (4096, 2048)}
    for masked, groups in ((False, {(4, 8192), (8, 4096)}), (True, {(32, 192), (6, 1024), (32, 20), (6, 20)})):
        cases = {work.shape for work in told if work.op.startswith("masked") == masked}
        for count, average in groups:
            sizes = grouped.sizes(count, average)
            for n, k in (*weights, (4096, 7168), (7168, 2048)):
                assert f"{count} groups, {sum(sizes)} rows x{n}x{k}" in cases
    assert all("x4096x7168" in w.shape or "x7168x2048" in w.shape for w in told if w.priority == 0)


def test_sizes_of_groups_are_of_the_average() -> None:
    for groups, average, *_ in (*grouped.CONTIGUOUS, *grouped.MASKED):
        found = grouped.sizes(groups, average)
        assert len(found) == groups
        assert all(0.69 * average < size < 1.31 * average for size in found)
        assert len(set(found)) > groups // 3


# grouped_wgrad


def test_wgrad_family(library: DeepGemm) -> None:
    stored, accumulated = wgrad.works(True)
    assert (stored.op, accumulated.op) == (wgrad.STORE, wgrad.ACCUMULATE)
    assert backends(stored) == backends(accumulated) == ["fastfp8", "DeepGEMM", "gemm a group", "BF16 grouped_mm"]
    rows = {work.op: work.measure(session())[0] for work in (stored, accumulated)}
    n, k, tokens = 64, 128, 384
    read = (n + k) * (tokens + 4 * tokens // 128)
    for op, passes in ((wgrad.STORE, 1), (wgrad.ACCUMULATE, 2)):
        moved = read + 3 * n * k * 4 * passes
        assert rows[op].intensity == pytest.approx(2 * tokens * n * k / moved)
    assert set(library.calls) == {"k-grouped"}


def test_every_way_to_accumulate_adds_to_what_is_there(library: DeepGemm) -> None:
    given = _wgrad_operands([128, 0, 256], 64, 128)
    for name, maker in (("ours", wgrad.ours), *wgrad.PEERS.items()):
        given.main_grad.fill_(1.0)
        maker(given, True)()
        once = given.main_grad.clone()
        maker(given, True)()
        assert (once[1] == 1).all(), f"{name}: the group without tokens"
        torch.testing.assert_close(given.main_grad - once, once - 1, rtol=1e-4, atol=1e-2)
        assert (once - 1).abs().max() > 10, name


def _wgrad_operands(counts: list[int], n: int, k: int) -> wgrad.Operands:
    tokens = sum(counts)
    grad_t, input_t = (fastfp8.quantize(torch.randn(rows, tokens)) for rows in (n, k))
    ends = torch.tensor(counts).cumsum(0)
    return wgrad.Operands(grad_t, input_t, ends.int(), ends.tolist(), torch.zeros(len(counts), n, k))


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch, accumulate: bool) -> None:
    right = fastfp8.grouped_wgrad

    def wrong(*operands: Any, **options: Any) -> Tensor:
        out: Tensor = right(*operands, **options)
        out[2, 3] = 0
        return out

    monkeypatch.setattr(fastfp8, "grouped_wgrad", wrong)
    with pytest.raises(AssertionError, match="fastfp8: differs"):
        wgrad.works(True)[accumulate].measure(session())


def test_groups_of_wgrad_begin_where_they_must() -> None:
    told = [work for work in wgrad.works(False) if isinstance(work, Case)]
    assert len(told) == 4 * 2 * 2
    for groups, average, _ in wgrad.TOKENS:
        found = wgrad.sizes(groups, average)
        assert all(size % 128 == 0 for size in found)
        assert all(0.69 * average < size < 1.31 * average + 128 for size in found)
        for n, k in ((4096, 7168), (7168, 2048)):
            assert f"{groups} groups, {sum(found)} tokens, {n}x{k}" in {work.shape for work in told}
    assert [(begin, end) for begin, end in pairwise([0, 128, 128])] == [
        (group.start, group.stop) for group in _wgrad_operands([128, 0], 16, 128).groups
    ]


# gemm_swiglu_quantize


def test_swiglu_family() -> None:
    rows = [row for work in swiglu.works(True) for row in work.measure(session())]
    ways = ["fastfp8", "product, silu, multiply, quantize", "product, swiglu_quantize"]
    assert [row.backend for row in rows] == ways * 2
    moved = 64 * (256 + 8 + 128 + 4) + 256 * 256 + 4 * 2 * 2
    assert rows[3].intensity == pytest.approx(2 * 64 * 256 * 256 / moved)


@pytest.mark.parametrize("what", ["gate and up exchanged", "a row's scale", "a group's weight"])
def test_wrong_swiglu_is_not_timed(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    def wrong(a: ScaledTensor, b: ScaledTensor, offsets: Tensor | None) -> ScaledTensor:
        gate_up = swiglu.product(
            a, b.__class__(b.data.flip(0), b.scale.flip(0), b.block) if "group" in what else b, offsets
        )
        if "exchanged" in what:
            gate_up = torch.cat(gate_up.chunk(2, 1)[::-1], 1)  # type: ignore[no-untyped-call]
        out = fastfp8.swiglu_quantize(gate_up)
        if "scale" in what:
            out.scale[3] *= 2
        return out

    monkeypatch.setattr(fastfp8, "gemm_swiglu_quantize", wrong)
    with pytest.raises(AssertionError, match="fastfp8: differs from SwiGLU"):
        swiglu.works(True)[0].measure(session())


def test_shapes_of_swiglu_are_the_experts() -> None:
    told = {work.shape: dataclasses.replace(work) for work in swiglu.works(False) if isinstance(work, Case)}
    assert len(told) == 5
    assert all("x4096x7168" in shape for shape in told)
    assert "4096 rows x4096x7168" in told
