"""Buffer: dispatch of tokens to the ranks of their experts, and the sums that come back."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import ArgumentTypeError, check_type, check_value, message
from ..scaled_tensor import ScaledTensor
from .agreement import Sizes, agree
from .arguments import Arguments
from .autograd import is_tracked, rows_of_tokens, tokens_of_rows, weights_of_rows
from .exchange import CollectiveExchange, Exchange
from .footprint import Layout, Memory
from .handle import Handle
from .link import Link
from .preflight import Call

if TYPE_CHECKING:
    from .model import Settings
    from .tune import Tuned

_OP = "comm.Buffer"


class Buffer:
    """Dispatch and combine of a mixture of experts over the ranks of ``group`` (DeepSeek-V3 report, section 3.2.2).

    Expert ``e`` lives on rank ``e // (num_experts / world)``, rank ``r`` on node ``r // ranks_per_node``. Every rank
    makes the same calls in the same order, whatever its number of tokens, 0 too. Bits and order of sums are those of
    :mod:`fastfp8.reference.comm`.

    It exchanges through the process group: on CPUs over gloo; on GPUs over NCCL by the same code, which has not been
    run. Each call waits for what other ranks say, on the host, so CUDA graphs cannot capture it: the ranks tell each
    other what they are about to do, and what one refuses is an error on all of them after which the Buffer stays
    usable: :class:`PeerError`, or its own error on the rank that refused. Only a closed Buffer, or a ``handle`` that is
    none of this Buffer's, is known to one rank alone. The others run into :class:`Timeout`, after which the Buffer and
    its group can only be given up.

    With ``way="kernels"`` the sm_90a kernels of ``csrc/comm`` do it, and after the constructor the host waits for
    nothing: over NVLink within a node, between nodes over NCCL's device API, for which the group must be NCCL's, the
    library 2.30.7 or newer, and the build one with its headers. A rank that lacks something is an error of the
    constructor on all ranks that says what. Arguments are checked on their own rank alone: one that refuses lets the
    others run into :class:`Timeout`. No GPU has run it.

    Args:
        group: the process group; None for all ranks. It runs nothing else while a call does.
        hidden: a multiple of 128.
        num_experts: a multiple of the number of ranks; at most 1024 on a rank.
        top_k: experts of a token, 1 to 32.
        max_tokens: the most that a rank may dispatch at once.
        ranks_per_node: a divisor of the number of ranks. It decides where combine rounds. None: the ranks of a machine
            are a node, where these are equally many neighbours.
        num_sms: how many SMs kernels may use, an even number: all, or fewer where :meth:`tune` found that these do. The
            process group's collectives take no notice.
        capacity: rows of ``recv``. None: as many as can come while no token names an expert twice, ``world * max_tokens
            * min(top_k, num_experts / world)``.
        timeout: seconds that a call may wait for others.
        device: of all tensors; None for the CPU, or the current GPU where the group's backend is NCCL.
        way: "collective", through the process group, or "kernels".

    Raises:
        TypeError: an argument is of another type.
        ValueError: a size does not fit, or ranks gave different ones.
        PeerError: another rank refused its arguments.
        Timeout: a rank did not come.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        hidden: int,
        num_experts: int,
        top_k: int,
        max_tokens: int,
        ranks_per_node: int | None = None,
        num_sms: int = 20,
        capacity: int | None = None,
        timeout: float = 300.0,
        device: torch.device | str | None = None,
        way: str = "collective",
    ) -> None:
        group = dist.group.WORLD if group is None else group
        if not isinstance(group, dist.ProcessGroup):
            raise ArgumentTypeError(message(_OP, "group", "a torch.distributed.ProcessGroup of this rank", group))
        check_type(timeout, (int, float), _OP, "timeout", "seconds")
        check_value(timeout > 0, _OP, "timeout", "more than 0 seconds", timeout)
        check_value(way in ("collective", "kernels"), _OP, "way", "'collective' or 'kernels'", way)
        if device is None:
            device = f"cuda:{torch.cuda.current_device()}" if dist.get_backend(group) == "nccl" else "cpu"
        link = Link(group, torch.device(device), float(timeout))
        sizes = Sizes(hidden, num_experts, top_k, max_tokens, ranks_per_node, capacity, num_sms)
        layout = agree(link, sizes)
        exchange: Exchange
        if way == "kernels":
            from .kernel_exchange import kernel_exchange  # with the model that chooses its settings: 0.1 s

            exchange = kernel_exchange(link, layout, num_sms)
        else:
            exchange = CollectiveExchange(link, layout)
        self._use(exchange, device)

    def _use(self, exchange: Exchange, device: torch.device | str) -> None:
        self._exchange = exchange
        self._arguments = Arguments(exchange.layout, torch.device(device), exchange.way == "collective")
        self._handles: weakref.WeakSet[Handle] = weakref.WeakSet()

    def dispatch(
        self,
        x: Tensor | ScaledTensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        *,
        handle: Handle | None = None,
        quantize: bool = True,
        pow2: bool = False,
        stream: torch.cuda.Stream | None = None,
        async_op: bool = False,
    ) -> tuple[Tensor | ScaledTensor, Tensor, Handle]:
        """Send each token to the ranks of its experts, where it becomes a row for each slot.

        Rows of ``recv`` are grouped by this rank's experts, as :func:`fastfp8.grouped_gemm` takes them, and within an
        expert ordered by (source rank, token, slot). Rows from ``offsets[-1]`` on are never written: their content is
        undefined.

        Without quantisation ``recv`` has a gradient with respect to ``x``. With it there is none: a layer that computes
        in FP8 has a backward of its own, and gives the gradients of its rows to :meth:`dispatch_backward`, straight
        through the quantisation. ``handle.recv_weights`` has a gradient with respect to ``topk_weights`` either way.
        Backward exchanges too, so every rank must get there: one without rows also has to use ``recv`` in its loss.

        Args:
            x: bfloat16 [T, hidden], any strides, or a ScaledTensor of that shape in (1, 128) blocks; T at most
                ``max_tokens``, different on each rank.
            topk_idx: int32 or int64 [T, top_k], experts, or -1 for an unused slot. An expert that a token names twice
                gets two rows. None with a ``handle``.
            topk_weights: float32 [T, top_k]; None for 1.
            handle: of an earlier dispatch: its routing and weights serve again, and no counts are exchanged.
            quantize: ``recv`` is a ScaledTensor, bit for bit that of ``fastfp8.quantize(x, pow2=pow2)``.
            pow2: as :func:`fastfp8.quantize` takes it.
            stream: the CUDA stream to work on, for which the current one then waits.
            async_op: return while rows are on their way: ``recv`` is there after ``handle.wait()``.

        Returns:
            ``recv`` [capacity, hidden], a ScaledTensor in (1, 128) blocks or bfloat16; ``offsets`` int32 [local
            experts], the row at which each expert ends; and the :class:`Handle`.

        Raises:
            TypeError, ValueError: this rank's arguments do not fit.
            PeerError: another rank's do not, or it makes another call.
            Overflow: a rank has no room; on all ranks.
            Timeout: a rank did not answer.
        """
        deadline = self._start("dispatch", handle, optional=True)
        problem = None
        try:
            self._arguments.dispatch(x, topk_idx, topk_weights, handle, (quantize, pow2), stream)
        except (TypeError, ValueError) as error:
            problem = error
        quantized = isinstance(x, ScaledTensor) or quantize is True
        tracked = not quantized and is_tracked(x), is_tracked(topk_weights)
        call = Call("dispatch", (quantized, quantized and pow2 is True, handle is not None, *tracked))
        with _on(None if problem else stream, async_op) as lend:
            if handle is None:
                routing = self._exchange.route(topk_idx, topk_weights, call, deadline, problem)  # type: ignore[arg-type]
                new = Handle(self, routing, weights_of_rows(topk_weights, self._exchange, routing))
            else:
                self._exchange.agree(call, deadline, problem)
                new = Handle(self, handle.routing, handle.recv_weights)
            self._handles.add(new)
            recv, arrival = rows_of_tokens(x, self._exchange, new.routing, quantized, pow2)
            new.add(arrival)
            lend((x, topk_idx, topk_weights), (recv, vars(new.routing)))
            if not async_op:
                new.wait()
        return recv, new.offsets, new

    def combine(
        self,
        expert_out: Tensor,
        handle: Handle,
        weighted: bool = True,
        *,
        out: Tensor | None = None,
        stream: torch.cuda.Stream | None = None,
        async_op: bool = False,
    ) -> Tensor:
        """Sum the rows of each token, by its weights, on the rank that it came from. A token without a slot gets zeros.

        FP32 sums, rounded to BF16 where they travel: of a rank, of a node, of all, in an order that
        :mod:`fastfp8.reference.comm` states. It has gradients with respect to ``expert_out`` and, by way of
        ``handle.recv_weights``, the ``topk_weights`` of dispatch, once differentiable.

        Args:
            expert_out: bfloat16 [capacity, hidden], any strides, in the order of ``recv``. Rows past the last offset
                are not read.
            handle: of the dispatch.
            weighted: multiply by ``handle.recv_weights``; False where the experts did that already.
            out: bfloat16 [T, hidden], contiguous, to be written; only where the result has no gradients.
            stream, async_op: as for :meth:`dispatch`; the result is there after ``handle.wait()``.

        Returns:
            bfloat16 [T, hidden].

        Raises:
            TypeError, ValueError, PeerError, Timeout: as :meth:`dispatch`.
        """
        deadline = self._start("combine", handle)
        problem = None
        try:
            self._arguments.combine(expert_out, handle, weighted, out, stream)
        except (TypeError, ValueError) as error:
            problem = error
        weights = handle.recv_weights if weighted is True else None
        call = Call("combine", (weights is not None, is_tracked(expert_out), is_tracked(weights)))
        self._exchange.agree(call, deadline, problem)
        with _on(stream, async_op) as lend:
            y, arrival = tokens_of_rows(expert_out, weights, self._exchange, handle.routing, out)
            handle.add(arrival)
            lend((expert_out, weights), y)
            if not async_op:
                handle.wait()
        return y

    def dispatch_backward(self, grad_rows: Tensor, handle: Handle) -> Tensor:
        """The gradient of dispatch with respect to ``x``, of any kind: combine of ``grad_rows`` without weights.

        Args:
            grad_rows: bfloat16 [capacity, hidden]: the gradient of ``recv``, or of what it stands for in FP8.
            handle: of the dispatch.

        Returns:
            bfloat16 [T, hidden].

        Raises:
            TypeError, ValueError, PeerError, Timeout: as :meth:`combine`.
        """
        self._start("dispatch_backward", handle)
        problem = self._arguments.wrong_rows("dispatch_backward", "grad_rows", grad_rows)
        return self._exchange.dispatch_backward(grad_rows, handle.routing, problem)

    def combine_backward(
        self, dy: Tensor, expert_out: Tensor, handle: Handle, weighted: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """The gradients of :meth:`combine`: dispatch of ``dy`` by the handle, times the weights of the rows.

        Args:
            dy: bfloat16 [T, hidden].
            expert_out: bfloat16 [capacity, hidden], what was combined.
            handle: of the dispatch.
            weighted: as :meth:`combine` had it.

        Returns:
            The gradient of ``expert_out``, bfloat16 [capacity, hidden], not written past the last offset; and that of
            ``handle.recv_weights``, float32 [capacity], 0 there, or None without weights, for :meth:`weights_backward`.

        Raises:
            TypeError, ValueError, PeerError, Timeout: as :meth:`combine`.
        """
        self._start("combine_backward", handle)
        call = "combine_backward"
        problem = self._arguments.wrong_tokens(call, "dy", dy, handle.routing.tokens)
        problem = problem or self._arguments.wrong_rows(call, "expert_out", expert_out)
        weights = handle.recv_weights.detach() if weighted else None
        return self._exchange.combine_backward(dy, expert_out, weights, handle.routing, problem)

    def weights_backward(self, grad_recv_weights: Tensor, handle: Handle) -> Tensor:
        """The gradient of ``topk_weights`` from that of ``handle.recv_weights``: each number back where it came from.

        Args:
            grad_recv_weights: float32 [capacity].
            handle: of the dispatch.

        Returns:
            float32 [T, top_k], 0 where a slot is unused.

        Raises:
            TypeError, ValueError, PeerError, Timeout: as :meth:`combine`.
        """
        self._start("weights_backward", handle)
        problem = self._arguments.wrong_values("weights_backward", "grad_recv_weights", grad_recv_weights)
        return self._exchange.weights_backward(grad_recv_weights, handle.routing, problem)

    def memory(self, quantize: bool = True) -> Memory:
        """What is allocated on a rank, to be printed; :func:`fastfp8.comm.memory` says it before there is a Buffer."""
        return self._exchange.memory(quantize)

    def tune(self, topk_idx: Tensor | None = None, *, names: Sequence[str] | None = None, repeats: int = 5) -> Tuned:
        """Measure dispatch and combine with other rings and numbers of SMs, and keep what is best for later Buffers.

        Every rank must come. Each setting gets windows of its own, and counts with the time of the slowest rank, so all
        ranks find the same. The first rank of each node writes it to ``~/.cache/fastfp8/comm.json``, by nodes, ranks,
        ``hidden``, ``top_k`` and name of the GPU; a Buffer takes what rank 0 reads there, and of its number of SMs at
        most ``num_sms``. This Buffer, its handles and CUDA graphs stay as they are. Untuned, a model chooses
        (:mod:`fastfp8.comm.tune`). It has not run on GPUs.

        Args:
            topk_idx: int32 or int64 [T, top_k]: the routing to measure with; None for ``max_tokens`` at random.
            names: what to try, one after the other: "rail_chunk", "rail_slots", "link_slots", "num_sms"; None for all
                that these nodes have.
            repeats: rounds of each setting, whose median counts.

        Returns:
            The settings, their seconds, and those of all that were tried; ``print`` shows them.

        Raises:
            ValueError: ``way="collective"``, which has no settings; this rank's arguments do not fit; or ranks gave
                different ones.
            TypeError: they are of another type.
            PeerError: another rank's do not fit, or it cannot connect its windows.
            Timeout: a rank did not answer.
        """
        self._start("tune", None, optional=True)
        problem = self._arguments.wrong_tuning(topk_idx, names, repeats)
        return self._exchange.tune(topk_idx, names, repeats, problem)

    def check(self) -> None:
        """Raise what kernels have reported so far, for which the host waits; nothing with ``way="collective"``."""
        self._exchange.check()

    def close(self) -> None:
        """Wait for what is in flight and end the use of this Buffer. Other ranks are waited for with ``way="kernels"``
        over several nodes only: they too must close, or what NCCL knows of them stays until the process ends."""
        try:
            if not self._exchange.closed and self._exchange.failure is None:
                for handle in list(self._handles):
                    handle.wait()
                self._exchange.end()
        finally:
            self._exchange.close()

    @property
    def layout(self) -> Layout:
        """The sizes that all ranks agreed on."""
        return self._exchange.layout

    @property
    def settings(self) -> Settings | None:
        """Rings and SMs of its kernels; None with ``way="collective"``."""
        return self._exchange.settings

    def __enter__(self) -> Buffer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        self._exchange.close()  # after an exception others may never send what is in flight

    def __repr__(self) -> str:
        exchange = self._exchange
        state = "closed" if exchange.closed else "failed" if exchange.failure else "open"
        return f"Buffer(rank {exchange.rank}, {self.layout}, {exchange.way}, {state})"

    def _start(self, call: str, handle: Handle | None, optional: bool = False) -> float:
        """The deadline of a call. Raises for what keeps this rank from taking part at all."""
        deadline = self._exchange.start(call)
        if handle is None and optional:
            return deadline
        op = f"{_OP}.{call}"
        check_type(handle, Handle, op, "handle", "a fastfp8.comm.Handle")
        assert handle is not None
        check_value(handle.buffer is self, op, "handle", "one of this Buffer", "one of another")
        return deadline


@contextlib.contextmanager
def _on(stream: torch.cuda.Stream | None, async_op: bool) -> Iterator[Callable[[object, object], None]]:
    """Work on ``stream`` after what the current one has to do, which then waits for it; with ``async_op`` only in
    :meth:`Handle.wait`, so that what comes before that runs beside it.

    Gives a function of the tensors that come from the current stream and of those that go there, for each is freed to
    the stream that allocated it while the other may still use it.
    """
    if stream is None:
        yield lambda given, made: None
        return
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)

    def lend(given: object, made: object) -> None:
        for things, user in ((given, stream), (made, current)):
            for t in pytree.tree_leaves(things):
                if isinstance(t, Tensor) and t.is_cuda:
                    t.record_stream(user)

    with torch.cuda.stream(stream):
        yield lend
    if not async_op:
        current.wait_stream(stream)
