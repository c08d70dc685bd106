"""What fastfp8.nn.GroupedLinear computes: against FP64 products of the dequantised operands."""

from __future__ import annotations

import copy

import pytest
import torch
from linear_support import BF16, FP32, gradients, sqnr, values
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastfp8
from fastfp8 import Format, Recipe
from fastfp8.nn import GroupedLinear

ENDS = [5, 5, 133, 261, 300]  # one group is empty, none starts at a tile
ROWS, K, N = 310, 144, 272


def layer(seed: int = 0, recipe: Recipe | None = Recipe(), **options: object) -> GroupedLinear:  # noqa: B008
    torch.manual_seed(seed)
    made = GroupedLinear(len(ENDS), K, N, recipe=recipe, **options)  # type: ignore[arg-type]
    torch.nn.init.normal_(made.weight)
    return made


def inputs(dtype: torch.dtype = FP32) -> tuple[Tensor, Tensor, Tensor]:
    x, dy = torch.randn(ROWS, K, dtype=dtype), torch.randn(ROWS, N, dtype=dtype)
    x[ENDS[-1] :] = dy[ENDS[-1] :] = torch.nan  # of no group
    return x, dy, torch.tensor(ENDS, dtype=torch.int32)


def groups() -> list[slice]:
    return [slice(a, b) for a, b in zip([0, *ENDS[:-1]], ENDS, strict=True)]


@pytest.mark.parametrize("pow2", [True, False], ids=["pow2", "fp32scales"])
def test_each_gemm_is_the_fp64_product_of_the_right_operands(pow2: bool) -> None:
    row = Format((1, 128), pow2)
    module = layer(recipe=Recipe(activation=row, gradient=row))
    x, dy, offsets = inputs()
    y = module(x, offsets)
    dx, dw = gradients(lambda x: module(x, offsets), x, dy, module.weight)
    for group, rows in enumerate(groups()):
        w8 = values(fastfp8.quantize(module.weight[group].detach(), (128, 128)))
        x8 = fastfp8.quantize(x[rows], pow2=pow2)
        assert sqnr(y[rows], values(x8) @ w8.t()) > 110 or rows.start == rows.stop
        assert sqnr(dx[rows], values(fastfp8.quantize(dy[rows], pow2=pow2)) @ w8) > 110 or rows.start == rows.stop
        retiled = values(fastfp8.quantize(x8.dequantize(), (128, 1), pow2=True))
        exact = values(fastfp8.quantize(dy[rows], (128, 1), pow2=pow2)).t() @ retiled
        if rows.start == rows.stop:
            assert not dw[group].any()
        else:
            assert sqnr(dw[group], exact) > 110


def test_gradients_in_square_blocks_are_worse() -> None:
    """The experiment of the report's appendix B.2, on gradients whose tokens differ in size."""
    x, dy, offsets = inputs()
    dy *= torch.logspace(-10, 10, ROWS, base=2)[:, None][torch.randperm(ROWS)]
    dy[ENDS[-1] :] = torch.nan
    exact = layer(recipe=None)
    weight = exact.weight.detach().double()
    noise = {}
    for block in ((1, 128), (128, 128)):
        module = layer(recipe=Recipe(gradient=Format(block, True)))
        (dx,) = gradients(lambda x, module=module: module(x, offsets), x, dy)
        found = [
            sqnr(dx[r][i], dy[r][i].double() @ weight[g])
            for g, r in enumerate(groups())
            for i in range(r.stop - r.start)
        ]
        noise[block] = min(found)
    assert noise[1, 128] > 24
    assert noise[128, 128] < 10


def test_dense_is_torchs_product_in_bf16() -> None:
    module = layer(recipe=None)
    x, dy, offsets = inputs(BF16)
    y = module(x, offsets)
    dx, dw = gradients(lambda x: module(x, offsets), x, dy, module.weight)
    for group, rows in enumerate(groups()):
        w = module.weight[group].detach().bfloat16().double()
        for actual, exact in (
            (y[rows], x[rows].double() @ w.t()),
            (dx[rows], dy[rows].double() @ w),
            (dw[group], dy[rows].double().t() @ x[rows].double()),
        ):
            torch.testing.assert_close(actual.double(), exact, rtol=0.02, atol=0.2)


@pytest.mark.parametrize("recipe", [Recipe(), None], ids=["fp8", "bf16"])
def test_main_grad_is_added_to_in_place_of_grad(recipe: Recipe | None) -> None:
    module = layer(recipe=recipe)
    x, dy, offsets = inputs()
    _, dw = gradients(lambda x: module(x, offsets), x, dy, module.weight)
    main_grad = torch.randn_like(module.weight)
    module.weight.main_grad = main_grad.clone()  # type: ignore[attr-defined]
    module(x, offsets).backward(dy)
    assert module.weight.grad is None
    torch.testing.assert_close(module.weight.main_grad, main_grad + dw)  # type: ignore[attr-defined]
    assert torch.equal(module.weight.main_grad[1], main_grad[1])  # type: ignore[attr-defined]  # no rows


def test_only_fp8_is_kept_for_backward() -> None:
    module, (x, _, offsets) = layer(), inputs(BF16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = module(x.requires_grad_(), offsets)
    assert y.requires_grad
    own = {module.weight.data_ptr()}
    assert sum(t.nbytes for t in kept if t.data_ptr() not in own) == ROWS * (K + 2 * 4) + offsets.nbytes


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_bit(reentrant: bool) -> None:
    module, (x, dy, offsets) = layer(), inputs()
    plain = gradients(lambda x: module(x, offsets), x, dy, module.weight)
    leaf = x.requires_grad_()
    checkpoint(module, leaf, offsets, use_reentrant=reentrant).backward(dy)  # type: ignore[no-untyped-call]
    end = ENDS[-1]
    assert torch.equal(leaf.grad[:end], plain[0][:end])  # type: ignore[index]
    assert torch.equal(module.weight.grad, plain[1])  # type: ignore[arg-type]


def test_compile_changes_no_bit() -> None:
    module, (x, dy, offsets) = layer(), inputs()
    plain = gradients(lambda x: module(x, offsets), x, dy, module.weight)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    found = gradients(lambda x: compiled(x, offsets), x, dy, module.weight)
    assert torch.equal(found[0][: ENDS[-1]], plain[0][: ENDS[-1]])
    assert torch.equal(found[1], plain[1])


def test_a_changed_weight_is_noticed_in_backward() -> None:
    module, (x, dy, offsets) = layer(), inputs()
    y = module(x.requires_grad_(), offsets)
    with torch.no_grad():
        module.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


def test_state_dict_and_copies() -> None:
    module, (x, _, offsets) = layer(), inputs()
    other = layer(seed=1)
    other.load_state_dict(module.state_dict())
    end = ENDS[-1]
    for same in (other, copy.deepcopy(module)):
        assert torch.equal(same(x, offsets)[:end], module(x, offsets)[:end])


@pytest.mark.parametrize(
    ("make", "kind", "match"),
    [
        (lambda: GroupedLinear(2, 100, 32), ValueError, "'in_features': expected a multiple of 16, got 100"),
        (lambda: GroupedLinear(2, 32, 100), ValueError, "'out_features': expected a multiple of 16"),
        (lambda: GroupedLinear(0, 32, 32), ValueError, "'num_groups': expected a positive number"),
        (lambda: GroupedLinear(2, 32, 32, dtype=torch.float16), TypeError, "'dtype'"),
        (
            lambda: layer()(torch.randn(3, 32), torch.tensor(ENDS, dtype=torch.int32)),
            ValueError,
            r"'x': expected \[R, 144",
        ),
        (lambda: layer()(torch.randn(3, K).half(), torch.tensor(ENDS, dtype=torch.int32)), TypeError, "'x'"),
        (lambda: layer()(torch.randn(3, K), torch.tensor(ENDS)), TypeError, "'offsets'"),
    ],
)
def test_what_does_not_fit_is_named(make: object, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        make()  # type: ignore[operator]
