"""The ops as torch sees them: opcheck, fake tensors, torch.compile, autograd."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from opcheck import corrected, opcheck
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastfp8
from fastfp8 import PackedE5M6, ScaledTensor
from fastfp8.layout import BLOCKS, Block

OPS = torch.ops.fastfp8
SHAPES = [(1, 128), (5, 300), (128, 256), (130, 16), (0, 256), (3, 0)]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def same(got: Any, want: Any) -> bool:
    """Equal dtypes, shapes, strides and bits, through ScaledTensors and tuples."""
    if isinstance(want, ScaledTensor):
        assert isinstance(got, ScaledTensor)
        return got.block == want.block and same(got.data, want.data) and same(got.scale, want.scale)
    if isinstance(want, tuple):
        return len(got) == len(want) and all(same(g, w) for g, w in zip(got, want, strict=True))
    assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
    return torch.equal(*(t.flatten().view(torch.uint8) for t in (got, want)))


def quantize_cases() -> list[Any]:
    cases = [
        pytest.param((randn(*shape, dtype=dtype), block, pow2, eps), id=f"{shape}-{dtype}-{block}-{pow2}-{eps}")
        for shape, dtype, (pow2, eps) in zip(
            SHAPES,
            [torch.float32, torch.bfloat16, torch.float16] * 2,
            [(False, 0.0), (True, 0.0), (False, 1e-4)] * 2,
            strict=True,
        )
        for block in BLOCKS
    ]
    wide = randn(6, 600)
    views = {"transposed": wide.t(), "strided": wide[::2, ::2], "expanded": wide[:1].expand(4, 600)}
    cases += [pytest.param((view, (1, 128)), id=name) for name, view in views.items()]
    stack = randn(3, 5, 300)
    cases += [pytest.param((stack, block), id=f"stack-{block}") for block in ((1, 128), (128, 128))]
    return [*cases, pytest.param((stack.mT, (1, 128)), id="transposed-stack")]


def dequantize_cases() -> list[Any]:
    cases = []
    for shape in SHAPES:
        for block, dtype in zip(BLOCKS, (torch.bfloat16, torch.float16, torch.float32), strict=True):
            t = fastfp8.quantize(randn(*shape), block)
            cases.append(pytest.param((t.data, t.scale, block, dtype), id=f"{shape}-{block}-{dtype}"))
    for block in ((1, 128), (128, 128)):
        t = fastfp8.quantize(randn(3, 5, 300), block)
        cases.append(pytest.param((t.data, t.scale, block), id=f"stack-{block}"))
    turned = fastfp8.quantize(randn(5, 300)).t()
    return cases + [pytest.param((turned.data, turned.scale, turned.block), id="transposed")]


def gemm_args(m: int, n: int, k: int, block: Block = (128, 128), *rest: Any) -> tuple[Any, ...]:
    a, b = fastfp8.quantize(randn(m, k)), fastfp8.quantize(randn(n, k), block)
    return (a.data, a.scale, b.data, b.scale, block, *rest)


def gemm_cases() -> list[Any]:
    rows = gemm_args(5, 16, 304)
    padded = torch.zeros(5, 512).to(torch.float8_e4m3fn)[:, :304].copy_(rows[0])
    return [
        pytest.param(gemm_args(5, 16, 304)[:4], id="defaults"),
        pytest.param(gemm_args(8, 136, 128, (1, 128), torch.float32), id="1x128-float32"),
        pytest.param(gemm_args(5, 16, 304, (128, 128), torch.bfloat16, randn(5, 16)), id="c"),
        pytest.param(gemm_args(5, 16, 304, (1, 128), torch.float32, randn(5, 16).bfloat16()), id="bfloat16-c"),
        pytest.param(gemm_args(5, 16, 304, (128, 128), torch.float32, randn(1, 16).expand(5, 16)), id="expanded-c"),
        pytest.param(gemm_args(5, 16, 304, (128, 128), torch.bfloat16, None, 20), id="num_sms"),
        pytest.param((padded, *rows[1:]), id="rows-apart"),
        pytest.param(gemm_args(0, 16, 128), id="no-rows"),
        pytest.param(gemm_args(3, 0, 128), id="no-columns"),
        pytest.param(gemm_args(3, 16, 0), id="no-k"),
    ]


def grouped_args(op: str, *rest: Any, n: int = 16, k: int = 304) -> tuple[Any, ...]:
    """All rows are in a group, for the others have no values to compare. The error word is the first of ``rest``."""
    masked = op == "masked_grouped_gemm"
    a, b = fastfp8.quantize(randn(*(3, 5) if masked else (15,), k)), fastfp8.quantize(randn(3, n, k), (128, 128))
    sizes = torch.tensor([5, 5, 5] if masked else [2, 2, 15], dtype=torch.int32)
    return (a.data, a.scale, b.data, b.scale, sizes, *rest)


def grouped_cases(op: str) -> list[Any]:
    return [
        pytest.param(grouped_args(op, None), id="defaults"),
        pytest.param(grouped_args(op, torch.zeros(1, dtype=torch.int32), torch.float32), id="error-word"),
        pytest.param(grouped_args(op, None, n=0), id="no-columns"),
        pytest.param(grouped_args(op, None, k=0), id="no-k"),
    ]


def swiglu_cases() -> list[Any]:
    wide = randn(5, 600)
    return [
        pytest.param((wide,), id="defaults"),
        pytest.param((wide.bfloat16(), randn(5), 7.0, True, 1e-4), id="all-options"),
        pytest.param((randn(8, 512).t()[:, ::2], randn(1).expand(512)), id="strided"),
        pytest.param((randn(0, 256), randn(0)), id="no-rows"),
        pytest.param((randn(3, 0),), id="no-columns"),
    ]


def gemm_swiglu_args(rows: int, b_shape: tuple[int, ...], *rest: Any) -> tuple[Any, ...]:
    a, b = fastfp8.quantize(randn(rows, b_shape[-1])), fastfp8.quantize(randn(*b_shape), (128, 128))
    return (a.data, a.scale, b.data, b.scale, *rest)


def gemm_swiglu_cases() -> list[Any]:
    """All rows are in a group, for the others have no values to compare."""
    ends, word = torch.tensor([2, 2, 5], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    options = (randn(5), 7.0, True, 1e-4, True)
    return [
        pytest.param(gemm_swiglu_args(5, (256, 304)), id="defaults"),
        pytest.param(gemm_swiglu_args(5, (512, 304), None, word, *options), id="all-options"),
        pytest.param(gemm_swiglu_args(5, (3, 256, 304), ends), id="groups"),
        pytest.param(gemm_swiglu_args(5, (3, 256, 304), ends, word, *options), id="groups-all-options"),
        pytest.param(gemm_swiglu_args(0, (256, 304)), id="no-rows"),
        pytest.param(gemm_swiglu_args(3, (0, 304)), id="no-columns"),
        pytest.param(gemm_swiglu_args(3, (256, 0)), id="no-k"),
    ]


def wgrad_args(*rest: Any, n: int = 5, k: int = 16, tokens: int = 304) -> tuple[Any, ...]:
    """The second of three groups is empty. The error word is the first of ``rest``."""
    left, right = fastfp8.quantize(randn(n, tokens)), fastfp8.quantize(randn(k, tokens))
    offsets = torch.tensor([min(200, tokens), min(200, tokens), tokens], dtype=torch.int32)
    return (left.data, left.scale, right.data, right.scale, offsets, *rest)


def wgrad_cases() -> list[Any]:
    return [
        pytest.param(wgrad_args(None), id="defaults"),
        pytest.param(wgrad_args(torch.zeros(1, dtype=torch.int32), torch.bfloat16), id="error-word"),
        pytest.param(wgrad_args(None, n=0), id="no-rows"),
        pytest.param(wgrad_args(None, tokens=0), id="no-tokens"),
    ]


def wgrad_out_cases() -> list[Any]:
    """With ``out`` last, which the schema wants by its name."""
    word = torch.zeros(1, dtype=torch.int32)
    return [
        pytest.param(wgrad_args(None, False, torch.zeros(3, 5, 16)), id="overwrites"),
        pytest.param(wgrad_args(word, True, randn(3, 5, 16).bfloat16()), id="accumulates"),
        pytest.param(wgrad_args(None, True, randn(3, 5, 16), tokens=0), id="no-tokens"),
    ]


def packed_cases(*more: tuple[Any, ...]) -> list[Any]:
    """Of unpack_e5m6 and requantize_e5m6: words, scale, columns, per_row and ``more``."""
    cases = []
    for (rows, cols), per_row, rest in zip([(5, 300), (130, 8), (3, 0)], [False, True, False], more, strict=True):
        p = fastfp8.pack_e5m6(randn(rows, cols), per_row=per_row)
        cases.append(pytest.param((p.words, p.scale, cols, per_row, *rest), id=f"{(rows, cols)}-{per_row}"))
    return cases


CASES = {
    OPS.quantize.default: quantize_cases(),
    OPS.dequantize.default: dequantize_cases(),
    OPS.gemm.default: gemm_cases(),
    OPS.grouped_gemm.default: grouped_cases("grouped_gemm"),
    OPS.masked_grouped_gemm.default: grouped_cases("masked_grouped_gemm"),
    OPS.swiglu_quantize.default: swiglu_cases(),
    OPS.gemm_swiglu_quantize.default: gemm_swiglu_cases(),
    OPS.grouped_wgrad.default: wgrad_cases(),
    OPS.grouped_wgrad.out: wgrad_out_cases(),
    OPS.pack_e5m6.default: [
        pytest.param((randn(5, 300),), id="defaults"),
        pytest.param((randn(130, 16, dtype=torch.bfloat16).t(), False, 1e-4, True), id="per-row"),
        pytest.param((randn(0, 8),), id="no-rows"),
    ],
    OPS.unpack_e5m6.default: packed_cases((), (torch.float32,), (torch.float16,)),
    OPS.requantize_e5m6.default: packed_cases((), (False,), ()),
}


def split(op: Any, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``args`` as ``op`` wants them: by name those that its schema has behind the star."""
    names = [argument.name for argument in op._schema.arguments if argument.kwarg_only]
    positional = len(args) - len(names)
    return args[:positional], dict(zip(names, args[positional:], strict=True))


every_case = pytest.mark.parametrize(
    ("op", "args"),
    [pytest.param(op, *case.values, id=f"{op._opname}-{case.id}") for op, cases in CASES.items() for case in cases],
)


class TestOpcheck:
    @every_case
    def test_op(self, op: Any, args: tuple[Any, ...]) -> None:
        opcheck(op, *split(op, args))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_input_that_requires_grad(self, dtype: torch.dtype) -> None:
        """Without test_aot_dispatch_dynamic, which sums the outputs and so would sum FP8."""
        x = randn(5, 300, dtype=dtype).requires_grad_()
        opcheck(OPS.quantize.default, (x,), utils=("test_schema", "test_autograd_registration", "test_faketensor"))

    def test_finds_a_mutation(self) -> None:
        """The corrected check still sees an op that writes to its FP8 argument."""
        with torch.library._scoped_library("fastfp8_test", "DEF") as library:
            library.define("bad(Tensor x) -> Tensor")

            def bad(x: Tensor) -> Tensor:
                x.view(torch.uint8).add_(1)
                return x.float()

            library.impl("bad", bad, "CPU")
            with pytest.raises(Exception, match="mutated"):
                opcheck(
                    torch.ops.fastfp8_test.bad.default, (randn(4, 4).to(torch.float8_e4m3fn),), utils=("test_schema",)
                )

    def test_finds_a_wrong_fake(self) -> None:
        with torch.library._scoped_library("fastfp8_test", "DEF") as library:
            library.define("bad(Tensor x) -> Tensor")
            library.impl("bad", lambda x: x.double(), "CPU")
            # Of a wrong dtype: torch 2.12 lets a wrong stride pass.
            torch.library.register_fake("fastfp8_test::bad", lambda x: torch.empty(x.shape), lib=library)
            with pytest.raises(Exception, match=r"(?i)dtype"):
                opcheck(torch.ops.fastfp8_test.bad.default, (randn(4, 5),), utils=("test_faketensor",))

    def test_the_corrections_are_still_needed(self) -> None:
        t = fastfp8.quantize(randn(5, 300))
        with pytest.raises(RuntimeError, match="not implemented for 'Float8_e4m3fn'"):
            torch.allclose(t.data, t.data)
        assert torch.clone(t.scale).stride() != t.scale.stride()
        with corrected():
            assert torch.allclose(t.data, t.data)
            assert not torch.allclose(t.data, torch.zeros_like(t.data))
            assert torch.clone(t.scale).stride() == t.scale.stride()
        for util in ("test_schema", "test_aot_dispatch_dynamic"):
            with pytest.raises(torch.testing._internal.optests.generate_tests.OpCheckError):
                torch.library.opcheck(OPS.dequantize.default, (t.data, t.scale, t.block), test_utils=util)


class TestFake:
    @every_case
    def test_metadata(self, op: Any, args: tuple[Any, ...]) -> None:
        given, named = split(op, args)
        real = op(*given, **named)
        with FakeTensorMode() as mode:
            given, named = split(op, tuple(mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in args))
            fake = op(*given, **named)
        if real is None:
            assert fake is None
            return
        pairs = zip(fake, real, strict=True) if isinstance(real, tuple) else [(fake, real)]
        for got, want in pairs:
            assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)
            assert got.stride() == want.stride()
            assert got.storage_offset() == want.storage_offset()

    def test_meta_device(self) -> None:
        t = fastfp8.quantize(randn(5, 304).to("meta"))
        assert t.device == torch.device("meta")
        w = fastfp8.quantize(torch.empty(16, 304, device="meta"), (128, 128))
        out = fastfp8.gemm(t, w, out_dtype=torch.float32)
        assert (out.shape, out.dtype, out.device) == ((5, 16), torch.float32, torch.device("meta"))
        assert t.dequantize().shape == (5, 304)

    def test_a_fake_checks_its_arguments(self) -> None:
        with pytest.raises(RuntimeError, match=r"fastfp8\.quantize: argument 'x': expected dtype"):
            OPS.quantize(torch.empty(3, 128, dtype=torch.float64, device="meta"))


def linear(x: Tensor, w: Tensor, c: Tensor) -> tuple[Tensor, ScaledTensor, Tensor]:
    a, b = fastfp8.quantize(x), fastfp8.quantize(w, (128, 128))
    return fastfp8.gemm(a, b, out_dtype=torch.float32, c=c), a, fastfp8.dequantize(a)


def scaled_in_and_out(a: ScaledTensor, w: ScaledTensor) -> tuple[ScaledTensor, Tensor]:
    """Dgrad after Fprop: the weight turned, a ScaledTensor in, another out."""
    y = fastfp8.gemm(a, w)
    g = fastfp8.quantize(y * 2, pow2=True)
    return g, fastfp8.gemm(g, w.t().contiguous(), out_dtype=torch.float32)


def wgrad_operands(x: Tensor) -> tuple[ScaledTensor, ScaledTensor]:
    t = fastfp8.quantize(x, (128, 1), eps=1e-4)
    return t, t.t().contiguous()


def rebuilt(data: Tensor, scale: Tensor) -> ScaledTensor:
    return ScaledTensor(data, scale * 1.0, (1, 128))


def experts(x: Tensor, w: Tensor, ends: Tensor, counts: Tensor) -> tuple[ScaledTensor, Tensor, Tensor]:
    """The same rows once as groups, once as a stack with room for all of them."""
    b = fastfp8.quantize(w, (128, 128))
    y = fastfp8.grouped_gemm(fastfp8.quantize(x), b, ends, out_dtype=torch.float32)
    stack = fastfp8.quantize(x.expand(w.shape[0], *x.shape))
    return stack, y, fastfp8.masked_grouped_gemm(stack, b, counts)


def gated_mlp(x: Tensor, w: Tensor, ends: Tensor, weight: Tensor) -> tuple[ScaledTensor, Tensor, ScaledTensor]:
    """Groups of rows with gate and up kept, and the first group's weights again for all rows."""
    a, b = fastfp8.quantize(x), fastfp8.quantize(w, (128, 128))
    h, gate_up = fastfp8.gemm_swiglu_quantize(a, b, ends, weight=weight, limit=7.0, return_gate_up=True)
    dense = fastfp8.gemm_swiglu_quantize(a, fastfp8.quantize(w[0], (128, 128)), pow2=True)
    return h, gate_up, dense


def expert_gradients(dy: Tensor, x: Tensor, ends: Tensor, main_grad: Tensor) -> tuple[Tensor, Tensor]:
    """Of all experts, a new tensor and the sum in main_grad, which the op writes."""
    left, right = (fastfp8.quantize(t, (128, 1)).t().contiguous() for t in (dy, x))
    fastfp8.grouped_wgrad(left, right, ends, out=main_grad, accumulate=True)
    return fastfp8.grouped_wgrad(left, right, ends, out_dtype=torch.bfloat16), main_grad * 2


def repacked(p: PackedE5M6) -> tuple[PackedE5M6, ScaledTensor]:
    return fastfp8.pack_e5m6(fastfp8.unpack_e5m6(p) * 2, per_row=True), fastfp8.requantize_e5m6(p)


def compiled(function: Callable[..., Any], backend: str, dynamic: bool | None) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [False, True, None], ids=["static", "dynamic", "automatic"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
class TestCompile:
    """Bit for bit equal to eager, in one graph."""

    def test_linear(self, backend: str, dynamic: bool | None) -> None:
        function = compiled(linear, backend, dynamic)
        for m in (5, 8, 130):
            args = randn(m, 304, dtype=torch.bfloat16), randn(24, 304), randn(m, 24)
            assert same(function(*args), linear(*args))

    def test_scaled_in_and_out(self, backend: str, dynamic: bool | None) -> None:
        function = compiled(scaled_in_and_out, backend, dynamic)
        w = fastfp8.quantize(randn(144, 304), (128, 128))
        for m in (5, 8, 130):
            a = fastfp8.quantize(randn(m, 304))
            assert same(function(a, w), scaled_in_and_out(a, w))

    def test_wgrad_operands(self, backend: str, dynamic: bool | None) -> None:
        function = compiled(wgrad_operands, backend, dynamic)
        for m in (5, 8, 130):
            assert same(function(randn(m, 300)), wgrad_operands(randn(m, 300)))

    def test_experts(self, backend: str, dynamic: bool | None) -> None:
        """With the error word, which the ops say they may write."""
        function = compiled(experts, backend, dynamic)
        for m in (5, 8, 130):
            ends, counts = (torch.tensor(sizes, dtype=torch.int32) for sizes in ([2, 2, m], [m, m, m]))
            args = randn(m, 304, dtype=torch.bfloat16), randn(3, 24, 304), ends, counts
            assert same(function(*args), experts(*args))

    def test_gated_mlp(self, backend: str, dynamic: bool | None) -> None:
        function = compiled(gated_mlp, backend, dynamic)
        for m in (5, 8, 130):
            args = randn(m, 304), randn(2, 256, 304), torch.tensor([2, m], dtype=torch.int32), randn(m)
            assert same(function(*args), gated_mlp(*args))

    def test_swiglu_quantize(self, backend: str, dynamic: bool | None) -> None:
        function = compiled(fastfp8.swiglu_quantize, backend, dynamic)
        for m in (5, 8, 130):
            args = randn(m, 600, dtype=torch.bfloat16), randn(m), 7.0
            assert same(function(*args), fastfp8.swiglu_quantize(*args))

    def test_expert_gradients(self, backend: str, dynamic: bool | None) -> None:
        function = compiled(expert_gradients, backend, dynamic)
        for tokens in (304, 320, 512):
            ends = torch.tensor([100, 128, tokens], dtype=torch.int32)
            args = randn(tokens, 24, dtype=torch.bfloat16), randn(tokens, 16), ends
            sums, expected = randn(3, 24, 16), randn(3, 24, 16)
            assert same(function(*args, sums), expert_gradients(*args, expected))
            assert same(sums, expected)

    def test_rebuilt(self, backend: str, dynamic: bool | None) -> None:
        """The constructor's checks and its copy of a scale into its layout trace too."""
        function = compiled(rebuilt, backend, dynamic)
        for m in (5, 8, 130):
            t = fastfp8.quantize(randn(m, 300))
            assert same(function(t.data, t.scale), rebuilt(t.data, t.scale))

    def test_packed(self, backend: str, dynamic: bool | None) -> None:
        """A PackedE5M6 in and another out."""
        function = compiled(repacked, backend, dynamic)
        for m in (5, 8, 130):
            p = fastfp8.pack_e5m6(randn(m, 300))
            (words, *rest), (expected, *others) = function(p), repacked(p)
            assert (words.shape, words.per_row) == (expected.shape, True)
            assert same((words.words, words.scale, *rest), (expected.words, expected.scale, *others))


class TestCompileMore:
    def test_dynamic_shapes_do_not_recompile(self) -> None:
        graphs = 0

        def count(graph: Any, inputs: Any) -> Any:
            nonlocal graphs
            graphs += 1
            return graph.forward

        torch._dynamo.reset()
        function = torch.compile(linear, backend=count, fullgraph=True, dynamic=True)
        for m in (5, 8, 130, 257, 300):
            function(randn(m, 304), randn(24, 304), randn(m, 24))
        assert graphs == 1

    def test_bad_input_raises_as_in_eager(self) -> None:
        """A compiled function reports an argument as eager does, though torch wraps the error in its own class."""
        function = compiled(lambda x: fastfp8.quantize(x).data, "aot_eager", False)
        with pytest.raises(Exception, match=r"argument 'x'.*float64"):
            function(randn(3, 128).double())


class TestAutograd:
    """No op has a backward, modules define theirs; and torch must not derive one from what the reference is made of."""

    @pytest.mark.parametrize("op", sorted({op._opname for op in CASES}))
    def test_backward_warns_and_gives_nothing(self, op: str) -> None:
        x, wide = randn(5, 304).requires_grad_(), randn(5, 600).requires_grad_()
        t, w = fastfp8.quantize(randn(5, 304)), fastfp8.quantize(randn(16, 304), (128, 128))
        scale = t.scale.detach().requires_grad_()
        of_groups = {name: grouped_args(name, None) for name in ("grouped_gemm", "masked_grouped_gemm")}
        of_groups["grouped_wgrad"] = wgrad_args(None)
        if op in of_groups:
            scale = of_groups[op][1].detach().requires_grad_()
        swiglu = gemm_swiglu_args(5, (256, 304))
        packed = fastfp8.pack_e5m6(randn(5, 304))
        packed_scale = packed.scale.detach().requires_grad_()
        leaf, out = {
            "pack_e5m6": lambda: (x, OPS.pack_e5m6(x)[1]),
            "unpack_e5m6": lambda: (packed_scale, OPS.unpack_e5m6(packed.words, packed_scale, 304)),
            "requantize_e5m6": lambda: (packed_scale, OPS.requantize_e5m6(packed.words, packed_scale, 304)[1]),
            "swiglu_quantize": lambda: (wide, OPS.swiglu_quantize(wide)[1]),
            "gemm_swiglu_quantize": lambda: (scale, OPS.gemm_swiglu_quantize(swiglu[0], scale, *swiglu[2:])[1]),
            "quantize": lambda: (x, OPS.quantize(x)[1]),
            "dequantize": lambda: (scale, OPS.dequantize(t.data, scale, t.block, torch.float32)),
            "gemm": lambda: (scale, OPS.gemm(t.data, scale, w.data, w.scale)),
            **{
                name: lambda name=name, args=args: (scale, getattr(OPS, name)(args[0], scale, *args[2:]))
                for name, args in of_groups.items()
            },
        }[op]()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out.float().sum().backward()
        assert any(f"fastfp8::{op}" in str(w.message) and "autograd" in str(w.message) for w in caught)
        assert leaf.grad is None

    def test_no_grad_mode(self) -> None:
        x = randn(5, 304).requires_grad_()
        with torch.no_grad():
            t = fastfp8.quantize(x)
        assert not t.data.requires_grad
        assert not t.scale.requires_grad

    def test_same_bits_with_and_without(self) -> None:
        x = randn(5, 304)
        plain, tracked = fastfp8.quantize(x), fastfp8.quantize(x.clone().requires_grad_())
        assert same((tracked.data.detach(), tracked.scale.detach()), (plain.data, plain.scale))
