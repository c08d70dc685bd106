"""ScaledTensor: its layout, its errors and the ways in and out of it."""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.utils import _pytree as pytree

import fastfp8
from fastfp8 import ScaledTensor
from fastfp8.layout import BLOCKS, Block, as_matrices, scale_shape, scale_strides

E4M3 = torch.float8_e4m3fn
SHAPES = [(1, 1), (1, 128), (5, 300), (128, 128), (257, 129), (130, 16), (0, 256), (7, 0)]


def make(rows: int, cols: int, block: Block) -> ScaledTensor:
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows * 1000 + cols))
    return fastfp8.quantize(x, block)


def same(left: ScaledTensor, right: ScaledTensor) -> bool:
    """Equal codes, scales, block and layout; of the stride of an extent of 1 nothing is asked."""
    strides = [[p for n, p in zip(t.scale.shape, t.scale.stride(), strict=True) if n > 1] for t in (left, right)]
    return (
        left.block == right.block
        and torch.equal(left.data.view(torch.uint8), right.data.view(torch.uint8))
        and torch.equal(left.scale, right.scale)
        and (left.data.dtype, left.scale.dtype) == (right.data.dtype, right.scale.dtype)
        and (left.scale.numel() == 0 or strides[0] == strides[1])
    )


@pytest.fixture(params=BLOCKS, ids=lambda b: f"{b[0]}x{b[1]}")
def block(request: pytest.FixtureRequest) -> Block:
    return request.param


class TestConstruction:
    @pytest.mark.parametrize(("rows", "cols"), SHAPES)
    def test_keeps_what_fits(self, rows: int, cols: int, block: Block) -> None:
        """A scale in the layout of its block is taken as it is, without a copy."""
        made = make(rows, cols, block)
        again = ScaledTensor(made.data, made.scale, block)
        assert again.data is made.data
        assert again.scale is made.scale
        assert again.block == block
        assert again.shape == (rows, cols)
        assert again.device == torch.device("cpu")

    @pytest.mark.parametrize(("rows", "cols"), SHAPES)
    @pytest.mark.parametrize("layout", ["row-major", "column-major", "padded", "strided", "expanded"])
    def test_scale_becomes_canonical(self, rows: int, cols: int, block: Block, layout: str) -> None:
        data = torch.zeros(rows, cols).to(E4M3)
        shape = scale_shape(rows, cols, block)
        values = torch.rand(shape)
        if layout == "row-major":
            scale = values.clone()
        elif layout == "column-major":
            scale = values.t().contiguous().t()
        elif layout == "padded":
            scale = torch.full((shape[0] + 3, shape[1] + 5), torch.nan)[: shape[0], : shape[1]].copy_(values)
        elif layout == "strided":
            scale = torch.full((2 * shape[0], 2 * shape[1]), torch.nan)[::2, ::2].copy_(values)
        else:
            values = torch.full(shape, 0.25)
            scale = torch.tensor(0.25).expand(shape)
        out = ScaledTensor(data, scale, block)
        assert torch.equal(out.scale, values)
        want = scale_strides(shape, block)
        for extent, got, stride in zip(shape, out.scale.stride(), want, strict=True):
            # A pitch may exceed the least one; of an extent of one, or of no elements, nothing is asked.
            asked = extent > 1 and out.scale.numel() > 0
            assert not asked or got == stride or (stride != 1 and got % 4 == 0 and got >= stride)

    def test_canonical_strides(self) -> None:
        """As literals, so that layout.py and the constructor cannot agree on something else."""
        column = torch.rand(5, 3)
        assert ScaledTensor(torch.zeros(5, 300).to(E4M3), column, (1, 128)).scale.stride() == (1, 8)
        assert ScaledTensor(torch.zeros(300, 5).to(E4M3), column.t(), (128, 1)).scale.stride() == (8, 1)
        assert ScaledTensor(torch.zeros(600, 300).to(E4M3), column.t().contiguous().t(), (128, 128)).scale.stride() == (
            3,
            1,
        )

    def test_block_as_a_list(self) -> None:
        made = make(4, 128, (1, 128))
        out = ScaledTensor(made.data, made.scale, [1, 128])  # type: ignore[arg-type]
        assert out.block == (1, 128)
        assert type(out.block) is tuple

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"data": torch.zeros(4, 256)}, TypeError, ["'data'", "float8_e4m3fn", "float32"]),
            (
                {"data": torch.zeros(4, 256).to(torch.float8_e5m2)},
                TypeError,
                ["'data'", "float8_e4m3fn", "float8_e5m2"],
            ),
            ({"data": torch.zeros(256).to(E4M3)}, ValueError, ["'data'", "2 or 3 dimensions", "(256,)"]),
            ({"data": torch.zeros(1, 4, 256).to(E4M3)}, ValueError, ["'scale'", "3 dimensions", "(4, 2)"]),
            ({"data": [[1.0]]}, TypeError, ["'data'", "torch.Tensor", "list"]),
            ({"data": torch.zeros(4, 256, device="meta").to(E4M3)}, ValueError, ["'scale'", "device meta", "cpu"]),
            ({"scale": torch.zeros(4, 2, dtype=torch.float64)}, TypeError, ["'scale'", "float32", "float64"]),
            ({"scale": torch.zeros(4, 3)}, ValueError, ["'scale'", "shape (4, 2)", "(4, 256)", "(4, 3)"]),
            ({"scale": torch.zeros(2, 4)}, ValueError, ["'scale'", "shape (4, 2)", "(2, 4)"]),
            ({"scale": torch.zeros(8)}, ValueError, ["'scale'", "2 dimensions", "(8,)"]),
            ({"scale": torch.zeros(4, 2, device="meta")}, ValueError, ["'scale'", "device cpu", "meta"]),
            ({"scale": torch.zeros(4, 2).to_sparse()}, ValueError, ["'scale'", "dense", "sparse"]),
            ({"scale": None}, TypeError, ["'scale'", "torch.Tensor", "NoneType"]),
            ({"block": (128, 1)}, ValueError, ["'scale'", "shape (1, 256)", "(128, 1)", "(4, 2)"]),
            ({"block": (1, 64)}, ValueError, ["'block'", "(1, 128) or (128, 1) or (128, 128)", "(1, 64)"]),
            ({"block": 128}, ValueError, ["'block'", "(1, 128)", "got 128"]),
            ({"block": None}, ValueError, ["'block'", "(1, 128)", "None"]),
        ],
        ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
    )
    def test_errors(self, change: dict[str, Any], error: type[Exception], words: list[str]) -> None:
        good = {"data": torch.zeros(4, 256).to(E4M3), "scale": torch.ones(4, 2), "block": (1, 128)}
        ScaledTensor(**good)  # type: ignore[arg-type]
        with pytest.raises(error) as caught:
            ScaledTensor(**{**good, **change})  # type: ignore[arg-type]
        assert all(word in str(caught.value) for word in ["ScaledTensor", *words]), str(caught.value)


class TestMethods:
    def test_repr_is_short(self) -> None:
        text = repr(make(5, 300, (1, 128)))
        assert text == "ScaledTensor((5, 300), 1x128 blocks, torch.float8_e4m3fn, cpu)"
        assert len(repr(make(300, 5000, (128, 128)))) < 100

    @pytest.mark.parametrize(("rows", "cols"), SHAPES)
    def test_nbytes(self, rows: int, cols: int, block: Block) -> None:
        scales = -(-rows // block[0]) * -(-cols // block[1])
        assert make(rows, cols, block).nbytes == rows * cols + 4 * scales

    def test_dequantize(self, block: Block) -> None:
        made = make(130, 300, block)
        spread = made.scale.repeat_interleave(block[0], 0)[:130].repeat_interleave(block[1], 1)[:, :300]
        exact = made.data.double() * spread.double()  # 4 + 24 bits: exact
        assert torch.equal(made.dequantize(), exact.float())
        assert torch.equal(made.dequantize(torch.bfloat16), exact.float().bfloat16())
        assert torch.equal(made.dequantize(torch.float16), exact.float().half())

    @pytest.mark.parametrize(("rows", "cols"), SHAPES)
    def test_t(self, rows: int, cols: int, block: Block) -> None:
        made = make(rows, cols, block)
        turned = made.t()
        assert turned.shape == (cols, rows)
        assert turned.block == (block[1], block[0])
        assert turned.data.data_ptr() == made.data.data_ptr()
        assert torch.equal(turned.dequantize(), made.dequantize().t())
        assert same(turned.t(), made)
        if block != (128, 128):
            assert turned.scale.data_ptr() == made.scale.data_ptr(), "the scale of a vector block moves"
        else:
            assert turned.scale.is_contiguous()

    def test_contiguous(self, block: Block) -> None:
        made = make(130, 300, block)
        assert made.contiguous().data is made.data
        turned = made.t()
        assert not turned.data.is_contiguous()
        out = turned.contiguous()
        assert out.data.is_contiguous()
        assert out.block == turned.block
        assert torch.equal(out.dequantize(), made.dequantize().t())

    def test_gemm_takes_a_contiguous_transpose(self) -> None:
        """Dgrad: the weight [N, K] turned to [K, N]."""
        w, g = make(256, 384, (128, 128)), make(6, 256, (1, 128))
        out = fastfp8.gemm(g, w.t().contiguous(), out_dtype=torch.float32)
        exact = g.dequantize().double() @ w.dequantize().double()
        assert (out - exact).abs().max() < 1e-5 * exact.abs().max()

    def test_to(self, block: Block) -> None:
        made = make(130, 300, block)
        here = made.to("cpu")
        assert here.data is made.data
        assert here.scale is made.scale
        there = made.to(torch.device("meta"))
        assert there.device == torch.device("meta")
        assert there.scale.device == torch.device("meta")
        assert there.scale.stride() == made.scale.stride()
        assert (there.shape, there.block) == (made.shape, made.block)


STACKS = [(3, 5, 300), (1, 5, 300), (3, 1, 300), (2, 128, 128), (2, 130, 100), (0, 5, 300), (3, 0, 300), (3, 5, 0)]


def make_stack(shape: tuple[int, int, int], block: Block) -> ScaledTensor:
    return fastfp8.quantize(torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))), block)


@pytest.mark.parametrize("shape", STACKS, ids=str)
@pytest.mark.parametrize("block", [(1, 128), (128, 128)], ids=str)
class TestStack:
    def test_layout(self, block: Block, shape: tuple[int, int, int]) -> None:
        """That of one tall matrix in (1, 128) blocks; as numbers, not as layout.py states it."""
        made = make_stack(shape, block)
        matrices, rows, cols = shape
        blocks = -(-cols // 128)
        assert (made.shape, made.block) == (shape, block)
        if block == (1, 128):
            assert made.scale.shape == (matrices, rows, blocks)
            assert made.scale.stride() == (rows, 1, -(-matrices * rows // 4) * 4)
        else:
            assert made.scale.shape == (matrices, -(-rows // 128), blocks)
            assert made.scale.is_contiguous()

    @pytest.mark.parametrize("layout", ["contiguous", "apart", "transposed"])
    def test_scale_becomes_canonical(self, block: Block, shape: tuple[int, int, int], layout: str) -> None:
        made = make_stack(shape, block)
        given = made.scale.contiguous()
        if layout == "apart":
            matrices, rows, blocks = given.shape
            given = torch.full((matrices, 2 * rows + 1, blocks + 1), torch.nan)[:, :rows, :blocks].copy_(given)
        elif layout == "transposed":
            given = given.mT.contiguous().mT
        out = ScaledTensor(made.data, given, block)
        assert same(out, made)
        assert fastfp8.dequantize(out).shape == shape
        again = ScaledTensor(made.data, made.scale, block)
        assert again.scale is made.scale

    def test_matrices_are_views(self, block: Block, shape: tuple[int, int, int]) -> None:
        made = make_stack(shape, block)
        matrices = list(made)
        assert len(matrices) == shape[0]
        for index, matrix in enumerate(matrices):
            alone = fastfp8.quantize(
                torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))[index], block
            )
            assert torch.equal(matrix.data.view(torch.uint8), alone.data.view(torch.uint8))
            assert torch.equal(matrix.scale, alone.scale)
            assert matrix.block == block
            assert matrix.data.data_ptr() == made.data[index].data_ptr()
            assert matrix.scale.data_ptr() == made.scale[index].data_ptr()
            # Any op takes it as it is.
            assert torch.equal(matrix.dequantize(), made.dequantize()[index])

    def test_turned(self, block: Block, shape: tuple[int, int, int]) -> None:
        made = make_stack(shape, block)
        if block == (1, 128):
            with pytest.raises(ValueError, match=r"ScaledTensor\.t: .*2 dimensions or \(128, 128\) blocks"):
                made.t()
            return
        turned = made.t()
        assert turned.data.data_ptr() == made.data.data_ptr()
        assert torch.equal(turned.dequantize(), made.dequantize().mT)
        assert same(turned.t(), made)
        assert turned.contiguous().data.is_contiguous()

    def test_in_and_out(self, tmp_path: pathlib.Path, block: Block, shape: tuple[int, int, int]) -> None:
        """Pytrees, which drop paddings, safetensors and torch.save."""
        made = make_stack(shape, block)
        assert same(pytree.tree_map(torch.clone, made), made)
        safetensors.torch.save_file(made.state_dict(), tmp_path / "x.safetensors")
        assert same(ScaledTensor.from_state_dict(safetensors.torch.load_file(tmp_path / "x.safetensors")), made)
        torch.save(made, tmp_path / "x.pt")
        assert same(torch.load(tmp_path / "x.pt"), made)
        assert repr(made).startswith(f"ScaledTensor({shape}, {block[0]}x{block[1]} blocks")

    def test_as_matrices(self, block: Block, shape: tuple[int, int, int]) -> None:
        """One launch where blocks do not end amid a matrix and the matrices lie one below the other."""
        made, other = make_stack(shape, block), torch.zeros(shape[0], 2 * shape[1] + 1, shape[2])[:, : shape[1]]
        many = shape[0] if shape[1] % block[0] else 1
        problems = as_matrices(block, made.data, made.scale)
        assert len(problems) == many
        assert sum(data.numel() for data, _ in problems) == made.data.numel()
        scattered = shape[0] > 1 and shape[1] > 1 and shape[2] > 0
        assert len(as_matrices(block, other, made.scale)) == (shape[0] if scattered else many)


class TestStackErrors:
    def test_no_columns_of_blocks(self) -> None:
        """(128, 1) blocks are of a matrix."""
        x = torch.ones(2, 128, 5)
        for call in (
            lambda: fastfp8.quantize(x, (128, 1)),
            lambda: ScaledTensor(x.to(E4M3), torch.ones(2, 1, 5), (128, 1)),
            lambda: torch.ops.fastfp8.quantize(x, (128, 1)),
            lambda: torch.ops.fastfp8.dequantize(x.to(E4M3), torch.ones(2, 1, 5), (128, 1)),
        ):
            with pytest.raises(ValueError, match=r"\(128, 1\) blocks of a stack .*, got shape \(2, 128, 5\)"):
                call()

    def test_indices(self) -> None:
        stack, matrix = make_stack((3, 5, 300), (1, 128)), make(5, 300, (1, 128))
        with pytest.raises(IndexError):
            stack[3]
        assert torch.equal(stack[-1].data.view(torch.uint8), stack[2].data.view(torch.uint8))
        with pytest.raises(ValueError, match=r"a stack \[G, R, C\].*\(5, 300\)"):
            matrix[0]
        with pytest.raises(TypeError, match="'matrix': expected an int"):
            stack["x"]  # type: ignore[index]

    def test_scale_of_another_layout_is_refused_by_ops(self) -> None:
        made = make_stack((3, 6, 300), (1, 128))
        with pytest.raises(RuntimeError, match=r"the number of rows of all matrices.*got stride \(18, 3, 1\)"):
            torch.ops.fastfp8.dequantize(made.data, made.scale.contiguous(), (1, 128))


class TestPytree:
    def test_flatten_and_unflatten(self, block: Block) -> None:
        made = make(5, 300, block)
        leaves, spec = pytree.tree_flatten(made)
        assert [leaf is part for leaf, part in zip(leaves, (made.data, made.scale), strict=True)] == [True, True]
        again = pytree.tree_unflatten(leaves, spec)
        assert isinstance(again, ScaledTensor)
        assert same(again, made)

    def test_leaves_of_any_kind(self) -> None:
        made = make(5, 300, (1, 128))
        out = pytree.tree_map(lambda leaf: tuple(leaf.shape), made)
        assert isinstance(out, ScaledTensor)
        assert (out.data, out.scale, out.block) == ((5, 300), (5, 3), (1, 128))
        filled = pytree.tree_unflatten([None, "scale"], pytree.tree_structure(made))
        assert (filled.data, filled.scale) == (None, "scale")

        assert all("1x128" in repr(t) for t in (out, filled)), "a repr must not depend on what the leaves are"

    @pytest.mark.parametrize("function", [torch.clone, torch.ones_like, lambda leaf: leaf.to("meta")])
    def test_a_map_keeps_the_layout(self, block: Block, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """torch drops the padding of a scale when it copies it; an op would refuse what is left."""
        out = pytree.tree_map(function, make(5, 300, block))
        assert out.scale.stride() == scale_strides(scale_shape(5, 300, block), block)
        assert fastfp8.dequantize(out).shape == (5, 300)

    def test_structure_through_json(self) -> None:
        """As torch.export saves it."""
        leaves, spec = pytree.tree_flatten(make(5, 304, (1, 128)))
        loaded = pytree.tree_unflatten(leaves, pytree.treespec_loads(pytree.treespec_dumps(spec)))
        assert loaded.block == (1, 128)
        assert fastfp8.gemm(loaded, make(8, 304, (128, 128))).shape == (5, 8)

    def test_in_a_tree(self) -> None:
        tree = {"w": make(128, 128, (128, 128)), "x": [make(3, 128, (1, 128)), 7]}
        leaves = pytree.tree_leaves(tree)
        assert len(leaves) == 5
        copied = pytree.tree_map_only(torch.Tensor, torch.clone, tree)
        assert same(copied["w"], tree["w"])
        assert same(copied["x"][0], tree["x"][0])
        assert copied["w"].data.data_ptr() != tree["w"].data.data_ptr()
        assert copied["x"][1] == 7

    def test_structure_tells_blocks_apart(self) -> None:
        square, row = (pytree.tree_structure(make(128, 128, b)) for b in ((128, 128), (1, 128)))
        assert square != row
        assert row == pytree.tree_structure(make(3, 5, (1, 128)))


class TestSaving:
    def test_torch_save(self, tmp_path: pathlib.Path, block: Block) -> None:
        """``torch.load`` with its default, weights_only, after nothing but ``import fastfp8``."""
        made = make(130, 300, block)
        torch.save({"layer": made, "step": 3}, tmp_path / "x.pt")
        loaded = torch.load(tmp_path / "x.pt")
        assert isinstance(loaded["layer"], ScaledTensor)
        assert same(loaded["layer"], made)
        assert torch.equal(loaded["layer"].dequantize(), made.dequantize())

    def test_torch_load_needs_the_registration(self, tmp_path: pathlib.Path) -> None:
        """The control of the test above: weights_only refuses a class that nobody declared safe."""
        torch.save(make(1, 128, (1, 128)), tmp_path / "x.pt")
        safe = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            with pytest.raises(Exception, match="weights_only"):
                torch.load(tmp_path / "x.pt")
        finally:
            torch.serialization.add_safe_globals(safe)
        assert torch.load(tmp_path / "x.pt").shape == (1, 128)

    @pytest.mark.parametrize(("rows", "cols"), SHAPES)
    def test_safetensors(self, tmp_path: pathlib.Path, rows: int, cols: int, block: Block) -> None:
        made, other = make(rows, cols, block), make(3, 130, (1, 128))
        tensors = {**made.state_dict("mlp.up."), **other.state_dict(), "bias": torch.ones(3)}
        assert all(t.is_contiguous() for t in tensors.values())
        safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
        loaded = safetensors.torch.load_file(tmp_path / "x.safetensors")
        assert same(ScaledTensor.from_state_dict(loaded, "mlp.up."), made)
        assert same(ScaledTensor.from_state_dict(loaded), other)

    def test_safetensors_of_a_transpose(self, tmp_path: pathlib.Path) -> None:
        turned = make(130, 300, (1, 128)).t()
        safetensors.torch.save_file(turned.state_dict(), tmp_path / "x.safetensors")
        loaded = ScaledTensor.from_state_dict(safetensors.torch.load_file(tmp_path / "x.safetensors"))
        assert torch.equal(loaded.dequantize(), turned.dequantize())

    @pytest.mark.parametrize("missing", ["data", "scale", "block"])
    def test_missing_key(self, missing: str) -> None:
        tensors = make(3, 130, (1, 128)).state_dict("a.")
        del tensors[f"a.{missing}"]
        with pytest.raises(ValueError, match=rf"from_state_dict.*tensors.*'a\.{missing}'"):
            ScaledTensor.from_state_dict(tensors, "a.")

    def test_state_of_another_block(self) -> None:
        tensors = make(3, 130, (1, 128)).state_dict()
        tensors["block"] = torch.tensor([1, 64])
        with pytest.raises(ValueError, match=r"block.*\(1, 128\).*\[1, 64\]"):
            ScaledTensor.from_state_dict(tensors)

    def test_deepcopy(self, block: Block) -> None:
        made = make(5, 300, block)
        again = copy.deepcopy(made)
        assert same(again, made)
        assert again.data.data_ptr() != made.data.data_ptr()
