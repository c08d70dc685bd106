"""MoE: gate, dispatch, experts and combine of a DeepSeekMoE layer, and the SwiGLU layer that its shared experts are."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import check_tensor, check_type, check_value
from ..layout import BLOCK
from ..ops.balance import balance_loss, update_bias
from ..ops.gemm import K_ALIGNMENT
from ..ops.route import Routing, route
from .activation import swiglu
from .experts import experts
from .grouped_linear import PARAM_DTYPES, GroupedLinear
from .linear import Linear
from .tokens import Coding, LocalTokens, OwnTokens, RemoteTokens, coding_of

if TYPE_CHECKING:
    import torch.distributed as dist

    from ..comm import Buffer

_OP = "nn.MoE"


class SwiGLU(torch.nn.Module):
    """``down(silu(gate(x)) * up(x))``: the dense layer, and the shared experts of a mixture as one.

    Its Linears are torch's; where :func:`fastfp8.nn.convert` has made both of them FP8, SwiGLU is fused with them: what
    is kept for backward is the input and gate and up in FP8, and the activation is computed again (DeepSeek-V3 report,
    section 3.3.3). For that ``hidden`` must be a multiple of 16 and ``intermediate`` of 128; else each Linear is alone.

    Args:
        hidden: of input and output, [..., hidden].
        intermediate: F, of gate and of up; ``gate_up.weight`` is [2 F, hidden], the rows of gate first.
        limit: clamps gate and up, see :func:`fastfp8.swiglu_quantize`.
        device, dtype: of the weights.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        *,
        limit: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate_up = torch.nn.Linear(hidden, 2 * intermediate, bias=False, device=device, dtype=dtype)
        self.down = torch.nn.Linear(intermediate, hidden, bias=False, device=device, dtype=dtype)
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        gate_up, down = self.gate_up, self.down
        if not (isinstance(gate_up, Linear) and isinstance(down, Linear) and _can_fuse(gate_up, down)):
            out: Tensor = self.down(swiglu(self.gate_up(x), self.limit))
            return out
        flat = x.reshape(-1, x.shape[-1])
        y = experts(flat, None, OwnTokens(flat, coding_of(gate_up, "activation", False)), gate_up, down, self.limit)
        return y.to(_out_dtype(x)).view(x.shape)


def _can_fuse(gate_up: Linear, down: Linear) -> bool:
    recipe = gate_up.recipe
    if recipe is None or recipe != down.recipe or recipe.promotion is None or gate_up.cache != recipe.cached:
        return False
    fits = gate_up.in_features % K_ALIGNMENT == 0 and down.in_features % BLOCK == 0
    return fits and not gate_up.frozen and not down.frozen


class _Logits(torch.autograd.Function):
    """``x @ weight.T`` in FP32, which keeps ``x`` as it is and no copy of it in FP32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        dx = (grad @ weight).to(x.dtype) if needs_x else None
        return dx, grad.t() @ x.float() if needs_weight else None


class Gate(torch.nn.Module):
    """Logits of experts, in FP32 whatever the model is converted to (DeepSeek-V3 report, section 3.3.1).

    ``weight`` float32 [E, hidden], and the buffer ``bias`` float32 [E], which no gradient moves: see
    :meth:`MoE.update_bias`.
    """

    bias: Tensor

    def __init__(self, hidden: int, num_experts: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(num_experts, hidden, device=device, dtype=torch.float32))
        self.register_buffer("bias", torch.zeros(num_experts, device=device, dtype=torch.float32))
        torch.nn.init.uniform_(self.weight, -1 / math.sqrt(hidden), 1 / math.sqrt(hidden))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = _Logits.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return logits

    def _apply(self, fn: Any, recurse: bool = True) -> Gate:
        def keep_precision(t: Tensor) -> Tensor:
            moved: Tensor = fn(t)
            return t.to(moved.device) if moved.is_floating_point() and moved.dtype != t.dtype else moved

        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        return self


class MoE(torch.nn.Module):
    """A mixture of experts as DeepSeek-V3's (report, section 2.1.2): ``shared(x) + sum of the weighted top_k experts``.

    Route, dispatch, gate and up, SwiGLU, down, combine. No token is dropped. BF16 as it is made; after
    :func:`fastfp8.nn.convert` all GEMMs of the experts are FP8, forward and backward, tokens and their gradients travel
    to the experts in FP8, and rows and gate and up are kept for backward in FP8 (:mod:`fastfp8.nn.experts`).

    Args:
        hidden: H, a multiple of 128 with a process group or in FP8.
        intermediate: F of an expert, a multiple of 128 in FP8.
        num_experts: E, a multiple of the number of ranks; rank r has experts ``r * E / ranks`` and on.
        top_k: experts of a token.
        shared: how many experts every token goes to; they are one :class:`SwiGLU` of that many times F. 0 for none.
        groups, top_groups, score, scale: see :func:`fastfp8.route`; groups are nodes.
        limit: see :func:`fastfp8.swiglu_quantize`.
        alpha: of :func:`fastfp8.balance_loss`.
        process_group: over whose ranks the experts are spread, by :class:`fastfp8.comm.Buffer`; None keeps all here.
        max_tokens: with a process group, the most tokens that a rank ever has.
        way: how the Buffer exchanges.
        timeout: seconds that the Buffer waits for other ranks.
        device, dtype: of the weights but the gate's: float32 or bfloat16.

    ``forward`` takes ``x`` [..., H] of bfloat16 or float32 and returns as much. With a process group every rank takes
    part in each forward and each backward, with any number of tokens, 0 too. Afterwards ``balance_loss`` is a scalar
    with a gradient, to be added to the loss, and ``routing`` what :func:`fastfp8.route` returned.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: a size does not fit.
        fastfp8.comm.CommError: of the Buffer.
    """

    load: Tensor

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        num_experts: int,
        top_k: int,
        *,
        shared: int = 1,
        groups: int = 1,
        top_groups: int = 1,
        score: str = "sigmoid",
        scale: float = 1.0,
        limit: float | None = None,
        alpha: float = 1e-4,
        process_group: dist.ProcessGroup | None = None,
        max_tokens: int | None = None,
        way: str = "collective",
        timeout: float = 300.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"hidden": hidden, "intermediate": intermediate, "num_experts": num_experts, "top_k": top_k}
        for name, value in sizes.items():
            check_type(value, int, _OP, name, "an int")
            check_value(value > 0, _OP, name, "a positive number", value)
        world = 1 if process_group is None else process_group.size()
        check_value(num_experts % world == 0, _OP, "num_experts", f"a multiple of the {world} ranks", num_experts)
        if process_group is not None:
            check_type(max_tokens, int, _OP, "max_tokens", "an int, with a process group")
            check_value(hidden % BLOCK == 0, _OP, "hidden", f"a multiple of {BLOCK} with a process group", hidden)
        self.num_experts, self.limit, self.alpha = num_experts, limit, alpha
        self.options: dict[str, Any] = {
            "top_k": top_k,
            "groups": groups,
            "top_groups": top_groups,
            "score": score,
            "scale": scale,
        }
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        local = num_experts // world
        self.gate = Gate(hidden, num_experts, device)
        self.gate_up = GroupedLinear(local, hidden, 2 * intermediate, recipe=None, **made)
        self.down = GroupedLinear(local, intermediate, hidden, recipe=None, **made)
        self.shared = SwiGLU(hidden, shared * intermediate, limit=limit, **made) if shared else None
        self.register_buffer("load", torch.zeros(num_experts, dtype=torch.int64, device=device), persistent=False)
        self.routing: Routing | None = None
        self.balance_loss: Tensor | None = None
        self.process_group, self._max_tokens, self._way, self._timeout = process_group, max_tokens, way, timeout
        self._stream: torch.cuda.Stream | None = None

    def forward(self, x: Tensor, sequences: int = 1) -> Tensor:
        """``sequences``: of how many equally long sequences the tokens are, for the balance loss."""
        check_tensor(x, _OP, "x", PARAM_DTYPES, tuple(range(1, 9)))
        hidden = self.gate.weight.shape[1]
        check_value(x.shape[-1] == hidden, _OP, "x", f"a last dimension of {hidden}", tuple(x.shape))
        flat = x.reshape(-1, hidden)
        routing = self._route(flat, sequences)
        tokens = flat.bfloat16()
        recipe = self.gate_up.recipe
        if recipe != self.down.recipe or (recipe is not None and recipe.promotion is None):
            recipe = None  # each of the two goes its own way, with BF16 in between
        sent = self._send(tokens, routing, None if recipe is None else coding_of(self.gate_up, "activation", True))
        shared = None
        if self.shared is not None:  # while tokens are on their way
            with torch.autocast(x.device.type, torch.bfloat16):
                shared = self.shared(tokens)
        if recipe is not None:
            y = experts(tokens, routing.topk_weights, sent, self.gate_up, self.down, self.limit)
        else:
            h = swiglu(self.gate_up(sent.rows, sent.offsets), self.limit)
            y = sent.weighted_sums(self.down(h, sent.offsets))
        y = y if shared is None else y + shared
        return y.to(x.dtype).view(x.shape)

    def _route(self, flat: Tensor, sequences: int) -> Routing:
        routing = route(self.gate(flat), self.gate.bias, **self.options)
        self.routing = Routing(*(t.detach() for t in routing))
        if flat.shape[0]:
            self.balance_loss = balance_loss(routing.scores, routing.topk_idx, alpha=self.alpha, sequences=sequences)
        else:
            self.balance_loss = routing.scores.sum()
        if self.training and (torch.compiler.is_compiling() or not _in_backward()):
            self.load += routing.load
        return routing

    def _send(self, tokens: Tensor, routing: Routing, coding: Coding | None) -> Any:
        if self.process_group is None:
            where = routing.topk_idx, routing.topk_weights
            return LocalTokens(tokens, *where, self.num_experts, coding)
        if tokens.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(tokens.device)  # type: ignore[no-untyped-call]
        sizes = self.num_experts, self.options["top_k"], self._max_tokens
        buffer = _buffer(self.process_group, tokens, sizes, self._way, self._timeout)
        return RemoteTokens(buffer, tokens, routing.topk_idx, routing.topk_weights, coding, self._stream)

    @torch.no_grad()
    def update_bias(self, rate: float = 1e-3) -> Tensor:
        """Move the gate's bias by the load since the last call: after each optimizer step, on all ranks.

        Returns:
            int64 [E]: that load, of all ranks of the process group.
        """
        load = self.load.clone()
        if self.process_group is not None:
            import torch.distributed as dist  # 0.1 s, which only this needs

            dist.all_reduce(load, group=self.process_group)
        self.gate.bias.copy_(update_bias(self.gate.bias, load, rate))
        self.load.zero_()
        return load

    def extra_repr(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"num_experts={self.num_experts}, {options}"


def _in_backward() -> bool:
    """Whether a checkpoint does the forward again, which counts no token a second time."""
    return torch._C._current_graph_task_id() != -1


_BUFFERS: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[Any, Buffer]] = weakref.WeakKeyDictionary()


def _buffer(
    group: dist.ProcessGroup, tokens: Tensor, sizes: tuple[int, int, int | None], way: str, timeout: float
) -> Buffer:
    """One for all layers of the same sizes: its memory serves one exchange after the other."""
    from ..comm import Buffer

    num_experts, top_k, max_tokens = sizes
    assert max_tokens is not None
    of_group = _BUFFERS.setdefault(group, {})
    key = (tokens.shape[1], sizes, tokens.device, way, timeout)
    if key not in of_group:
        of_group[key] = Buffer(
            group,
            hidden=tokens.shape[1],
            num_experts=num_experts,
            top_k=top_k,
            max_tokens=max_tokens,
            device=tokens.device,
            way=way,
            timeout=timeout,
        )
    return of_group[key]


def _out_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
