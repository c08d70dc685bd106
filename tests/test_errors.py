"""Bad input, through both entrances: the Python API raises ValueError or TypeError, torch.ops.fastfp8 RuntimeError.

One table serves both. A message names the op, the argument, what was expected of it and what came.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastfp8
from fastfp8 import ScaledTensor

E4M3 = torch.float8_e4m3fn
ANY_BLOCK = "(1, 128) or (128, 1) or (128, 128)"
OPS = torch.ops.fastfp8


def scale(rows: int, cols: int, device: str = "cpu") -> Tensor:
    """In the layout of (1, 128) blocks."""
    return torch.ones(cols, -(-rows // 4) * 4, device=device).t()[:rows]


def good(op: str) -> dict[str, Any]:
    """Arguments that ``op`` takes, by the names of its schema."""
    if op == "quantize":
        return {"x": torch.ones(5, 300), "block": (1, 128), "pow2": False, "eps": 0.0}
    if op == "dequantize":
        return {"data": torch.ones(5, 304).to(E4M3), "scale": scale(5, 3), "block": (1, 128), "dtype": torch.float32}
    return {
        "a": torch.ones(5, 304).to(E4M3),
        "a_scale": scale(5, 3),
        "b": torch.ones(16, 304).to(E4M3),
        "b_scale": torch.ones(1, 3),
        "b_block": (128, 128),
        "out_dtype": torch.float32,
        "c": torch.zeros(5, 16),
    }


def call_ops(op: str, arguments: dict[str, Any]) -> Any:
    return getattr(OPS, op)(**arguments)


def call_api(op: str, arguments: dict[str, Any], make: Callable[..., ScaledTensor] = ScaledTensor) -> Any:
    """The public function, with operands that ``make`` puts together."""
    if op == "quantize":
        return fastfp8.quantize(arguments["x"], arguments["block"], pow2=arguments["pow2"], eps=arguments["eps"])
    if op == "dequantize":
        t = make(arguments["data"], arguments["scale"], arguments["block"])
        return fastfp8.dequantize(t, arguments["dtype"])
    a = make(arguments["a"], arguments["a_scale"], (1, 128))
    b = make(arguments["b"], arguments["b_scale"], arguments["b_block"])
    return fastfp8.gemm(a, b, out_dtype=arguments["out_dtype"], c=arguments["c"], num_sms=arguments.get("num_sms"))


class Bad(NamedTuple):
    """A change to good arguments and what both entrances must say."""

    op: str
    change: dict[str, Any]
    error: type[Exception]
    argument: str
    words: tuple[str, ...]
    #: Words for torch.ops, where torch itself refuses the Python type; () where torch converts it instead of refusing.
    torch_words: tuple[str, ...] | None = None
    #: The name of the argument in the Python API, where it is another.
    api_argument: str | None = None

    @property
    def reaches_api(self) -> bool:
        """Not where ScaledTensor refuses a part of it for its Python type: tests/test_scaled_tensor.py has those."""
        return self.torch_words is None or self.op == "quantize" or self.argument in ("dtype", "out_dtype", "c")

    @property
    def id(self) -> str:
        name, value = next(iter(self.change.items()))
        if isinstance(value, Tensor):
            value = (
                f"{value.dtype}{tuple(value.shape)}{value.layout if value.is_sparse else value.stride()}{value.device}"
            )
        return f"{self.op}-{name}-{value!r:.60}"


def bad_quantize() -> list[Bad]:
    x, block, eps = "bfloat16 or torch.float16 or torch.float32", ANY_BLOCK, "a number from 0 up to 2**100"
    rows = [
        Bad("quantize", {"x": torch.ones(5, 300).to(dtype)}, TypeError, "x", (x, str(dtype)))
        for dtype in (torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64, E4M3, torch.float8_e5m2)
    ]
    rows += [
        Bad("quantize", {"x": torch.ones(shape)}, ValueError, "x", ("2 or 3 dimensions", str(shape)))
        for shape in ((), (128,), (1, 2, 3, 128))
    ]
    rows += [
        Bad(
            "quantize", {"x": torch.ones(5, 300).to_sparse()}, ValueError, "x", ("dense", "sparse_coo"), ("SparseCPU",)
        ),
        Bad("quantize", {"x": torch.ones(5, 300).to_mkldnn()}, ValueError, "x", ("dense", "mkldnn"), ("MkldnnCPU",)),
        Bad("quantize", {"x": [[1.0]]}, TypeError, "x", ("torch.Tensor", "list"), ("'x'", "'Tensor'", "'list'")),
        Bad("quantize", {"x": "ones"}, TypeError, "x", ("torch.Tensor", "str"), ("'x'", "'Tensor'", "'str'")),
    ]
    rows += [
        Bad("quantize", {"block": b}, ValueError, "block", (block, str(list(b))[1:-1]))
        for b in ((1, 64), (64, 64), (128, 256), (128,), (1, 128, 1), (), (0, 0), (-1, 128), (128, 2))
    ]
    refused = ("'block'", "List[int]")
    rows += [
        Bad("quantize", {"block": "1x128"}, ValueError, "block", (block, "1x128"), refused),
        Bad("quantize", {"block": None}, ValueError, "block", (block, "None"), refused),
        Bad("quantize", {"block": 128}, ValueError, "block", (block, "got 128"), ()),
        Bad("quantize", {"block": (1, None)}, ValueError, "block", (block, "None"), refused),
        Bad("quantize", {"block": (1, "128")}, ValueError, "block", (block, "'128'"), refused),
        Bad("quantize", {"block": {1: 128}}, ValueError, "block", (block, "{1: 128}"), refused),
        Bad("quantize", {"block": np.array([1, 128])}, ValueError, "block", (block, "[  1 128]"), ()),
    ]
    rows += [
        Bad("quantize", {"eps": value}, ValueError, "eps", (eps, str(value)))
        for value in (-1.0, -1e-30, math.nan, math.inf, -math.inf, 2.0**100, 1e300)
    ]
    rows += [
        Bad("quantize", {"eps": "small"}, TypeError, "eps", ("number", "small"), ("'eps'", "'float'", "'str'")),
        Bad("quantize", {"eps": None}, TypeError, "eps", ("number", "None"), ("'eps'", "'float'", "'NoneType'")),
        Bad("quantize", {"eps": 1j}, TypeError, "eps", ("number", "1j"), ("'eps'", "'float'", "'complex'")),
        Bad("quantize", {"pow2": "yes"}, TypeError, "pow2", ("bool", "yes"), ("'pow2'", "'bool'", "'str'")),
        Bad("quantize", {"pow2": 2}, TypeError, "pow2", ("bool", "2"), ()),
    ]
    return rows


def bad_dequantize() -> list[Bad]:
    layout = "stride (1, a multiple of 4 not below the number of rows)"
    rows = [
        Bad("dequantize", {"data": torch.ones(5, 304).to(dtype)}, TypeError, "data", ("float8_e4m3fn", str(dtype)))
        for dtype in (torch.float32, torch.uint8, torch.float8_e5m2)
    ]
    rows += [
        Bad("dequantize", {"scale": torch.ones(5, 3, dtype=dtype)}, TypeError, "scale", ("float32", str(dtype)))
        for dtype in (torch.float64, torch.bfloat16, torch.float8_e8m0fnu)
    ]
    rows += [
        Bad("dequantize", {"scale": scale(*shape)}, ValueError, "scale", ("shape (5, 3)", f"shape {shape}"))
        for shape in ((5, 2), (5, 4), (4, 3), (3, 5), (1, 1))
    ]
    strides = {
        "row-major": torch.ones(5, 3),
        "unpadded": torch.ones(3, 5).t(),
        "strided": torch.ones(3, 16).t()[::2][:5],
    }
    strides["expanded"] = torch.ones(1).expand(5, 3)
    rows += [
        Bad("dequantize", {"scale": value}, ValueError, "scale", (layout, str(value.stride())))
        for value in strides.values()
    ]
    square = {"data": torch.ones(256, 256).to(E4M3), "block": (128, 128)}
    column = {"data": torch.ones(300, 5).to(E4M3), "block": (128, 1)}
    pitch = "stride (a multiple of 4 not below the number of columns, 1)"
    rows += [
        Bad("dequantize", {"scale": torch.ones(2, 2).t(), **square}, ValueError, "scale", ("contiguous", "(1, 2)")),
        Bad("dequantize", {"scale": torch.ones(2, 4)[:, :2], **square}, ValueError, "scale", ("contiguous", "(4, 1)")),
        Bad("dequantize", {"scale": torch.ones(3, 5), **column}, ValueError, "scale", (pitch, "(5, 1)")),
        Bad("dequantize", {"scale": torch.ones(8, 3).t()[:, :5], **column}, ValueError, "scale", (pitch, "(1, 3)")),
        Bad("dequantize", {"data": torch.ones(304).to(E4M3)}, ValueError, "data", ("2 or 3 dimensions", "(304,)")),
        Bad("dequantize", {"scale": torch.ones(3)}, ValueError, "scale", ("2 dimensions", "(3,)")),
        Bad("dequantize", {"scale": scale(5, 3).to("meta")}, ValueError, "scale", ("device cpu", "meta")),
        Bad("dequantize", {"data": good("dequantize")["data"].to("meta")}, ValueError, "scale", ("device meta", "cpu")),
        Bad(
            "dequantize",
            {"scale": torch.ones(5, 3).to_sparse()},
            ValueError,
            "scale",
            ("dense", "sparse"),
            ("SparseCPU",),
        ),
        Bad("dequantize", {"block": (1, 64)}, ValueError, "block", (ANY_BLOCK, "1, 64")),
        Bad("dequantize", {"block": None}, ValueError, "block", (ANY_BLOCK, "None"), ("'block'", "List[int]")),
        Bad("dequantize", {"block": (128, 1)}, ValueError, "scale", ("shape (1, 304)", "(5, 3)")),
        Bad("dequantize", {"scale": None}, TypeError, "scale", ("torch.Tensor", "NoneType")),
    ]
    dtypes = "torch.bfloat16 or torch.float16 or torch.float32"
    rows += [
        Bad("dequantize", {"dtype": dtype}, TypeError, "dtype", (dtypes, str(dtype)))
        for dtype in (torch.float64, torch.int32, E4M3)
    ]
    refused = ("'dtype'", "'int'")
    rows += [
        Bad("dequantize", {"dtype": "float32"}, TypeError, "dtype", (dtypes, "float32"), refused),
        Bad("dequantize", {"dtype": None}, TypeError, "dtype", (dtypes, "None"), refused),
        Bad("dequantize", {"dtype": float}, TypeError, "dtype", (dtypes, "float"), ()),
    ]
    return rows


def bad_operands() -> list[Bad]:
    """Of gemm's a, b and their scales."""
    data, s = good("gemm"), {"a": scale(5, 3), "b": torch.ones(1, 3)}
    rows = []
    for name, height in (("a", 5), ("b", 16)):
        on_meta = scale(5, 3, "meta") if name == "a" else torch.ones(1, 3, device="meta")
        meta = {name: data[name].to("meta"), f"{name}_scale": on_meta}
        rows += [
            Bad("gemm", {name: torch.ones(height, 304)}, TypeError, name, ("float8_e4m3fn", "float32")),
            Bad("gemm", {name: torch.ones(height, 304).to(torch.float8_e5m2)}, TypeError, name, ("e4m3fn", "e5m2")),
            Bad("gemm", {name: torch.ones(304).to(E4M3)}, ValueError, name, ("2 dimensions", "(304,)")),
            Bad("gemm", {name: torch.ones(1, height, 304).to(E4M3)}, ValueError, name, ("2 dimensions", "304)")),
            Bad("gemm", {name: [1.0]}, TypeError, name, ("torch.Tensor", "list"), (f"'{name}'", "'Tensor'", "'list'")),
            Bad(
                "gemm", {name: torch.ones(304, height).to(E4M3).t()}, ValueError, name, ("row-major", f"(1, {height})")
            ),
            Bad("gemm", {name: torch.ones(height, 312).to(E4M3)[:, :304]}, ValueError, name, ("16 bytes", "(312, 1)")),
            Bad("gemm", {name: torch.ones(height, 608).to(E4M3)[:, ::2]}, ValueError, name, ("row-major", "(608, 2)")),
            Bad("gemm", {f"{name}_scale": s[name].double()}, TypeError, f"{name}_scale", ("float32", "float64")),
            Bad("gemm", {f"{name}_scale": s[name][0]}, ValueError, f"{name}_scale", ("2 dimensions", "(3,)")),
            Bad("gemm", {f"{name}_scale": s[name][:, :2]}, ValueError, f"{name}_scale", (", 3)", ", 2)")),
            Bad("gemm", {f"{name}_scale": s[name].to("meta")}, ValueError, f"{name}_scale", ("device cpu", "meta")),
            Bad(
                "gemm",
                {f"{name}_scale": None},
                TypeError,
                f"{name}_scale",
                ("torch.Tensor", "NoneType"),
            ),
            Bad("gemm", meta, ValueError, "b", ("device", "'a'", "meta", "cpu")),
        ]
    a_stride, wide = "stride (1, a multiple of 4", {"b": torch.ones(144, 304).to(E4M3), "c": None}
    rows += [
        Bad("gemm", {"a_scale": torch.ones(5, 3)}, ValueError, "a_scale", (a_stride, "(3, 1)")),
        Bad("gemm", {"a_scale": torch.ones(3, 5).t()}, ValueError, "a_scale", (a_stride, "(1, 5)")),
        Bad("gemm", {"b_scale": torch.ones(3, 2).t(), **wide}, ValueError, "b_scale", ("contiguous", "(1, 2)")),
        Bad("gemm", {"b_scale": torch.ones(2, 3)}, ValueError, "b_scale", ("shape (1, 3)", "(2, 3)")),
        Bad("gemm", {"b_block": (1, 128)}, ValueError, "b_scale", ("shape (16, 3)", "(1, 3)")),
    ]
    return rows


def bad_gemm() -> list[Bad]:
    """What concerns gemm as a whole."""
    dtypes, blocks = "torch.bfloat16 or torch.float32", "(128, 128) or (1, 128)"
    short = {"b": torch.ones(16, 256).to(E4M3), "b_scale": torch.ones(1, 2)}
    odd_k = {"a": torch.ones(5, 312).to(E4M3), "b": torch.ones(16, 312).to(E4M3)}
    odd_n = {"b": torch.ones(12, 304).to(E4M3), "c": None}
    rows = [
        Bad("gemm", short, ValueError, "b", ("K = 304", "(16, 256)")),
        Bad("gemm", odd_k, ValueError, "a", ("K a multiple of 16", "K = 312")),
        Bad("gemm", odd_n, ValueError, "b", ("N a multiple of 8", "N = 12")),
        Bad("gemm", {"num_sms": 0}, ValueError, "num_sms", ("None or at least 1", "0")),
        Bad("gemm", {"num_sms": -2}, ValueError, "num_sms", ("None or at least 1", "-2")),
    ]
    rows += [
        Bad("gemm", {"b_block": b}, ValueError, "b_block", (blocks, str(b)[1:-1]), None, "b")
        for b in ((128, 1), (64, 64), (1, 64))
    ]
    rows += [
        Bad("gemm", {"out_dtype": dtype}, TypeError, "out_dtype", (dtypes, str(dtype)))
        for dtype in (torch.float16, torch.float64, E4M3, torch.int32)
    ]
    refused = ("'out_dtype'", "'int'")
    rows += [
        Bad("gemm", {"out_dtype": "bfloat16"}, TypeError, "out_dtype", (dtypes, "bfloat16"), refused),
        Bad("gemm", {"out_dtype": None}, TypeError, "out_dtype", (dtypes, "None"), refused),
    ]
    rows += [
        Bad("gemm", {"c": torch.zeros(5, 16, dtype=dtype)}, TypeError, "c", ("dtype " + dtypes, str(dtype)))
        for dtype in (torch.float16, torch.float64, torch.int32, E4M3)
    ]
    rows += [
        Bad("gemm", {"c": torch.zeros(shape)}, ValueError, "c", ("shape (5, 16)", str(shape)))
        for shape in ((16, 5), (5, 15), (4, 16), (1, 16), (5, 1), (0, 0))
    ]
    refused = ("'c'", "Optional[Tensor]")
    rows += [
        Bad("gemm", {"c": torch.zeros(16)}, ValueError, "c", ("2 dimensions", "(16,)")),
        Bad("gemm", {"c": torch.zeros(16, 5).t()}, ValueError, "c", ("row", "(1, 5)")),
        Bad("gemm", {"c": torch.zeros(5, 32)[:, ::2]}, ValueError, "c", ("row", "(32, 2)")),
        Bad("gemm", {"c": torch.zeros(5, 16, device="meta")}, ValueError, "c", ("device cpu", "meta")),
        Bad("gemm", {"c": torch.zeros(5, 16).to_sparse()}, ValueError, "c", ("dense", "sparse"), ("SparseCPU",)),
        Bad("gemm", {"c": 1.0}, TypeError, "c", ("torch.Tensor", "float"), (*refused, "'float'")),
        Bad("gemm", {"c": "zeros"}, TypeError, "c", ("torch.Tensor", "str"), (*refused, "'str'")),
    ]
    return rows


TABLE = bad_quantize() + bad_dequantize() + bad_operands() + bad_gemm()


def assert_says(caught: pytest.ExceptionInfo[BaseException], *words: str) -> None:
    text = str(caught.value)
    missing = [word for word in words if word not in text]
    assert not missing, f"the message says nothing of {missing}: {text}"


@pytest.mark.parametrize("op", ["quantize", "dequantize", "gemm"])
@pytest.mark.parametrize("call", [call_api, call_ops])
def test_good_arguments_are_good(op: str, call: Callable[..., Any]) -> None:
    """Else the table would prove nothing."""
    call(op, good(op))


@pytest.mark.parametrize("bad", [bad for bad in TABLE if bad.reaches_api], ids=lambda bad: bad.id)
def test_api(bad: Bad) -> None:
    """With operands put together without the checks of ScaledTensor, so that those of the op are reached."""
    with pytest.raises(bad.error) as caught:
        call_api(bad.op, good(bad.op) | bad.change, ScaledTensor._trusted)
    argument = bad.api_argument or bad.argument
    assert_says(caught, f"fastfp8.{bad.op}: argument '{argument}': expected ", ", got ", *bad.words)


@pytest.mark.parametrize("bad", [bad for bad in TABLE if bad.torch_words != ()], ids=lambda bad: bad.id)
def test_ops(bad: Bad) -> None:
    with pytest.raises(RuntimeError) as caught:
        call_ops(bad.op, good(bad.op) | bad.change)
    if bad.torch_words is None:
        assert_says(caught, f"fastfp8.{bad.op}: argument '{bad.argument}': expected ", ", got ", *bad.words)
    else:
        assert_says(caught, f"fastfp8::{bad.op}", *bad.torch_words)


@pytest.mark.parametrize("bad", [bad for bad in TABLE if bad.torch_words is None], ids=lambda bad: bad.id)
def test_fake_refuses_the_same(bad: Bad) -> None:
    """On fake tensors, so that torch.compile reports an argument where the function is traced."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    arguments = good(bad.op) | bad.change
    with FakeTensorMode() as mode, pytest.raises(RuntimeError) as caught:
        call_ops(bad.op, {n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in arguments.items()})
    assert_says(caught, f"fastfp8.{bad.op}: argument '{bad.argument}': expected ", *bad.words)


class TestScaledTensorArguments:
    """What only the Python API can be given."""

    @pytest.mark.parametrize("value", [None, 1.0, torch.ones(2, 128), (torch.ones(1), torch.ones(1))], ids=str)
    def test_not_a_scaled_tensor(self, value: Any) -> None:
        t, w = fastfp8.quantize(torch.ones(5, 128)), fastfp8.quantize(torch.ones(8, 128), (128, 128))
        for op, argument, call in (
            ("dequantize", "t", lambda: fastfp8.dequantize(value)),
            ("gemm", "a", lambda: fastfp8.gemm(value, w)),
            ("gemm", "b", lambda: fastfp8.gemm(t, value)),
        ):
            with pytest.raises(TypeError) as caught:
                call()
            name = type(value).__name__
            assert_says(caught, f"fastfp8.{op}: argument '{argument}': expected a fastfp8.ScaledTensor, got {name}")

    @pytest.mark.parametrize("block", [(128, 1), (128, 128)])
    def test_blocks_of_a(self, block: tuple[int, int]) -> None:
        a, b = fastfp8.quantize(torch.ones(128, 128), block), fastfp8.quantize(torch.ones(8, 128))
        with pytest.raises(ValueError, match="blocks") as caught:
            fastfp8.gemm(a, b)
        assert_says(caught, "fastfp8.gemm: argument 'a': expected blocks of (1, 128), got blocks of", str(block))

    def test_a_transposed_operand(self) -> None:
        """The view that t() makes is not row-major: the message must say so, not compute something else."""
        w = fastfp8.quantize(torch.ones(128, 256), (128, 128))
        with pytest.raises(ValueError, match=r"argument 'b': expected row-major"):
            fastfp8.gemm(fastfp8.quantize(torch.ones(5, 128)), w.t())


def test_no_tensor_at_all() -> None:
    """torch finds no backend before it looks at the arguments, and says that."""
    with pytest.raises(RuntimeError, match=r"no tensor arguments.*fastfp8::quantize"):
        OPS.quantize(None)


# Fuzzing: each argument from a pool of good, odd and bad ones. A call gives a result of the right shape and dtype, or
# one of the documented errors.

JUNK: list[Any] = [None, 1, -1.5, "text", (), [1, 2], {}, float, torch.float32, object()]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.bool, E4M3]
EXTENTS = st.sampled_from([0, 1, 3, 8, 16, 127, 128, 130, 144])


@st.composite
def tensors(draw: st.DrawFn, dtypes: list[torch.dtype], dims: tuple[int, ...] = (2, 2, 2, 2, 2, 0, 1, 3)) -> Tensor:
    shape = [draw(EXTENTS) for _ in range(draw(st.sampled_from(dims)))]
    kind = draw(
        st.sampled_from(["plain", "plain", "plain", "transposed", "strided", "expanded", "meta", "sparse", "grad"])
    )
    value = torch.full(shape, 0.75).to(draw(st.sampled_from(dtypes)))
    if kind == "transposed" and len(shape) == 2:
        return value.t().contiguous().t()
    if kind == "strided" and len(shape) == 2:
        return torch.zeros(shape[0], 2 * shape[1]).to(value.dtype)[:, ::2]
    if kind == "expanded" and len(shape) == 2:
        return value[:1].expand(*shape) if shape[0] else value
    if kind == "meta":
        return value.to("meta")
    if kind == "sparse" and value.dtype == torch.float32:
        return value.to_sparse()
    return value.requires_grad_() if kind == "grad" and value.is_floating_point() else value


def mostly(usual: st.SearchStrategy[Any], odd: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 7).flatmap(lambda n: odd if n == 0 else usual)


JUNK_OR_TENSOR = st.one_of(st.sampled_from(JUNK), tensors(DTYPES))
BLOCK_VALUES = mostly(
    st.sampled_from([(1, 128), (128, 1), (128, 128), [1, 128]]),
    st.one_of(st.sampled_from(JUNK), st.tuples(st.integers(-2, 200), st.integers(-2, 200)), tensors(DTYPES)),
)
DTYPE_VALUES = mostly(st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([*DTYPES, *JUNK]))


@st.composite
def scaled(draw: st.DrawFn, block: Any, rows: int, cols: int) -> tuple[Any, Any]:
    """Data and scale: fitting ones, or either of them something else."""
    fits = isinstance(block, (tuple, list)) and tuple(block) in ((1, 128), (128, 1), (128, 128))
    made = fastfp8.quantize(torch.full((rows, cols), 0.75), block if fits else (1, 128))
    data, s = made.data, made.scale
    odd = draw(st.integers(0, 9))
    if odd == 0:
        data = draw(mostly(tensors([E4M3], (2,)), JUNK_OR_TENSOR))
    if odd == 1:
        s = draw(mostly(tensors([torch.float32], (2,)), JUNK_OR_TENSOR))
    if odd == 2:
        s = s.contiguous()
    if odd == 3:
        data, s = data.to("meta"), s.to("meta")
    return data, s


@st.composite
def arguments_of(draw: st.DrawFn, op: str) -> dict[str, Any]:
    if op == "quantize":
        return {
            "x": draw(mostly(tensors(DTYPES[:3]), JUNK_OR_TENSOR)),
            "block": draw(BLOCK_VALUES),
            "pow2": draw(mostly(st.booleans(), st.sampled_from(JUNK))),
            "eps": draw(mostly(st.floats(), st.one_of(st.sampled_from(JUNK), st.integers()))),
        }
    if op == "dequantize":
        block = draw(BLOCK_VALUES)
        data, s = draw(scaled(block, draw(EXTENTS), draw(EXTENTS)))
        return {"data": data, "scale": s, "block": block, "dtype": draw(DTYPE_VALUES)}
    k = draw(mostly(st.sampled_from([0, 16, 128, 144]), EXTENTS))
    m, n = draw(EXTENTS), draw(mostly(st.sampled_from([0, 8, 16, 128, 144]), EXTENTS))
    block = draw(mostly(st.sampled_from([(128, 128), (1, 128)]), BLOCK_VALUES))
    a, a_scale = draw(scaled((1, 128), m, k))
    b, b_scale = draw(scaled(block, n, draw(mostly(st.just(k), EXTENTS))))
    c = draw(mostly(st.sampled_from([None, torch.zeros(m, n), torch.zeros(m, n).bfloat16()]), JUNK_OR_TENSOR))
    out_dtype = draw(DTYPE_VALUES)
    return {"a": a, "a_scale": a_scale, "b": b, "b_scale": b_scale, "b_block": block, "out_dtype": out_dtype, "c": c}


def assert_right(op: str, arguments: dict[str, Any], out: Any) -> None:
    """Shape, dtype, device and, of what the pools can make, values."""
    if op == "quantize":
        x = arguments["x"]
        data, s = (out.data, out.scale) if isinstance(out, ScaledTensor) else out
        block = out.block if isinstance(out, ScaledTensor) else (1, 1)
        assert (data.shape, data.dtype, data.device, data.is_contiguous()) == (x.shape, E4M3, x.device, True)
        if isinstance(out, ScaledTensor):
            assert s.shape == (*x.shape[:-2], -(-x.shape[-2] // block[0]), -(-x.shape[-1] // block[1]))
        assert (s.dtype, s.device) == (torch.float32, x.device)
        return
    left = arguments["data"] if op == "dequantize" else arguments["a"]
    dtype = arguments["dtype"] if op == "dequantize" else arguments["out_dtype"]
    shape = left.shape if op == "dequantize" else (left.shape[0], arguments["b"].shape[0])
    assert (out.shape, out.device, out.is_contiguous()) == (shape, left.device, True)
    if isinstance(dtype, torch.dtype):
        assert out.dtype == dtype


def is_documented(op: str, call: Callable[..., Any], error: Exception) -> bool:
    text = str(error)
    if isinstance(error, (ValueError, TypeError)):
        return text.startswith((f"fastfp8.{op}: argument '", "fastfp8.ScaledTensor: argument '"))
    # Of torch's dispatcher, which looks at Python types and backends before any op does.
    return call is call_ops and isinstance(error, RuntimeError) and f"fastfp8::{op}" in text


@pytest.mark.parametrize("call", [call_api, call_ops])
@pytest.mark.parametrize("op", ["quantize", "dequantize", "gemm"])
def test_fuzz(op: str, call: Callable[..., Any]) -> None:
    seen = {"results": 0, "errors": 0}

    @settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(arguments_of(op))
    def fuzz(arguments: dict[str, Any]) -> None:
        try:
            out = call(op, arguments)
        except Exception as error:
            seen["errors"] += 1
            if not is_documented(op, call, error):
                raise
        else:
            seen["results"] += 1
            assert_right(op, arguments, out)

    fuzz()
    assert min(seen.values()) > 30, f"the pools are one-sided: {seen}"
