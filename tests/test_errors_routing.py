"""Bad input to routing and permutation, through both entrances and with fake tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from test_errors import assert_says
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastfp8
from fastfp8 import RowMap, ScaledTensor

E4M3 = torch.float8_e4m3fn
OPS = torch.ops.fastfp8
INPUTS = "torch.bfloat16 or torch.float16 or torch.float32"


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape).to(E4M3)


def row_scale(rows: int, blocks: int) -> Tensor:
    pitch = -(-rows // 4) * 4
    return torch.ones(blocks * pitch).as_strided((rows, blocks), (1, pitch))


def rows(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.int32).view(shape)


def good(op: str) -> dict[str, Any]:
    """Arguments that ``op`` takes, by the names of its schema: five tokens, two experts each."""
    x, y, weights = torch.zeros(5, 304), torch.zeros(10, 304), torch.zeros(5, 2)
    route = {"logits": torch.zeros(5, 12), "bias": torch.zeros(12), "top_k": 4, "groups": 4, "top_groups": 2}
    backward = {"grad_weights": weights, "grad_scores": None, "topk_idx": rows(5, 2).long() % 2}
    return {
        "route": route | {"score": "sigmoid", "scale": 1.0},
        "route_backward": backward
        | {"scores": torch.zeros(5, 12), "score": "sigmoid", "scale": 1.0, "out_dtype": torch.float32},
        "row_map": {"topk_idx": torch.zeros(5, 2, dtype=torch.int64), "num_experts": 12, "error": None},
        "permute": {"x": x, "rows": rows(5, 2)},
        "permute_scaled": {"x": zeros(5, 304), "x_scale": row_scale(5, 3), "rows": rows(5, 2)},
        "permute_quantize": {"x": x, "rows": rows(5, 2), "pow2": False, "eps": 0.0},
        "unpermute": {"y": y, "y_scale": None, "rows": rows(5, 2), "weights": weights, "out_dtype": torch.float32},
        "unpermute_backward": {"grad": x, "y": y, "rows": rows(5, 2), "weights": weights},
    }[op]


class Bad(NamedTuple):
    """A change to good arguments and what must be said of it."""

    op: str
    change: dict[str, Any]
    error: type[Exception]
    argument: str
    words: tuple[str, ...]
    #: Whether only torch.ops can be given it, because the Python function makes the argument itself.
    ops_only: bool = False
    #: Whether torch.ops refuses a Python type in its own words.
    api_only: bool = False


def bad_routes() -> list[Bad]:
    def bad(change: dict[str, Any], error: type[Exception], *words: str, api_only: bool = False) -> Bad:
        return Bad("route", change, error, next(iter(change)), words, api_only=api_only)

    wide = {"logits": torch.zeros(5, 1025), "bias": torch.zeros(1025)}
    return [
        bad({"logits": torch.zeros(5, 12).half()}, TypeError, "torch.float32 or torch.bfloat16", "float16"),
        bad({"logits": torch.zeros(12)}, ValueError, "2 dimensions", "(12,)"),
        bad(wide, ValueError, "1 to 1024 experts", "(5, 1025)"),
        bad({"logits": torch.zeros(5, 0), "bias": torch.zeros(0)}, ValueError, "1 to 1024 experts", "(5, 0)"),
        bad({"logits": [1.0]}, TypeError, "a torch.Tensor", "list", api_only=True),
        bad({"bias": torch.zeros(12).bfloat16()}, TypeError, "torch.float32", "bfloat16"),
        bad({"bias": torch.zeros(11)}, ValueError, "shape (12,)", "(11,)"),
        bad({"bias": torch.zeros(1, 12)}, ValueError, "1 dimension", "(1, 12)"),
        bad({"bias": torch.zeros(24)[::2]}, ValueError, "contiguous", "(2,)"),
        bad({"bias": torch.zeros(12, device="meta")}, ValueError, "device cpu", "meta"),
        bad({"top_k": 3}, ValueError, "a multiple of top_groups = 2 from 1 to 6", "got 3"),
        bad({"top_k": 8}, ValueError, "from 1 to 6", "got 8"),
        bad({"top_k": 0}, ValueError, "from 1 to 6", "got 0"),
        bad({"top_k": 2.0}, TypeError, "an int", "float 2.0", api_only=True),
        bad({"groups": 5}, ValueError, "a divisor of E = 12", "got 5"),
        bad({"groups": 0}, ValueError, "a divisor of E = 12", "got 0"),
        bad({"top_groups": 5}, ValueError, "1 to 4", "got 5"),
        bad({"top_groups": 0}, ValueError, "1 to 4", "got 0"),
        bad({"score": "relu"}, ValueError, "'sigmoid' or 'softmax'", "'relu'"),
        bad({"score": 1}, TypeError, "a str", "int 1", api_only=True),
        bad({"scale": float("nan")}, ValueError, "below 2**100", "nan"),
        bad({"scale": "1"}, TypeError, "a number", "str", api_only=True),
    ]


def bad_backwards() -> list[Bad]:
    def bad(change: dict[str, Any], error: type[Exception], *words: str) -> Bad:
        return Bad("route_backward", change, error, next(iter(change)), words)

    return [
        bad({"scores": torch.zeros(5, 12).double()}, TypeError, "torch.float32", "float64"),
        bad({"scores": torch.zeros(5, 24)[:, ::2]}, ValueError, "contiguous", "(24, 2)"),
        bad({"topk_idx": rows(5, 2)}, TypeError, "torch.int64", "int32"),
        bad({"topk_idx": rows(4, 2).long()}, ValueError, "T = 5 rows", "(4, 2)"),
        bad({"topk_idx": rows(2, 5).long().t()}, ValueError, "contiguous", "(1, 5)"),
        bad({"grad_weights": torch.zeros(5, 3)}, ValueError, "shape (5, 2)", "(5, 3)"),
        bad({"grad_weights": torch.zeros(5, 2).half()}, TypeError, "torch.float32", "float16"),
        bad({"grad_scores": torch.zeros(5, 11)}, ValueError, "shape (5, 12)", "(5, 11)"),
        bad({"grad_scores": torch.zeros(5, 12, device="meta")}, ValueError, "device cpu", "meta"),
        bad({"score": "tanh"}, ValueError, "'sigmoid' or 'softmax'", "'tanh'"),
        bad({"scale": float("inf")}, ValueError, "below 2**100", "inf"),
        bad({"out_dtype": torch.float16}, TypeError, "torch.float32 or torch.bfloat16", "float16"),
    ]


def bad_maps() -> list[Bad]:
    def bad(change: dict[str, Any], error: type[Exception], *words: str, **only: bool) -> Bad:
        return Bad("row_map", change, error, next(iter(change)), words, **only)

    idx = torch.zeros(5, 4, dtype=torch.int64)
    return [
        bad({"topk_idx": idx.short()}, TypeError, "torch.int64 or torch.int32", "int16"),
        bad({"topk_idx": idx[0]}, ValueError, "2 dimensions", "(4,)"),
        bad({"topk_idx": idx[:, :0]}, ValueError, "top_k of at least 1", "(5, 0)"),
        bad({"topk_idx": idx[:, ::2]}, ValueError, "contiguous", "(4, 2)"),
        bad({"topk_idx": None}, TypeError, "a torch.Tensor", "NoneType", api_only=True),
        bad({"num_experts": 0}, ValueError, "1 to 1024", "got 0"),
        bad({"num_experts": 1025}, ValueError, "1 to 1024", "got 1025"),
        bad({"num_experts": 2.0}, TypeError, "an int", "float 2.0", api_only=True),
        bad({"error": torch.zeros(2, dtype=torch.int32)}, ValueError, "shape (1,)", "(2,)", ops_only=True),
        bad({"error": torch.zeros(1)}, TypeError, "torch.int32", "float32", ops_only=True),
    ]


def bad_rows(op: str, like: str) -> list[Bad]:
    """What all that take ``rows`` say of them."""

    def bad(value: Tensor, error: type[Exception], *words: str) -> Bad:
        return Bad(op, {"rows": value}, error, "rows", words)

    return [
        bad(rows(5, 2).long(), TypeError, "torch.int32", "int64"),
        bad(rows(10), ValueError, "2 dimensions", "(10,)"),
        bad(rows(5, 0), ValueError, "top_k of at least 1", "(5, 0)"),
        bad(rows(2, 5).t(), ValueError, "contiguous", "(1, 5)"),
        bad(rows(5, 2).to("meta"), ValueError, f"device cpu, where '{like}' is", "meta"),
    ]


def bad_permutes() -> list[Bad]:
    table = [bad for op in ("permute", "permute_scaled", "permute_quantize") for bad in bad_rows(op, "x")]
    for op in ("permute", "permute_quantize"):
        table += [
            Bad(op, {"x": torch.zeros(5, 304).double()}, TypeError, "x", (INPUTS, "float64")),
            Bad(op, {"x": torch.zeros(5)}, ValueError, "x", ("2 dimensions", "(5,)")),
            Bad(op, {"x": torch.zeros(4, 304)}, ValueError, "x", ("T = 5 rows", "(4, 304)")),
            Bad(op, {"x": None}, TypeError, "x", ("a torch.Tensor", "NoneType"), api_only=True),
        ]
    return table + [
        Bad("permute_scaled", {"x": zeros(4, 304), "x_scale": row_scale(4, 3)}, ValueError, "x", ("T = 5", "(4, 304)")),
        Bad("permute_scaled", {"x": zeros(1, 5, 304), "x_scale": torch.ones(1, 5, 3)}, ValueError, "x", ("2 dim",)),
        Bad("permute_scaled", {"x_scale": row_scale(5, 2)}, ValueError, "x_scale", ("shape (5, 3)", "(5, 2)")),
        Bad("permute_scaled", {"x_scale": torch.ones(5, 3)}, ValueError, "x_scale", ("multiple of 4", "(3, 1)")),
        Bad("permute_quantize", {"eps": -1.0}, ValueError, "eps", ("from 0 up to 2**100", "-1.0")),
        Bad("permute_quantize", {"eps": "1"}, TypeError, "eps", ("a number", "str"), api_only=True),
        Bad("permute_quantize", {"pow2": 1.5}, TypeError, "pow2", ("a bool", "float"), api_only=True),
    ]


def bad_unpermutes() -> list[Bad]:
    table = bad_rows("unpermute", "y") + bad_rows("unpermute_backward", "y")
    for op in ("unpermute", "unpermute_backward"):
        table += [
            Bad(op, {"y": torch.zeros(10, 304).double()}, TypeError, "y", (INPUTS, "float64")),
            Bad(op, {"y": torch.zeros(9, 304)}, ValueError, "y", ("T * top_k = 10 rows", "(9, 304)")),
            Bad(op, {"weights": torch.zeros(5, 2).half()}, TypeError, "weights", ("torch.float32", "float16")),
            Bad(op, {"weights": torch.zeros(5, 3)}, ValueError, "weights", ("shape (5, 2)", "(5, 3)")),
            Bad(op, {"weights": torch.zeros(2, 5).t()}, ValueError, "weights", ("contiguous", "(1, 5)")),
            Bad(op, {"weights": torch.zeros(5, 2, device="meta")}, ValueError, "weights", ("device cpu", "meta")),
        ]
    fp8 = {"y": zeros(10, 304), "y_scale": row_scale(10, 2)}
    return table + [
        Bad("unpermute", fp8, ValueError, "y_scale", ("shape (10, 3)", "(10, 2)")),
        Bad("unpermute", {"y": zeros(10, 304)}, TypeError, "y", (INPUTS, "float8_e4m3fn")),
        Bad("unpermute", {"out_dtype": torch.int32}, TypeError, "out_dtype", (INPUTS, "int32")),
        Bad("unpermute_backward", {"grad": torch.zeros(5, 303)}, ValueError, "grad", ("(5, 304)", "(5, 303)")),
        Bad("unpermute_backward", {"grad": torch.zeros(5, 304).double()}, TypeError, "grad", (INPUTS, "float64")),
    ]


TABLE = bad_routes() + bad_backwards() + bad_maps() + bad_permutes() + bad_unpermutes()


def where(given: dict[str, Any]) -> RowMap:
    return RowMap(torch.zeros(12, dtype=torch.int32), given["rows"], torch.zeros(10, dtype=torch.int32))


def call_api(op: str, given: dict[str, Any]) -> Any:
    """With ScaledTensors put together without their checks, so that those of the op are reached."""
    if op == "route":
        return fastfp8.route(given.pop("logits"), given.pop("bias"), **given)
    if op == "route_backward":
        from fastfp8.ops.route import route_backward

        positional = [given.pop(name) for name in ("grad_weights", "grad_scores", "topk_idx", "scores")]
        return route_backward(*positional, **given)
    if op == "row_map":
        return fastfp8.row_map(given["topk_idx"], given["num_experts"])
    if op == "permute_scaled":
        return fastfp8.permute(ScaledTensor._trusted(given["x"], given["x_scale"], (1, 128)), where(given))
    if op == "permute":
        return fastfp8.permute(given["x"], where(given))
    if op == "permute_quantize":
        return fastfp8.permute_quantize(given["x"], where(given), pow2=given["pow2"], eps=given["eps"])
    if op == "unpermute":
        y = given["y"]
        if given["y_scale"] is not None:
            y = ScaledTensor._trusted(y, given["y_scale"], (1, 128))
        return fastfp8.unpermute(y, where(given), given["weights"], out_dtype=given["out_dtype"])
    from fastfp8.ops.permute import unpermute_backward

    return unpermute_backward(**given)


def public(op: str) -> str:
    """The function that an op's errors name."""
    return "permute" if op == "permute_scaled" else op


def name_of(bad: Bad) -> str:
    return f"{bad.op}-{'-'.join(bad.change)}-{' '.join(bad.words)}"


@pytest.mark.parametrize("op", sorted({bad.op for bad in TABLE}))
def test_good_arguments_are_good(op: str) -> None:
    """Else the table would prove nothing."""
    for result in (call_api(op, good(op)), getattr(OPS, op)(**good(op))):
        assert result is not None


@pytest.mark.parametrize("bad", [bad for bad in TABLE if not bad.ops_only], ids=name_of)
def test_api(bad: Bad) -> None:
    with pytest.raises(bad.error) as caught:
        call_api(bad.op, good(bad.op) | bad.change)
    assert_says(caught, f"fastfp8.{public(bad.op)}: argument '{bad.argument}': expected ", ", got ", *bad.words)


@pytest.mark.parametrize("bad", [bad for bad in TABLE if not bad.api_only], ids=name_of)
def test_ops(bad: Bad) -> None:
    with pytest.raises(RuntimeError) as caught:
        getattr(OPS, bad.op)(**(good(bad.op) | bad.change))
    assert_says(caught, f"fastfp8.{public(bad.op)}: argument '{bad.argument}': expected ", ", got ", *bad.words)


@pytest.mark.parametrize("bad", [bad for bad in TABLE if not bad.api_only], ids=name_of)
def test_fake_refuses_the_same(bad: Bad) -> None:
    arguments = good(bad.op) | bad.change
    with FakeTensorMode() as mode:
        fakes = {n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in arguments.items()}
        with pytest.raises(RuntimeError) as caught:
            getattr(OPS, bad.op)(**fakes)
    assert_says(caught, f"fastfp8.{public(bad.op)}: argument '{bad.argument}': expected ", *bad.words)


def test_kinds_of_arguments() -> None:
    """What only the Python functions can tell apart."""
    x, idx = torch.zeros(5, 304), torch.zeros(5, 2, dtype=torch.int64)
    map_ = fastfp8.row_map(idx, 3)
    square = ScaledTensor(zeros(128, 128), torch.ones(1, 1), (128, 128))
    calls = [
        (lambda: fastfp8.permute(square, map_), ValueError, "permute: argument 'x': expected blocks of (1, 128), got"),
        (lambda: fastfp8.permute(x, idx), TypeError, "permute: argument 'num_experts': expected an int, got None"),
        (lambda: fastfp8.permute(x, map_, 3), ValueError, "permute: argument 'num_experts': expected None with a"),
        (lambda: fastfp8.permute(x, idx, 3.0), TypeError, "row_map: argument 'num_experts': expected an int, got"),
        (lambda: fastfp8.permute_quantize(x, [0]), TypeError, "permute_quantize: argument 'num_experts': expected"),
        (lambda: fastfp8.unpermute(square, map_), ValueError, "unpermute: argument 'y': expected blocks of (1, 128)"),
        (lambda: fastfp8.unpermute(x, idx), TypeError, "unpermute: argument 'where': expected a fastfp8.RowMap, got"),
        (lambda: fastfp8.unpermute(None, map_), TypeError, "unpermute: argument 'y': expected a torch.Tensor, got"),
        (lambda: fastfp8.unpermute(x, map_, [1]), TypeError, "unpermute: argument 'weights': expected a torch.Tensor"),
    ]
    for call, error, words in calls:
        with pytest.raises(error) as caught:
            call()
        assert_says(caught, f"fastfp8.{words}")
