"""Invented nights for the tests of the reports: round, impossible figures that nobody can take for measurements."""

from __future__ import annotations

import dataclasses

from bench.night import Comparison, Night
from bench.rows import Environment, NotRun, Row, Run, Spread, Suite

SHAPES = ((4096, 7168, 2112), (4096, 1536, 24576), (128, 7168, 4096), (64, 7168, 36864))
HOSTILE = "<script>alert(1)</script> a|b & *c* `d` _e_ [f](g) $h$"
PEERS = {"cuBLASLt block scaling": 1.25, "DeepGEMM": 0.9, "cuBLASLt BF16": 1.7}


def around(value: float, width: float = 0.04) -> Spread:
    return value * (1 - width), value, value * (1 + width)


def row(kind: str, family: str, op: str, shape: str, backend: str, value: float, **more: object) -> Row:
    unit = str(more.pop("unit", "ms"))
    lower, median, upper = around(value)
    more.setdefault("samples", 21)
    return Row(family, op, shape, backend, kind, unit, median, lower, upper, **more)  # type: ignore[arg-type]


def environment(gpu: str | None = "Imaginary GPU", day: int = 1, commit: str = "abc1234") -> Environment:
    machine = "imaginary-gpu" if gpu else "cpu-imaginary-2cores"
    versions = {"python": "3.11.7", "torch": "2.13.0"}
    date = f"2030-01-{day:02d}T01:02:03Z"
    return Environment(machine, date, commit, "Imaginary CPU", 16, 0.5, gpu, "13000" if gpu else None, versions)


def case(kind: str, family: str, op: str, shape: str, own: float, peers: dict[str, float], **more: object) -> list[Row]:
    """A row of ours and one for each peer, given as the peer's time over ours."""
    ratios = {peer: around(1 / factor) for peer, factor in peers.items()}
    shared = {k: v for k, v in more.items() if k not in ("bar", "config", "note")}
    ours = row(kind, family, op, shape, "fastfp8 CUDA" if kind == "gpu" else "fastfp8", own, ratios=ratios, **more)
    return [ours, *(row(kind, family, op, shape, peer, own * factor, **shared) for peer, factor in peers.items())]


def gpu_run(day: int = 1, slower: float = 1.0) -> Run:
    rows = [
        row("gpu", "ceilings", "copy", "1 GiB", "torch", 0.5, rate=4000.0, rate_unit="GB/s"),
        row("gpu", "ceilings", "fp8", "8192x8192x8192", "torch", 1.0, rate=1000.0, rate_unit="TFLOPS"),
        row("gpu", "ceilings", "bf16", "8192x8192x8192", "torch", 2.0, rate=500.0, rate_unit="TFLOPS"),
    ]
    for m, n, k in SHAPES:
        flops, moved = 2 * m * n * k, m * k + n * k + 2 * m * n
        own = max(flops / 1e12, moved / 4e9 * 1e-3) * 1.5 * slower
        state = {"clock_mhz": 1500.0, "power_w": 600.0, "temperature_c": 55.0, "intensity": flops / moved}
        for r in case("gpu", "gemm", "gemm", f"{m}x{n}x{k}", own, PEERS, **state, config="128x128, 4 stages"):
            rate = {"rate": flops / (r.median * 1e-3) / 1e12, "rate_unit": "TFLOPS", "floor": own / 1.5}
            rows.append(Row(**{**vars(r), **rate}))
    for op in ("quantize 1x128", "quantize 128x128", "dequantize 1x128"):
        for shape in ("4096x7168", "16384x7168"):
            more = {"rate": 3000.0, "rate_unit": "GB/s", "floor": 0.04, "throttle": "SwPowerCap", "bar": 2.0}
            rows += case("gpu", "quantize", op, shape, 0.05 * slower, {"copy": 0.8, "torch.compile": 1.4}, **more)
    rows += cpu_rows(slower) + computed_rows()
    not_run = [NotRun("gemm", "gemm", f"{m}x7168x7168", "no time left") for m in range(8, 64, 8)]
    suites = [Suite("op tests", 812, 0, 3, 140.0), Suite("memcheck", 12, 0, 0, 30.0)]
    return Run(environment(day=day), rows, not_run, suites)


def cpu_rows(slower: float = 1.0) -> list[Row]:
    rows = case("cpu", "cpu", "gemm", "2048x2048x2048", 100.0 * slower, {"torch.mm float32": 0.8}, bar=3.0)
    for block, factor in (("1x128", 0.7), ("128x1", 0.6), ("128x128", 0.9)):
        peers = {"clone bfloat16": factor}
        rows += case("cpu", "cpu", f"quantize {block}", "4096x7168", 30.0 * slower, peers, bar=12.0)
    rows += case("cpu", "cpu", "one call of quantize", "1x128", 50.0, {"clone": 0.1}, unit="us", note="without X: why")
    rows.append(row("cpu", "cpu", "import fastfp8", "", "fastfp8", 0.02, unit="s", bar=0.3))
    return [*rows, row("cpu", "cpu", "Triton modules it imports", "", "fastfp8", 0.0, unit="modules", bar=0.0)]


def computed_rows() -> list[Row]:
    kernels = [f"gemm_sm90_block_bf16_n{n}" for n in (64, 96, 128)]
    rows = [
        row("static", "static", kernel, "", "fastfp8 CUDA", value, unit=unit, samples=1)
        for kernel in kernels
        for unit, value in (("registers", 168.0), ("bytes of spills", 0.0), ("instructions", 4000.0))
    ]
    rows += [row("emulated", "emulator", kernel, "8x8", "fastfp8 CUDA", 128.0, unit="wgmma") for kernel in kernels]
    shape = "64x7168x4096"
    return [*rows, row("modelled", "static", "gemm", shape, "fastfp8 CUDA", 12345.0, unit="cycles", note="rough model")]


def cpu_run(day: int = 1, slower: float = 1.0) -> Run:
    not_run = [NotRun("gemm", "gemm", "all shapes", "there is no GPU to measure on")]
    suites = [Suite("op tests on the CPU", 57, 0, 0, 20.0)]
    return Run(environment(None, day), cpu_rows(slower) + computed_rows(), not_run, suites)


def comparison(run: Run, verdict: str) -> Comparison:
    own = next(r for r in run.rows if r.ours)
    return Comparison(own.key, own.unit, around(1.0), around(1.5), verdict, "1.5 ms is 44 % over the upper quartile")


def night(run: Run, history: list[Run] | None = None, verdicts: tuple[str, ...] = ("same",)) -> Night:
    """Against the last run of the history, if there is one."""
    history = history or []
    comparisons = [comparison(run, verdict) for verdict in verdicts] if history else []
    stages = {"build": 31.0, "tests": 65.0, "families": 80.0}
    return Night(run, history[-1] if history else None, comparisons, history, stages, 3.0)


def failing_night() -> Night:
    run = cpu_run()
    run.rows.append(row("cpu", "cpu", "quantize", "8x8", "fastfp8", 70.0, unit="us", bar=60.0))
    run.not_run.append(NotRun("quantize", "quantize 1x128", "8x8", "RuntimeError: launch\nfailed", failed=True))
    run.suites.append(Suite("op tests on a GPU", 3, 2, 0, 9.0, ("test_one[8x8]", "test_two")))
    return night(run, [cpu_run()], ("regressed", "suspect", "improved", "same"))


def hostile_night() -> Night:
    """Every text that comes from elsewhere is out to break the report."""
    run = cpu_run()
    rows = case("cpu", HOSTILE, HOSTILE, HOSTILE, 1.0, {HOSTILE: 2.0}, note=HOSTILE, config=HOSTILE, bar=0.1)
    run.rows += [dataclasses.replace(row, throttle=HOSTILE) for row in rows]
    run.not_run.append(NotRun(HOSTILE, HOSTILE, HOSTILE, f"{HOSTILE}\nsecond line", failed=True))
    run.suites.append(Suite(HOSTILE, 0, 1, 0, 1.0, (HOSTILE,)))
    run.environment = dataclasses.replace(run.environment, cpu=HOSTILE, versions={HOSTILE: HOSTILE})
    before, now = around(1.0), around(2.0)
    slow = Comparison(("cpu", "cpu", HOSTILE, HOSTILE, "fastfp8", "ms"), "ms", before, now, "regressed", HOSTILE)
    earlier = [dataclasses.replace(run, rows=run.rows[-2:])]
    return dataclasses.replace(night(run, earlier), comparisons=[slow], stages={HOSTILE: 1.0})
