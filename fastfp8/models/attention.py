"""Multi-head latent attention: queries, keys and values out of low-rank projections (DeepSeek-V3 report, 2.1.1)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..nn import RMSNormLinear
from .config import Config


def rotations(length: int, dim: int, base: float, device: torch.device) -> Tensor:
    """float32 [length, dim / 2, 2]: cosine and sine of each position's angles."""
    rate = base ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float64), rate)
    return torch.stack((angles.cos(), angles.sin()), -1).float()


def rotate(x: Tensor, by: Tensor) -> Tensor:
    """Rotary embedding of ``x`` [B, T, heads, dim], neighbouring columns as pairs, in FP32."""
    even, odd = x.float().view(*x.shape[:-1], -1, 2).unbind(-1)
    cos, sin = by[:, None].unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


class Attention(torch.nn.Module):
    """``x`` [B, T, hidden] -> [B, T, hidden], causal, with the RMSNorm before it.

    One product takes the normalised input to the query's latent (or the query, with ``query_rank=None``), the latent of
    keys and values and the key that carries position. The core is torch's scaled_dot_product_attention.

    Args:
        config: sizes.
        recompute: keep the latents, the core's output and its softmax statistics for backward, and compute queries,
            keys and values from them again (section 3.2.3); the core itself is not computed again.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        config: Config,
        *,
        recompute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config, self.recompute = config, recompute
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        norm: dict[str, Any] = {"eps": config.norm_eps, **made}
        query = config.heads * config.query_dim
        first = query if config.query_rank is None else config.query_rank
        self.splits = [first, config.kv_rank, config.rope_dim]
        self.qkv_a = RMSNormLinear(config.hidden, sum(self.splits), **norm)
        self.q_b = None if config.query_rank is None else RMSNormLinear(config.query_rank, query, **norm)
        self.kv_b = RMSNormLinear(config.kv_rank, config.heads * (config.head_dim + config.value_dim), **norm)
        self.o_proj = torch.nn.Linear(config.heads * config.value_dim, config.hidden, bias=False, **made)

    def forward(self, x: Tensor, by: Tensor) -> Tensor:
        """``by``: what :func:`rotations` returned."""
        q, kv, k_rope = torch.split(self.qkv_a(x), self.splits, -1)
        if self.recompute and torch.is_grad_enabled():
            out = checkpoint(self._core, q, kv, k_rope, by, use_reentrant=False, context_fn=_contexts)
        else:
            out = self._core(q, kv, k_rope, by)
        y: Tensor = self.o_proj(out)
        return y

    def _core(self, q: Tensor, kv: Tensor, k_rope: Tensor, by: Tensor) -> Tensor:
        config = self.config
        q = (q if self.q_b is None else self.q_b(q)).reshape(*q.shape[:2], config.heads, -1)
        q_nope, q_rope = torch.split(q, [config.head_dim, config.rope_dim], -1)
        kv = self.kv_b(kv).view(*kv.shape[:2], config.heads, -1)
        k_nope, v = torch.split(kv, [config.head_dim, config.value_dim], -1)
        k_rope = rotate(k_rope.unsqueeze(2), by).expand(-1, -1, config.heads, -1)
        q = torch.cat((q_nope, rotate(q_rope, by)), -1)
        k = torch.cat((k_nope, k_rope), -1)
        # A copy of v, else all of the up-projection would be kept for it.
        q, k, v = (t.transpose(1, 2) for t in (q, k, v.contiguous()))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


_CORES = (
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _CORES else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]
