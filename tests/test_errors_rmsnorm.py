"""Bad input to the ops with RMSNorm, and a bad residual to dequantize, by both entrances and with fake tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from test_errors import assert_says
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastfp8
from fastfp8 import ScaledTensor

OPS = torch.ops.fastfp8
INPUTS = "torch.bfloat16 or torch.float16 or torch.float32"
FORWARD, AGAIN, BACKWARD = "rmsnorm_quantize", "rmsnorm_quantize_transpose", "rmsnorm_backward"


def good(op: str) -> dict[str, Any]:
    """Arguments that ``op`` takes, by the names of its schema."""
    x, weight, rstd = torch.ones(5, 300), torch.ones(300), torch.ones(5)
    quantizing = {"pow2": False, "amax_floor": 0.0}
    if op == "dequantize":
        t = fastfp8.quantize(x)
        return {"data": t.data, "scale": t.scale, "block": t.block, "dtype": torch.float32, "add": x}
    return {
        FORWARD: {"x": x, "weight": weight, "eps": 1e-6, "residual": x, **quantizing},
        AGAIN: {"x": x, "weight": weight, "rstd": rstd, **quantizing},
        BACKWARD: {"grad": x, "x": x, "weight": weight, "rstd": rstd, "residual_grad": x},
    }[op]


class Bad(NamedTuple):
    """A change to good arguments and what must be said of it."""

    op: str
    change: dict[str, Any]
    error: type[Exception]
    words: tuple[str, ...]
    #: Whether torch.ops refuses a Python type in its own words.
    api_only: bool = False


def bad_of_all(op: str) -> list[Bad]:
    """x and weight."""
    x = good(op)["x"]
    return [
        Bad(op, {"x": x.double()}, TypeError, (INPUTS, "float64")),
        Bad(op, {"x": x[0]}, ValueError, ("2 dimensions", "(300,)")),
        Bad(op, {"weight": torch.ones(300).double()}, TypeError, (INPUTS, "float64")),
        Bad(op, {"weight": torch.ones(1, 300)}, ValueError, ("1 dimension", "(1, 300)")),
        Bad(op, {"weight": torch.ones(5)}, ValueError, ("shape (300,)", "each column of 'x'", "(5,)")),
        Bad(op, {"weight": torch.ones(600)[::2]}, ValueError, ("contiguous", "(2,)")),
        Bad(op, {"weight": torch.ones(300, device="meta")}, ValueError, ("device cpu", "'x'", "meta")),
    ]


def bad_rstd(op: str) -> list[Bad]:
    return [
        Bad(op, {"rstd": torch.ones(5).bfloat16()}, TypeError, ("torch.float32", "bfloat16")),
        Bad(op, {"rstd": torch.ones(5, 1)}, ValueError, ("1 dimension", "(5, 1)")),
        Bad(op, {"rstd": torch.ones(300)}, ValueError, ("shape (5,)", "each row of 'x'", "(300,)")),
        Bad(op, {"rstd": torch.ones(10)[::2]}, ValueError, ("contiguous", "(2,)")),
        Bad(op, {"rstd": torch.ones(5, device="meta")}, ValueError, ("device cpu", "'x'", "meta")),
    ]


def bad_like(op: str, name: str, like: str) -> list[Bad]:
    return [
        Bad(op, {name: torch.ones(5, 300).double()}, TypeError, (INPUTS, "float64")),
        Bad(op, {name: torch.ones(1, 300)}, ValueError, ("shape (5, 300)", "(1, 300)")),
        Bad(op, {name: torch.ones(300)}, ValueError, ("2 dimensions", "(300,)")),
        Bad(op, {name: torch.ones(5, 300, device="meta")}, ValueError, ("device cpu", f"'{like}'", "meta")),
        Bad(op, {name: [1.0]}, TypeError, ("a torch.Tensor", "list"), api_only=True),
    ]


def bad_options(op: str) -> list[Bad]:
    return [
        Bad(op, {"pow2": 1.5}, TypeError, ("a bool", "float"), api_only=True),
        Bad(op, {"amax_floor": "1"}, TypeError, ("a number", "str"), api_only=True),
        *(Bad(op, {"amax_floor": v}, ValueError, ("from 0 up to 2**100", str(v))) for v in (-1.0, float("nan"))),
    ]


TABLE = [
    *(bad for op in (FORWARD, AGAIN, BACKWARD) for bad in bad_of_all(op)),
    *(bad for op in (AGAIN, BACKWARD) for bad in bad_rstd(op)),
    *(bad for op in (FORWARD, AGAIN) for bad in bad_options(op)),
    *bad_like(FORWARD, "residual", "x"),
    *bad_like(BACKWARD, "grad", "x"),
    *bad_like(BACKWARD, "residual_grad", "x"),
    *bad_like("dequantize", "add", "data"),
    *(Bad(FORWARD, {"eps": v}, ValueError, ("from 2**-100 to 2**100", str(v))) for v in (0.0, -1.0, float("inf"))),
    Bad(FORWARD, {"eps": "1"}, TypeError, ("a number", "str"), api_only=True),
    Bad(FORWARD, {"x": None}, TypeError, ("a torch.Tensor", "NoneType"), api_only=True),
    Bad(FORWARD, {"transpose": 1}, TypeError, ("a bool", "int 1"), api_only=True),
    Bad(FORWARD, {"pad": None}, TypeError, ("a bool", "NoneType"), api_only=True),
    Bad(FORWARD, {"pad": True}, ValueError, ("False without 'transpose'", "True"), api_only=True),
    Bad(AGAIN, {"pad": 1}, TypeError, ("a bool", "int 1"), api_only=True),
    Bad(BACKWARD, {"grad": None}, TypeError, ("a torch.Tensor", "NoneType"), api_only=True),
]


def call_api(op: str, given: dict[str, Any]) -> Any:
    if op == "dequantize":
        t = ScaledTensor._trusted(given["data"], given["scale"], given["block"])
        return fastfp8.dequantize(t, given["dtype"], add=given["add"])
    return getattr(fastfp8, op)(**given)


def name_of(bad: Bad) -> str:
    return f"{bad.op}-{'-'.join(bad.change)}-{' '.join(bad.words)}"


def says(caught: Any, bad: Bad) -> None:
    (argument,) = bad.change
    assert_says(caught, f"fastfp8.{bad.op}: argument '{argument}': expected ", ", got ", *bad.words)


@pytest.mark.parametrize("op", [FORWARD, AGAIN, BACKWARD, "dequantize"])
def test_good_arguments_are_good(op: str) -> None:
    """Else the table would prove nothing."""
    for result in (call_api(op, good(op)), getattr(OPS, op)(**good(op))):
        assert result is not None


@pytest.mark.parametrize("bad", TABLE, ids=name_of)
def test_api(bad: Bad) -> None:
    with pytest.raises(bad.error) as caught:
        call_api(bad.op, good(bad.op) | bad.change)
    says(caught, bad)


@pytest.mark.parametrize("bad", [bad for bad in TABLE if not bad.api_only], ids=name_of)
def test_ops_and_fakes(bad: Bad) -> None:
    arguments = good(bad.op) | bad.change
    with pytest.raises(RuntimeError) as caught:
        getattr(OPS, bad.op)(**arguments)
    says(caught, bad)
    with FakeTensorMode() as mode:
        fakes = {n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in arguments.items()}
        with pytest.raises(RuntimeError) as caught:
            getattr(OPS, bad.op)(**fakes)
    says(caught, bad)
