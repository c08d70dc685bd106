"""What a kernel found wrong with data on its device, where to look at it before the launch would be a host sync.

Each device has one int32, its error word, which is 0 or the bits below. A kernel that meets such data computes with
values brought into range, never touches memory out of bounds, and sets its op's bit; :func:`check` reads and clears.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import ArgumentValueError, message

# The bit of each op that reports, and how a message goes on: op, argument, what was expected.
OFFSETS, COUNTS, TOKEN_OFFSETS, SWIGLU_OFFSETS, QUANTIZE_OFFSETS, REQUANTIZE_OFFSETS = 1, 2, 4, 8, 16, 32
TOPK_IDX, SWIGLU_BACKWARD_OFFSETS = 64, 128
_ENDS = "ends that ascend from 0 to at most T"
_MEANINGS = {
    OFFSETS: ("grouped_gemm", "offsets", _ENDS),
    COUNTS: ("masked_grouped_gemm", "counts", "counts from 0 to M"),
    TOKEN_OFFSETS: ("grouped_wgrad", "offsets", _ENDS),
    SWIGLU_OFFSETS: ("gemm_swiglu_quantize", "offsets", _ENDS),
    QUANTIZE_OFFSETS: ("quantize_grouped_both", "offsets", _ENDS),
    REQUANTIZE_OFFSETS: ("requantize_transpose", "offsets", _ENDS),
    SWIGLU_BACKWARD_OFFSETS: ("swiglu_backward_quantize", "offsets", _ENDS),
    TOPK_IDX: ("row_map", "topk_idx", "experts from 0 to below num_experts, or -1"),
}

_words: dict[torch.device, Tensor] = {}


def error_word(device: torch.device) -> Tensor | None:
    """The error word of a CUDA ``device``, int32 [1] and zero when made; None of a meta device, or where none can be.

    That is in the capture of a CUDA graph: a word made there would be cleared by each replay. The CPU has a word that
    nothing sets, because torch.compile cannot lower an op whose one mutable argument is None (seen in torch 2.13).
    """
    word = _words.get(device)
    if word is None and device.type in ("cpu", "cuda"):
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        word = _words[device] = torch.zeros(1, dtype=torch.int32, device=device)
    return word


# A compiled function calls this when it is traced and holds the word as a constant. It is all that
# torch.compiler.assume_constant_result does, but for the import of Dynamo, which takes seconds.
error_word._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check() -> None:
    """Raise if a kernel has met bad data in device memory since the last call.

    What the host cannot see without waiting for the device is not checked before a launch: offsets of
    :func:`fastfp8.grouped_gemm`, :func:`fastfp8.grouped_wgrad`, :func:`fastfp8.gemm_swiglu_quantize`,
    :func:`fastfp8.quantize_grouped_both`, :func:`fastfp8.requantize_transpose` and
    :func:`fastfp8.swiglu_backward_quantize`, counts of :func:`fastfp8.masked_grouped_gemm`, indices of
    :func:`fastfp8.row_map`. On a GPU their kernels bring such values
    into range and go on; this is where to learn of it. It waits for each device on which such an op has run, so call it
    once a step, or while looking for a fault, and not while a CUDA graph is captured.

    On a CPU the ops raise at once and this never does. An op with nothing to compute launches nothing and so reports
    nothing. Launches captured in a CUDA graph report if the op ran on the device before the capture, as a warm-up does.

    Raises:
        ValueError: naming device, op and argument. The report is cleared, and the process stays usable.
    """
    found = []
    for device, word in _words.items():
        if device.type != "cuda":
            continue
        torch.cuda.synchronize(device)  # all streams: the word is read on the current one
        bits = int(word.item())
        if bits:
            word.zero_()
            torch.cuda.synchronize(device)  # lest a launch on another stream sets a bit that this still clears
        found += [
            message(*_MEANINGS[bit], f"others on {device} since the last check, which were brought into range")
            for bit in _MEANINGS
            if bits & bit
        ]
    if found:
        raise ArgumentValueError("; ".join(found))
