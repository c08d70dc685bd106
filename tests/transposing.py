"""The ops that write a transpose, over the backends of ``tests/backends.py``: one function serves them all."""

from __future__ import annotations

import functools
from typing import Any

import torch
from backends import Backend, Emulator, Reference, TritonInterpreter, assert_same_bits
from placement import aligned, on_gpu
from torch import Tensor

from fastfp8 import ScaledTensor
from fastfp8.error_word import error_word
from fastfp8.layout import BLOCK, Block, has_scale_layout

ROW_BLOCK: Block = (1, BLOCK)
OPS = torch.ops.fastfp8
# Each op by the name of its host function: the overload, and the module of its Triton kernel.
_OVERLOADS = {
    "quantize_both": (OPS.quantize_both.default, "quantize_both"),
    "quantize_grouped_both": (OPS.quantize_grouped_both.default, "quantize_both"),
    "requantize_transpose": (OPS.requantize_transpose.default, "requantize_transpose"),
    "requantize_grouped_transpose": (OPS.requantize_transpose.grouped, "requantize_transpose"),
}
_WORD = "the error word of the backend"


def _run(b: Backend, name: str, *args: Any) -> tuple[Tensor, ...]:
    """The results of an op on the CPU with the strides that it gave them, _WORD replaced in ``args``."""
    overload, module_name = _OVERLOADS[name]
    if isinstance(b, Reference):
        return overload(*(None if arg is _WORD else arg for arg in args))
    if not isinstance(b, (TritonInterpreter, Emulator)):
        word = error_word(torch.device("cuda", torch.cuda.current_device()))
        args = tuple(on_gpu(arg) if isinstance(arg, Tensor) else word if arg is _WORD else arg for arg in args)
        found = overload(*args)
        return tuple(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t) for t in found)
    from fastfp8.triton_kernels import quantize_both, requantize_transpose

    module = {"quantize_both": quantize_both, "requantize_transpose": requantize_transpose}[module_name]
    args = tuple(b.error if arg is _WORD else aligned(arg) if isinstance(arg, Tensor) else arg for arg in args)
    host = functools.partial(getattr(module, name), *args)
    if isinstance(b, Emulator):
        return b._run_triton(module, f"{module_name}_kernel", host)
    with b._interpreted():
        return host()


def _scaled(data: Tensor, scale: Tensor) -> ScaledTensor:
    assert data.is_contiguous()
    assert has_scale_layout(scale, ROW_BLOCK)
    assert scale.shape == (data.shape[0], -(-data.shape[1] // BLOCK))
    return ScaledTensor._trusted(data, scale, ROW_BLOCK)


def quantize_both(b: Backend, x: Tensor, pow2: bool = False, eps: float = 0.0) -> tuple[ScaledTensor, ScaledTensor]:
    """With ``pad``, as the op has it."""
    found = _run(b, "quantize_both", x, pow2, eps)
    return _scaled(*found[:2]), _scaled(*found[2:])


def quantize_grouped_both(
    b: Backend, x: Tensor, offsets: Tensor, pow2: bool = False, eps: float = 0.0
) -> tuple[ScaledTensor, ScaledTensor, Tensor]:
    found = _run(b, "quantize_grouped_both", x, offsets, _WORD, pow2, eps)
    return _scaled(*found[:2]), _scaled(*found[2:4]), found[4]


def requantize_transpose(b: Backend, t: ScaledTensor) -> ScaledTensor:
    """With ``pad``, as the op has it."""
    return _scaled(*_run(b, "requantize_transpose", t.data, t.scale))


def requantize_grouped_transpose(b: Backend, t: ScaledTensor, offsets: Tensor) -> tuple[ScaledTensor, Tensor]:
    found = _run(b, "requantize_grouped_transpose", t.data, t.scale, offsets, _WORD)
    return _scaled(*found[:2]), found[2]


def check_padded(got: ScaledTensor, expected: ScaledTensor, what: str) -> None:
    """``expected`` in the first columns of ``got``, then zero codes up to the next multiple of 16."""
    tokens = expected.shape[1]
    assert got.shape == (expected.shape[0], -(-tokens // 16) * 16)
    assert_same_bits(got.data[:, :tokens], expected.data, f"data of {what}")
    assert_same_bits(got.scale, expected.scale, f"scale of {what}")
    assert not got.data.view(torch.uint8)[:, tokens:].any()


def padded_ends(sizes: list[int]) -> list[int]:
    """Where groups of these sizes end if each begins at a multiple of 128, one after the other."""
    ends, first = [], 0
    for size in sizes:
        ends.append(first + size)
        first += -(-size // BLOCK) * BLOCK
    return ends


def check_groups(
    got: ScaledTensor, ends_t: Tensor, offsets: Tensor, expected: list[ScaledTensor], tokens: int
) -> Tensor:
    """Each group of a transpose made of ``tokens`` is what is ``expected`` of it alone, in its place, and then zeros.

    Returns which of the blocks belong to a group.
    """
    sizes = offsets.diff(prepend=torch.zeros(1, dtype=offsets.dtype)).tolist()
    assert ends_t.dtype == torch.int32
    assert ends_t.tolist() == padded_ends(sizes)
    room = (tokens + 127 * min(tokens, len(sizes))) // BLOCK * BLOCK
    assert got.shape[1] == room
    mine = torch.zeros(room // BLOCK, dtype=torch.bool)
    for group, (size, end, alone) in enumerate(zip(sizes, ends_t.tolist(), expected, strict=True)):
        first, last = (end - size) // BLOCK, -(-end // BLOCK)
        assert last <= room // BLOCK
        mine[first:last] = True
        assert_same_bits(got.data[:, end - size : end], alone.data, f"transposed data of group {group}")
        assert_same_bits(got.scale[:, first:last], alone.scale, f"transposed scale of group {group}")
        assert not got.data.view(torch.uint8)[:, end : last * BLOCK].any(), f"padding of group {group}"
    return mine


def reported(b: Backend) -> int:
    """The bits in the error word, which is cleared."""
    word = getattr(b, "error", None)
    word = error_word(torch.device("cuda", torch.cuda.current_device())) if word is None else word
    bits = int(word.item())
    word.zero_()
    return bits
