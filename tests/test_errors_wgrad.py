"""Bad input to grouped_wgrad, through both entrances and with fake tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_errors import assert_says
from test_errors_grouped import DTYPES, E4M3, Bad, name_of, row_scale, zeros
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastfp8
from fastfp8 import _C, ScaledTensor

OP = "grouped_wgrad"
NEW, OUT = torch.ops.fastfp8.grouped_wgrad.default, torch.ops.fastfp8.grouped_wgrad.out


def good() -> dict[str, Any]:
    """Arguments by the names of the schemas: three groups, N = 5, K = 136, T = 304."""
    return {
        "grad_t": zeros(5, 304),
        "grad_t_scale": row_scale(5, 3),
        "input_t": zeros(136, 304),
        "input_t_scale": row_scale(136, 3),
        "offsets": torch.tensor([2, 2, 300], dtype=torch.int32),
        "error": None,
    }


def bad_operands() -> list[Bad]:
    rows = []
    for name, size in (("grad_t", 5), ("input_t", 136)):
        scale = f"{name}_scale"
        rows += [
            Bad(OP, {name: torch.zeros(size, 304)}, TypeError, name, ("float8_e4m3fn", "float32")),
            Bad(OP, {name: zeros(304)}, ValueError, name, ("2 dimensions", "(304,)")),
            Bad(OP, {name: zeros(1, size, 304)}, ValueError, name, ("2 dimensions", f"(1, {size}, 304)")),
            Bad(OP, {name: zeros(304, size).t()}, ValueError, name, ("row-major", f"(1, {size})")),
            Bad(OP, {name: zeros(size, 312)[:, :304]}, ValueError, name, ("16 bytes", "(312, 1)")),
            Bad(OP, {name: zeros(1, 304).expand(size, 304)}, ValueError, name, ("do not overlap", "(0, 1)")),
            Bad(OP, {scale: row_scale(size, 3).double()}, TypeError, scale, ("float32", "float64")),
            Bad(OP, {scale: row_scale(size, 2)}, ValueError, scale, (f"({size}, 3)", f"({size}, 2)")),
            Bad(OP, {scale: torch.ones(size, 3)}, ValueError, scale, ("a multiple of 4", "(3, 1)")),
            Bad(OP, {scale: row_scale(size, 3).to("meta")}, ValueError, scale, ("device cpu", "meta")),
            Bad(OP, {name: None}, TypeError, name, ("ScaledTensor", "NoneType"), api_only=True),
        ]
    on_meta = {"input_t": zeros(136, 304).to("meta"), "input_t_scale": row_scale(136, 3).to("meta")}
    odd = {"grad_t": zeros(5, 312), "input_t": zeros(136, 312)}
    return [
        *rows,
        Bad(OP, on_meta, ValueError, "input_t", ("device cpu", "'grad_t'", "meta")),
        Bad(OP, {"input_t": zeros(136, 272)}, ValueError, "input_t", ("T = 304", "'grad_t'", "(136, 272)")),
        Bad(OP, odd, ValueError, "grad_t", ("T a multiple of 16", "T = 312")),
        Bad(
            OP,
            {"input_t": zeros(132, 304), "input_t_scale": row_scale(132, 3)},
            ValueError,
            "input_t",
            ("K a multiple of 8", "K = 132"),
        ),
    ]


def bad_offsets() -> list[Bad]:
    name, given = "offsets", good()["offsets"]
    rows = [
        Bad(OP, {name: given.to(dtype)}, TypeError, name, ("int32", str(dtype)))
        for dtype in (torch.int64, torch.int16, torch.float32)
    ]
    return [
        *rows,
        Bad(OP, {name: given[:0]}, ValueError, name, ("at least one group", "(0,)")),
        Bad(OP, {name: given[None]}, ValueError, name, ("1 dimension", "(1, 3)")),
        Bad(OP, {name: given.repeat_interleave(2)[::2]}, ValueError, name, ("contiguous", "(2,)")),
        Bad(OP, {name: given.to("meta")}, ValueError, name, ("device cpu", "'grad_t'", "meta")),
        Bad(OP, {name: [2, 2, 300]}, TypeError, name, ("torch.Tensor", "list"), api_only=True),
        Bad(OP, {"error": torch.zeros(1)}, TypeError, "error", ("int32", "float32"), ops_only=True),
        Bad(OP, {"error": torch.zeros(2).int()}, ValueError, "error", ("(1,)", "(2,)"), ops_only=True),
        Bad(OP, {"error": torch.zeros(1).int().to("meta")}, ValueError, "error", ("device cpu", "meta"), ops_only=True),
    ]


def bad_outs() -> list[Bad]:
    """With ``out``, hence of the op that writes it."""
    out = torch.zeros(3, 5, 136)
    return [
        *(
            Bad(OP, {"out": out.to(dtype)}, TypeError, "out", (DTYPES, str(dtype)))
            for dtype in (torch.float16, torch.float64, torch.int32)
        ),
        Bad(OP, {"out": out[0]}, ValueError, "out", ("3 dimensions", "(5, 136)")),
        Bad(OP, {"out": torch.zeros(2, 5, 136)}, ValueError, "out", ("(3, 5, 136)", "(2, 5, 136)")),
        Bad(OP, {"out": torch.zeros(3, 136, 5)}, ValueError, "out", ("(3, 5, 136)", "(3, 136, 5)")),
        Bad(OP, {"out": torch.zeros(3, 136, 5).mT}, ValueError, "out", ("contiguous", "(680, 1, 5)")),
        Bad(OP, {"out": torch.zeros(3, 5, 144)[..., :136]}, ValueError, "out", ("contiguous", "(720, 144, 1)")),
        Bad(OP, {"out": out.to("meta")}, ValueError, "out", ("device cpu", "'grad_t'", "meta")),
        Bad(OP, {"out": [0.0]}, TypeError, "out", ("torch.Tensor", "list"), api_only=True),
        Bad(OP, {"accumulate": True}, ValueError, "out", ("to accumulate to", "None"), api_only=True),
        Bad(OP, {"out": out, "accumulate": 1}, TypeError, "accumulate", ("a bool", "int"), api_only=True),
        Bad(
            OP,
            {"out": out, "out_dtype": torch.bfloat16},
            TypeError,
            "out_dtype",
            ("torch.float32", "'out'", "torch.bfloat16"),
            api_only=True,
        ),
    ]


def bad_dtypes() -> list[Bad]:
    return [
        Bad(OP, {"out_dtype": dtype}, TypeError, "out_dtype", (DTYPES, str(dtype)))
        for dtype in (torch.float16, torch.float64, E4M3, torch.int32)
    ] + [Bad(OP, {"out_dtype": "bfloat16"}, TypeError, "out_dtype", (DTYPES, "bfloat16"), api_only=True)]


TABLE = [*bad_operands(), *bad_offsets(), *bad_outs(), *bad_dtypes()]


def call_api(arguments: dict[str, Any]) -> Tensor:
    """With operands put together without the checks of ScaledTensor, so that those of the op are reached."""
    operands = []
    for name in ("grad_t", "input_t"):
        data, scale = arguments.pop(name), arguments.pop(f"{name}_scale")
        operands.append(data if data is None else ScaledTensor._trusted(data, scale, (1, 128)))
    arguments.pop("error")
    return fastfp8.grouped_wgrad(*operands, arguments.pop("offsets"), **arguments)


def test_good_arguments_are_good() -> None:
    """Else the table would prove nothing."""
    out = torch.full((3, 5, 136), torch.nan)
    assert call_api(good()).shape == out.shape
    assert call_api(good() | {"out": out}) is out
    assert NEW(**good()).shape == out.shape
    assert OUT(**good(), out=out) is None
    assert not out.count_nonzero()
    # The dtype of out is the result's; to say so is allowed.
    into = out.bfloat16()
    assert call_api(good() | {"out": into, "accumulate": True, "out_dtype": torch.bfloat16}) is into
    assert call_api(good() | {"out_dtype": torch.bfloat16}).dtype == torch.bfloat16


@pytest.mark.parametrize("bad", [bad for bad in TABLE if not bad.ops_only], ids=name_of)
def test_api(bad: Bad) -> None:
    with pytest.raises(bad.error) as caught:
        call_api(good() | bad.change)
    assert_says(caught, f"fastfp8.{OP}: argument '{bad.argument}': expected ", ", got ", *bad.words)


def ops_of(bad: Bad) -> list[tuple[Any, dict[str, Any]]]:
    """The ops that take the argument that is wrong."""
    if "out" in bad.change:
        return [(OUT, {})]
    if "out_dtype" in bad.change:
        return [(NEW, {})]
    return [(NEW, {}), (OUT, {"out": torch.zeros(3, 5, 136)})]


@pytest.mark.parametrize("bad", [bad for bad in TABLE if not bad.api_only], ids=name_of)
def test_ops(bad: Bad) -> None:
    for op, rest in ops_of(bad):
        with pytest.raises(RuntimeError) as caught:
            op(**(good() | rest | bad.change))
        assert_says(caught, f"fastfp8.{OP}: argument '{bad.argument}': expected ", ", got ", *bad.words)


@pytest.mark.parametrize("bad", [bad for bad in TABLE if not bad.api_only], ids=name_of)
def test_fake_refuses_the_same(bad: Bad) -> None:
    for op, rest in ops_of(bad):
        arguments = good() | rest | bad.change
        with FakeTensorMode() as mode:
            fakes = {n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in arguments.items()}
            with pytest.raises(RuntimeError) as caught:
                op(**fakes)
        assert_says(caught, f"fastfp8.{OP}: argument '{bad.argument}': expected ", *bad.words)


def test_blocks() -> None:
    """Of another kind than the op takes, and wrong for its name, not for its shape."""
    rows, square = (fastfp8.quantize(torch.ones(128, 128), block) for block in ((1, 128), (128, 128)))
    offsets = torch.tensor([128], dtype=torch.int32)
    for left, right, name in ((square, rows, "grad_t"), (rows, square, "input_t"), (rows.t(), rows, "grad_t")):
        with pytest.raises(ValueError, match="blocks") as caught:
            fastfp8.grouped_wgrad(left, right, offsets)
        assert_says(caught, f"fastfp8.{OP}: argument '{name}': expected blocks of (1, 128), got blocks of")


# What a CUDA device's planner is given for good(), as views at aligned addresses: dtype, sizes, strides.
VIEWS: dict[str, tuple[Any, ...]] = {
    "grad_t": ("float8_e4m3fn", (5, 304), (304, 1)),
    "grad_t_scale": ("float32", (5, 3), (1, 8)),
    "input_t": ("float8_e4m3fn", (136, 304), (304, 1)),
    "input_t_scale": ("float32", (136, 3), (1, 136)),
    "offsets": ("int32", (3,), (1,)),
    "out": ("float32", (15, 136), (136, 1)),
}
BAD_VIEWS: list[tuple[str, tuple[Any, ...], tuple[str, ...]]] = [
    ("grad_t", ("float32", (5, 304), (304, 1)), ("float8_e4m3fn", "float32")),
    ("grad_t", ("float8_e4m3fn", (5, 304), (304, 1), -1), ("on a CUDA device",)),
    ("grad_t", ("float8_e4m3fn", (5, 304), (312, 1)), ("16 bytes", "(312, 1)")),
    ("grad_t_scale", ("float32", (5, 2), (1, 8)), ("(5, 3)", "(5, 2)")),
    ("input_t", ("float8_e4m3fn", (136, 304), (304, 1), 1), ("device of 'grad_t' (cuda:0)", "cuda:1")),
    ("input_t", ("float8_e4m3fn", (136, 288), (304, 1)), ("T = 304 columns, as 'grad_t' has", "(136, 288)")),
    ("input_t", ("float8_e4m3fn", (132, 304), (304, 1)), ("K a multiple of 8", "K = 132")),
    ("input_t_scale", ("float32", (136, 3), (3, 1)), ("a multiple of 4", "(3, 1)")),
    ("offsets", ("int64", (3,), (1,)), ("int32",)),
    ("offsets", ("int32", (3,), (2,)), ("contiguous", "stride 2")),
    ("offsets", ("int32", (3,), (1,), 1), ("device of 'grad_t'", "elsewhere")),
    ("offsets", ("int32", (3, 1), (1, 1)), ("one number for each", "2 dimensions")),
    ("offsets", ("int32", (1025,), (1,)), ("1 to 1024 groups", "1025")),
    ("offsets", ("int32", (0,), (1,)), ("1 to 1024 groups", "0")),
    ("out", ("float32", (10, 136), (136, 1)), ("(3, 5, 136)", "(10, 136)")),
    ("out", ("float32", (15, 136), (144, 1)), ("contiguous", "(144, 1)")),
    ("out", ("float32", (15, 136), (136, 1), 0, 8), ("16 bytes", "8 bytes past")),
    ("out", ("float32", (15, 136), (136, 1), 1), ("device of 'grad_t'", "cuda:1")),
]


def planned(views: dict[str, tuple[Any, ...]]) -> _C.GemmProblem:
    given = {name: _C.TensorView(*view, *(0, 16)[len(view) - 3 :]) for name, view in views.items()}
    return _C.GemmProblem.wgrad(**given, accumulate=True, num_sms=132)


@pytest.mark.parametrize(("argument", "view", "words"), BAD_VIEWS, ids=str)
def test_the_planner_refuses(argument: str, view: tuple[Any, ...], words: tuple[str, ...]) -> None:
    """In the op's own names, which are not those of gemm."""
    with pytest.raises(RuntimeError) as caught:
        planned(VIEWS | {argument: view})
    assert_says(caught, f"fastfp8.{OP}: argument '{argument}': expected ", ", got ", *words)


def test_what_the_planner_takes() -> None:
    problem = planned(VIEWS)
    assert (problem.m, problem.n, problem.k, problem.groups) == (5, 136, 304, 3)
    assert (problem.out_dtype, problem.c_dtype) == ("float32", "float32")
    with pytest.raises(RuntimeError, match="'grad_t': expected T a multiple of 16, got T = 312"):
        planned(
            VIEWS | {name: ("float8_e4m3fn", (rows, 312), (320, 1)) for name, rows in (("grad_t", 5), ("input_t", 136))}
        )
