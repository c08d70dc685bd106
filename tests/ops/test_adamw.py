"""adamw on every backend, bit by bit, against an oracle in NumPy that shares no code with the library."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
import torch
from backends import BACKENDS, assert_same_bits, backend_params, from_numpy
from opcheck import opcheck
from torch import Tensor

import fastfp8
from fastfp8.counters import new_counters
from fastfp8.layout import empty_scale, scale_shape_of
from fastfp8.numerics import totals
from fastfp8.ops.adamw import adamw
from fastfp8.reference.adamw import factors, philox

F32, BF16, E4M3 = torch.float32, torch.bfloat16, torch.float8_e4m3fn
EVERYWHERE = backend_params([name for name in BACKENDS if name != "cuda_triton"])
NUMBERS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(300,), (), (0, 5), (3, 700), (130, 136), (2049,), (2, 3, 5)]
MATRICES = [(130, 136), (16, 128), (3, 5), (2, 129, 144), (1, 257), (0, 128)]


class Work:
    """Arguments of a step: tensors of ``shapes``, each in memory of its own, ``offset`` elements into it."""

    def __init__(
        self,
        shapes: list[tuple[int, ...]],
        param: torch.dtype = BF16,
        grad: torch.dtype = F32,
        moment: torch.dtype = BF16,
        *,
        fp8: bool = False,
        counted: bool = False,
        offset: int = 0,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def make(shape: tuple[int, ...], dtype: torch.dtype, factor: float = 1.0, positive: bool = False) -> Tensor:
            values = torch.randn(shape, generator=generator) * factor
            count = math.prod(shape)
            out = torch.zeros(count + offset, dtype=dtype)[offset:].view(shape)
            return out.copy_(values.abs() if positive else values)

        masters = [make(s, F32) for s in shapes]
        self.params = masters if param == F32 else [m.to(param) for m in masters]
        self.masters = [] if param == F32 else masters
        self.grads = [make(s, grad, 0.1) for s in shapes]
        self.exp_avgs = [make(s, moment, 0.1) for s in shapes]
        self.exp_avg_sqs = [make(s, moment, 0.01, True) for s in shapes]
        self.fp8: list[Tensor] = []
        for s in shapes if fp8 else []:
            for shape in (s, (*s[:-2], s[-1], s[-2])):
                data = torch.full(shape, math.nan).to(E4M3)
                scale = empty_scale(data, scale_shape_of(shape, (128, 128)), (128, 128)).fill_(math.nan)
                self.fp8 += [data, scale]
        self.counters = [new_counters("cpu") for _ in shapes] if counted else []
        self.indices = [3 * i + 1 for i in range(len(shapes))]

    def lists(self) -> list[list[Tensor]]:
        return [self.params, self.grads, self.masters, self.exp_avgs, self.exp_avg_sqs, self.fp8]

    def to(self, device: str) -> list[list[Tensor]]:
        return [
            [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device).copy_(t) for t in ts]
            for ts in self.lists()
        ]


def host(module: ModuleType, work: Work, options: dict[str, Any]) -> None:
    """The Triton host function, as the op calls it."""
    o = dict(options)
    step, stochastic, seed = o.pop("step"), o.pop("stochastic_rounding", False), o.pop("seed", 0)
    module.adamw(*work.lists(), work.counters, work.indices, step, factors(step, **o), stochastic, seed)


def run_emulated(work: Work, options: dict[str, Any]) -> int:
    """With the PTX for sm_90 in place of each launch; returns how many there were."""
    from triton_launch import Emulated

    from fastfp8.triton_kernels import adamw as module

    kernel, launches = module.adamw_kernel, 0
    emulated = Emulated(seed=0)
    emulated.memory = tuple(t for ts in (*work.lists(), work.counters) for t in ts if t.numel())

    class Launcher:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*args: Any, **kwargs: Any) -> None:
                nonlocal launches
                launches += 1
                emulated(kernel, grid, *args, **kwargs)

            return launch

    with mock.patch.object(module, "adamw_kernel", Launcher()):
        host(module, work, options)
    return launches


def run(name: str, work: Work, **options: Any) -> None:
    """A step on a backend, in place."""
    options = {"step": 7, **NUMBERS, **options}
    if name == "reference":
        adamw(*work.lists(), work.indices, counters=work.counters, **options)
    elif name == "triton_interpreter":
        from interpreter import interpreted

        from fastfp8.triton_kernels import adamw as module  # first, so that its kernel is swapped

        with interpreted(memory=[t for ts in (*work.lists(), work.counters) for t in ts]):
            host(module, work, options)
    elif name == "emulator":
        run_emulated(work, options)
    else:
        on_gpu, counters = work.to("cuda"), [c.cuda() for c in work.counters]
        adamw(*on_gpu, work.indices, counters=counters, **options)
        for mine, theirs in zip([*work.lists(), work.counters], [*on_gpu, counters], strict=True):
            for t, result in zip(mine, theirs, strict=True):
                t.copy_(result)


def philox_words(counter: tuple[int, int, int, int], seed: int) -> tuple[int, ...]:
    """One counter at a time, with Python's integers."""
    c, key = list(counter), [seed % 2**32, seed >> 32]
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [second >> 32 ^ c[1] ^ key[0], second % 2**32, first >> 32 ^ c[3] ^ key[1], first % 2**32]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


def words_of(count: int, step: int, index: int, seed: int) -> np.ndarray:
    groups = [philox_words((i % 2**32, i >> 32, step, index), seed) for i in range((count + 3) // 4)]
    return np.array([word for group in groups for word in group][:count], np.uint32)


def rounded(x: np.ndarray, dtype: torch.dtype, random: np.ndarray | None) -> Tensor:
    """FP32 values as moments are kept."""
    if dtype == F32:
        return torch.from_numpy(x)
    if random is None:
        return from_numpy(x.astype(ml_dtypes.bfloat16), BF16)
    # Of the two neighbours in BF16 the larger one if the distance to the smaller, in 2^-16, and the bits reach 1.
    bits = x.view(np.uint32)
    cut, low = bits >> 16, bits & 0xFFFF
    result = (cut + (low + random >= 1 << 16)).astype(np.uint16)
    return from_numpy(np.where(np.isnan(x), np.uint16(0x7FC0), result), BF16)


def oracle(work: Work, *, stochastic_rounding: bool = False, seed: int = 0, **options: Any) -> list[list[Tensor]]:
    """Masters, parameters, first and second moments after a step: NumPy rounds each operation to FP32."""
    o = {"step": 7, **NUMBERS, **options}
    (b1, b2), step = o["betas"], o["step"]
    f = np.float32
    decay, root, rate = f(1 - o["lr"] * o["weight_decay"]), f(1 / math.sqrt(1 - b2**step)), f(o["lr"] / (1 - b1**step))
    results: list[list[Tensor]] = [[], [], [], []]
    for i, param in enumerate(work.params):
        shape, kept = param.shape, work.exp_avgs[i].dtype
        p, g, m, v = (
            t.float().flatten().numpy()
            for t in ((work.masters or work.params)[i], work.grads[i], work.exp_avgs[i], work.exp_avg_sqs[i])
        )
        with np.errstate(all="ignore"):
            m = m * f(b1) + g * f(1 - b1)
            v = v * f(b2) + g * g * f(1 - b2)
            p = p * decay - m / (np.sqrt(v) * root + f(o["eps"])) * rate
            words = words_of(len(p), step, work.indices[i], seed) if stochastic_rounding and kept == BF16 else None
            moments = (
                rounded(x, kept, None if words is None else words >> 16 * k & 0xFFFF) for k, x in enumerate((m, v))
            )
            values = (torch.from_numpy(p), rounded(p, param.dtype, None), *moments)
        for out, value in zip(results, values, strict=True):
            out.append(value.view(shape))
    return results


def check(name: str, work: Work, **options: Any) -> None:
    grads = [g.clone() for g in work.grads]
    expected = oracle(work, **options)
    run(name, work, **options)
    got = [work.masters or work.params, work.params, work.exp_avgs, work.exp_avg_sqs]
    for what, ours, theirs in zip(("master", "param", "exp_avg", "exp_avg_sq"), got, expected, strict=True):
        for i, (t, want) in enumerate(zip(ours, theirs, strict=True)):
            assert_same_bits(t, want, f"{what} {i}")
    for before, after in zip(grads, work.grads, strict=True):
        assert_same_bits(after, before, "a gradient")
    for i in range(len(work.fp8) // 4):
        counts = new_counters("cpu")
        want = fastfp8.quantize(expected[0][i], (128, 128), counters=counts)
        if work.counters:
            assert totals(work.counters[i]) == totals(counts)
        for t, value in zip(
            work.fp8[4 * i : 4 * i + 4], (want.data, want.scale, want.data.mT, want.scale.mT), strict=True
        ):
            assert_same_bits(t, value, f"fp8 of {i}")


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(counter: tuple[int, int, int, int], seed: int, words: tuple[int, ...]) -> None:
    """Those that come with Random123, the authors' own implementation."""
    assert philox_words(counter, seed) == words
    tensors = [torch.tensor([c]) for c in counter[:2]]
    assert tuple(w.item() for w in philox((tensors[0], tensors[1], *counter[2:]), seed)) == words


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("moment", [F32, BF16], ids=str)
@pytest.mark.parametrize("grad", [F32, BF16], ids=str)
@pytest.mark.parametrize("param", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_dtypes(name: str, param: torch.dtype, grad: torch.dtype, moment: torch.dtype, stochastic: bool) -> None:
    work = Work(SHAPES, param, grad, moment)
    check(name, work, stochastic_rounding=stochastic, seed=0x1234_5678_9ABC_DEF0)


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("param", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_fp8(name: str, param: torch.dtype, stochastic: bool) -> None:
    """Also that random bits are those of the element, whatever tile it is in."""
    check(name, Work(MATRICES, param, fp8=True, counted=param == BF16), stochastic_rounding=stochastic, seed=5)


@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
@pytest.mark.parametrize("name", EVERYWHERE)
def test_tensors_that_start_anywhere(name: str, fp8: bool) -> None:
    check(name, Work(MATRICES, fp8=fp8, counted=fp8, offset=1), stochastic_rounding=True)


@pytest.mark.parametrize("name", EVERYWHERE)
@pytest.mark.parametrize("step", [1, 2, 16, 100000])
def test_steps(name: str, step: int) -> None:
    check(name, Work([(70,)]), step=step, stochastic_rounding=True)


@pytest.mark.parametrize(
    "options",
    [{"betas": (0.0, 0.0)}, {"eps": 0.0}, {"lr": 0.0}, {"weight_decay": 0.0}, {"betas": (0.99, 0.9999), "lr": 30.0}],
    ids=str,
)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_numbers(name: str, options: dict[str, Any]) -> None:
    check(name, Work([(200,), (40, 5)], fp8=False), **options)
    check(name, Work([(3, 9)], fp8=True), **options)


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("name", EVERYWHERE)
def test_special_values(name: str, stochastic: bool) -> None:
    """NaN, infinities, what overflows and what is subnormal, in each tensor; none touches its neighbour."""
    special = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 3.3e38, -3e38, 1e-40, -1e-45, 0.0, -0.0, 1.0])
    n = len(special)
    for which in ("masters", "grads", "exp_avgs", "exp_avg_sqs"):
        work = Work([(n, n), (n * n,)], moment=BF16)
        for t in getattr(work, which):
            t.view(n, n).copy_(special[:, None] * torch.tensor([1.0] * (n - 1) + [0.5]))
        check(name, work, stochastic_rounding=stochastic)
    work = Work([(n, n)], fp8=True, counted=True)
    work.masters[0][3] = special
    work.masters[0][4] = 3e38 * 2.0 ** -torch.arange(12.0, 12 + n)  # beside what is near the largest
    for ts in (work.grads, work.exp_avgs):
        ts[0][4] = 0.0
    check(name, work, stochastic_rounding=stochastic)
    assert min(totals(work.counters[0])) > 0


@pytest.mark.parametrize("name", EVERYWHERE)
def test_any_nan_stays_one_where_rounding_is_stochastic(name: str) -> None:
    """Of a NaN whose payload is all ones the carry would make a zero, of one whose payload is 1 an infinity."""
    work = Work([(64,)], F32, F32, BF16)
    work.grads[0].view(torch.int32).copy_(torch.tensor([0x7FFFFFFF, 0x7F800001, -1, 0x7FC00000] * 16))
    run(name, work, stochastic_rounding=True)
    assert work.exp_avgs[0].isnan().all()
    assert work.exp_avg_sqs[0].isnan().all()


@pytest.mark.parametrize("name", EVERYWHERE)
def test_stochastic_rounding_is_right_on_average(name: str) -> None:
    """exp_avg becomes 1 + 2^-10, a quarter of the way from 1 to the next BF16: a quarter of 4096 are rounded up."""
    n = 4096
    work = Work([(n,)], F32, F32, BF16)
    work.exp_avgs[0].zero_()
    work.grads[0].fill_(1 + 2.0**-9)
    run(name, work, stochastic_rounding=True, betas=(0.0, 0.0), seed=11)
    up = (work.exp_avgs[0] > 1).sum().item()
    assert set(work.exp_avgs[0].tolist()) == {1.0, 1 + 2.0**-7}
    assert abs(up - n / 4) < 5 * math.sqrt(n * 3 / 16)
    # (1 + 2^-9)^2 is just above 1 + 2^-8: half of them.
    up_sq = (work.exp_avg_sqs[0] > 1).sum().item()
    assert abs(up_sq - n / 2) < 5 * math.sqrt(n / 4)
    # Independent of each other.
    both = ((work.exp_avgs[0] > 1) & (work.exp_avg_sqs[0] > 1)).sum().item()
    assert abs(both - n / 8) < 5 * math.sqrt(n * 7 / 64)


@pytest.mark.parametrize("changed", [{"seed": 1}, {"seed": 1 << 40}, {"step": 8}, {"indices": [5]}], ids=str)
def test_what_random_bits_depend_on(changed: dict[str, Any]) -> None:
    results = []
    for options in ({}, {}, changed):
        work = Work([(64,)])
        work.indices = options.get("indices", [4])
        run("reference", work, stochastic_rounding=True, **{k: v for k, v in options.items() if k != "indices"})
        results.append(work.exp_avgs[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_one_launch_for_a_list() -> None:
    pytest.importorskip("triton")
    options = {"step": 1, **NUMBERS}
    assert run_emulated(Work([(256,), (64, 32), (4096,)]), options) == 1
    assert run_emulated(Work([(128, 32), (256, 160)], fp8=True), options) == 1
    assert run_emulated(Work([(256,), (64, 32), (7,), (9,)]), options) == 2  # the last two end between 16 bytes
    assert run_emulated(Work([(0,), (0, 3)]), options) == 0


def test_reference_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastfp8.reference import adamw as module

    whole, parts = Work([(130, 136)]), Work([(130, 136)])
    run("reference", whole, stochastic_rounding=True)
    monkeypatch.setattr(module, "_CHUNK", 512)
    run("reference", parts, stochastic_rounding=True)
    for one, other in zip(whole.lists(), parts.lists(), strict=True):
        for left, right in zip(one, other, strict=True):
            assert_same_bits(left, right, "a tensor")


def op_arguments(**options: Any) -> tuple[Any, ...]:
    work = Work([(5, 16), (130, 8)], **options)
    for t in work.fp8:
        t.copy_(torch.ones(t.shape))
    numbers = (NUMBERS["lr"], NUMBERS["betas"], NUMBERS["eps"], NUMBERS["weight_decay"])
    return (*work.lists(), work.counters, work.indices, 2, *numbers, True, 3)


@pytest.mark.parametrize(
    "options", [{}, {"param": F32, "grad": BF16}, {"fp8": True}, {"fp8": True, "counted": True}], ids=str
)
def test_opcheck(options: dict[str, Any]) -> None:
    opcheck(torch.ops.fastfp8.adamw.default, op_arguments(**options))


@pytest.mark.parametrize("options", [{}, {"fp8": True}, {"fp8": True, "counted": True}], ids=str)
def test_compiled(options: dict[str, bool]) -> None:
    """In one graph, which sees what is written."""

    def step(work_lists: list[list[Tensor]], counters: list[Tensor]) -> Tensor:
        adamw(*work_lists, [1, 4], step=3, counters=counters, **NUMBERS)
        return work_lists[2][0] * 2

    eager, compiled = (Work([(5, 16), (130, 8)], **options) for _ in range(2))
    torch._dynamo.reset()
    doubled = torch.compile(step, backend="aot_eager", fullgraph=True)(compiled.lists(), compiled.counters)
    assert_same_bits(doubled, step(eager.lists(), eager.counters), "what follows the step")
    for counted, wanted in zip(compiled.counters, eager.counters, strict=True):
        assert totals(counted) == totals(wanted)
        assert totals(wanted).values > 0
    for left, right in zip(eager.lists(), compiled.lists(), strict=True):
        for one, other in zip(left, right, strict=True):
            assert_same_bits(other, one, "a tensor")


def test_what_is_written_has_a_new_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though torch sees nothing of what a kernel writes."""
    monkeypatch.setattr(torch.ops.fastfp8, "adamw", lambda *args: None)
    work = Work([(16, 16)], fp8=True, counted=True)
    lists = (work.params, work.masters, work.exp_avgs, work.exp_avg_sqs, work.fp8, work.counters)
    written = [t for ts in lists for t in ts]
    before = [t._version for t in written]
    run("reference", work)
    assert all(t._version > version for t, version in zip(written, before, strict=True))


def bad(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda arguments: arguments.update({name: value})


def in_list(name: str, make: Callable[[Tensor], Tensor], at: int = 0) -> Callable[[dict[str, Any]], None]:
    def change(arguments: dict[str, Any]) -> None:
        arguments[name][at] = make(arguments[name][at])

    return change


BAD: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (bad("grads", []), r"'grads': expected 2 tensors, as 'params' has, got 0"),
    (bad("masters", []), r"'masters': expected 2 tensors"),
    (bad("exp_avgs", []), r"'exp_avgs': expected 2 tensors"),
    (bad("exp_avg_sqs", []), r"'exp_avg_sqs': expected 2 tensors"),
    (bad("indices", [1]), r"'indices': expected 2, as many as 'params', got 1"),
    (bad("step", 0), r"'step': expected 1 or more, got 0"),
    (bad("lr", -1.0), r"'lr': expected a finite number"),
    (bad("betas", (0.9, 1.0)), r"'betas': expected two numbers from 0 to below 1"),
    (bad("eps", math.nan), r"'eps': expected a finite number"),
    (bad("weight_decay", math.inf), r"'weight_decay': expected a finite number"),
    (bad("seed", -1), r"'seed': expected an integer from 0 to"),
    (
        in_list("params", Tensor.half),
        r"'params\[0\]': expected dtype torch.float32 or torch.bfloat16, got torch.float16",
    ),
    (in_list("params", Tensor.float), r"'params': expected one dtype"),
    (in_list("grads", Tensor.double), r"'grads\[0\]': expected dtype"),
    (in_list("grads", lambda t: t[0]), r"'grads\[0\]': expected 2 dimensions"),
    (in_list("grads", lambda t: t[:1]), r"'grads\[0\]': expected shape \(5, 16\), got shape \(1, 16\)"),
    (in_list("grads", lambda t: t.t().contiguous().t(), 1), r"'grads\[1\]': expected a contiguous tensor, got stride"),
    (in_list("grads", lambda t: t.to("meta")), r"'grads\[0\]': expected device cpu|different devices|meta"),
    (in_list("masters", Tensor.bfloat16), r"'masters\[0\]': expected dtype torch.float32, got torch.bfloat16"),
    (in_list("exp_avgs", Tensor.float), r"'exp_avg_sqs\[0\]': expected torch.float32, as 'exp_avgs\[0\]' is"),
    (in_list("fp8", Tensor.float), r"'fp8\[0\], data,': expected dtype torch.float8_e4m3fn"),
    (in_list("fp8", lambda t: t.t(), 2), r"'fp8\[2\], transposed data,': expected shape \(16, 5\)"),
    (in_list("fp8", lambda t: t[:0], 5), r"'fp8\[5\], scale,': expected shape \(2, 1\)"),
    (lambda a: a["fp8"].pop(), r"'fp8': expected none or 8 tensors, four a parameter, got 7"),
    (lambda a: a["counters"].pop(), r"'counters': expected none or 2, one a parameter, got 1"),
    (bad("fp8", []), r"'counters': expected none, as 'fp8' is empty, got 2"),
    (in_list("counters", Tensor.int, 1), r"'counters\[1\]': expected dtype torch.int64, got torch.int32"),
    (in_list("counters", lambda t: t[:8]), r"'counters\[0\]': expected shape \(32, 5\), as fastfp8.numerics"),
    (in_list("counters", lambda t: t.to("meta")), r"'counters\[0\]': expected device cpu|different devices|meta"),
]


@pytest.mark.parametrize(("change", "text"), BAD, ids=[text[:40] for _, text in BAD])
def test_bad_input(change: Callable[[dict[str, Any]], None], text: str) -> None:
    """Through both entrances, and nothing is written."""
    work = Work([(5, 16), (130, 8)], fp8=True, counted=True)
    names = ("params", "grads", "masters", "exp_avgs", "exp_avg_sqs", "fp8", "counters")
    lists = (*work.lists(), work.counters)
    arguments = {**dict(zip(names, lists, strict=True)), "indices": [0, 1], "step": 1, **NUMBERS}
    before = work.params[1].clone()
    change(arguments)
    with pytest.raises(RuntimeError, match=rf"fastfp8\.adamw: argument {text}"):
        adamw(**arguments)
    with pytest.raises(RuntimeError, match=rf"fastfp8\.adamw: argument {text}"):
        torch.ops.fastfp8.adamw(**arguments)
    assert_same_bits(work.params[1], before, "a parameter")


def test_masters_of_float32_parameters() -> None:
    work = Work([(5,)], F32)
    work.masters = [work.params[0].clone()]
    with pytest.raises(ValueError, match="'masters': expected none, as 'params' are float32, got 1"):
        run("reference", work)


def test_fp8_of_a_vector() -> None:
    work = Work([(5,)])
    work.fp8 = Work([(5, 1)], fp8=True).fp8
    with pytest.raises(ValueError, match=r"'params\[0\]': expected 2 or 3 dimensions, as 'fp8' is given, got 1"):
        run("reference", work)
