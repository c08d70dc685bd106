"""Checks of what a Buffer's methods are given, but for what another rank does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import check_tensor, check_type, check_value, value_error
from ..layout import BLOCK, Block
from ..ops.permute import INDEX_DTYPES
from ..scaled_tensor import ScaledTensor
from .autograd import is_tracked
from .footprint import Layout
from .handle import Handle

_OP = "comm.Buffer"
_BLOCK: Block = (1, BLOCK)


class Arguments:
    """The sizes and the device that arguments must fit."""

    def __init__(self, layout: Layout, device: torch.device, reads: bool) -> None:
        """``reads``: look at the values of indices too, for which the host waits where they are on a GPU."""
        self._layout, self._device, self._reads = layout, device, reads

    def dispatch(
        self,
        x: object,
        topk_idx: Tensor | None,
        topk_weights: Tensor | None,
        handle: Handle | None,
        options: tuple[object, object],
        stream: object,
    ) -> None:
        op, layout = f"{_OP}.dispatch", self._layout
        for name, value in zip(("quantize", "pow2"), options, strict=True):
            check_type(value, bool, op, name, "a bool")
        self._check_stream(op, stream)
        if isinstance(x, ScaledTensor):
            check_value(x.block == _BLOCK, op, "x", f"blocks of {_BLOCK}", f"blocks of {x.block}")
            codes = x.data
            check_value(codes.dim() == 2, op, "x", "2 dimensions", f"shape {tuple(x.shape)}")
        else:
            check_tensor(x, op, "x", (torch.bfloat16,))
            assert isinstance(x, Tensor)
            codes = x
        tokens, cols = codes.shape
        check_value(cols == layout.hidden, op, "x", f"[T, {layout.hidden}]", f"shape {tuple(codes.shape)}")
        self._check_device(op, "x", codes)
        if handle is not None:
            sent = handle.routing.tokens
            check_value(topk_idx is None, op, "topk_idx", "None with a handle", type(topk_idx).__name__)
            check_value(topk_weights is None, op, "topk_weights", "None with a handle", type(topk_weights).__name__)
            check_value(tokens == sent, op, "x", f"{sent} tokens, as the handle's dispatch had", f"{tokens}")
            return
        check_value(tokens <= layout.max_tokens, op, "x", f"at most max_tokens = {layout.max_tokens} tokens", tokens)
        check_tensor(topk_idx, op, "topk_idx", INDEX_DTYPES)
        assert topk_idx is not None
        self._check_slots(op, "topk_idx", topk_idx, tokens)
        if self._reads:
            self._check_experts(op, topk_idx)
        if topk_weights is not None:
            check_tensor(topk_weights, op, "topk_weights", (torch.float32,))
            self._check_slots(op, "topk_weights", topk_weights, tokens)

    def wrong_tuning(self, topk_idx: Tensor | None, names: Sequence[str] | None, repeats: int) -> Exception | None:
        from .tune import CHOICES  # with the model: 0.1 s

        op, most = f"{_OP}.tune", self._layout.max_tokens
        try:
            check_type(repeats, int, op, "repeats", "an int")
            check_value(repeats > 0, op, "repeats", "1 or more", repeats)
            fits = names is None or set(names) <= set(CHOICES)
            check_value(fits, op, "names", f"some of {tuple(CHOICES)}", names)
            if topk_idx is not None:
                check_tensor(topk_idx, op, "topk_idx", INDEX_DTYPES)
                tokens = len(topk_idx)
                check_value(tokens <= most, op, "topk_idx", f"at most max_tokens = {most} tokens", tokens)
                self._check_slots(op, "topk_idx", topk_idx, tokens)
                self._check_experts(op, topk_idx)
        except (TypeError, ValueError) as error:
            return error
        return None

    def _check_experts(self, op: str, topk_idx: Tensor) -> None:
        bad = ((topk_idx < -1) | (topk_idx >= self._layout.num_experts)).nonzero()
        if bad.numel():
            token, slot = bad[0].tolist()
            expected = f"experts from 0 to below num_experts = {self._layout.num_experts}, or -1"
            raise value_error(op, "topk_idx", expected, f"{int(topk_idx[token, slot])} for token {token}")

    def combine(self, expert_out: Tensor, handle: Handle, weighted: object, out: Tensor | None, stream: object) -> None:
        op = f"{_OP}.combine"
        check_type(weighted, bool, op, "weighted", "a bool")
        self._check_stream(op, stream)
        self._check(op, "expert_out", expert_out, (self._layout.capacity, self._layout.hidden))
        if out is None:
            return
        self._check(op, "out", out, (handle.routing.tokens, self._layout.hidden))
        check_value(out.is_contiguous(), op, "out", "a contiguous tensor", f"stride {tuple(out.stride())}")
        tracked = is_tracked(expert_out) or (weighted is True and is_tracked(handle.recv_weights))
        check_value(not tracked, op, "out", "None where the result has gradients", "a tensor")

    def wrong_rows(self, call: str, argument: str, value: Tensor) -> Exception | None:
        """What is wrong with rows as ``recv`` has them, or None."""
        return self._wrong(call, argument, value, (self._layout.capacity, self._layout.hidden))

    def wrong_tokens(self, call: str, argument: str, value: Tensor, tokens: int) -> Exception | None:
        return self._wrong(call, argument, value, (tokens, self._layout.hidden))

    def wrong_values(self, call: str, argument: str, value: Tensor) -> Exception | None:
        """What is wrong with one number for each row, or None."""
        return self._wrong(call, argument, value, (self._layout.capacity,), torch.float32)

    def _wrong(
        self,
        call: str,
        argument: str,
        value: Tensor,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.bfloat16,
    ) -> Exception | None:
        try:
            self._check(f"{_OP}.{call}", argument, value, shape, dtype)
        except (TypeError, ValueError) as error:
            return error
        return None

    def _check(
        self, op: str, argument: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16
    ) -> None:
        check_tensor(value, op, argument, (dtype,), len(shape))
        check_value(tuple(value.shape) == shape, op, argument, f"shape {shape}", f"shape {tuple(value.shape)}")
        self._check_device(op, argument, value)

    def _check_slots(self, op: str, argument: str, value: Tensor, tokens: int) -> None:
        shape = (tokens, self._layout.top_k)
        check_value(tuple(value.shape) == shape, op, argument, f"shape {shape}", f"shape {tuple(value.shape)}")
        self._check_device(op, argument, value)

    def _check_device(self, op: str, argument: str, value: Tensor) -> None:
        check_value(value.device == self._device, op, argument, f"device {self._device}, the Buffer's", value.device)

    def _check_stream(self, op: str, stream: object) -> None:
        if stream is not None:
            check_value(self._device.type == "cuda", op, "stream", "None for a Buffer on a CPU", stream)
            check_type(stream, torch.cuda.Stream, op, "stream", "a torch.cuda.Stream")
