"""atom and red: each operation on each type against NumPy, many lanes at one address, spaces, and what is illegal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from backends import backend_params
from machines import machine, on_silicon, silicon_too

pytestmark = backend_params(["emulator"])[0].marks

N = 256
# Each thread does its operation on an element of its own: %b and %c are the operands, %d the old value.
PTX = """
.version 8.6
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 pm, .param .u64 pb, .param .u64 pc, .param .u64 pd) {{
  .reg .pred p;
  .reg .b16 %h<20>;
  .reg .b32 %t, %s, %r<12>;
  .reg .b64 %x, %m, %d, %o, %v, %w, %b, %c, %old;
  .shared .align 16 .b8 buffer[4096];
  mov.u32 %t, %tid.x;
  mul.wide.u32 %o, %t, {bytes};
  ld.param.u64 %m, [pm];
  ld.param.u64 %b, [pb];
  ld.param.u64 %c, [pc];
  ld.param.u64 %d, [pd];
  add.s64 %m, %m, %o;
  add.s64 %b, %b, %o;
  add.s64 %c, %c, %o;
  add.s64 %d, %d, %o;
  mul.lo.u32 %s, %t, {bytes};
  mov.u32 %r0, buffer;
  add.u32 %s, %s, %r0;
  {body}
  ret;
}}
"""
Array = np.ndarray[Any, Any]


def run(body: str, memory: Array, b: Array, c: Array, threads: int | None = None, seed: int = 0) -> Array:
    """The old values; ``memory`` is updated."""
    old = np.zeros_like(memory)
    count = memory.size if threads is None else threads
    text = PTX.format(body=body, bytes=memory.nbytes // memory.size)
    machine(seed).load(text)["kernel"].launch(1, count, args=[a.view(np.uint8) for a in (memory, b, c, old)])
    return old


def random_array(rng: np.random.Generator, dtype: Any) -> Array:
    """Of all bit patterns, corners among them, but no NaN."""
    dtype = np.dtype(dtype)
    bits = np.frombuffer(rng.bytes(N * dtype.itemsize), dtype=f"u{dtype.itemsize}").copy()
    top = 1 << (8 * dtype.itemsize - 1)
    bits[: N // 4] = rng.choice(np.array([0, 1, top - 1, top, top + 1, 2 * top - 1], f"u{dtype.itemsize}"), N // 4)
    values = bits.view(dtype)
    if dtype.kind in "fV":
        with np.errstate(invalid="ignore"):
            values = np.where(np.isnan(values.astype(np.float64)), dtype.type(1.5), values)
    return np.ascontiguousarray(values)


def wrap_inc(old: Array, b: Array, _: Array) -> Array:
    return np.where(old >= b, 0, old + np.uint32(1)).astype(np.uint32)


def wrap_dec(old: Array, b: Array, _: Array) -> Array:
    return np.where((old == 0) | (old > b), b, old - np.uint32(1)).astype(np.uint32)


def flushing_add(old: Array, b: Array, _: Array) -> Array:
    tiny = np.finfo(np.float32).tiny

    def flush(x: Array) -> Array:
        return np.where(np.abs(x) < tiny, np.copysign(np.float32(0), x), x)

    return flush(flush(old) + flush(b))


Model = Callable[[Array, Array, Array], Array]
BITS: dict[str, Model] = {
    "and": lambda old, b, _: old & b,
    "or": lambda old, b, _: old | b,
    "xor": lambda old, b, _: old ^ b,
    "exch": lambda _, b, __: b,
    "cas": lambda old, b, c: np.where(old == b, c, old),
}
NUMBERS: dict[str, Model] = {
    "add": lambda old, b, _: old + b,
    "min": lambda old, b, _: np.minimum(old, b),
    "max": lambda old, b, _: np.maximum(old, b),
}
CASES: dict[str, tuple[Any, Model]] = {
    **{f"{op}.b32": (np.uint32, f) for op, f in BITS.items()},
    **{f"{op}.b64": (np.uint64, f) for op, f in BITS.items()},
    **{f"{op}.{t}": (d, f) for t, d in (("u32", np.uint32), ("s32", np.int32)) for op, f in NUMBERS.items()},
    **{f"{op}.u64": (np.uint64, f) for op, f in NUMBERS.items()},
    **{f"{op}.s64": (np.int64, f) for op, f in NUMBERS.items() if op != "add"},
    "inc.u32": (np.uint32, wrap_inc),
    "dec.u32": (np.uint32, wrap_dec),
    "add.f32": (np.float32, NUMBERS["add"]),
    "add.f64": (np.float64, NUMBERS["add"]),
}


def same_bits(a: Array, b: Array) -> bool:
    """NaN is NaN."""
    if a.dtype.kind in "fV":
        nan = np.isnan(a.astype(np.float64))
        if not np.array_equal(nan, np.isnan(b.astype(np.float64))):
            return False
        a, b = a[~nan], b[~nan]
    return a.tobytes() == b.tobytes()


@silicon_too
@pytest.mark.parametrize("space", ["global", "shared", "generic", "generic shared"])
@pytest.mark.parametrize("case", CASES)
def test_operations(case: str, space: str) -> None:
    dtype, model = CASES[case]
    rng = np.random.default_rng(list(case.encode()))
    memory, b, c = (random_array(rng, dtype) for _ in range(3))
    b[::3] = memory[::3]
    if case == "add.f32" and "shared" not in space:
        model = flushing_add
    with np.errstate(all="ignore"):
        expected = np.ascontiguousarray(model(memory, b, c).astype(dtype))
    width = f"b{8 * np.dtype(dtype).itemsize}"
    reg = "%old" if width == "b64" else "%r1"
    first, second = ("%v", "%w") if width == "b64" else ("%r2", "%r3")
    operands = f"{first}, {second}" if case.startswith("cas") else first
    atom = {
        "global": f"atom.global.{case} {reg}, [%m], {operands};",
        "shared": f"atom.acq_rel.cta.shared.{case} {reg}, [%s], {operands};",
        "generic": f"atom.relaxed.sys.{case} {reg}, [%m], {operands};",
        "generic shared": f"cvt.u64.u32 %x, %s; cvta.shared.u64 %x, %x; atom.{case} {reg}, [%x], {operands};",
    }[space]
    fill = f"ld.global.{width} {reg}, [%m]; st.shared.{width} [%s], {reg};" if "shared" in space else ""
    back = f"ld.shared.{width} {reg}, [%s]; st.global.{width} [%m], {reg};" if "shared" in space else ""
    body = f"""ld.global.{width} {first}, [%b]; ld.global.{width} {second}, [%c]; {fill} {atom}
      st.global.{width} [%d], {reg}; {back}"""
    before = memory.copy()
    old = run(body, memory, b, c)
    assert same_bits(old, before)
    assert same_bits(memory, expected)


@silicon_too
def test_cas_of_16_bits() -> None:
    rng = np.random.default_rng(3)
    memory, b, c = (rng.integers(0, 1 << 16, N).astype(np.uint16) for _ in range(3))
    b[::2] = memory[::2]
    expected = np.where(memory == b, c, memory)
    before = memory.copy()
    body = """ld.global.b16 %h1, [%b]; ld.global.b16 %h2, [%c]; atom.global.cas.b16 %h3, [%m], %h1, %h2;
      st.global.b16 [%d], %h3;"""
    assert np.array_equal(run(body, memory, b, c), before)
    assert np.array_equal(memory, expected)


def number_or_other(choose: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """As the ISA's min and max: the one that is a number; -0 below +0."""

    def result(a: Array, b: Array) -> Array:
        order = np.where(a == b, np.signbit(a) if choose is np.minimum else ~np.signbit(a), choose(a, b) == a)
        return np.where(np.isnan(b) | (order & ~np.isnan(a)), a, b)

    return result


@silicon_too
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["f16", "bf16"])
@pytest.mark.parametrize("op", ["add", "min", "max"])
@pytest.mark.parametrize("form", ["one", "x2", "v2", "v4", "v8", "v2 of x2", "v4 of x2"])
def test_halves(form: str, op: str, dtype: Any) -> None:
    name = "f16" if dtype is np.float16 else "bf16"
    if form in ("one", "x2") and op != "add":
        return  # only vectors have them
    rng = np.random.default_rng(len(form))
    halves = {"one": 1, "x2": 2, "v2": 2, "v4": 4, "v8": 8, "v2 of x2": 4, "v4 of x2": 8}[form]
    a, b = (rng.integers(0, 1 << 16, (64, halves)).astype(np.uint16).view(dtype) for _ in range(2))
    with np.errstate(all="ignore"):
        wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
        choose = {"min": number_or_other(np.minimum), "max": number_or_other(np.maximum)}.get(op, np.add)
        expected = choose(wide_a, wide_b)
        if dtype is np.float16:
            expected = expected.astype(np.float16)
        else:  # through float32, which does no harm to a sum of two bfloat16
            expected = expected.astype(np.float32).astype(ml_dtypes.bfloat16)
    width, count = ("b32", halves // 2) if "x2" in form else ("b16", halves)
    kind = name + ("x2" if "x2" in form else "")
    regs = [f"%r{i + 1}" if width == "b32" else f"%h{i + 1}" for i in range(count)]
    olds = [f"%r{i + 6}" if width == "b32" else f"%h{i + 9}" for i in range(count)]
    step = 4 if width == "b32" else 2
    loads = "".join(f"ld.global.{width} {r}, [%b+{step * i}];" for i, r in enumerate(regs))
    stores = "".join(f"st.global.{width} [%d+{step * i}], {r};" for i, r in enumerate(olds))
    vector = f".v{count}" if count > 1 else ""
    if count == 1:
        body = loads + f"atom.global.{op}.noftz.{kind} {olds[0]}, [%m], {regs[0]};" + stores
    else:
        listed = ", ".join(regs), ", ".join(olds)
        body = loads + f"atom.global.{op}.noftz{vector}.{kind} {{{listed[1]}}}, [%m], {{{listed[0]}}};" + stores
    record = np.dtype((np.void, 2 * halves))
    memory = np.ascontiguousarray(a).view(record).reshape(64)
    before = memory.tobytes()
    old = run(body, memory, np.ascontiguousarray(b).view(record).reshape(64), memory.copy())
    assert old.tobytes() == before
    result = np.frombuffer(memory.tobytes(), dtype).reshape(64, halves)
    assert same_bits(result.ravel(), np.ascontiguousarray(expected).ravel())


@silicon_too
def test_vectors_of_floats() -> None:
    rng = np.random.default_rng(7)
    a, b = (rng.standard_normal((64, 4)).astype(np.float32) for _ in range(2))
    expected = flushing_add(a, b, b)
    loads = "".join(f"ld.global.b32 %r{i + 1}, [%b+{4 * i}];" for i in range(4))
    record = np.dtype((np.void, 16))
    for text in (
        "red.global.add.v4.f32 [%m], {%r1, %r2, %r3, %r4};",
        "red.relaxed.gpu.global.v4.f32.add [%m], {%r1, %r2, %r3, %r4};",
        "red.add.v2.f32 [%m], {%r1, %r2}; red.add.L2::cache_hint.v2.f32 [%m+8], {%r3, %r4}, %o;",
    ):
        memory = a.copy().view(record).reshape(64)
        run(loads + text, memory, b.view(record).reshape(64), memory.copy())
        assert np.frombuffer(memory.tobytes(), np.float32).tobytes() == expected.tobytes()


@silicon_too
@pytest.mark.parametrize("space", ["global", "shared"])
def test_many_threads_at_one_address(space: str) -> None:
    # Each thread gets a ticket of its own, in an order that the seed picks.
    orders = set()
    for seed in range(4):
        memory, tickets = np.zeros(128, np.uint32), np.zeros(128, np.uint32)
        ask = {
            "global": "ld.param.u64 %m, [pm]; atom.global.add.u32 %r1, [%m], 1;",
            "shared": """mov.u32 %r2, 0; setp.eq.u32 p, %t, 0; @p st.shared.b32 [buffer], %r2; bar.sync 0;
              atom.shared.add.u32 %r1, [buffer], 1; bar.sync 0; ld.shared.b32 %r2, [buffer];
              ld.param.u64 %m, [pm]; @p st.global.b32 [%m], %r2;""",
        }[space]
        tickets = run(ask + "st.global.b32 [%d], %r1;", memory, memory.copy(), memory.copy(), 128, seed)
        assert memory[0] == 128
        assert sorted(tickets.tolist()) == list(range(128))
        orders.add(tuple(tickets.tolist()))
    assert on_silicon() or len(orders) == 4


# Threads of different warps add to a plain variable under a lock.
RELEASE = "atom.release.gpu.global.exch.b32 %r1, [%m], 0;"
LOCKED = f"""ld.param.u64 %m, [pm]; ld.param.u64 %d, [pd];
  and.b32 %r5, %t, 31; setp.ne.u32 p, %r5, 0; @p exit;
  L: atom.acquire.gpu.global.cas.b32 %r1, [%m], 0, 1; setp.ne.u32 p, %r1, 0; @p bra L;
  ld.global.b32 %r2, [%d]; add.u32 %r2, %r2, 1; st.global.b32 [%d], %r2;
  {RELEASE}"""


@silicon_too
def test_a_lock() -> None:
    for seed in range(10):
        memory = np.zeros(256, np.uint32)
        assert run(LOCKED, memory, memory.copy(), memory.copy(), 256, seed)[0] == 8
        assert memory[0] == 0


def test_a_lock_that_is_kept() -> None:
    from emulator import EmulationError

    memory = np.zeros(256, np.uint32)
    with pytest.raises(EmulationError, match="a deadlock"):
        run(LOCKED.replace(RELEASE, ""), memory, memory, memory, 256)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("atom.shared.add.u32 %r1, [buffer], 1;", "uninitialised shared memory"),
        ("atom.global.add.u64 %x, [%m+4], 1;", "misaligned"),
        ("atom.global.add.u32 %r1, [%m+1024], 1;", "out of bounds: write of 4 bytes"),
        (
            "cvt.u64.u32 %x, %s; cvta.shared.u64 %x, %x; mov.u32 %r1, 0; red.add.v2.f32 [%x], {%r1, %r1};",
            "outside of gl|misaligned",
        ),
        ("red.global.add.u32 [%m], %r1;", "it reads %r1, uninitialised"),
        ("mov.u64 %x, 0x8300000000000000; red.add.u32 [%x], 1;", "the parameters of a kernel are read-only"),
    ],
)
def test_errors(body: str, words: str) -> None:
    from emulator import EmulationError

    memory = np.zeros(4, np.uint32)
    with pytest.raises(EmulationError, match=words):
        run(body, memory, memory, memory)


@pytest.mark.parametrize(
    "text",
    [
        "red.acquire.gpu.global.add.u32 [%m], 1;",
        "red.acq_rel.gpu.global.add.u32 [%m], 1;",
        "red.global.exch.b32 [%m], 1;",
        "red.global.cas.b32 [%m], 1, 2;",
        "atom.weak.global.add.u32 %r1, [%m], 1;",
        "atom.global.add.b32 %r1, [%m], 1;",
        "atom.global.add.s64 %v, [%m], 1;",
        "atom.global.and.u32 %r1, [%m], 1;",
        "atom.global.exch.b16 %h1, [%m], %h2;",
        "atom.global.inc.s32 %r1, [%m], 1;",
        "atom.global.min.f32 %r1, [%m], %r2;",
        "atom.global.add.f16 %h1, [%m], %h2;",
        "atom.global.add.noftz.f32 %r1, [%m], %r2;",
        "atom.global.min.noftz.f16x2 %r1, [%m], %r2;",
        "atom.local.add.u32 %r1, [%m], 1;",
        "atom.global.cas.L2::cache_hint.b32 %r1, [%m], 1, 2, %o;",
        "atom.global.gpu.cta.add.u32 %r1, [%m], 1;",
        "atom.global.v2.add.f32 {%r1,%r2}, [%m], {%r1,%r2};",
        "red.shared.add.v2.f32 [%s], {%r1, %r1};",
        "red.global.add.v8.f32 [%m], {%r1,%r1,%r1,%r1,%r1,%r1,%r1,%r1};",
        "red.global.add.v2.f32 [%m], {%r1,%r1,%r1};",
        "red.global.add.v2.u32 [%m], {%r1,%r1};",
        "atom.global.cas.b32 %r1, [%m], 1;",
    ],
)
def test_unknown_forms_are_refused_when_loaded(text: str) -> None:
    from emulator import EmulationError, Machine

    with pytest.raises(EmulationError, match="does not know"):
        Machine().load(PTX.format(body=text, bytes=4))
