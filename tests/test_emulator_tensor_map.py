"""The emulator's host side: tensor maps with the limits of cuTensorMapEncodeTiled, kernel arguments, listed memory."""

from __future__ import annotations

import ctypes
import math
import struct
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from emulator import EmulationError, Machine, TensorMap
from emulator.tensor_map import buffer_of, memory_of

NAN = float("nan")


class Bits(ctypes.LittleEndianStructure):
    """TensorMapBits of tests/emulator/src/tensor_map.h."""

    _pack_ = 1
    _fields_ = (
        ("address", ctypes.c_uint64),
        ("strides", ctypes.c_uint64 * 4),
        ("dims", ctypes.c_uint32 * 5),
        ("box", ctypes.c_uint16 * 5),
        ("element_strides", ctypes.c_uint8 * 5),
        ("rank", ctypes.c_uint8),
        ("element_type", ctypes.c_uint8),
        ("interleave", ctypes.c_uint8),
        ("swizzle", ctypes.c_uint8),
        ("fill_nan", ctypes.c_uint8),
    )


def fields(tensor_map: TensorMap) -> dict[str, Any]:
    assert len(tensor_map.data) == 128
    assert not any(tensor_map.data[ctypes.sizeof(Bits) :])
    bits = Bits.from_buffer_copy(tensor_map.data)
    values = {name: getattr(bits, name) for name, _ in Bits._fields_}
    return {name: list(v) if isinstance(v, ctypes.Array) else v for name, v in values.items()}


def test_fields_of_codes() -> None:
    wide = torch.zeros(300, 512, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert fields(TensorMap(wide[:, :400], box=(64, 128))) == {
        "address": wide.data_ptr(),
        "strides": [512, 0, 0, 0],
        "dims": [399, 299, 0, 0, 0],
        "box": [127, 63, 0, 0, 0],
        "element_strides": [0] * 5,
        "rank": 1,
        "element_type": 0,
        "interleave": 0,
        "swizzle": 3,
        "fill_nan": 0,
    }


def test_fields_of_five_dimensions() -> None:
    """Everything is reversed: a map counts from the innermost dimension. Its element stride is ignored."""
    x = np.zeros((2, 3, 4, 5, 8), np.float64)
    made = TensorMap(x, box=(1, 2, 3, 4, 6), element_strides=(2, 3, 4, 5, 6), swizzle=64, oob_fill=NAN)
    assert fields(made) == {
        "address": x.ctypes.data,
        "strides": [64, 5 * 64, 20 * 64, 60 * 64],
        "dims": [7, 4, 3, 2, 1],
        "box": [5, 3, 2, 1, 0],
        "element_strides": [0, 4, 3, 2, 1],
        "rank": 4,
        "element_type": 9,
        "interleave": 0,
        "swizzle": 2,
        "fill_nan": 1,
    }


def test_a_transposed_view_is_a_tensor_like_any_other() -> None:
    x = torch.zeros(6, 16, 4, dtype=torch.int32).permute(2, 0, 1).contiguous().permute(1, 0, 2)
    got = fields(TensorMap(x, box=(1, 2, 8), swizzle=32))
    assert (got["dims"], got["strides"]) == ([15, 3, 5, 0, 0], [6 * 64, 64, 0, 0])


# The numbers of tensormap.replace's .elemtype.
ELEMENTS = {
    torch.uint8: 0,
    torch.int8: 0,
    torch.float8_e4m3fn: 0,
    torch.float8_e5m2: 0,
    torch.int16: 1,
    torch.float16: 6,
    torch.bfloat16: 10,
    torch.int32: 3,
    torch.float32: 7,
    torch.int64: 5,
    torch.float64: 9,
}


@pytest.mark.parametrize(("dtype", "expected"), ELEMENTS.items(), ids=str)
def test_elements(dtype: torch.dtype, expected: int) -> None:
    got = fields(TensorMap(torch.zeros(16, dtype=dtype), box=(16,), swizzle=0))
    assert (got["element_type"], got["rank"], got["swizzle"]) == (expected, 0, 0)


def test_elements_of_numpy() -> None:
    for dtype, expected in [(ml_dtypes.bfloat16, 10), (ml_dtypes.float8_e4m3fn, 0), (np.uint64, 4)]:
        got = fields(TensorMap(np.zeros(16, dtype), box=(16,), swizzle=0))
        assert got["element_type"] == expected


def codes(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def floats(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


ACCEPTED: dict[str, tuple[Any, dict[str, Any]]] = {
    "2^32 rows": (codes(1, 128).expand(1 << 32, 128), {"box": (1, 128)}),
    "rows almost 2^40 apart": (torch.empty_strided((1, 16), ((1 << 40) - 16, 1), dtype=torch.uint8), {"box": (1, 16)}),
    "a box of 256": (codes(4, 256), {"box": (256, 256), "swizzle": 0}),
    "a box beyond the tensor": (codes(4, 16), {"box": (8, 128)}),
    "an element stride of 8": (codes(16, 128), {"box": (16, 128), "element_strides": (8, 1)}),
    "32 bytes of swizzle": (floats(4, 8), {"box": (4, 8), "swizzle": 32}),
    "64 bytes of swizzle": (floats(4, 16), {"box": (4, 16), "swizzle": 64}),
    "nan": (floats(4, 16), {"box": (4, 16), "oob_fill": NAN}),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_just_legal(name: str) -> None:
    tensor, arguments = ACCEPTED[name]
    got = fields(TensorMap(tensor, **arguments))
    assert [n + 1 for n in got["dims"][: tensor.dim()]] == list(reversed(tensor.shape))


REJECTED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no dimension": (floats(), {"box": ()}, "tensorRank: expected 1 to 5, got 0"),
    "six dimensions": (codes(1, 1, 1, 1, 1, 16), {"box": (1,) * 5 + (16,)}, "tensorRank: expected 1 to 5, got 6"),
    "complex": (torch.zeros(4, 4, dtype=torch.complex64), {"box": (4, 4)}, "tensorDataType: .*got complex64"),
    "bool": (torch.zeros(4, 16, dtype=torch.bool), {"box": (4, 16)}, "tensorDataType: .*got bool"),
    "misaligned": (codes(1, 40)[:, 8:], {"box": (1, 16)}, "globalAddress: expected a multiple of 16, .*8 bytes past"),
    "empty": (codes(0, 16), {"box": (1, 16)}, r"globalDim\[1\]: expected 1 to 2\^32, got 0"),
    "no column": (codes(16, 16)[:, :0], {"box": (1, 16)}, r"globalDim\[0\]: expected 1 to 2\^32, got 0"),
    "too long": (codes(1, 16).expand((1 << 32) + 1, 16), {"box": (1, 16)}, r"globalDim\[1\]: expected 1 to 2\^32"),
    "odd pitch": (codes(4, 24), {"box": (1, 16)}, r"globalStrides\[0\]: expected a multiple of 16 bytes, got 24"),
    "odd outer pitch": (
        torch.empty_strided((2, 2, 16), (40, 16, 1), dtype=torch.uint8),
        {"box": (1, 1, 16)},
        r"globalStrides\[1\]: expected a multiple of 16 bytes, got 40",
    ),
    "far pitch": (
        torch.empty_strided((1, 16), (1 << 40, 1), dtype=torch.uint8),
        {"box": (1, 16)},
        r"globalStrides\[0\]: expected at least 0 and below 2\^40",
    ),
    "backwards": (np.zeros((4, 16), np.uint8)[::-1], {"box": (1, 16)}, r"globalStrides\[0\]: .*got -16"),
    "columns apart": (codes(4, 32)[:, ::2], {"box": (1, 16)}, "stride 1 in the last dimension, got 2 bytes"),
    "box of another rank": (codes(4, 16), {"box": (16,)}, "boxDim: expected one extent for each of the 2"),
    "box of 0": (codes(4, 16), {"box": (0, 16)}, r"boxDim\[1\]: expected 1 to 256 elements, got 0"),
    "box of 257": (codes(4, 16), {"box": (257, 16)}, r"boxDim\[1\]: expected 1 to 256 elements, got 257"),
    "inner box of 512": (codes(4, 512), {"box": (1, 512), "swizzle": 0}, r"boxDim\[0\]: expected 1 to 256 elements"),
    "box of 1.5": (codes(4, 16), {"box": (1.5, 16)}, "boxDim: expected integers"),
    "inner box of 24 bytes": (floats(4, 8), {"box": (1, 6)}, r"boxDim\[0\]: expected a multiple of 16 bytes, got 6"),
    "element stride 0": (
        codes(4, 16),
        {"box": (4, 16), "element_strides": (0, 1)},
        r"elementStrides\[1\]: expected 1 to 8, got 0",
    ),
    "element stride 9": (
        codes(4, 16),
        {"box": (4, 16), "element_strides": (9, 1)},
        r"elementStrides\[1\]: expected 1 to 8, got 9",
    ),
    "one element stride": (codes(4, 16), {"box": (4, 16), "element_strides": (1,)}, "elementStrides: expected one for"),
    "swizzle 96": (codes(4, 16), {"box": (4, 16), "swizzle": 96}, "swizzle: expected 0, 32, 64 or 128, got 96"),
    "beyond 32": (codes(4, 48), {"box": (4, 48), "swizzle": 32}, r"boxDim\[0\]: expected at most .* 32 bytes, got 48"),
    "beyond 64": (codes(4, 80), {"box": (4, 80), "swizzle": 64}, r"boxDim\[0\]: expected at most .* 64 bytes, got 80"),
    "beyond 128": (codes(4, 144), {"box": (4, 144)}, r"boxDim\[0\]: expected at most .* 128 bytes, got 144"),
    "filled with 1": (floats(4, 16), {"box": (4, 16), "oob_fill": 1.0}, "oobFill: expected 0.0 or nan, got 1.0"),
    "codes filled with nan": (
        codes(4, 16).view(torch.float8_e4m3fn),
        {"box": (4, 16), "oob_fill": NAN},
        "oobFill: .*got nan of float8_e4m3fn",
    ),
    "integers filled with nan": (
        torch.zeros(4, 16, dtype=torch.int32),
        {"box": (4, 16), "oob_fill": NAN},
        "oobFill: .*got nan of int32",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_a_limit_is_named(name: str) -> None:
    tensor, arguments, text = REJECTED[name]
    with pytest.raises(EmulationError, match=f"TensorMap: .*{text}"):
        TensorMap(tensor, **arguments)


def test_only_memory_of_the_cpu() -> None:
    with pytest.raises(TypeError, match="expected a dense CPU tensor, got one on meta"):
        TensorMap(torch.empty(4, 16, device="meta"), box=(4, 16))
    with pytest.raises(TypeError, match="expected a torch CPU tensor or a numpy array, got list"):
        TensorMap([1, 2, 3], box=(3,))


def span(tensor: Any) -> tuple[int, int, bool]:
    [(address, nbytes, writable, _)] = memory_of([buffer_of(tensor, "x")])
    return address, nbytes, writable


def test_memory_ends_with_the_last_element() -> None:
    x = torch.zeros(8, 10)
    assert span(x) == (x.data_ptr(), 320, True)
    assert span(x[2:5, 3:7]) == (x.data_ptr() + 4 * 23, 4 * 24, True)
    assert span(x[:1].expand(5, 10)) == (x.data_ptr(), 40, True)
    assert memory_of([buffer_of(x[:0], "x")]) == []
    y = np.zeros((4, 6), np.int16)[::-1, ::2]
    y.flags.writeable = False
    assert span(y) == (y.ctypes.data - 36, 36 + 10, False)


def test_shared_memory_is_listed_once() -> None:
    x, y = torch.zeros(10), torch.zeros(10)
    buffers = [buffer_of(t, name) for t, name in ((x[4:8], "b"), (y, "y"), (x[:5], "a"), (x[8:], "c"))]
    got = {(first - x.data_ptr(), nbytes) for first, nbytes, _, name in memory_of(buffers) if "y" not in name}
    assert got == {(0, 32), (32, 8)}, "a and b overlap; b and c touch, and stay apart"
    assert [name for *_, name in memory_of(buffers) if "a" in name.split()] == ["a (float32 5) and b (float32 4)"]


ARGUMENTS_PTX = """
.version 8.0
.target sm_90a
.address_size 64

.visible .entry store(
    .param .u64 store_param_0,
    .param .u32 store_param_1,
    .param .f32 store_param_2,
    .param .u64 store_param_3,
    .param .f64 store_param_4,
    .param .align 128 .b8 store_param_5[128]
)
{
    .reg .b32 %r<3>;
    .reg .b64 %rd<6>;
    ld.param.u64 %rd1, [store_param_0];
    cvta.to.global.u64 %rd2, %rd1;
    ld.param.u32 %r1, [store_param_1];
    st.global.u32 [%rd2], %r1;
    ld.param.b32 %r2, [store_param_2];
    st.global.b32 [%rd2+4], %r2;
    ld.param.u64 %rd3, [store_param_3];
    st.global.u64 [%rd2+8], %rd3;
    ld.param.b64 %rd4, [store_param_4];
    st.global.b64 [%rd2+16], %rd4;
    ld.param.b64 %rd5, [store_param_5+120];
    st.global.b64 [%rd2+24], %rd5;
    ret;
}
"""


@pytest.fixture(scope="module")
def machine() -> Machine:
    return Machine(seed=7)


def arguments(**changed: Any) -> list[Any]:
    """Legal arguments of the kernel ``store``."""
    given = {"out": np.zeros(32, np.uint8), "u32": 5, "f32": 1.5, "u64": None, "f64": 2.5, "struct": bytes(range(128))}
    return list({**given, **changed}.values())


@pytest.mark.parametrize(
    ("u32", "f32", "u64", "f64"),
    [(0, 0.0, 0, 0.0), (-1, -0.0, (1 << 64) - 1, math.inf), ((1 << 32) - 1, 1e38, 12345678901234, -math.pi)],
)
def test_arguments_arrive(machine: Machine, u32: int, f32: float, u64: int, f64: float) -> None:
    given = arguments(u32=u32, f32=np.float32(f32), u64=u64, f64=f64)
    machine.load(ARGUMENTS_PTX)["store"].launch(args=given)
    expected = struct.pack("<IfQd", u32 % (1 << 32), f32, u64, f64) + bytes(range(120, 128))
    assert given[0].tobytes() == expected


def test_addresses_arrive(machine: Machine) -> None:
    for value, address in [(None, 0), (x := torch.zeros(5), x.data_ptr()), (y := np.zeros(5), y.ctypes.data)]:
        given = arguments(u64=value)
        machine.load(ARGUMENTS_PTX)["store"].launch(args=given)
        assert int(given[0].view(np.uint64)[1]) == address


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a float for an integer": ({"u32": 5.0}, TypeError, r"argument 1: expected an integer \(.u32\), got the float"),
    "a tensor for an integer": ({"u32": torch.zeros(1)}, TypeError, r"argument 1: expected an integer .*got Tensor"),
    "None for an integer": ({"u32": None}, TypeError, r"argument 1: expected an integer .*got None"),
    "33 bits": ({"u32": 1 << 32}, EmulationError, "argument 1: expected 4 bytes .*got 4294967296, which needs more"),
    "-33 bits": ({"u32": -(1 << 31) - 1}, EmulationError, "argument 1: expected 4 bytes .*needs more"),
    "65 bits": ({"u64": 1 << 64}, EmulationError, "argument 3: expected 8 bytes .*needs more"),
    "an integer for a float": ({"f32": 1}, TypeError, r"argument 2: expected a float \(.f32\), got the integer 1"),
    "a double for a float": ({"f32": 1e39}, EmulationError, "argument 2: expected .f32, got 1e\\+39"),
    "None for a double": ({"f64": None}, TypeError, r"argument 4: expected a float \(.f64\), got None"),
    "a float for an address": ({"out": 1.0}, TypeError, "argument 0: expected a tensor, an array, None or an integer"),
    "a tensor elsewhere": ({"out": torch.empty(4, device="meta")}, TypeError, "argument 0: .*got one on meta"),
    "a string": ({"u64": "x"}, TypeError, "argument 3: .*got str"),
    "a tensor for a map": ({"struct": torch.zeros(4)}, TypeError, "argument 5: expected a TensorMap .*got Tensor"),
    "an integer for a map": ({"struct": 0}, TypeError, "argument 5: expected a TensorMap .*got the integer 0"),
    "a short structure": ({"struct": bytes(64)}, EmulationError, "argument 5: expected 128 bytes .*got 64 bytes"),
    "a map for an address": (
        {"u64": TensorMap(floats(4, 16), box=(4, 16))},
        EmulationError,
        "argument 3: .*got TensorMap.* of 128 bytes",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(machine: Machine, name: str) -> None:
    changed, error, text = WRONG[name]
    with pytest.raises(error, match=f"store: {text}"):
        machine.load(ARGUMENTS_PTX)["store"].prepare(args=arguments(**changed))


def test_the_number_of_arguments(machine: Machine) -> None:
    with pytest.raises(EmulationError, match="store: expected 6 arguments, got 5"):
        machine.load(ARGUMENTS_PTX)["store"].launch(args=arguments()[:5])


@pytest.mark.parametrize(
    ("launch", "text"),
    [
        ({"grid": (0, 1, 1)}, "grid: expected up to three integers from 1"),
        ({"grid": (1, 65536, 1)}, "grid: expected up to three integers from 1"),
        ({"block": (1024, 2, 1)}, "block: expected at most 1024 threads"),
        ({"block": (1, 1, 65)}, "block: expected up to three integers"),
        ({"grid": (3, 1, 1), "cluster": (2, 1, 1)}, r"grid: expected whole clusters of \(2, 1, 1\), got \(3, 1, 1\)"),
        ({"grid": (32, 1, 1), "cluster": (32, 1, 1)}, "cluster: expected up to three integers"),
        ({"shared_bytes": 232449}, "shared_bytes: expected 0 to 232448, got 232449"),
        ({"device": 1}, "device: expected one of 1, got 1"),
    ],
)
def test_the_limits_of_a_launch(machine: Machine, launch: dict[str, Any], text: str) -> None:
    with pytest.raises(EmulationError, match=f"store: {text}"):
        machine.load(ARGUMENTS_PTX)["store"].prepare(args=arguments(), **launch)


def test_launches_step_the_seed() -> None:
    def seeds(seed: int, count: int) -> list[int]:
        machine = Machine(seed=seed)
        kernel, found = machine.load(ARGUMENTS_PTX)["store"], [machine.seed]
        for _ in range(count):
            kernel.launch(args=arguments())
            found.append(machine.seed)
        return found

    first = seeds(3, 4)
    assert first[0] == 3
    assert len(set(first)) == 5
    assert first == seeds(3, 4), "a new machine runs the same course"
    assert not set(first) & set(seeds(4, 4))


def test_launches_of_one_call() -> None:
    machine = Machine()
    kernel = machine.load(ARGUMENTS_PTX)["store"]
    first, second = arguments(u32=1), arguments(u32=2)
    counters = machine.launch_all([kernel.prepare(args=first), (kernel, {"args": second})])
    assert [int(given[0].view(np.uint32)[0]) for given in (first, second)] == [1, 2]
    assert len(counters) == 2
    with pytest.raises(EmulationError, match="store: loaded by another machine"):
        Machine().launch_all([kernel.prepare(args=arguments())])


def test_a_read_only_array_is_not_written(machine: Machine) -> None:
    given = arguments()
    given[0].flags.writeable = False
    with pytest.raises(EmulationError, match=r"To run this launch again: Machine\(seed=\d+\)"):
        machine.load(ARGUMENTS_PTX)["store"].launch(args=given)
    assert not given[0].any()
