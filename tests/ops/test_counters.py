"""What the quantising ops count, on every backend, against the codes that they give."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from backends import Emulator, Reference, TritonInterpreter, backend, backend_params
from groups import ends_of
from opcheck import opcheck
from placement import aligned, on_gpu
from test_quantize import as_tensor, make
from torch import Tensor

import fastfp8
from fastfp8.counters import LANES, new_counters
from fastfp8.layout import BLOCKS, empty_scale
from fastfp8.numerics import Counts, totals
from fastfp8.reference.activation import swiglu, swiglu_backward

OPS = torch.ops.fastfp8
NAMES = ("reference", "triton_interpreter", "emulator", "cuda")
ROWS, COLS = 130, 264  # with ragged blocks, and programs more than lanes
SIZES = (0, 5, 120)  # of groups, so that some rows belong to none


class Case(NamedTuple):
    """``x`` makes of the arguments the values [R, C] that are quantised, ``codes`` of the results the code of each.

    There are as many functions ``codes`` as counters, and ``x`` makes one for all of them or a tuple.
    """

    op: Any
    args: tuple[Any, ...]
    module: str
    host: str
    x: Callable[..., Tensor | tuple[Tensor, ...]]
    codes: tuple[Callable[[tuple[Tensor, ...]], Tensor], ...]
    names: tuple[str, ...] = ("counters", "counters_t")

    def named(self, counters: Iterable[Any]) -> dict[str, Any]:
        return dict(zip(self.names, counters, strict=False))


def values(rows: int = ROWS, cols: int = COLS) -> Tensor:
    """Of all sizes, with infinities, NaN and zeros among them; the first block has what is on an edge."""
    x = make("mixed", (rows, cols))
    x[0, :128] = 0.0
    edges = [k * 2.0**-10 for k in (0.5, 1, 1.5, 3, 13, 14.9, 15, 15.1, 16)]
    x[0, : len(edges) + 2] = [448.0, np.inf, *edges]
    return as_tensor(x, torch.float32)


def cases() -> dict[str, Case]:
    x, first = values(), operator.itemgetter(0)
    t, where = fastfp8.quantize(x, pow2=True), fastfp8.row_map(torch.arange(ROWS)[:, None] % 3, 3).rows
    ends, taken = ends_of(SIZES), slice(0, sum(SIZES))
    found = {
        f"quantize-{block}": Case(
            OPS.quantize.counted, (x, block, False, 0.0), "quantize", "quantize", lambda x, *_: x, (first,)
        )
        for block in BLOCKS
    }
    both = ("quantize_both", "quantize_both", lambda x, *_: x, (first, lambda out: out[2][:, :ROWS].t()))
    found["quantize_both"] = Case(OPS.quantize_both.counted, (x, True, 0.0), *both)
    found["quantize_grouped_both"] = Case(
        OPS.quantize_grouped_both.counted,
        (x, ends, None, False, 0.0),
        "quantize_both",
        "quantize_grouped_both",
        lambda x, *_: x[taken],
        (lambda out: out[0][taken], lambda out: _of_groups(out[2])),
    )
    wide = lambda data, scale, *_: fastfp8.ScaledTensor(data, scale, (1, 128)).dequantize(torch.float32)  # noqa: E731
    module = "requantize_transpose"
    found[module] = Case(
        OPS.requantize_transpose.counted, (t.data, t.scale), module, module, wide, (lambda out: out[0][:, :ROWS].t(),)
    )
    found["requantize_transpose, grouped"] = Case(
        OPS.requantize_transpose.grouped_counted,
        (t.data, t.scale, ends, None),
        module,
        "requantize_grouped_transpose",
        lambda *args: wide(*args)[taken],
        (lambda out: _of_groups(out[0]),),
    )
    module = "swiglu_quantize"
    weight = torch.linspace(-2, 2, ROWS)
    weight[::9] = torch.inf
    found[module] = Case(
        OPS.swiglu_quantize.counted,
        (x, weight, 7.0, False, 0.0),
        module,
        module,
        lambda x, w, *_: swiglu(x[:, : COLS // 2], x[:, COLS // 2 :], w, 7.0),
        (first,),
    )
    # An infinity would leave nothing of its row but NaN and zeros, so they come from the weight.
    gain, rstd, tame = torch.linspace(-2, 2, COLS), torch.linspace(0.5, 2, ROWS), x.nan_to_num(1.0).clamp(-99.0, 99.0)
    gain[9] = torch.inf
    tame[3, 0] = torch.nan
    found["rmsnorm_quantize"] = Case(
        OPS.rmsnorm_quantize.counted,
        (tame, gain, 1e-6, tame.bfloat16(), False, 0.0),
        "rmsnorm",
        "rmsnorm_quantize",
        lambda *args: normalized(*args[:4]),
        (first,),
    )
    found["rmsnorm_quantize_transpose"] = Case(
        OPS.rmsnorm_quantize_transpose.counted,
        (x, gain, rstd, False, 0.0),
        "rmsnorm",
        "rmsnorm_quantize_transpose",
        lambda x, gain, rstd, *_: x * rstd[:, None] * gain,
        (lambda out: out[0][:, :ROWS].t(),),
    )
    found["permute_quantize"] = Case(
        OPS.permute_quantize.counted,
        (x, where, False, 0.0),
        "permute",
        "permute_quantize",
        lambda x, *_: x,
        (lambda out: out[0][where[:, 0].long()],),
    )
    packed = fastfp8.pack_e5m6(x)
    found["requantize_e5m6"] = Case(
        OPS.requantize_e5m6.counted,
        (packed.words, packed.scale, COLS, False, False),
        "e5m6",
        "requantize_e5m6",
        lambda *_: fastfp8.unpack_e5m6(packed, torch.float32),
        (first,),
    )
    return found | backward_cases() | gemm_cases()


def backward_cases() -> dict[str, Case]:
    """Of swiglu_backward_quantize, FP8 gates and groups in one and neither in the other."""
    grad, gate_up, ends, taken = values(ROWS, 128).roll(64, 1), values(ROWS, 256), ends_of(SIZES), sum(SIZES)
    gate_up[20:40, ::7], gate_up[40:, 3] = 3.0, -60.0
    t = fastfp8.quantize(gate_up)

    def x(rows: int, both: Tensor, limit: float | None = None) -> tuple[Tensor, ...]:
        found = swiglu_backward(grad[:rows], both[:rows, :128], both[:rows, 128:], None, limit)
        gradient = torch.cat([found.grad_gate, found.grad_up], 1)
        return found.value, gradient, gradient

    op, host = OPS.swiglu_backward_quantize.counted, ("swiglu_backward_quantize",) * 2
    names = ("activation_counters", "counters", "counters_t")
    return {
        "swiglu_backward_quantize": Case(
            op,
            (grad, gate_up, None, None, None, None, None, True, 0.0, False),
            *host,
            lambda *_: x(ROWS, gate_up),
            (lambda out: out[0][:, :ROWS].t(), lambda out: out[2], lambda out: out[4][:, :ROWS].t()),
            names,
        ),
        "swiglu_backward_quantize, grouped": Case(
            op,
            (grad, t.data, t.scale, None, 7.0, ends, None, False, 0.0, False),
            *host,
            lambda *_: x(taken, t.dequantize(torch.float32), 7.0),
            (lambda out: _of_groups(out[0]), lambda out: out[2][:taken], lambda out: _of_groups(out[4])),
            names,
        ),
    }


def gemm_cases() -> dict[str, Case]:
    """Of gemm_swiglu_quantize: sums of small integers, which are exact, so that all backends have the same."""
    generator = torch.Generator().manual_seed(0)
    shapes = (ROWS, 16), (256, 16), (len(SIZES), 256, 16)
    a, b, bs = (torch.randint(-3, 4, s, generator=generator).float().to(torch.float8_e4m3fn) for s in shapes)
    # Gates down to -70 or so, of which SwiGLU makes what is zero in FP8.
    a_scale = empty_scale(a, (ROWS, 1), (1, 128)).copy_(2.0 ** -(torch.arange(ROWS) % 3)[:, None])
    weight, ends, taken = torch.linspace(-2, 2, ROWS), ends_of(SIZES), slice(0, sum(SIZES))
    weight[::9] = torch.inf

    def x(rows: slice, *args: Any) -> Tensor:
        gate_up = OPS.gemm_swiglu_quantize(*args[:-1], True)[2][rows].float()
        weight = None if args[6] is None else args[6][rows]
        return swiglu(gate_up[:, :128], gate_up[:, 128:], weight, args[7])

    op, host = OPS.gemm_swiglu_quantize.counted, ("gemm_swiglu_quantize",) * 2
    dense, grouped = (a, a_scale, b, torch.ones(2, 1)), (a, a_scale, bs, torch.ones(len(SIZES), 2, 1), ends)
    return {
        "gemm_swiglu_quantize": Case(
            op,
            (*dense, None, None, weight, None, True, 0.0, False),
            *host,
            functools.partial(x, slice(None)),
            (lambda out: out[0],),
        ),
        "gemm_swiglu_quantize, grouped": Case(
            op,
            (*grouped, None, weight, 9.0, False, 1e-4, False),
            *host,
            functools.partial(x, taken),
            (lambda out: out[0][taken],),
        ),
    }


def normalized(x: Tensor, gain: Tensor, eps: float, residual: Tensor) -> Tensor:
    """What is quantised."""
    *_, rstd, summed = OPS.rmsnorm_quantize(x, gain, eps, residual)
    return summed.float() * rstd[:, None] * gain


def _of_groups(data_t: Tensor) -> Tensor:
    """The codes of the rows of each group, one after the other, of a grouped transpose."""
    parts, first = [], 0
    for size in SIZES:
        parts.append(data_t[:, first : first + size])
        first += -(-size // 128) * 128
    return torch.cat(parts, 1).t()


CASES = cases()


def expected(x: Tensor, codes: Tensor) -> Counts:
    """By the codes, and by no product."""
    magnitude = codes.contiguous().view(torch.uint8) & 0x7F
    finite = x.isfinite()
    flags = (x.isinf(), finite & (x != 0) & (magnitude == 0), (magnitude > 0) & (magnitude < 8), ~finite)
    assert (magnitude[x.isinf()] == 0x7E).all()
    return Counts(x.numel(), *(int(flag.sum()) for flag in flags))


def run(name: str, case: Case, args: tuple[Any, ...], counters: list[Tensor]) -> tuple[Tensor, ...]:
    b = backend(name)
    if isinstance(b, Reference):
        return case.op(*args, **case.named(counters))
    if not isinstance(b, (TritonInterpreter, Emulator)):
        device = [on_gpu(c) for c in counters]
        moved = (on_gpu(arg) if isinstance(arg, Tensor) else arg for arg in args)
        out = case.op(*moved, **case.named(device))
        for c, counted in zip(counters, device, strict=True):
            c.copy_(counted)
        return tuple(t.cpu() for t in out)
    module = __import__(f"fastfp8.triton_kernels.{case.module}", fromlist=[""])
    args = tuple(aligned(arg) if isinstance(arg, Tensor) else arg for arg in args)
    host = functools.partial(getattr(module, case.host), *args, **case.named(counters))
    if isinstance(b, Emulator):
        kernel = case.host if case.module in ("e5m6", "rmsnorm") else case.module
        return b._run_triton(module, f"{kernel}_kernel", host)
    with b._interpreted():
        return host()


# Each is a compilation of its own; the others count by the same function.
QUICK_EMULATED = ("quantize-(1, 128)", "quantize_both")


def runs() -> list[Any]:
    """Backends and ops."""
    return [
        pytest.param(*param.values, op, marks=[*param.marks, *([pytest.mark.slow] if slow else [])], id=f"{name}-{op}")
        for name, param in zip(NAMES, backend_params(NAMES), strict=True)
        for op in CASES
        for slow in (name == "emulator" and op not in QUICK_EMULATED,)
    ]


@pytest.mark.parametrize(("name", "op"), runs())
def test_counts(name: str, op: str) -> None:
    """Added to what the counters have; nothing else changes."""
    case = CASES[op]
    counters = [new_counters("cpu") for _ in case.codes]
    for c in counters:
        c[LANES - 1] = 1000
    out = run(name, case, case.args, counters)
    x = case.x(*case.args)
    for c, codes, of in zip(counters, case.codes, x if isinstance(x, tuple) else [x] * len(counters), strict=True):
        counted = Counts(*(n - 1000 for n in totals(c)))
        assert counted == expected(of, codes(out))
        # Every kind occurs, but that of FP8 nothing is infinite.
        assert min(counted if of.isinf().any() else counted._replace(saturated=1)) > 0


SMALL = torch.arange(-8 * 128.0, 8 * 128.0).view(8, 256).bfloat16()


@pytest.mark.parametrize("op", CASES)
def test_opcheck(op: str) -> None:
    """In small, with rows of groups only: the others' codes are undefined."""
    case, t, packed = CASES[op], fastfp8.quantize(SMALL), fastfp8.pack_e5m6(SMALL)
    square = fastfp8.quantize(SMALL.repeat(32, 1), (128, 128))
    small: dict[str, tuple[Any, ...]] = {
        "quantize_grouped_both": (SMALL, ends_of((3, 5)), None),
        "requantize_transpose": (t.data, t.scale),
        "requantize_transpose, grouped": (t.data, t.scale, ends_of((3, 5)), None),
        "swiglu_quantize": (SMALL, torch.ones(8)),
        "permute_quantize": (SMALL, torch.arange(8, dtype=torch.int32)[:, None]),
        "requantize_e5m6": (packed.words, packed.scale, 256),
        "swiglu_backward_quantize": (SMALL[:, :128], SMALL),
        "swiglu_backward_quantize, grouped": (SMALL[:, :128], t.data, t.scale, None, None, ends_of((3, 5))),
        "rmsnorm_quantize": (SMALL, torch.ones(256)),
        "rmsnorm_quantize_transpose": (SMALL, torch.ones(256), torch.ones(8)),
        "gemm_swiglu_quantize": (t.data, t.scale, square.data, square.scale),
        "gemm_swiglu_quantize, grouped": (
            *(t.data, t.scale, torch.stack([square.data] * 2), torch.stack([square.scale] * 2), ends_of((3, 5))),
        ),
    }
    opcheck(case.op, small.get(op, (SMALL,)), case.named(new_counters("cpu") for _ in case.codes))


def test_counting_changes_the_version_and_no_bit() -> None:
    counters = new_counters("cpu")
    version = counters._version
    counted, plain = fastfp8.quantize(SMALL, counters=counters), fastfp8.quantize(SMALL)
    assert torch.equal(counted.data.view(torch.uint8), plain.data.view(torch.uint8))
    assert torch.equal(counted.scale, plain.scale)
    assert counters._version > version


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (torch.zeros(LANES, 5), TypeError, "dtype torch.int64, got torch.float32"),
        (torch.zeros(5, dtype=torch.int64), ValueError, "2 dimensions, got shape (5,)"),
        (torch.zeros(LANES, 4, dtype=torch.int64), ValueError, "shape (32, 5), as fastfp8.numerics.new_counters makes"),
        (torch.zeros(5, LANES, dtype=torch.int64).t(), ValueError, "a contiguous tensor, got stride (1, 32)"),
        (new_counters("meta"), ValueError, "device cpu"),
        ("all", TypeError, "a torch.Tensor, got str"),
    ],
    ids=["dtype", "dimensions", "shape", "stride", "device", "type"],
)
def test_bad_counters(op: str, bad: Any, error: type[Exception], words: str) -> None:
    """Through the public functions."""
    t, grad = fastfp8.quantize(SMALL), SMALL[:, :128]
    square = fastfp8.quantize(SMALL.repeat(32, 1), (128, 128))
    calls: dict[str, Callable[[], object]] = {
        "quantize_both": lambda: fastfp8.quantize_both(SMALL, counters=(new_counters("cpu"), bad)),
        "quantize_grouped_both": lambda: fastfp8.quantize_grouped_both(
            SMALL, ends_of((8,)), counters=(new_counters("cpu"), bad)
        ),
        "requantize_transpose": lambda: fastfp8.requantize_transpose(t, counters=bad),
        "requantize_transpose, grouped": lambda: fastfp8.requantize_transpose(t, ends_of((8,)), counters=bad),
        "swiglu_quantize": lambda: fastfp8.swiglu_quantize(SMALL, counters=bad),
        "permute_quantize": lambda: fastfp8.permute_quantize(SMALL, torch.zeros(8, 1).long(), 1, counters=bad),
        "requantize_e5m6": lambda: fastfp8.requantize_e5m6(fastfp8.pack_e5m6(SMALL), counters=bad),
        "swiglu_backward_quantize": lambda: fastfp8.swiglu_backward_quantize(
            grad, SMALL, counters=(bad, new_counters("cpu"), new_counters("cpu"))
        ),
        "swiglu_backward_quantize, grouped": lambda: fastfp8.swiglu_backward_quantize(
            grad, t, offsets=ends_of((8,)), counters=(new_counters("cpu"), new_counters("cpu"), bad)
        ),
        "gemm_swiglu_quantize": lambda: fastfp8.gemm_swiglu_quantize(t, square, counters=bad),
        "gemm_swiglu_quantize, grouped": lambda: fastfp8.gemm_swiglu_quantize(
            t, fastfp8.ScaledTensor(square.data[None], square.scale[None], square.block), ends_of((8,)), counters=bad
        ),
        "rmsnorm_quantize": lambda: fastfp8.rmsnorm_quantize(SMALL, torch.ones(256), counters=bad),
        "rmsnorm_quantize_transpose": lambda: fastfp8.rmsnorm_quantize(
            SMALL, torch.ones(256), transpose=True, counters_t=bad
        ),
    }
    with pytest.raises(error, match=r"argument '(activation_)?counters(_t)?': expected .*") as raised:
        calls.get(op, lambda: fastfp8.quantize(SMALL, counters=bad))()
    assert words in str(raised.value)


@pytest.mark.parametrize(("bad", "words"), [(new_counters("cpu"), "Tensor"), ((new_counters("cpu"),), "got 1")])
def test_of_two_results_counters_are_a_pair(bad: Any, words: str) -> None:
    for call in (fastfp8.quantize_both, functools.partial(fastfp8.quantize_grouped_both, offsets=ends_of((8,)))):
        with pytest.raises((TypeError, ValueError), match=f"argument 'counters': expected a pair.*{words}"):
            call(SMALL, counters=bad)


def test_of_three_results_counters_are_three() -> None:
    bad, words = (new_counters("cpu"),) * 2, "argument 'counters': expected three tensors, one of each result, got 2"
    with pytest.raises(ValueError, match=words):
        fastfp8.swiglu_backward_quantize(SMALL[:, :128], SMALL, counters=bad)


def test_a_dense_activation_is_not_counted() -> None:
    counters = tuple(new_counters("cpu") for _ in range(3))
    fastfp8.swiglu_backward_quantize(SMALL[:, :128], SMALL, dense_activation=True, counters=counters)
    assert [totals(c).values for c in counters] == [0, SMALL.numel(), SMALL.numel()]


@pytest.mark.parametrize("name", backend_params(("triton_interpreter",)))
def test_counts_of_rows_in_chunks(name: str) -> None:
    """Of RMSNorm, whose kernel takes rows of more than 8192 columns a chunk at a time."""
    x = values(1, 8500).nan_to_num(1.0).clamp(-99.0, 99.0)
    args, counters = (x, torch.ones(8500), 1e-6, None, False, 0.0), new_counters("cpu")
    out = run(name, CASES["rmsnorm_quantize"]._replace(args=args), args, [counters])
    assert totals(counters) == expected(x * out[2][:, None], out[0])


def test_rmsnorm_counts_both_results() -> None:
    x, gain, counters = values(), torch.linspace(-2, 2, COLS), [new_counters("cpu") for _ in range(2)]
    out = fastfp8.rmsnorm_quantize(x, gain, transpose=True, counters=counters[0], counters_t=counters[1])
    y = x * out.rstd[:, None] * gain
    assert out.transposed is not None
    for c, codes in zip(counters, (out.quantized.data, out.transposed.data.t()), strict=True):
        assert totals(c) == expected(y, codes)
    with pytest.raises(ValueError, match="argument 'counters_t': expected None without 'transpose'"):
        fastfp8.rmsnorm_quantize(x, gain, counters_t=counters[1])
