"""The goals of the GEMMs and of the fused ops, and how far a run's rows meet them. What no row says is unmeasured."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from .rows import Row
from .shapes import DEEPSEEK_V3, DENSE_TOKENS

#: Only the kernels for sm_90a have these goals.
BACKEND = "fastfp8 sm_90a"
DENSE_OP = "gemm 1x128 by 128x128, bfloat16"
HOST_OP = "host cost of a call"
HOST_US = 6.0
LARGE_M, SMALL_M, BANDWIDTH_M = 1024, 128, 64
#: Those of fusions.py, which this does not import: a report is written where the package cannot be.
FUSED_OPS = 34
LARGEST = sorted(DEEPSEEK_V3, key=lambda weight: weight.n * weight.k)[-4:]


def lines(rows: Sequence[Row]) -> list[str]:
    """One for each goal."""
    dense = {row.shape: row for row in rows if row.family == "gemm" and row.op == DENSE_OP and _counts(row)}
    wgrad = [row for row in rows if row.family == "wgrad" and _counts(row) and "DeepGEMM" in row.ratios]

    def table(wanted: Callable[[int], bool], weights: Iterable[object] = DEEPSEEK_V3) -> tuple[list[Row], int]:
        """The rows of the dense table for some M, and how many there should be."""
        shapes = [w.shape(m) for m in DENSE_TOKENS if wanted(m) for w in DEEPSEEK_V3 if w in weights]
        return [dense[shape] for shape in shapes if shape in dense], len(shapes)

    return [
        _faster(f"dense products of M >= {LARGE_M}", 1.0, *table(lambda m: m >= LARGE_M)),
        _faster(f"dense products of M <= {SMALL_M}", 1.3, *table(lambda m: m <= SMALL_M)),
        _faster("gradients of weights", 1.3, wgrad, len(wgrad), "DeepGEMM"),
        _bandwidth(rows, *table(lambda m: m <= BANDWIDTH_M, LARGEST)),
        _passes([row for row in rows if row.family == "fused" and row.kind == "gpu" and row.ours and row.share]),
        *(_host(rows, kind, where) for kind, where in (("gpu", "on a GPU"), ("cpu", "on a CPU, up to the launch"))),
    ]


def _counts(row: Row) -> bool:
    return row.kind == "gpu" and row.backend == BACKEND and bool(row.ratios)


def _line(goal: str, found: str | None, met: bool, of: tuple[int, int] = (1, 1)) -> str:
    """``of``: how many of how many shapes were measured; a goal for all of them is judged only if all were."""
    if found is None:
        return f"goal: {goal}: unmeasured"
    verdict = f"not judged, {of[0]} of {of[1]} shapes measured" if of[0] < of[1] else "met" if met else "missed"
    return f"goal: {goal}: measured {found}: {verdict}"


def _faster(what: str, least: float, rows: Sequence[Row], count: int, peer: str | None = None) -> str:
    goal = f"{what}, {least:g} times as fast as {peer or 'the best peer'}, geometric mean"
    if not rows:
        return _line(goal, None, False)
    # A row has the own time over the peer's: the largest is that of the fastest peer.
    speeds = [1 / (row.ratios[peer] if peer else max(row.ratios.values(), key=lambda s: s[1]))[1] for row in rows]
    mean, worst = statistics.geometric_mean(speeds), min(range(len(rows)), key=speeds.__getitem__)
    peers = Counter(name for row in rows for name in row.ratios if peer in (None, name))
    beside = ", ".join(f"{name} in {n}" for name, n in peers.items())
    found = f"{mean:.3f} over {len(rows)} shapes (worst {speeds[worst]:.3f} at {rows[worst].shape}; beside {beside})"
    return _line(goal, found, mean >= least, (len(rows), count))


def _bandwidth(rows: Sequence[Row], measured: Sequence[Row], count: int) -> str:
    least = 0.8
    goal = f"dense products of M <= {BANDWIDTH_M} by the four largest weights, {least:.0%} of a copy's bandwidth each"
    copies = [row.rate for row in rows if row.family == "ceilings" and row.op == "copy" and row.rate]
    shares = {
        row.shape: row.rate * 1e3 / row.intensity / max(copies)  # TFLOPS over FLOPs a byte, and GB/s
        for row in measured
        if copies and row.rate and row.intensity and row.rate_unit == "TFLOPS"
    }
    if not shares:
        return _line(goal, None, False)
    worst = min(shares, key=shares.__getitem__)
    found = f"{shares[worst]:.0%} at worst, at {worst}, of {max(copies):,.0f} GB/s"
    return _line(goal, found, shares[worst] >= least, (len(shares), count))


def _passes(measured: Sequence[Row]) -> str:
    least = 0.85
    goal = f"ops of one pass over memory, each at {least:.0%} of a copy's rate"
    if not measured:
        return _line(goal, None, False)
    shares = {row.op: row.share or 0.0 for row in measured}
    worst = min(shares, key=shares.__getitem__)
    found = f"{shares[worst]:.0%} at worst, of {worst}, {statistics.geometric_mean(shares.values()):.0%} on average"
    return _line(goal, found, shares[worst] >= least, (len(shares), FUSED_OPS))


def _host(rows: Sequence[Row], kind: str, where: str) -> str:
    found = [row for row in rows if row.op == HOST_OP and row.kind == kind and row.unit == "us" and row.ours]
    goal = f"{HOST_OP} {where}, at most {HOST_US:g} us"
    if not found:
        return _line(goal, None, False)
    slowest = max(found, key=lambda row: row.median)
    text = f"{slowest.median:.3g} us ({slowest.shape})"
    if slowest.disturbed:
        return f"goal: {goal}: measured {text}: not judged, disturbed by other processes"
    return _line(goal, text, slowest.median <= HOST_US)
