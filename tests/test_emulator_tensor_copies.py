"""TMA on the emulator: tiles of tensors against numpy, the swizzles against the tables of the PTX ISA."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from copy_kernels import cluster_sync, dump, expect, fetch, init, kernel, peer, run, wait
from emulator import EmulationError, TensorMap

Array = np.ndarray[Any, Any]
DTYPES = {
    "uint8": np.uint8,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "int16": np.int16,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "uint32": np.uint32,
    "float32": np.float32,
    "int64": np.int64,
    "float64": np.float64,
}
CASES = range(40)

# Which chunk of 16 bytes lies at each place of a row of 128 bytes, after the figures of the ISA's "Swizzling Modes".
SWIZZLES = {
    0: ["01234567"],
    32: ["01234567", "10325476"],
    64: ["01234567", "10325476", "23016745", "32107654"],
    128: ["01234567", "10325476", "23016745", "32107654", "45670123", "54761032", "67452301", "76543210"],
}


def swizzled(data: Array, swizzle: int) -> Any:
    """Bytes as they lie in shared memory, from the order of the tile; the inverse is the same."""
    rows = SWIZZLES[swizzle]
    out = data.copy()
    for at in range(0, len(data) // 16 * 16, 16):
        row, place = divmod(at // 16, 8)
        origin = 16 * (8 * row + int(rows[row % len(rows)][place]))
        out[at : at + 16] = data[origin : origin + 16]
    return out


def coordinates(shape: Sequence[int], start: Sequence[int], box: Sequence[int], steps: Sequence[int]) -> list[Array]:
    """Of the elements of a tile, outermost dimension first; the innermost step does not count."""
    steps = [*steps[:-1], 1]
    return [np.arange(s, s + b, step) for s, b, step in zip(start, box, steps, strict=True)]


def tile_of(x: Array, index: list[Array], fill: Array) -> Array:
    """x[index], and ``fill`` outside of x."""
    inside = [(i >= 0) & (i < n) for i, n in zip(index, x.shape, strict=True)]
    out = np.full([len(i) for i in index], fill, dtype=x.dtype)
    out[np.ix_(*inside)] = x[np.ix_(*[i[ok] for i, ok in zip(index, inside, strict=True)])]
    return out


class Case:
    """A random tensor, and a tile that may reach beyond it."""

    def __init__(self, seed: int, dtypes: Sequence[str] = tuple(DTYPES), loads: bool = True) -> None:
        r = random.Random(seed)
        self.rank = seed % 5 + 1
        self.name = dtypes[seed % len(dtypes)]
        self.dtype: Any = DTYPES[self.name]
        size = np.dtype(self.dtype).itemsize
        self.swizzle = r.choice([0, 32, 64, 128])
        inner = (self.swizzle or 16 * r.randint(1, min(16, 256 * size // 16))) // size
        limit = 6 if self.rank > 3 else 24
        self.box = [*(r.randint(1, limit // max(1, self.rank - 2)) for _ in range(self.rank - 1)), inner]
        self.steps = [r.choice([1, 1, 2, 3, 8]) for _ in range(self.rank)]
        granule = 16 // size
        self.shape = [*(r.randint(1, 12) for _ in range(self.rank - 1)), r.randint(1, 3 * inner)]
        low = -5 if loads else 0
        self.start = [*(r.randint(low, n + 2) for n in self.shape[:-1]), 0]
        self.start[-1] = granule * r.randint(low, (self.shape[-1] + granule) // granule)
        # Rows apart by more than they need, as the pitch must be a multiple of 16 bytes.
        pitch = -(-self.shape[-1] * size // 16) * 16 // size
        self.memory = np.frombuffer(r.randbytes(int(np.prod(self.shape[:-1])) * pitch * size), np.uint8).copy()
        self.tensor = self.memory.view(self.dtype).reshape(*self.shape[:-1], pitch)[..., : self.shape[-1]]
        self.index = coordinates(self.shape, self.start, self.box, self.steps)
        self.nbytes = int(np.prod([len(i) for i in self.index])) * size
        self.nan = loads and self.name in ("float16", "bfloat16", "float32", "float64") and r.random() < 0.5

    def map(self) -> TensorMap:
        fill = float("nan") if self.nan else 0.0
        return TensorMap(self.tensor, self.box, self.steps, self.swizzle, fill)

    @property
    def at(self) -> str:
        return "{" + ", ".join(map(str, reversed(self.start))) + "}"

    @property
    def bits(self) -> Any:
        return np.dtype(f"u{np.dtype(self.dtype).itemsize}")

    def expected(self) -> Any:
        """The bytes that a load puts into shared memory."""
        fill = np.array((1 << (8 * self.bits.itemsize - 1)) - 1 if self.nan else 0, self.bits)
        tile = tile_of(self.tensor.view(self.bits), self.index, fill)
        return swizzled(np.ascontiguousarray(tile).reshape(-1).view(np.uint8), self.swizzle)


def load_text(case: Case, space: str = "shared::cluster", hint: str = "") -> str:
    policy = ", %rd9" if hint else ""
    return kernel(
        f"mov.b64 %rd9, 0x12F0000000000000;\n{init()}{expect(case.nbytes)}"
        f"@%p0 cp.async.bulk.tensor.{case.rank}d.{space}.global.tile.mbarrier::complete_tx::bytes{hint} "
        f"[%r1], [%rd0, {case.at}], [%r2]{policy};\n{wait()}{dump(case.nbytes, '%rd1')}",
        ["map", "ptr"],
    )


@pytest.mark.parametrize("seed", CASES)
def test_load(seed: int) -> None:
    case = Case(seed)
    text = load_text(
        case, *[("shared::cluster", ""), ("shared::cta", ""), ("shared::cta", ".L2::cache_hint")][seed % 3]
    )
    out = np.zeros(case.nbytes, np.uint8)
    counters = run(text, [case.map(), out], seed=seed)
    np.testing.assert_array_equal(out, case.expected())
    assert counters.tma_bytes == case.nbytes


@pytest.mark.parametrize("seed", CASES)
def test_store(seed: int) -> None:
    case = Case(seed, loads=False)
    values = np.frombuffer(random.Random(-seed - 1).randbytes(case.nbytes), np.uint8).copy()
    tile = swizzled(values, case.swizzle).view(case.bits).reshape([len(i) for i in case.index])
    expected = case.memory.copy()
    pitch = case.memory.nbytes // int(np.prod(case.shape[:-1])) // case.bits.itemsize
    whole = expected.view(case.bits).reshape(*case.shape[:-1], pitch)
    inside = [i < n for i, n in zip(case.index, case.shape, strict=True)]
    part = tile[np.ix_(*inside)]
    whole[np.ix_(*[i[ok] for i, ok in zip(case.index, inside, strict=True)])] = part
    text = kernel(
        f"{fetch(case.nbytes, '%rd1')}"
        f"@%p0 cp.async.bulk.tensor.{case.rank}d.global.shared::cta.bulk_group [%rd0, {case.at}], [%r1];\n"
        "@%p0 cp.async.bulk.commit_group;\n@%p0 cp.async.bulk.wait_group 0;",
        ["map", "ptr"],
    )
    counters = run(text, [case.map(), values], seed=seed)
    np.testing.assert_array_equal(case.memory, expected)
    assert counters.tma_bytes == part.nbytes


def wrap(f: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    def compute(a: Array, b: Array) -> Array:
        with np.errstate(all="ignore"):
            return f(a, b)

    return compute


def flush(x: Array) -> Any:
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def float_sum(a: Array, b: Array) -> Any:
    if a.dtype == np.float32:
        return flush(flush(a) + flush(b))
    return (a.astype(np.float64) + b.astype(np.float64)).astype(a.dtype)


def extreme(a: Array, b: Array, largest: bool) -> Any:
    """Signed zeros count, and NaN loses against numbers."""
    if a.dtype.kind in "iu":
        return np.maximum(a, b) if largest else np.minimum(a, b)
    x, y = a.astype(np.float64), b.astype(np.float64)
    above = (x > y) | ((x == y) & ~np.signbit(x))
    out = np.where(above == largest, a, b)
    return np.where(np.isnan(x), b, np.where(np.isnan(y), a, out))


REDUCTIONS: dict[str, tuple[list[str], Callable[[Array, Array], Array]]] = {
    "add": (
        ["uint32", "int32", "uint64", "float16", "bfloat16", "float32"],
        wrap(lambda a, b: a + b if a.dtype.kind in "iu" else float_sum(a, b)),
    ),
    "min": (["uint32", "int32", "uint64", "int64", "float16", "bfloat16"], wrap(lambda a, b: extreme(a, b, False))),
    "max": (["uint32", "int32", "uint64", "int64", "float16", "bfloat16"], wrap(lambda a, b: extreme(a, b, True))),
    "inc": (["uint32"], lambda a, b: np.where(a >= b, 0, a + 1).astype(a.dtype)),
    "dec": (["uint32"], lambda a, b: np.where((a == 0) | (a > b), b, a - 1).astype(a.dtype)),
    "and": (["uint32", "int32", "uint64", "int64"], operator.and_),
    "or": (["uint32", "int32", "uint64", "int64"], operator.or_),
    "xor": (["uint32", "int32", "uint64", "int64"], operator.xor),
}
NUMPY = {**DTYPES, "int32": np.int32, "uint64": np.uint64}


def same_bits(got: Array, expected: Array) -> None:
    """All NaN of the hardware are one: 0x7fff or 0x7fffffff."""
    bits = np.dtype(f"u{expected.dtype.itemsize}")
    want = expected.view(bits).copy()
    if expected.dtype.kind not in "iu":
        want[np.isnan(expected.astype(np.float64))] = (1 << (8 * bits.itemsize - 1)) - 1
    np.testing.assert_array_equal(got.view(bits), want)


def operand_values(name: str, count: int, seed: int) -> Any:
    """Random bits, and all pairs of awkward values."""
    dtype = np.dtype(NUMPY[name])
    rng = np.random.default_rng(seed)
    out = np.frombuffer(rng.bytes(count * dtype.itemsize), dtype).copy()
    bits = out.view(f"u{dtype.itemsize}")
    half = count // 2
    bits[:half] = rng.choice(np.array([0, 1, 2, 3], bits.dtype), half)
    if dtype.kind not in "iu":
        special = np.array([0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-40, 6e-8, 65504.0]).astype(dtype)
        out[:half] = rng.choice(special, half)
    return out


REDUCED = [(op, name) for op, (names, _) in REDUCTIONS.items() for name in names]


@pytest.mark.parametrize(("op", "name"), REDUCED, ids=[f"{op}-{name}" for op, name in REDUCED])
def test_reduce(op: str, name: str) -> None:
    size = np.dtype(NUMPY[name]).itemsize
    inner, seed = 64 // size, REDUCED.index((op, name))
    target, values = operand_values(name, 20 * inner, seed), operand_values(name, 32 * inner, seed + 1000)
    rows = values.reshape(32, inner)[:16]
    expected = target.copy()
    expected[4 * inner :] = REDUCTIONS[op][1](target[4 * inner :], rows.reshape(-1))
    text = kernel(
        f"{fetch(values.nbytes, '%rd1')}"
        f"@%p0 cp.reduce.async.bulk.tensor.2d.global.shared::cta.{op}.tile.bulk_group [%rd0, {{0, 4}}], [%r1];\n"
        "@%p0 cp.async.bulk.commit_group;\n@%p0 cp.async.bulk.wait_group 0;",
        ["map", "ptr"],
    )
    run(text, [TensorMap(target.reshape(20, inner), (32, inner), swizzle=0), values.view(np.uint8)], seed=seed)
    same_bits(target[4 * inner :], expected[4 * inner :])
    np.testing.assert_array_equal(target[: 4 * inner].view(np.uint8), expected[: 4 * inner].view(np.uint8))


def test_two_ctas_add_to_one_tile() -> None:
    out, ones = np.zeros((8, 32), np.int32), np.arange(256, dtype=np.int32)
    text = kernel(
        f"{fetch(1024, '%rd1')}"
        "@%p0 cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%rd0, {0, 0}], [%r1];\n"
        "@%p0 cp.async.bulk.commit_group;\n@%p0 cp.async.bulk.wait_group.read 0;",
        ["map", "ptr"],
    )
    run(text, [TensorMap(out, (8, 32), swizzle=0), ones], grid=7)
    np.testing.assert_array_equal(out, 7 * ones.reshape(8, 32))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_multicast(size: int, seed: int) -> None:
    """Each CTA loads a part of the tile into a set of CTAs; each arms its own mbarrier for what comes to it."""
    rng = random.Random(seed)
    masks = [rng.randrange(1, 1 << size) for _ in range(size)]
    x = np.frombuffer(rng.randbytes(size * 1024), np.uint8).reshape(size * 8, 128)
    comes = [[i for i in range(size) if masks[i] >> rank & 1] for rank in range(size)]
    table = np.array([[masks[rank], 1024 * len(comes[rank])] for rank in range(size)], np.uint32)
    out, flags = np.zeros((size, size, 1024), np.uint8), np.zeros(8 * size, np.uint32)
    dumps = "".join(
        f"and.b32 %r14, %r13, {1 << i}; setp.ne.u32 %p4, %r14, 0;\n@!%p4 bra SKIP{i};\n"
        f"{dump(1024, '%rd11', f'DUMP{i}')}SKIP{i}: add.u32 %r1, %r1, 1024; add.u64 %rd11, %rd11, 1024;\n"
        for i in range(size)
    )
    received = np.array([sum(1 << i for i in c) for c in comes], np.uint32)
    text = kernel(
        f"mov.u32 %r10, %cluster_ctarank;\n{init()}{cluster_sync(size, '%rd3', 'A')}"
        "mul.wide.u32 %rd10, %r10, 8; add.u64 %rd10, %rd1, %rd10;\n"
        "ld.global.b32 %r11, [%rd10]; ld.global.b32 %r12, [%rd10+4]; cvt.u16.u32 %h1, %r11;\n"
        "mul.wide.u32 %rd10, %r10, 4; add.u64 %rd10, %rd4, %rd10; ld.global.b32 %r13, [%rd10];\n"
        "@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], %r12;\n"
        "shl.b32 %r15, %r10, 10; add.u32 %r15, %r1, %r15; shl.b32 %r16, %r10, 3;\n"
        "@%p0 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        f"[%r15], [%rd0, {{0, %r16}}], [%r2], %h1;\n{wait()}"
        f"mul.wide.u32 %rd11, %r10, {1024 * size}; add.u64 %rd11, %rd2, %rd11;\n"
        f"{dumps}{cluster_sync(size, '%rd3', 'B')}",
        ["map", "ptr", "ptr", "ptr", "ptr"],
    )
    args = [TensorMap(x, (8, 128)), table, out, flags, received]
    run(text, args, seed=seed, grid=size, cluster=(size, 1, 1))
    for rank in range(size):
        for i in range(size):
            part = swizzled(x[8 * i : 8 * i + 8].reshape(-1), 128) if i in comes[rank] else 0
            np.testing.assert_array_equal(out[rank, i], part)


def test_load_into_another_cta() -> None:
    x = np.arange(1024, dtype=np.uint16).reshape(16, 64)
    out, flags = np.zeros((2, 2048), np.uint8), np.zeros(4, np.uint32)
    text = kernel(
        f"mov.u32 %r10, %cluster_ctarank; xor.b32 %r11, %r10, 1;\n{peer('%r12', '%r1', '%r11')}"
        f"{peer('%r13', '%r2', '%r11')}{init()}{expect(1024)}{cluster_sync(2, '%rd2', 'A')}shl.b32 %r14, %r10, 3;\n"
        "@%p0 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        f"[%r12], [%rd0, {{0, %r14}}], [%r13];\n{wait()}mul.wide.u32 %rd10, %r10, 2048; add.u64 %rd10, %rd1, %rd10;\n"
        f"{dump(1024, '%rd10')}",
        ["map", "ptr", "ptr"],
    )
    run(text, [TensorMap(x, (8, 64), swizzle=0), out, flags], grid=2, cluster=(2, 1, 1))
    np.testing.assert_array_equal(out[0, :1024], x[8:].reshape(-1).view(np.uint8))
    np.testing.assert_array_equal(out[1, :1024], x[:8].reshape(-1).view(np.uint8))


def test_multicast_into_a_cta_that_has_exited() -> None:
    text = kernel(
        "mov.u32 %r10, %cluster_ctarank; setp.eq.u32 %p1, %r10, 1; mov.u16 %h1, 3;\n"
        f"@%p1 ret;\n{init()}{SPIN}"
        "@%p0 cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%r1], [%rd0, {0}], [%r2], %h1;",
        ["map"],
    )
    made = TensorMap(np.zeros(128, np.uint8), (128,))
    for seed in range(4):
        with pytest.raises(EmulationError, match="access to the shared memory of a CTA that has exited"):
            run(text, [made], seed=seed, grid=2, cluster=(2, 1, 1))


LOAD = "@%p0 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
STORE = "@%p0 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group "
# Long enough for what is in flight to arrive.
SPIN = "mov.u32 %r30, 0;\nSPIN: add.u32 %r30, %r30, 1; setp.lt.u32 %p4, %r30, 2000;\n@%p4 bra SPIN;\n"
COMMIT = "@%p0 cp.async.bulk.commit_group;\n"
FULL = init() + expect(1024) + LOAD + "[%r1], [%rd0, {0, 0}], [%r2];\n"

WRONG: dict[str, tuple[str, str]] = {
    "rank": (LOAD.replace("2d", "1d") + "[%r1], [%rd0, {0}], [%r2];", "the tensor map has rank 2, not 1"),
    "shared address": ("add.u32 %r1, %r1, 64;\n" + FULL, "the shared address is no multiple of 128"),
    "pattern": ("add.u32 %r1, %r1, 128;\n" + FULL, "does not start where its swizzle pattern does"),
    "mbarrier": (FULL.replace("[%r2];\n", "[%r2+4];\n", 1).replace("0}], [%r2]", "0}], [%r2+4]"), "multiple of 8"),
    "no mbarrier": (LOAD + "[%r1], [%rd0, {0, 0}], [%r2];\n" + wait(), "no initialised mbarrier"),
    "effective address": (LOAD + "[%r1], [%rd0, {8, 0}], [%r2];", "no multiple of 16: 8 elements of 1 bytes"),
    "beyond shared memory": ("add.u32 %r1, %r1, 0x10000;\n" + FULL, "out of bounds"),
    "no such map": (LOAD + "[%r1], [%rd1, {0, 0}], [%r2];", "a tensor map lies at a multiple of 64|tensor map: "),
    "map in shared memory": (
        "cvt.u64.u32 %rd5, %r1; cvta.shared.u64 %rd5, %rd5;\n" + LOAD + "[%r1], [%rd5, {0, 0}], [%r2];",
        "a tensor map lies among the parameters",
    ),
    "map off": ("add.u64 %rd0, %rd0, 16;\n" + FULL, "multiple of 64 bytes"),
    "map beyond": ("add.u64 %rd0, %rd0, 64;\n" + FULL, "no tensor map in the parameters there"),
    "negative store": (
        fetch(1024, "%rd1") + STORE + "[%rd0, {0, -1}], [%r1];",
        "a store may not start at a negative coordinate",
    ),
    "read before the wait": (FULL + dump(1024, "%rd1"), "a copy in flight still writes.*cp.async.bulk.tensor"),
    "read long before the phase is over": (
        FULL.replace("1024;", "2048;") + SPIN + "ld.shared.b32 %r10, [%r1];",
        "a copy in flight still writes",
    ),
    "source written long after, without a wait": (
        fetch(1024, "%rd1") + STORE + f"[%rd0, {{0, 0}}], [%r1];\n{COMMIT}{SPIN}st.shared.b32 [%r1], %r0;",
        "still being read asynchronously",
    ),
    "written while in flight": (FULL + "st.shared.b32 [%r1], %r0;", "a copy in flight still writes"),
    "two copies": (FULL + LOAD + "[%r1], [%rd0, {0, 0}], [%r2];", "two copies in flight write the same"),
    "exit before the wait": (FULL, "the CTA exits while copies into its shared memory are in flight"),
    "no fence": (
        fetch(1024, "%rd1").replace("fence.proxy.async.shared::cta;", "") + STORE + "[%rd0, {0, 0}], [%r1];\n"
        f"{COMMIT}@%p0 cp.async.bulk.wait_group 0;",
        "without a fence.proxy.async since",
    ),
    "no commit": (fetch(1024, "%rd1") + STORE + "[%rd0, {0, 0}], [%r1];\n", "never committed"),
    "no wait": (fetch(1024, "%rd1") + STORE + "[%rd0, {0, 0}], [%r1];\n" + COMMIT, "exits without a wait"),
    "source written again": (
        fetch(1024, "%rd1") + STORE + f"[%rd0, {{0, 0}}], [%r1];\n{COMMIT}@%p0 cp.async.bulk.wait_group.read 1;\n"
        "st.shared.b32 [%r1], %r0;",
        "still being read asynchronously",
    ),
    "multicast beyond the cluster": (
        "mov.u16 %h1, 3;\n" + init() + LOAD.rstrip() + ".multicast::cluster [%r1], [%rd0, {0, 0}], [%r2], %h1;",
        "multicast mask 3 in a cluster of 1 CTAs",
    ),
    "multicast to none": (
        "mov.u16 %h1, 0;\n" + init() + LOAD.rstrip() + ".multicast::cluster [%r1], [%rd0, {0, 0}], [%r2], %h1;",
        "multicast mask 0",
    ),
    "another CTA": (
        "or.b32 %r1, %r1, 0x1000000;\n" + FULL,
        "is of rank 1 in a cluster of 1 CTAs",
    ),
    "no reduction of bytes": (
        fetch(1024, "%rd1")
        + "@%p0 cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%rd0, {0, 0}], [%r1];",
        "no reduction .add of a tensor with elements of type .u8",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name: str) -> None:
    body, text = WRONG[name]
    x, other = np.zeros((8, 128), np.uint8), np.zeros(1024, np.uint8)
    for seed in range(3):
        with pytest.raises(EmulationError, match=text):
            run(kernel(body, ["map", "ptr"]), [TensorMap(x, (8, 128)), other], seed=seed)


UNKNOWN = {
    "im2col": "cp.async.bulk.tensor.3d.shared::cta.global.im2col.mbarrier::complete_tx::bytes [%r1], "
    "[%rd0, {0, 0, 0}], [%r2], {%h1};",
    "cta group": "cp.async.bulk.tensor.1d.shared::cta.global.mbarrier::complete_tx::bytes.cta_group::1 [%r1], "
    "[%rd0, {0}], [%r2];",
    "six dimensions": "cp.async.bulk.tensor.6d.global.shared::cta.bulk_group [%rd0, {0, 0, 0, 0, 0, 0}], [%r1];",
    "multicast to shared::cta": "cp.async.bulk.tensor.1d.shared::cta.global.mbarrier::complete_tx::bytes"
    ".multicast::cluster [%r1], [%rd0, {0}], [%r2], %h1;",
    "two coordinates for one": "cp.async.bulk.tensor.1d.global.shared::cta.bulk_group [%rd0, {0, 0}], [%r1];",
    "a missing hint": "cp.async.bulk.tensor.1d.global.shared::cta.bulk_group.L2::cache_hint [%rd0, {0}], [%r1];",
    "a reduction": "cp.reduce.async.bulk.tensor.1d.global.shared::cta.cas.bulk_group [%rd0, {0}], [%r1];",
    "no groups": "cp.async.bulk.wait_group %r1;",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown(name: str) -> None:
    with pytest.raises(EmulationError, match=r"line \d+: the emulator does not know this .*cp"):
        run(kernel(UNKNOWN[name], ["map"]), [TensorMap(np.zeros(128, np.uint8), (128,))])


def test_prefetch() -> None:
    body = (
        "prefetch.tensormap [%rd0];\nprefetch.param.tensormap [p0];\n"
        "cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%rd0, {0, -3}];"
    )
    made = TensorMap(np.zeros((8, 128), np.uint8), (8, 128))
    assert run(kernel(body, ["map"]), [made]).tma_bytes == 0
    with pytest.raises(EmulationError, match="rank 2, not 1"):
        run(kernel("cp.async.bulk.prefetch.tensor.1d.L2.global [%rd0, {0}];", ["map"]), [made])
    with pytest.raises(EmulationError, match="multiple of 64 bytes"):
        run(kernel("prefetch.tensormap [%rd0+32];", ["map"]), [made])


def test_groups_are_awaited_in_order() -> None:
    """.read with one pending group lets go of the older source only."""
    x, values = np.zeros((16, 128), np.uint8), np.arange(2048).astype(np.uint8)
    stores = (
        f"{STORE}[%rd0, {{0, 0}}], [%r1];\n{COMMIT}add.u32 %r3, %r1, 1024;\n{STORE}[%rd0, {{0, 8}}], [%r3];\n{COMMIT}"
        "@%p0 cp.async.bulk.wait_group.read 1;\n"
    )
    end = "@%p0 cp.async.bulk.wait_group 0;"
    for seed in range(5):
        made = TensorMap(x, (8, 128), swizzle=0)
        legal = fetch(2048, "%rd1") + stores + "@%p0 st.shared.b32 [%r1+1020], %r0;\n" + end
        run(kernel(legal, ["map", "ptr"]), [made, values], seed=seed)
        np.testing.assert_array_equal(x.reshape(-1), values)
        with pytest.raises(EmulationError, match="still being read"):
            run(kernel(legal.replace("%r1+1020", "%r1+1024"), ["map", "ptr"]), [made, values], seed=seed)
