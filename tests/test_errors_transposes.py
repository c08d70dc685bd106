"""Bad input to the ops that write a transpose, through both entrances and with fake tensors."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from test_errors import assert_says
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastfp8
from fastfp8 import ScaledTensor

E4M3 = torch.float8_e4m3fn
BOTH, GROUPED, TURN, TURN_GROUPED = "quantize_both", "quantize_grouped_both", "requantize_transpose", "grouped"
OVERLOADS = {
    BOTH: torch.ops.fastfp8.quantize_both.default,
    GROUPED: torch.ops.fastfp8.quantize_grouped_both.default,
    TURN: torch.ops.fastfp8.requantize_transpose.default,
    TURN_GROUPED: torch.ops.fastfp8.requantize_transpose.grouped,
}


def scale(rows: int, cols: int) -> Tensor:
    """In the layout of (1, 128) blocks."""
    return torch.ones(cols, -(-rows // 4) * 4).t()[:rows]


def good(op: str) -> dict[str, Any]:
    """Arguments that ``op`` takes, by the names of its schema."""
    arguments: dict[str, Any] = {}
    if op in (BOTH, GROUPED):
        arguments |= {"x": torch.ones(5, 300), "pow2": False, "eps": 0.0}
    else:
        arguments |= {"data": torch.ones(5, 300).to(E4M3), "scale": scale(5, 3)}
    if op in (GROUPED, TURN_GROUPED):
        arguments |= {"offsets": torch.tensor([2, 2, 5], dtype=torch.int32), "error": None}
    return arguments


def call_api(op: str, arguments: dict[str, Any]) -> Any:
    """With a ScaledTensor put together without its checks, so that those of the op are reached."""
    if op == BOTH:
        pad = arguments.get("pad", False)
        return fastfp8.quantize_both(arguments["x"], pow2=arguments["pow2"], eps=arguments["eps"], pad=pad)
    if op == GROUPED:
        options = {name: arguments[name] for name in ("pow2", "eps")}
        return fastfp8.quantize_grouped_both(arguments["x"], arguments["offsets"], **options)
    t = ScaledTensor._trusted(arguments["data"], arguments["scale"], (1, 128))
    return fastfp8.requantize_transpose(t, arguments.get("offsets"), pad=arguments.get("pad", False))


class Bad(NamedTuple):
    """A change to good arguments and what both entrances must say."""

    op: str
    change: dict[str, Any]
    error: type[Exception]
    argument: str
    words: tuple[str, ...]
    #: Whether only torch.ops can be given it: the error word.
    ops_only: bool = False
    #: Whether torch.ops has no such argument, or refuses or converts a Python type in its own way.
    api_only: bool = False


def bad_x(op: str) -> list[Bad]:
    eps = "a number from 0 up to 2**100"
    rows = [
        Bad(op, {"x": torch.ones(5, 300).to(dtype)}, TypeError, "x", ("bfloat16 or torch.float16", str(dtype)))
        for dtype in (torch.float64, torch.int32, E4M3)
    ]
    rows += [Bad(op, {"x": torch.ones(s)}, ValueError, "x", ("2 dimensions", str(s))) for s in ((), (5,), (2, 5, 300))]
    rows += [
        Bad(op, {"eps": value}, ValueError, "eps", (eps, str(value))) for value in (-1.0, math.nan, math.inf, 2.0**100)
    ]
    return rows + [
        Bad(op, {"x": [[1.0]]}, TypeError, "x", ("torch.Tensor", "list"), api_only=True),
        Bad(op, {"x": torch.ones(5, 300).to_sparse()}, ValueError, "x", ("dense", "sparse_coo"), api_only=True),
        Bad(op, {"eps": "small"}, TypeError, "eps", ("number", "small"), api_only=True),
        Bad(op, {"pow2": 2}, TypeError, "pow2", ("bool", "2"), api_only=True),
    ]


def bad_scaled(op: str) -> list[Bad]:
    layout = "stride (1, a multiple of 4 not below the number of rows)"
    return [
        Bad(op, {"data": torch.ones(5, 300)}, TypeError, "data", ("float8_e4m3fn", "float32")),
        Bad(op, {"data": torch.ones(300).to(E4M3)}, ValueError, "data", ("2 dimensions", "(300,)")),
        Bad(op, {"data": torch.ones(1, 5, 300).to(E4M3)}, ValueError, "data", ("2 dimensions", "(1, 5, 300)")),
        Bad(op, {"scale": scale(5, 3).double()}, TypeError, "scale", ("float32", "float64")),
        Bad(op, {"scale": scale(5, 2)}, ValueError, "scale", ("shape (5, 3)", "(5, 2)")),
        Bad(op, {"scale": torch.ones(5, 3)}, ValueError, "scale", (layout, "(3, 1)")),
        Bad(op, {"scale": scale(5, 3).to("meta")}, ValueError, "scale", ("device cpu", "meta")),
        Bad(op, {"pad": 1}, TypeError, "pad", ("bool", "1"), api_only=True),
    ]


def bad_offsets(op: str) -> list[Bad]:
    offsets, like = good(op)["offsets"], "x" if op == GROUPED else "data"
    rows = [
        Bad(op, {"offsets": offsets.to(dtype)}, TypeError, "offsets", ("int32", str(dtype)))
        for dtype in (torch.int64, torch.float32)
    ]
    return rows + [
        Bad(op, {"offsets": offsets[:0]}, ValueError, "offsets", ("at least one group", "(0,)")),
        Bad(op, {"offsets": offsets[None]}, ValueError, "offsets", ("1 dimension", "(1, 3)")),
        Bad(op, {"offsets": offsets.repeat_interleave(2)[::2]}, ValueError, "offsets", ("contiguous", "(2,)")),
        Bad(op, {"offsets": offsets.to("meta")}, ValueError, "offsets", ("device cpu", f"'{like}'", "meta")),
        Bad(op, {"offsets": [2, 2, 5]}, TypeError, "offsets", ("torch.Tensor", "list"), api_only=True),
        Bad(op, {"error": torch.zeros(1)}, TypeError, "error", ("int32", "float32"), ops_only=True),
        Bad(op, {"error": torch.zeros(2).int()}, ValueError, "error", ("(1,)", "(2,)"), ops_only=True),
        Bad(op, {"error": torch.zeros(1).int().to("meta")}, ValueError, "error", ("device cpu", "meta"), ops_only=True),
    ]


TABLE = [
    *(bad for op in (BOTH, GROUPED) for bad in bad_x(op)),
    *(bad for op in (TURN, TURN_GROUPED) for bad in bad_scaled(op)),
    *(bad for op in (GROUPED, TURN_GROUPED) for bad in bad_offsets(op)),
    Bad(BOTH, {"pad": "yes"}, TypeError, "pad", ("bool", "yes"), api_only=True),
]


def name_of(bad: Bad) -> str:
    return f"{bad.op}-{'-'.join(bad.change)}-{' '.join(bad.words)}"


def check_message(caught: pytest.ExceptionInfo[BaseException], bad: Bad) -> None:
    name = TURN if bad.op == TURN_GROUPED else bad.op
    assert_says(caught, f"fastfp8.{name}: argument '{bad.argument}': expected ", ", got ", *bad.words)


@pytest.mark.parametrize("op", list(OVERLOADS))
def test_good_arguments_are_good(op: str) -> None:
    """Else the table would prove nothing."""
    call_api(op, good(op))
    OVERLOADS[op](**good(op))


@pytest.mark.parametrize("bad", [bad for bad in TABLE if not bad.ops_only], ids=name_of)
def test_api(bad: Bad) -> None:
    with pytest.raises(bad.error) as caught:
        call_api(bad.op, good(bad.op) | bad.change)
    check_message(caught, bad)


@pytest.mark.parametrize("bad", [bad for bad in TABLE if not bad.api_only], ids=name_of)
def test_ops(bad: Bad) -> None:
    with pytest.raises(RuntimeError) as caught:
        OVERLOADS[bad.op](**(good(bad.op) | bad.change))
    check_message(caught, bad)


@pytest.mark.parametrize("bad", [bad for bad in TABLE if not bad.api_only], ids=name_of)
def test_fake_refuses_the_same(bad: Bad) -> None:
    arguments = good(bad.op) | bad.change
    with FakeTensorMode() as mode:
        fakes = {n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in arguments.items()}
        with pytest.raises(RuntimeError) as caught:
            OVERLOADS[bad.op](**fakes)
    check_message(caught, bad)


def test_no_scaled_tensor_of_other_blocks() -> None:
    for given, words in ((torch.ones(5, 300), ("ScaledTensor", "Tensor")), (None, ("ScaledTensor", "NoneType"))):
        with pytest.raises(TypeError) as caught:
            fastfp8.requantize_transpose(given)
        assert_says(caught, "fastfp8.requantize_transpose: argument 't': expected ", *words)
    for block in ((128, 1), (128, 128)):
        with pytest.raises(ValueError, match="blocks") as caught:
            fastfp8.requantize_transpose(fastfp8.quantize(torch.ones(5, 300), block))
        assert_says(caught, "argument 't': expected blocks of (1, 128), got blocks of", str(block))


def test_more_tokens_than_int32_counts() -> None:
    """Where the transpose would have 2^31 columns, padded_offsets could not say where a group ends."""
    offsets = torch.zeros(2, dtype=torch.int32, device="meta")
    fits, none = (torch.empty(tokens, 1, device="meta") for tokens in (2**31 - 256, 2**31 - 127))
    assert fastfp8.quantize_grouped_both(fits, offsets)[1].shape[1] == 2**31 - 128
    with pytest.raises(ValueError, match="int32") as caught:
        fastfp8.quantize_grouped_both(none, offsets)
    assert_says(caught, "fastfp8.quantize_grouped_both: argument 'x': expected fewer tokens", "2**31", str(2**31 - 127))
