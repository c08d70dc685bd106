"""Goals, the experiment on promotion, DeepGEMM's tiles: what is said follows from the rows and from the rules."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import nights
import pytest
from test_plan import DENSE_TABLE

from bench import __main__, accuracy, deep_gemm_tiles, explain, family, goals, page, plots, report, shapes
from bench.case import Session
from bench.fusions import FUSIONS
from bench.rows import Row, Run
from fastfp8 import _C

TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def dense(m: int, n: int, k: int, ratios: dict[str, float], **more: Any) -> Row:
    spreads = {peer: nights.around(ratio) for peer, ratio in ratios.items()}
    given = {"backend": goals.BACKEND, **more}
    return nights.row("gpu", "gemm", goals.DENSE_OP, f"{m}x{n}x{k}", value=1.0, ratios=spreads, unit="us", **given)


def table(ratios: dict[str, float], **more: Any) -> list[Row]:
    return [dense(m, n, k, ratios, **more) for m in TOKENS for n, k in DENSE_TABLE]


def line(rows: list[Row], words: str) -> str:
    (found,) = (line for line in goals.lines(rows) if words in line)
    return found


def test_without_rows_everything_is_unmeasured() -> None:
    for rows in ([], nights.gpu_run().rows, nights.cpu_run().rows):
        assert [text.rsplit(": ", 1)[1] for text in goals.lines(rows)] == ["unmeasured"] * 7
    assert not any(character.isdigit() for text in goals.lines([]) for character in text.rsplit(": ", 1)[1])


@pytest.mark.parametrize(("ratio", "verdict"), [(0.9, "met"), (1.1, "missed")])
def test_large_products_against_the_best_peer(ratio: float, verdict: str) -> None:
    """The best peer is the fastest: the one with the largest of the own time over its own."""
    text = line(table({"slow": 0.5, "fast": ratio}), "M >= 1024")
    assert f"measured {1 / ratio:.3f} over 28 shapes" in text
    assert "slow in 28, fast in 28" in text
    assert text.endswith(f": {verdict}")


@pytest.mark.parametrize(("ratio", "verdict"), [(1 / 1.31, "met"), (1 / 1.29, "missed")])
def test_small_products_must_be_faster(ratio: float, verdict: str) -> None:
    text = line(table({"peer": ratio}), "M <= 128")
    assert "over 42 shapes" in text
    assert text.endswith(f": {verdict}")


def test_the_mean_is_geometric_and_the_worst_is_named() -> None:
    rows = table({"peer": 0.5})
    index = next(i for i, row in enumerate(rows) if row.shape == "2048x576x7168")
    rows[index] = dense(2048, 576, 7168, {"peer": 4.0})
    text = line(rows, "M >= 1024")
    assert f"measured {(2**27 * 0.25) ** (1 / 28):.3f} " in text
    assert "worst 0.250 at 2048x576x7168" in text


def test_a_goal_for_a_table_is_judged_by_all_of_it() -> None:
    text = line([row for row in table({"peer": 0.5}) if row.shape != "1024x576x7168"], "M >= 1024")
    assert text.endswith("not judged, 27 of 28 shapes measured")
    assert "2.000 over 27 shapes" in text
    # Of another backend, another op, of a CPU, or alone: no row of the table.
    for other in (
        {"backend": "fastfp8"},
        {"backend": "DeepGEMM"},
        {"ratios": {}},
        {"op": "gemm 1x128 by 1x128, float32"},
        {"kind": "cpu"},
    ):
        rows = [dataclasses.replace(row, **other) for row in table({"peer": 0.5})]  # type: ignore[arg-type]
        assert line(rows, "M >= 1024").endswith("unmeasured"), other


@pytest.mark.parametrize(("ratio", "verdict"), [(1 / 1.31, "met"), (1 / 1.29, "missed")])
def test_wgrad_is_held_to_deep_gemm(ratio: float, verdict: str) -> None:
    rows = [
        dataclasses.replace(row, family="wgrad", op="grouped_wgrad, stored")
        for row in table({"BF16 grouped_mm": 3.0, "DeepGEMM": ratio})[:4]
    ]
    rows.append(dataclasses.replace(rows[0], shape="alone", ratios={"BF16 grouped_mm": nights.around(9.0)}))
    text = line(rows, "gradients")
    assert f"measured {1 / ratio:.3f} over 4 shapes" in text
    assert "beside DeepGEMM in 4)" in text
    assert text.endswith(f": {verdict}")


@pytest.mark.parametrize(("share", "verdict"), [(0.81, "met"), (0.79, "missed")])
def test_bandwidth_is_of_the_measured_copy(share: float, verdict: str) -> None:
    """Of the four largest weights at M up to 64, and of the worst of them; TFLOPS over FLOPs a byte are TB/s."""
    copy = nights.row("gpu", "ceilings", "copy", "1 GiB", "torch", 1.0, rate=4000.0, rate_unit="GB/s")
    rows = table({"peer": 1.0}, rate=400.0, rate_unit="TFLOPS", intensity=100.0)  # as fast as the copy
    worst = rows.index(next(row for row in rows if row.shape == "16x24576x1536"))
    rows[worst] = dataclasses.replace(rows[worst], rate=400.0 * share)
    # None of these counts: a large M, a small weight.
    for shape in ("128x24576x1536", "16x2112x7168"):
        index = rows.index(next(row for row in rows if row.shape == shape))
        rows[index] = dataclasses.replace(rows[index], rate=1.0)
    text = line([copy, *rows], "bandwidth")
    assert f"{share:.0%} at worst, at 16x24576x1536, of 4,000 GB/s" in text
    assert text.endswith(f": {verdict}")
    assert line(rows, "bandwidth").endswith("unmeasured"), "without a copy there is no share"
    assert {(w.n, w.k) for w in goals.LARGEST} == {(7168, 16384), (24576, 1536), (4096, 7168), (32768, 512)}


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
@pytest.mark.parametrize(("median", "verdict"), [(5.9, "met"), (6.1, "missed")])
def test_host_cost(kind: str, median: float, verdict: str) -> None:
    row = nights.row(kind, kind, goals.HOST_OP, "64x576x7168", "fastfp8", median, unit="us")
    told = [text for text in goals.lines([row]) if "host cost" in text]
    assert [text.endswith("unmeasured") for text in told] == [kind == "cpu", kind == "gpu"]
    assert next(text for text in told if "measured " in text).endswith(f"{median} us (64x576x7168): {verdict}")
    disturbed = goals.lines([dataclasses.replace(row, foreign_cores=1.5)])
    assert any("not judged, disturbed" in text for text in disturbed)
    part = dataclasses.replace(row, op=f"{goals.HOST_OP}: a part", median=1.0)
    assert goals.lines([part]) == goals.lines([])


def test_the_report_has_the_goals() -> None:
    run = Run(nights.environment(), table({"peer": 0.5}))
    night = nights.night(run)
    assert "2.000 over 28 shapes" in report.markdown(night)
    assert "2.000 over 28 shapes" in page.html(night, [])


def test_the_dense_table_of_the_goals() -> None:
    assert shapes.DENSE_TOKENS == TOKENS
    assert sorted((w.n, w.k) for w in shapes.DEEPSEEK_V3) == sorted(DENSE_TABLE)


# accuracy


@pytest.fixture(scope="module")
def errors() -> dict[tuple[str, int], dict[str, Row]]:
    """By data and interval, then by measure."""
    found = family.Report()
    family.run("accuracy", accuracy.works(False), Session(1), found)
    assert not found.not_run
    rows: dict[tuple[str, int], dict[str, Row]] = {}
    for row in found.rows:
        rows.setdefault((row.op.removeprefix("gemm, "), plots._interval(row)), {})[row.unit] = row
    return rows


def test_accuracy_follows_the_published_experiment(errors: Any) -> None:
    """reference/tensor_core's errors by interval, here as rows: within a factor of 2 of what others computed."""
    intervals = [32 << i for i in range(8)]
    assert set(errors) == {(data, interval) for data in accuracy.GATES for interval in intervals}
    for data, interval, unit, expected in [
        (accuracy.NORMAL, 32, accuracy.RMS, 4.5e-5),
        (accuracy.NORMAL, 128, accuracy.DIFF, 8.2e-9),
        (accuracy.NORMAL, 128, accuracy.MOST, 5.8e-4),
        (accuracy.NORMAL, 4096, accuracy.DIFF, 9.1e-7),
        (accuracy.NORMAL, 4096, accuracy.MOST, 1.1e-2),
        (accuracy.POSITIVE, 128, accuracy.BIAS, 5.6e-4),
        (accuracy.POSITIVE, 4096, accuracy.BIAS, 7.5e-2),
    ]:
        assert expected / 2 < errors[data, interval][unit].median < expected * 2, (data, interval, unit)
    for data in accuracy.GATES:
        for unit in (accuracy.RMS, accuracy.MOST, accuracy.DIFF):
            values = [errors[data, interval][unit].median for interval in intervals]
            assert values == sorted(values), (data, unit)


def test_gates_are_for_what_the_kernels_do(errors: Any) -> None:
    """They pass at 128, and the same fail without promotion."""
    assert {interval for (_, interval), rows in errors.items() for row in rows.values() if row.bar} == {128}
    for data, gates in accuracy.GATES.items():
        for unit, gate in gates.items():
            assert errors[data, 128][unit].bar == gate
            assert errors[data, 128][unit].passed
            never = dataclasses.replace(errors[data, 4096][unit], bar=gate)
            assert not never.passed
    assert all(row.kind == "modelled" for rows in errors.values() for row in rows.values())


def test_a_kernel_that_never_promoted_would_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    promoted = accuracy.tensor_core.gemm
    monkeypatch.setattr(
        accuracy.tensor_core, "gemm", lambda *given, promote_every: promoted(*given, promote_every=None)
    )
    found = family.Report()
    works = [work for work in accuracy.works(False) if work.shape.endswith(" 128")]
    family.run("accuracy", works, Session(1), found)
    assert sum(not row.passed for row in found.rows) == 4


def test_the_plot_of_errors(errors: Any) -> None:
    rows = [row for found in errors.values() for row in found.values()]
    plot = plots.promotion(rows)
    assert plot is not None
    assert plot.name in [drawn.name for drawn in plots.draw(nights.night(Run(nights.environment(None), rows)))]
    assert ">bias<" in plot.svg
    for label in (*(op for op in {row.op for row in rows}), accuracy.MOST, accuracy.RMS, accuracy.DIFF, "128", "4096"):
        assert f">{label}<" in plot.svg, label
    # A gate that both data share, and one of each in its line's colour.
    dashed = re.findall(r"stroke-dasharray: [^;]*; stroke-dashoffset: 0; stroke: (#?\w+)", plot.svg)
    assert dashed == ["currentColor", plots.OURS.lower(), plots.PEERS[0].lower()]


# gemm --tiles

# reference/gemm.md, section 1.2: tile, CTAs or waves, on 132 SMs.
DEEP_GEMM = {
    1: "16x16 36c, 16x16 132c, 16x96 2w, 16x128 2w, 16x64 112c, 16x32 128c, 16x64 112c",
    64: "64x16 36c, 64x16 132c, 64x96 2w, 64x128 2w, 64x64 112c, 64x32 128c, 64x64 112c",
    128: "64x16 72c, 64x32 132c, 128x192 1w, 128x128 2w, 64x112 128c, 64x64 128c, 64x112 128c",
    1024: "64x80 1w, 128x144 120c, 256x128 6w, 256x128 8w, 256x112 2w, 256x128 1w, 256x112 2w",
    4096: "128x144 1w, 128x192 3w, 256x128 24w, 256x128 32w, 256x128 7w, 256x128 4w, 256x128 7w",
}


@pytest.mark.parametrize("m", DEEP_GEMM)
def test_deep_gemms_tiles(m: int) -> None:
    """As they were derived from its sources before, by someone else."""
    for (n, k), told in zip(DENSE_TABLE, DEEP_GEMM[m].split(", "), strict=True):
        tile, count = told.split()
        found = deep_gemm_tiles.choose(m, n, k, 132)
        assert f"{found.m}x{found.n}" == tile, (n, k)
        assert {"c": found.tiles, "w": found.waves}[count[-1]] == int(count[:-1]), (n, k)


def test_stages_and_fill_of_deep_gemms_tiles() -> None:
    assert deep_gemm_tiles.choose(4096, 2112, 7168, 132).fill(132) == pytest.approx(0.89, abs=0.005)
    for tile_m, tile_n, count in ((256, 128, 3), (128, 192, 4), (128, 128, 5), (64, 64, 13)):
        assert deep_gemm_tiles.stages(tile_m, tile_n, 7168) == count
    for n, k in DENSE_TABLE:
        assert all(min(t.m, t.n) <= 128 and t.stages >= 3 for t in deep_gemm_tiles.candidates(4096, n, k, 132))
        one_wave = [t for t in deep_gemm_tiles.candidates(1, n, k, 132) if t.waves == 1]
        assert {t.cluster for t in one_wave} <= {(1, 1)}, "a pair pays only over several waves"


@pytest.mark.parametrize("machine", ["H100", "H20"])
def test_tiles_beside_ours(machine: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["gemm", "--tiles", "--machine", machine]) == 0
    text = capsys.readouterr().out
    assert "derived" in text
    sms = explain.MACHINES[machine]
    for n, k in DENSE_TABLE:
        for m in TOKENS:
            (row,) = (re.split(r" {2,}", found.strip()) for found in text.splitlines() if f" {m}x{n}x{k} " in found)
            asked = explain.problem(m, n, k, num_sms=sms, machine=machine)
            config, other = _C.gemm_select(asked), deep_gemm_tiles.choose(m, n, k, sms)
            assert row[1:4] == [config.name, str(config.grid), f"{config.cycles:,.0f}"]
            assert float(row[4]) >= 1, "nothing is faster than the roofline"
            assert row[5] == str(other)


def test_roofline_is_of_bytes_or_of_products() -> None:
    small, large = (explain.problem(m, 4096, 7168) for m in (1, 8192))
    hbm = _C.gemm_candidates(small)[0][0].cost["hbm"]
    assert explain.roofline(small) == hbm
    assert explain.roofline(large) == 2 * 8192 * 4096 * 7168 / (8192 * 132)


@pytest.mark.parametrize(("worst", "verdict"), [(0.86, "met"), (0.84, "missed")])
def test_ops_of_one_pass_against_the_copy(worst: float, verdict: str) -> None:
    def row(op: str, share: float) -> Row:
        given = {"kind": "gpu", "family": "fused", "op": op, "shape": "8192x7168", "backend": "fastfp8 Triton"}
        return Row(**given, unit="us", median=100.0, lower=99.0, upper=101.0, floor=100.0 * share)  # type: ignore[arg-type]

    assert len(FUSIONS) == goals.FUSED_OPS
    rows = [row(name, 0.95) for name in FUSIONS]
    rows[3] = row("slowest", worst)
    text = line(rows, "one pass over memory")
    assert f"measured {worst:.0%} at worst, of slowest, 9" in text
    assert text.endswith(f": {verdict}")
    assert line(rows[1:], "one pass over memory").endswith("not judged, 33 of 34 shapes measured")
    without = [dataclasses.replace(r, floor=None) for r in rows]
    assert line(without, "one pass over memory").endswith("unmeasured"), "without a copy there is no share"
