"""Bad input to the ops with SwiGLU, through both entrances and with fake tensors: test_errors.py has the others."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from test_errors import assert_says
from test_errors_grouped import row_scale, zeros
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastfp8
from fastfp8 import ScaledTensor

SWIGLU, DENSE, GROUPED, BACKWARD = "swiglu_quantize", "dense", "grouped", "swiglu_backward_quantize"
OPS = {SWIGLU: SWIGLU, DENSE: "gemm_swiglu_quantize", GROUPED: "gemm_swiglu_quantize", BACKWARD: BACKWARD}


def good(kind: str) -> dict[str, Any]:
    """Arguments that the op of ``kind`` takes, by the names of its schema."""
    options = {"weight": torch.ones(5), "limit": 7.0, "pow2": False, "eps": 0.0}
    if kind == SWIGLU:
        return {"gate_up": torch.ones(5, 600), **options}
    if kind == BACKWARD:
        offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
        operands = {"grad": torch.ones(5, 256), "gate_up": zeros(5, 512), "gate_up_scale": row_scale(5, 4)}
        return {**operands, **options, "offsets": offsets, "error": None, "dense_activation": False}
    lead = (3,) if kind == GROUPED else ()
    return {
        "a": zeros(5, 304),
        "a_scale": row_scale(5, 3),
        "b": zeros(*lead, 256, 304),
        "b_scale": torch.ones(*lead, 2, 3),
        "offsets": torch.tensor([2, 2, 5], dtype=torch.int32) if kind == GROUPED else None,
        "error": None,
        **options,
        "return_gate_up": True,
    }


class Bad(NamedTuple):
    """A change to good arguments and what both entrances must say."""

    kind: str
    change: dict[str, Any]
    error: type[Exception]
    argument: str
    words: tuple[str, ...]
    #: Whether only torch.ops can be given it, or only the Python function: torch refuses a type in its own words.
    ops_only: bool = False
    api_only: bool = False


def bad_options(kind: str) -> list[Bad]:
    name = {SWIGLU: "gate_up", BACKWARD: "grad"}.get(kind, "a")
    limit, eps = "positive number from 2**-100 to 2**100", "number from 0 up to 2**100"
    rows = [
        Bad(kind, {"weight": torch.ones(5).bfloat16()}, TypeError, "weight", ("float32", "bfloat16")),
        Bad(kind, {"weight": torch.ones(4)}, ValueError, "weight", ("shape (5,)", "each row", "(4,)")),
        Bad(kind, {"weight": torch.ones(5, 1)}, ValueError, "weight", ("1 dimension", "(5, 1)")),
        Bad(kind, {"weight": torch.ones(5, device="meta")}, ValueError, "weight", ("cpu", f"'{name}'", "meta")),
        Bad(kind, {"weight": [1.0] * 5}, TypeError, "weight", ("torch.Tensor", "list"), api_only=True),
        Bad(kind, {"limit": "7"}, TypeError, "limit", ("a number or None", "str '7'"), api_only=True),
        Bad(kind, {"pow2": 1}, TypeError, "pow2", ("a bool", "int 1"), api_only=True),
        Bad(kind, {"eps": None}, TypeError, "eps", ("a number", "NoneType"), api_only=True),
    ]
    rows += [
        Bad(kind, {"limit": value}, ValueError, "limit", (limit, str(value)))
        for value in (0.0, -7.0, math.inf, math.nan, 2.0**101, 2.0**-101)
    ]
    return rows + [
        Bad(kind, {"eps": value}, ValueError, "eps", (eps, str(value))) for value in (-1.0, math.inf, math.nan)
    ]


def bad_gate_up() -> list[Bad]:
    dtypes = "torch.bfloat16 or torch.float16 or torch.float32"
    return [
        Bad(SWIGLU, {"gate_up": torch.ones(5, 600).double()}, TypeError, "gate_up", (dtypes, "float64")),
        Bad(SWIGLU, {"gate_up": torch.ones(5, 601)}, ValueError, "gate_up", ("an even number", "(5, 601)")),
        Bad(SWIGLU, {"gate_up": torch.ones(1, 5, 600)}, ValueError, "gate_up", ("2 dimensions", "(1, 5, 600)")),
        Bad(SWIGLU, {"gate_up": None}, TypeError, "gate_up", ("torch.Tensor", "NoneType"), api_only=True),
    ]


def bad_backward() -> list[Bad]:
    """Of gate_up in FP8, and dense."""
    dense = {"gate_up": torch.ones(5, 512), "gate_up_scale": None}
    return [
        Bad(BACKWARD, {"grad": torch.ones(5, 256).double()}, TypeError, "grad", ("bfloat16", "float64")),
        Bad(BACKWARD, {"grad": torch.ones(5, 200)}, ValueError, "grad", ("F a multiple of 128", "(5, 200)")),
        Bad(BACKWARD, {"grad": torch.ones(256)}, ValueError, "grad", ("2 dimensions", "(256,)")),
        Bad(BACKWARD, {"grad": None}, TypeError, "grad", ("torch.Tensor", "NoneType"), api_only=True),
        Bad(BACKWARD, {"gate_up_scale": row_scale(5, 3)}, ValueError, "gate_up_scale", ("(5, 4)", "(5, 3)")),
        Bad(BACKWARD, {"gate_up_scale": torch.ones(5, 4)}, ValueError, "gate_up_scale", ("a multiple of 4", "(4, 1)")),
        Bad(BACKWARD, dense | {"gate_up": torch.ones(5, 510)}, ValueError, "gate_up", ("(5, 512)", "(5, 510)")),
        Bad(BACKWARD, dense | {"gate_up": torch.ones(4, 512)}, ValueError, "gate_up", ("(5, 512)", "(4, 512)")),
        Bad(BACKWARD, dense | {"gate_up": torch.ones(5, 512).long()}, TypeError, "gate_up", ("float32", "int64")),
        Bad(
            BACKWARD,
            dense | {"gate_up": torch.ones(5, 512, device="meta")},
            ValueError,
            "gate_up",
            ("device cpu", "'grad'", "meta"),
        ),
        Bad(BACKWARD, {"pad": 1}, TypeError, "pad", ("a bool", "int 1"), api_only=True),
        Bad(BACKWARD, {"dense_activation": 1}, TypeError, "dense_activation", ("a bool", "int 1"), api_only=True),
        Bad(BACKWARD, {"error": torch.zeros(2).int()}, ValueError, "error", ("(1,)", "(2,)"), ops_only=True),
        Bad(
            BACKWARD,
            {"offsets": None, "error": torch.zeros(1)},
            TypeError,
            "error",
            ("int32", "float32"),
            ops_only=True,
        ),
    ]


def bad_operands(kind: str) -> list[Bad]:
    lead = (3,) if kind == GROUPED else ()
    few = {"b": zeros(*lead, 128, 304), "b_scale": torch.ones(*lead, 1, 3)}
    odd = {"b": zeros(*lead, 384, 304), "b_scale": torch.ones(*lead, 3, 3)}
    wide = {"a": zeros(5, 312), "b": zeros(*lead, 256, 312)}
    other = {"b": zeros(*(() if lead else (3,)), 256, 304)}
    return [
        Bad(kind, few, ValueError, "b", ("2 F rows, F a multiple of 128", "128, 304)")),
        Bad(kind, odd, ValueError, "b", ("2 F rows, F a multiple of 128", "384, 304)")),
        Bad(kind, other, ValueError, "b", (f"{2 + len(lead)} dimensions", "256, 304)")),
        Bad(kind, wide, ValueError, "a", ("K a multiple of 16", "K = 312")),
        Bad(kind, {"b": zeros(*lead, 256, 272)}, ValueError, "b", ("K = 304", "256, 272)")),
        Bad(kind, {"a": torch.ones(5, 304)}, TypeError, "a", ("float8_e4m3fn", "float32")),
        Bad(kind, {"a": zeros(304, 5).t()}, ValueError, "a", ("row-major", "(1, 5)")),
        Bad(kind, {"a_scale": torch.ones(5, 3)}, ValueError, "a_scale", ("a multiple of 4", "(3, 1)")),
        Bad(kind, {"b_scale": torch.ones(*lead, 1, 3)}, ValueError, "b_scale", ("2, 3)", "1, 3)")),
        Bad(kind, {"a": None}, TypeError, "a", ("ScaledTensor", "NoneType"), api_only=True),
        Bad(kind, {"b": None}, TypeError, "b", ("ScaledTensor", "NoneType"), api_only=True),
        Bad(kind, {"return_gate_up": 1}, TypeError, "return_gate_up", ("a bool", "int 1"), api_only=True),
        Bad(kind, {"error": torch.zeros(2).int()}, ValueError, "error", ("(1,)", "(2,)"), ops_only=True),
    ]


def bad_offsets(kind: str) -> list[Bad]:
    offsets, name = good(kind)["offsets"], "a" if kind == GROUPED else "grad"
    few = ("shape (3,)", "'b'", "(2,)") if kind == GROUPED else ("at least one group", "(0,)")
    return [
        Bad(kind, {"offsets": offsets.long()}, TypeError, "offsets", ("int32", "int64")),
        Bad(kind, {"offsets": offsets[: 2 if kind == GROUPED else 0]}, ValueError, "offsets", few),
        Bad(kind, {"offsets": offsets.repeat(2)[::2]}, ValueError, "offsets", ("contiguous", "(2,)")),
        Bad(kind, {"offsets": offsets.to("meta")}, ValueError, "offsets", ("device cpu", f"'{name}'", "meta")),
        Bad(kind, {"offsets": [2, 2, 5]}, TypeError, "offsets", ("torch.Tensor", "list"), api_only=True),
    ]


TABLE = [
    *(bad for kind in OPS for bad in bad_options(kind)),
    *bad_gate_up(),
    *(bad for kind in (DENSE, GROUPED) for bad in bad_operands(kind)),
    *bad_backward(),
    *(bad for kind in (GROUPED, BACKWARD) for bad in bad_offsets(kind)),
]


def call_api(kind: str, arguments: dict[str, Any]) -> Any:
    """With operands put together without the checks of ScaledTensor, so that those of the op are reached."""
    given = dict(arguments)
    if kind == SWIGLU:
        return fastfp8.swiglu_quantize(given.pop("gate_up"), given.pop("weight"), given.pop("limit"), **given)
    if kind == BACKWARD:
        gate_up, scale = given.pop("gate_up"), given.pop("gate_up_scale")
        gate_up = gate_up if scale is None else ScaledTensor._trusted(gate_up, scale, (1, 128))
        del given["error"]
        return fastfp8.swiglu_backward_quantize(
            given.pop("grad"), gate_up, given.pop("weight"), given.pop("limit"), **given
        )
    a, b, a_scale, b_scale = (given.pop(name) for name in ("a", "b", "a_scale", "b_scale"))
    del given["error"]
    a = a if a is None else ScaledTensor._trusted(a, a_scale, (1, 128))
    b = b if b is None else ScaledTensor._trusted(b, b_scale, (128, 128))
    return fastfp8.gemm_swiglu_quantize(a, b, given.pop("offsets"), **given)


def call_op(kind: str, arguments: dict[str, Any]) -> Any:
    return getattr(torch.ops.fastfp8, OPS[kind])(**arguments)


def name_of(bad: Bad) -> str:
    return f"{bad.kind}-{'-'.join(bad.change)}-{' '.join(bad.words)}"


@pytest.mark.parametrize("kind", OPS)
def test_good_arguments_are_good(kind: str) -> None:
    """Else the table would prove nothing."""
    shape = {SWIGLU: (5, 300), BACKWARD: (256, 384)}.get(kind, (5, 128))
    api, op = call_api(kind, good(kind)), call_op(kind, good(kind))
    assert (api if kind == SWIGLU else api[0]).shape == op[0].shape == shape


@pytest.mark.parametrize("bad", [bad for bad in TABLE if not bad.ops_only], ids=name_of)
def test_api(bad: Bad) -> None:
    with pytest.raises(bad.error) as caught:
        call_api(bad.kind, good(bad.kind) | bad.change)
    assert_says(caught, f"fastfp8.{OPS[bad.kind]}: argument '{bad.argument}': expected ", ", got ", *bad.words)


@pytest.mark.parametrize("bad", [bad for bad in TABLE if not bad.api_only], ids=name_of)
def test_ops(bad: Bad) -> None:
    with pytest.raises(RuntimeError) as caught:
        call_op(bad.kind, good(bad.kind) | bad.change)
    assert_says(caught, f"fastfp8.{OPS[bad.kind]}: argument '{bad.argument}': expected ", ", got ", *bad.words)


@pytest.mark.parametrize("bad", [bad for bad in TABLE if not bad.api_only], ids=name_of)
def test_fake_refuses_the_same(bad: Bad) -> None:
    arguments = good(bad.kind) | bad.change
    with FakeTensorMode() as mode:
        fakes = {n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in arguments.items()}
        with pytest.raises(RuntimeError) as caught:
            call_op(bad.kind, fakes)
    assert_says(caught, f"fastfp8.{OPS[bad.kind]}: argument '{bad.argument}': expected ", *bad.words)


def test_blocks() -> None:
    """Of another kind than the op takes."""
    square, rows = (fastfp8.quantize(torch.ones(256, 128), block) for block in ((128, 128), (1, 128)))
    for left, right, name, needed in ((square, square, "a", (1, 128)), (rows, rows, "b", (128, 128))):
        with pytest.raises(ValueError, match="blocks") as caught:
            fastfp8.gemm_swiglu_quantize(left, right)
        assert_says(caught, f"fastfp8.gemm_swiglu_quantize: argument '{name}': expected blocks of {needed}, got")
    for kind, first in ((SWIGLU, ()), (BACKWARD, (torch.ones(256, 64),))):
        with pytest.raises(ValueError, match="blocks") as caught:
            getattr(fastfp8, kind)(*first, square)
        assert_says(
            caught, f"fastfp8.{kind}: argument 'gate_up': expected blocks of (1, 128), got blocks of (128, 128)"
        )
