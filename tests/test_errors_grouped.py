"""Bad input to the grouped GEMMs, through both entrances and with fake tensors: tests/test_errors.py has the others."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from test_errors import assert_says
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastfp8
from fastfp8 import ScaledTensor

E4M3 = torch.float8_e4m3fn
GROUPED, MASKED = "grouped_gemm", "masked_grouped_gemm"
SIZES = {GROUPED: "offsets", MASKED: "counts"}
DTYPES = "torch.bfloat16 or torch.float32"


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape).to(E4M3)


def row_scale(*shape: int) -> Tensor:
    """In the layout of (1, 128) blocks: rows of all matrices beside each other, padded to 4."""
    *matrices, rows, blocks = shape
    pitch = -(-rows * (matrices or [1])[0] // 4) * 4
    return torch.ones(blocks * pitch).as_strided(shape, (*[rows] * len(matrices), 1, pitch))


def good(op: str) -> dict[str, Any]:
    """Arguments that ``op`` takes, by the names of its schema: three groups."""
    shape = (5, 304) if op == GROUPED else (3, 5, 304)
    return {
        "a": zeros(*shape),
        "a_scale": row_scale(*shape[:-1], 3),
        "b": zeros(3, 136, 304),
        "b_scale": torch.ones(3, 2, 3),
        SIZES[op]: torch.tensor([2, 2, 5], dtype=torch.int32),
        "error": None,
        "out_dtype": torch.float32,
    }


class Bad(NamedTuple):
    """A change to good arguments and what both entrances must say."""

    op: str
    change: dict[str, Any]
    error: type[Exception]
    argument: str
    words: tuple[str, ...]
    #: Whether only torch.ops can be given it: the error word, or a part that ScaledTensor refuses for its type.
    ops_only: bool = False
    #: Whether torch.ops refuses a Python type in its own words.
    api_only: bool = False


def bad_operands(op: str) -> list[Bad]:
    dim = 2 if op == GROUPED else 3
    lead = () if op == GROUPED else (3,)
    a, b_shape = good(op)["a"], (3, 136, 304)
    rows = [
        Bad(op, {"a": torch.zeros(a.shape)}, TypeError, "a", ("float8_e4m3fn", "float32")),
        Bad(op, {"b": torch.zeros(b_shape)}, TypeError, "b", ("float8_e4m3fn", "float32")),
        Bad(op, {"a": zeros(304)}, ValueError, "a", (f"{dim} dimensions", "(304,)")),
        Bad(op, {"a": zeros(5, 304) if dim == 3 else zeros(1, 5, 304)}, ValueError, "a", (f"{dim} dimensions",)),
        Bad(op, {"b": zeros(136, 304)}, ValueError, "b", ("3 dimensions", "(136, 304)")),
        Bad(op, {"a": zeros(*lead, 304, 5).mT}, ValueError, "a", ("row-major", "1, 5)")),
        Bad(op, {"b": zeros(3, 304, 136).mT}, ValueError, "b", ("row-major", "1, 136)")),
        Bad(op, {"a": zeros(*lead, 5, 312)[..., :304]}, ValueError, "a", ("16 bytes", "312, 1)")),
        Bad(op, {"b": zeros(3, 136, 312)[..., :304]}, ValueError, "b", ("16 bytes", "312, 1)")),
        Bad(op, {"b": zeros(3, 144, 304)[:, :136]}, ValueError, "b", ("136 rows apart", "(43776, 304, 1)")),
        Bad(op, {"b": zeros(1, 136, 304).expand(b_shape)}, ValueError, "b", ("136 rows apart", "(0, 304, 1)")),
        Bad(op, {"b": zeros(1, 304).expand(b_shape)}, ValueError, "b", ("do not overlap", "(0, 0, 1)")),
        Bad(op, {"a": zeros(1, 304).expand(a.shape)}, ValueError, "a", ("do not overlap", "0, 1)")),
        Bad(op, {"a_scale": row_scale(*lead, 5, 3).double()}, TypeError, "a_scale", ("float32", "float64")),
        Bad(op, {"a_scale": row_scale(*lead, 5, 2)}, ValueError, "a_scale", ("5, 3)", "5, 2)")),
        Bad(op, {"a_scale": torch.ones(*lead, 5, 3)}, ValueError, "a_scale", ("a multiple of 4", "3, 1)")),
        Bad(op, {"a_scale": torch.ones(3)}, ValueError, "a_scale", (f"{dim} dimensions", "(3,)")),
        Bad(op, {"b_scale": torch.ones(3, 2, 3).half()}, TypeError, "b_scale", ("float32", "float16")),
        Bad(op, {"b_scale": torch.ones(3, 1, 3)}, ValueError, "b_scale", ("(3, 2, 3)", "(3, 1, 3)")),
        Bad(op, {"b_scale": torch.ones(3, 3, 2).mT}, ValueError, "b_scale", ("contiguous", "(6, 1, 2)")),
        Bad(op, {"b_scale": torch.ones(2, 3)}, ValueError, "b_scale", ("3 dimensions", "(2, 3)")),
        Bad(op, {"a_scale": row_scale(*lead, 5, 3).to("meta")}, ValueError, "a_scale", ("device cpu", "meta")),
        Bad(op, {"b_scale": torch.ones(3, 2, 3, device="meta")}, ValueError, "b_scale", ("device cpu", "meta")),
        Bad(
            op,
            {"b": zeros(*b_shape).to("meta"), "b_scale": torch.ones(3, 2, 3, device="meta")},
            ValueError,
            "b",
            ("device cpu", "'a'", "meta"),
        ),
        Bad(op, {"b": zeros(3, 136, 272)}, ValueError, "b", ("K = 304", "(3, 136, 272)")),
        Bad(op, {"a": zeros(*lead, 5, 312), "b": zeros(3, 136, 312)}, ValueError, "a", ("multiple of 16", "K = 312")),
        Bad(op, {"b": zeros(3, 132, 304)}, ValueError, "b", ("N a multiple of 8", "N = 132")),
        Bad(op, {"b": zeros(0, 136, 304), "b_scale": torch.ones(0, 2, 3)}, ValueError, "b", ("one group", "(0, 136")),
        Bad(op, {"a": None}, TypeError, "a", ("ScaledTensor", "NoneType"), api_only=True),
        Bad(op, {"b": None}, TypeError, "b", ("ScaledTensor", "NoneType"), api_only=True),
    ]
    if op == MASKED:
        few = {"a": zeros(2, 5, 304), "a_scale": row_scale(2, 5, 3)}
        apart = zeros(3, 6, 304)[:, :5]
        scale_apart = row_scale(3, 6, 3)[:, :5]
        rows += [
            Bad(op, few, ValueError, "a", ("3 groups", "'b'", "(2, 5, 304)")),
            Bad(op, {"a": apart}, ValueError, "a", ("5 rows apart", "(1824, 304, 1)")),
            Bad(op, {"a_scale": scale_apart}, ValueError, "a_scale", ("the number of rows, 1", "(6, 1, 20)")),
            *(
                Bad(op, {"a_scale": torch.ones(99).as_strided((3, 5, 3), strides)}, ValueError, "a_scale", words)
                for strides, words in (((5, 2, 20), ("rows, 1", "(5, 2, 20)")), ((5, 1, 12), ("not below", "5, 1, 12")))
            ),
        ]
    return rows


def bad_others(op: str) -> list[Bad]:
    name = SIZES[op]
    sizes = good(op)[name]
    rows = [
        Bad(op, {name: sizes.to(dtype)}, TypeError, name, ("int32", str(dtype)))
        for dtype in (torch.int64, torch.int16, torch.float32)
    ]
    rows += [
        Bad(op, {name: sizes[:2]}, ValueError, name, ("shape (3,)", "'b'", "(2,)")),
        Bad(op, {name: sizes[None]}, ValueError, name, ("1 dimension", "(1, 3)")),
        Bad(op, {name: sizes.repeat_interleave(2)[::2]}, ValueError, name, ("contiguous", "(2,)")),
        Bad(op, {name: sizes[:1].expand(3)}, ValueError, name, ("contiguous", "(0,)")),
        Bad(op, {name: sizes.to("meta")}, ValueError, name, ("device cpu", "'a'", "meta")),
        Bad(op, {name: [2, 2, 5]}, TypeError, name, ("torch.Tensor", "list"), api_only=True),
        Bad(op, {name: None}, TypeError, name, ("torch.Tensor", "NoneType"), api_only=True),
        Bad(op, {"out_dtype": "bfloat16"}, TypeError, "out_dtype", (DTYPES, "bfloat16"), api_only=True),
        Bad(op, {"error": torch.zeros(1)}, TypeError, "error", ("int32", "float32"), ops_only=True),
        Bad(op, {"error": torch.zeros(2).int()}, ValueError, "error", ("(1,)", "(2,)"), ops_only=True),
        Bad(op, {"error": torch.zeros(()).int()}, ValueError, "error", ("1 dimension", "()"), ops_only=True),
        Bad(op, {"error": torch.zeros(1).int().to("meta")}, ValueError, "error", ("device cpu", "meta"), ops_only=True),
    ]
    return rows + [
        Bad(op, {"out_dtype": dtype}, TypeError, "out_dtype", (DTYPES, str(dtype)))
        for dtype in (torch.float16, torch.float64, E4M3, torch.int32)
    ]


TABLE = [bad for op in (GROUPED, MASKED) for bad in bad_operands(op) + bad_others(op)]


def call_api(op: str, arguments: dict[str, Any]) -> Tensor:
    """With operands put together without the checks of ScaledTensor, so that those of the op are reached."""
    a, b = arguments["a"], arguments["b"]
    a = a if a is None else ScaledTensor._trusted(a, arguments["a_scale"], (1, 128))
    b = b if b is None else ScaledTensor._trusted(b, arguments["b_scale"], (128, 128))
    return getattr(fastfp8, op)(a, b, arguments[SIZES[op]], out_dtype=arguments["out_dtype"])


def name_of(bad: Bad) -> str:
    return f"{bad.op}-{'-'.join(bad.change)}-{' '.join(bad.words)}"


@pytest.mark.parametrize("op", [GROUPED, MASKED])
def test_good_arguments_are_good(op: str) -> None:
    """Else the table would prove nothing."""
    shape = (5, 136) if op == GROUPED else (3, 5, 136)
    assert call_api(op, good(op)).shape == shape
    assert getattr(torch.ops.fastfp8, op)(**good(op)).shape == shape


@pytest.mark.parametrize("bad", [bad for bad in TABLE if not bad.ops_only], ids=name_of)
def test_api(bad: Bad) -> None:
    with pytest.raises(bad.error) as caught:
        call_api(bad.op, good(bad.op) | bad.change)
    assert_says(caught, f"fastfp8.{bad.op}: argument '{bad.argument}': expected ", ", got ", *bad.words)


@pytest.mark.parametrize("bad", [bad for bad in TABLE if not bad.api_only], ids=name_of)
def test_ops(bad: Bad) -> None:
    with pytest.raises(RuntimeError) as caught:
        getattr(torch.ops.fastfp8, bad.op)(**(good(bad.op) | bad.change))
    assert_says(caught, f"fastfp8.{bad.op}: argument '{bad.argument}': expected ", ", got ", *bad.words)


@pytest.mark.parametrize("bad", [bad for bad in TABLE if not bad.api_only], ids=name_of)
def test_fake_refuses_the_same(bad: Bad) -> None:
    arguments = good(bad.op) | bad.change
    with FakeTensorMode() as mode:
        fakes = {n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in arguments.items()}
        with pytest.raises(RuntimeError) as caught:
            getattr(torch.ops.fastfp8, bad.op)(**fakes)
    assert_says(caught, f"fastfp8.{bad.op}: argument '{bad.argument}': expected ", *bad.words)


@pytest.mark.parametrize("op", [GROUPED, MASKED])
def test_blocks(op: str) -> None:
    """Of another kind than the op takes, and wrong for its name, not for its shape."""
    a, b = zeros(128, 128), zeros(3, 128, 128)
    square = fastfp8.quantize(torch.ones(128, 128), (128, 128))
    rows = ScaledTensor(a, torch.ones(128, 1), (1, 128))
    weights = ScaledTensor(b, torch.ones(3, 1, 1), (128, 128))
    by_row = ScaledTensor(b, torch.ones(3, 128, 1), (1, 128))
    sizes = torch.zeros(3, dtype=torch.int32)
    for left, right, name, needed in ((square, weights, "a", (1, 128)), (rows, by_row, "b", (128, 128))):
        with pytest.raises(ValueError, match="blocks") as caught:
            getattr(fastfp8, op)(left, right, sizes)
        assert_says(caught, f"fastfp8.{op}: argument '{name}': expected blocks of {needed}, got blocks of")
