"""The GPU families without a GPU: the timer on a pretended device, every contestant's call on CPU or meta tensors."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_plan import DENSE_TABLE
from torch import Tensor

import fastfp8
from bench import ceilings, device, family, fused, fusions, gemm, goals, grouped, peers, quantize, swiglu, wgrad
from bench.case import Case, Ceilings, Contestant, Session, Subject, Unavailable
from bench.rows import Row
from fastfp8 import ScaledTensor


class Pretended:
    """A device whose calls take as long as a table says, and whose memory is the host's."""

    def __init__(self, seconds: dict[str, float] | None = None, writes: bool = True) -> None:
        self.telemetry = None
        self.order: list[str] = []
        self.captured: list[tuple[str, int, int]] = []
        self._seconds, self._writes = seconds or {}, writes

    def capture(self, run: Callable[[int], Any], copies: int, calls: int) -> tuple[Callable[[], None], list[Any]]:
        outputs = [run(i) for i in range(copies)]
        name = getattr(run, "name", "")
        self.captured.append((name, copies, calls))

        def replay() -> None:
            self.order.append(name)
            if self._writes:
                for i, output in enumerate(outputs):
                    for old, new in zip(tensors(output), tensors(run(i)), strict=True):
                        old.copy_(new)

        replay.seconds = self._seconds.get(name, 1e-6) * calls  # type: ignore[attr-defined]
        return replay, outputs

    def seconds(self, replay: Any) -> float:
        replay()
        return float(replay.seconds)

    def poison(self, outputs: Any) -> None:
        for output in outputs:
            for tensor in tensors(output):
                raw = torch.empty(0, dtype=torch.uint8)
                raw.set_(tensor.untyped_storage()).fill_(0xFF)

    def synchronize(self) -> None:
        pass


def tensors(output: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor)]


def named(name: str, run: Callable[[int], Any], check: Callable[[Any], None] | None = None) -> Contestant:
    def call(i: int) -> Any:
        return run(i)

    call.name = name  # type: ignore[attr-defined]
    return Contestant(name, call, check)


def test_contestants_take_turns_and_short_samples_are_repeated() -> None:
    """A call of 1 us on 3 copies is repeated until a sample has 300 us; one of 1 ms is not."""
    pretended = Pretended({"a": 1e-6, "b": 1e-3})
    subject = Subject([named(n, lambda i: torch.zeros(1)) for n in "ab"], copies=3)
    times = device.DeviceTimer(pretended).time(subject, 40)
    assert [len(t) for t in times] == [40, 40]
    assert times[0] == pytest.approx([1e-6] * 40)
    assert times[1] == pytest.approx([1e-3] * 40)
    assert pretended.captured == [("a", 3, 3), ("a", 3, 300), ("b", 3, 3)]
    rounds = ["".join(pretended.order[-80:][i : i + 2]) for i in range(0, 80, 2)]
    assert set(rounds) == {"ab", "ba"}, "each once a round, in either order"


def test_an_output_that_is_not_written_is_not_timed() -> None:
    def check(out: Tensor) -> None:
        assert not out.isnan().any(), "has NaN"

    subject = Subject([named("lazy", lambda i: torch.ones(4), check)], copies=2)
    assert device.DeviceTimer(Pretended()).time(subject, 1)
    with pytest.raises(AssertionError, match="lazy: has NaN"):
        device.DeviceTimer(Pretended(writes=False)).time(subject, 1)


def test_every_copy_is_checked() -> None:
    def check(out: Tensor) -> None:
        assert out.item() < 2, f"is {out.item()}"

    subject = Subject([named("a", lambda i: torch.tensor(i), check)], copies=3)
    with pytest.raises(AssertionError, match="a: is 2"):
        device.DeviceTimer(Pretended()).time(subject, 1)


def test_poison_reaches_every_tensor_of_an_output() -> None:
    t = fastfp8.quantize(torch.randn(5, 256))
    device.Cuda.poison(None, [(t, torch.ones(3))])  # type: ignore[arg-type]
    assert (t.data.view(torch.uint8) == 0xFF).all()
    assert t.scale.isnan().all()


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(device, "copies_for", lambda nbytes: 2)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gemm, "sm90a", lambda: False)


def session() -> Session:
    timers = {"gpu": device.DeviceTimer(Pretended())}
    return Session(3, True, Ceilings(bytes=4e12, fp8=1.5e15, bf16=8e14), timers)


def test_gemm_family(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With peers that can run on a CPU; the others say why they are not there."""
    rows = [row for work in gemm.works(True) for row in work.measure(session())]
    assert [(r.op, r.backend) for r in rows] == [
        ("gemm 1x128 by 128x128, bfloat16", "fastfp8"),
        ("gemm 1x128 by 128x128, bfloat16", "BF16 cuBLAS"),
        ("gemm 1x128 by 1x128, float32", "fastfp8"),
        ("host cost of a call", "fastfp8"),
    ]
    ours = rows[0]
    assert set(ours.ratios) == {"BF16 cuBLAS"}
    assert "without DeepGEMM: deep_gemm is not installed" in (ours.note or "")
    moved = 64 * 256 + 128 * 256 + 4 * 2 * (64 + 1) + 64 * 128 * 2
    assert ours.intensity == pytest.approx(2 * 64 * 128 * 256 / moved)
    assert ours.floor == pytest.approx(moved / 4e12 * 1e6)
    monkeypatch.setattr(fastfp8, "gemm", lambda a, b, out_dtype: torch.zeros(64, 128, dtype=out_dtype))
    with pytest.raises(AssertionError, match=r"fastfp8: differs from the FP32 product by"):
        gemm.works(True)[0].measure(session())


def test_the_dense_table() -> None:
    """Every M by every weight of the table, early those of decoding and training; the goals know it by the same op."""
    told = {work.shape: work for work in gemm.works(False) if work.op == goals.DENSE_OP}
    tokens = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    table = {f"{m}x{n}x{k}" for m in tokens for n, k in DENSE_TABLE}
    assert len(table) == 84
    assert table <= set(told)
    assert [shape for shape in table if told[shape].priority > 2] == []
    first = {shape for shape, work in told.items() if work.priority == 0}
    assert first == {f"{m}x{n}x{k}" for m in (64, 4096) for n, k in DENSE_TABLE}


def test_host_cost_ends_before_the_kernels_do(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for the GPU stands outside of the clock; the bar is for the sm_90a kernels at full size."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: time.sleep(0.05))
    monkeypatch.setattr(gemm, "HOST_CALLS", 3)
    (row,) = gemm.host_cost((1, 8, 128), session())
    assert 0 < row.median < 1e4
    assert row.bar is None
    monkeypatch.setattr(gemm, "sm90a", lambda: True)
    (row,) = gemm.host_cost((1, 8, 128), dataclasses.replace(session(), tiny=False))
    assert (row.backend, row.unit, row.bar, row.samples) == (goals.BACKEND, "us", 6.0, 3)


def test_a_product_with_nan_is_wrong() -> None:
    expected = torch.ones(4, 4)
    got = expected.clone()
    gemm.check_product(expected, got)
    got[1, 1] = float("nan")
    with pytest.raises(AssertionError):
        gemm.check_product(expected, got)


@pytest.mark.parametrize("m", [128, 129])
@pytest.mark.parametrize("block", [gemm.WEIGHT, gemm.ROW])
def test_scales_as_cublaslt_wants_them(block: tuple[int, int], m: int) -> None:
    """torch's own shape function of scaled_mm, on meta tensors, takes these layouts and refuses ours of weights."""
    F = torch.nn.functional
    a, b = fastfp8.quantize(torch.randn(m, 640)), fastfp8.quantize(torch.randn(384, 640), block)
    meta = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in (a.data, a.scale, b.data)]
    left = ScaledTensor._trusted(meta[0], meta[1], (1, 128))
    right = ScaledTensor._trusted(meta[2], torch.empty_strided(b.scale.shape, b.scale.stride(), device="meta"), block)
    out = peers.cublaslt(left, right, torch.bfloat16)()
    assert (tuple(out.shape), out.dtype) == ((m, 384), torch.bfloat16)
    rows, blocks = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    if block == gemm.WEIGHT:
        with pytest.raises(RuntimeError):
            F.scaled_mm(left.data, right.data.t(), left.scale, rows, right.scale, blocks)


def test_deep_gemm_gets_its_operands(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the library's signature computes the product from what it is given."""

    def fp8_gemm_nt(a: Any, b: Any, d: Tensor, c: Tensor | None = None, recipe: Any = None) -> None:
        block = (1, 128) if recipe == (1, 1, 128) else (128, 128)
        assert a[1].stride() == (1, (a[0].shape[0] + 3) // 4 * 4), "scales of A are MN-major, padded to four"
        left, right = ScaledTensor(*a, (1, 128)).dequantize(), ScaledTensor(*b, block).dequantize()
        d.copy_(left @ right.t() if c is None else left @ right.t() + c)

    monkeypatch.setitem(sys.modules, "deep_gemm", types.SimpleNamespace(fp8_gemm_nt=fp8_gemm_nt))
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object())
    for block, dtype in ((gemm.WEIGHT, torch.bfloat16), (gemm.ROW, torch.float32)):
        subject = gemm.subject(7, 128, 256, block, dtype)
        peer = next(c for c in subject.contestants if c.backend == "DeepGEMM")
        assert peer.check is not None
        peer.check(peer.run(1))
    a, b = fastfp8.quantize(torch.randn(4, 128)), fastfp8.quantize(torch.randn(128, 128), (128, 128))
    with pytest.raises(Unavailable, match="128x128 with BF16"):
        peers.deep_gemm(a, b, torch.float32)


def test_a_peer_that_refuses_is_left_out_with_its_words(on_cpu: None) -> None:
    def refuses(a: Any, b: Any, out_dtype: Any) -> Any:
        raise ValueError("not for this shape\nand a long trace")

    a, b = fastfp8.quantize(torch.randn(4, 128)), fastfp8.quantize(torch.randn(128, 128), (128, 128))
    found, missing = peers.contestants({"x": refuses, "y": peers.bf16}, [(a, b)], torch.bfloat16, lambda out: None)
    assert [c.backend for c in found] == ["y"]
    assert missing == {"x": "ValueError: not for this shape"}


def test_quantize_family(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    rows = [row for work in quantize.works(True) for row in work.measure(session())]
    ops = [f"quantize {b}" for b in ("1x128", "128x1", "128x128")]
    assert {r.op for r in rows} == {*ops, "dequantize 1x128"}
    for op in ops:
        assert [r.backend for r in rows if r.op == op] == ["fastfp8 Triton", "clone", "torch.compile"]
    assert all(r.rate_unit == "GB/s" for r in rows)


def test_wrong_codes_are_not_timed(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    right = fastfp8.quantize

    def one_code_off(x: Tensor, block: Any) -> ScaledTensor:
        t = right(x, block)
        t.data.view(torch.uint8)[3, 5] ^= 1
        return t

    subject = quantize.quantize_subject(128, 256, (1, 128))
    monkeypatch.setattr(fastfp8, "quantize", one_code_off)
    with pytest.raises(AssertionError, match="fastfp8 Triton: only"):
        device.DeviceTimer(Pretended()).time(subject, 1)


def test_fused_family(on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op, with its codes checked; plain torch gives nearly the same, and what is not installed is named."""
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    rows = [row for work in fused.works(True) for row in work.measure(session())]
    ours = {row.op: row for row in rows if row.ours and row.backend == fused.OURS}
    assert list(ours) == list(fusions.FUSIONS)
    assert {row.op for row in rows if row.backend == "torch.compile"} == set(fused.PLAIN)
    for op, row in ours.items():
        assert row.share == pytest.approx(row.floor / row.median)  # type: ignore[operator]
        assert row.rate_unit == "GB/s"
        assert ("without torch.compile" in (row.note or "")) == (op not in fused.PLAIN)
    assert "without TransformerEngine: transformer_engine is not installed" in (ours["quantize_both"].note or "")
    assert set(ours["quantize_both"].ratios) == {"torch.compile", "quantize twice"}
    n = 128 * 256
    assert ours["quantize_both"].floor == pytest.approx((4 * n + 8 * n // 128) / 4e12 * 1e6)


@pytest.mark.parametrize("name", ["quantize_grouped_both", "unpermute", "pack_e5m6"])
def test_wrong_results_of_fused_ops_are_not_timed(on_cpu: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    subject = fused.subject(name, 128, 256)
    right = subject.contestants[0].run

    def one_bit_off(i: int) -> Any:
        out = right(i)
        torch.utils._pytree.tree_leaves(out)[0].view(torch.uint8)[3, 5] ^= 1
        return out

    wrong = dataclasses.replace(subject.contestants[0], run=one_bit_off)
    with pytest.raises(AssertionError, match="fastfp8 Triton: other bits"):
        device.DeviceTimer(Pretended()).time(Subject([wrong], 2), 1)


def test_stand_ins_for_other_libraries_get_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the names that we call them by: what they are given, and that their absence is said."""
    x = torch.zeros(4, 128)
    for make in (functools.partial(fused.transformer_engine, True), functools.partial(fused.torchao, (fused.ROWS,))):
        with pytest.raises(Unavailable, match="is not installed"):
            make(x)
    kernels = types.SimpleNamespace(triton_fp8_blockwise_act_quant_lhs=lambda t: t + 1)
    monkeypatch.setitem(sys.modules, "torchao.prototype.blockwise_fp8_training.kernels", kernels)  # type: ignore[arg-type]
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(fused.importlib, "import_module", lambda name: sys.modules[name])
    assert torch.equal(fused.torchao((fused.ROWS,), x)()[0], x + 1)  # type: ignore[index]


def test_ceilings_family(on_cpu: None, tmp_path: Any) -> None:
    report = family.Report(tmp_path / "ceilings.jsonl")
    found = {work.op: work for work in ceilings.works(True)}
    for op in ("copy", "bf16"):
        report.add(*found[op].measure(session()))
    read = family.read_ceilings(tmp_path / "ceilings.jsonl")
    by_op = {row.op: row for row in report.rows}
    assert read.bytes == pytest.approx((by_op["copy"].rate or 0) * 1e9, rel=1e-4)
    assert read.bf16 == pytest.approx((by_op["bf16"].rate or 0) * 1e12, rel=1e-4)
    assert read.fp8 is None
    assert by_op["bf16"].rate_unit == "TFLOPS"
    assert not any(row.ours for row in report.rows)


def test_without_a_gpu_nothing_is_measured() -> None:
    for module in (gemm, grouped, wgrad, swiglu, quantize, fused, ceilings):
        for work in module.works(True):
            with pytest.raises(Unavailable, match="no GPU"):
                work.measure(Session(3, True))


class FakeNvml:
    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0

    def __init__(self) -> None:
        self.samples = iter([(1980, 500_000, 60, 0x1), (1500, 690_000, 66, 0x4), (1700, 700_000, 64, 0x44)])

    def nvmlDeviceGetClockInfo(self, handle: Any, kind: int) -> int:
        self.now = next(self.samples)
        return self.now[0]

    def nvmlDeviceGetPowerUsage(self, handle: Any) -> int:
        return self.now[1]

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int) -> int:
        return self.now[2]

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Any) -> int:
        return self.now[3]


def test_telemetry() -> None:
    nvml = device.Nvml(FakeNvml(), None)
    for _ in range(3):
        nvml.sample()
    expected = {"clock_mhz": 1700.0, "power_w": 690.0, "temperature_c": 66.0, "throttle": "power cap, hardware thermal"}
    assert nvml.fields() == expected
    assert nvml.fields() == {}
    row = Row("gemm", "gemm", "1x1x1", "fastfp8", "gpu", "us", 1.0, 1.0, 1.0, **expected)
    assert row.clock_mhz == 1700.0
    # And it is in the rows of a case whose timer has it.
    case = Case("f", "op", "s", "gpu", lambda: Subject([named("fastfp8", lambda i: torch.zeros(1))]))
    pretended = Pretended()
    pretended.telemetry = device.Nvml(FakeNvml(), None)  # type: ignore[assignment]
    assert case.measure(Session(3, timers={"gpu": device.DeviceTimer(pretended)}))[0].power_w == 690.0
