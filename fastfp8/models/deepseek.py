"""A language model as DeepSeek-V3: latent attention, experts, multi-token prediction (arXiv 2412.19437, section 2)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..errors import check_dtype, check_tensor, check_type, check_value
from ..nn import MoE, SwiGLU
from .attention import Attention, rotations
from .config import Config
from .norm import RMSNorm

_OP = "models.DeepSeek"
TOKEN_DTYPES = (torch.int64, torch.int32)
PARAM_DTYPES = (torch.float32, torch.bfloat16)


class Losses(NamedTuple):
    """What :meth:`DeepSeek.loss` returns: float32 scalars, of which the first has a gradient."""

    total: Tensor
    """``main + mtp_weight * mtp + balance``."""
    main: Tensor
    """Cross entropy of the next token, nats a token."""
    mtp: Tensor
    """The mean over the modules of multi-token prediction, 0 without them."""
    balance: Tensor
    """The sum of the layers' balance losses."""


class Block(torch.nn.Module):
    """Attention and experts, or a dense SwiGLU layer, each added to the residual stream."""

    def __init__(self, config: Config, *, dense: bool, recompute: bool, experts: dict[str, Any], **made: Any) -> None:
        super().__init__()
        self.attention = Attention(config, recompute=recompute, **made)
        self.norm = RMSNorm(config.hidden, config.norm_eps, **made)
        self.ffn: SwiGLU | MoE
        if dense:
            self.ffn = SwiGLU(config.hidden, config.dense_ffn, **made)
        else:
            self.ffn = MoE(
                config.hidden,
                config.expert_ffn,
                config.experts,
                config.top_k,
                shared=config.shared_experts,
                groups=config.groups,
                top_groups=config.top_groups,
                scale=config.route_scale,
                alpha=config.balance_alpha,
                **experts,
                **made,
            )

    def forward(self, x: Tensor, by: Tensor) -> Tensor:
        x = x + self.attention(x, by)
        h = self.norm(x)
        y: Tensor = self.ffn(h, sequences=x.shape[0]) if isinstance(self.ffn, MoE) else self.ffn(h)
        return x + y


class MTP(torch.nn.Module):
    """A module of multi-token prediction (section 2.2): of the stream and of the tokens one further on, one stream.

    Embedding and output head are the main model's, the very same Parameters.
    """

    def __init__(self, config: Config, *, recompute: bool, experts: dict[str, Any], **made: Any) -> None:
        super().__init__()
        self.stream_norm, self.token_norm, self.norm = (
            RMSNorm(config.hidden, config.norm_eps, **made) for _ in range(3)
        )
        self.projection = torch.nn.Linear(2 * config.hidden, config.hidden, bias=False, **made)
        self.block = Block(config, dense=False, recompute=recompute, experts=experts, **made)

    def forward(self, x: Tensor, tokens: Tensor, by: Tensor) -> Tensor:
        """``x``: the stream; ``tokens``: embedded, of one position further."""
        y: Tensor = self.block(self.projection(torch.cat((self.stream_norm(x), self.token_norm(tokens)), -1)), by)
        return y


class DeepSeek(torch.nn.Module):
    """The model. Made in high precision; :func:`fastfp8.nn.convert` makes its GEMMs FP8.

    Run it under ``torch.autocast(device, torch.bfloat16)`` where its parameters are float32, as for training: they are
    the master weights then, and the residual stream is bfloat16.

    Args:
        config: sizes.
        process_group: over whose ranks the experts are spread; None keeps all here.
        max_tokens: with a process group, the most tokens that a rank ever has.
        timeout: with a process group, seconds that an exchange of tokens waits for other ranks.
        recompute: see :class:`fastfp8.models.attention.Attention`.
        seed: of the weights. An expert's are the same on whatever rank it is.
        device, dtype: of the parameters but the gates', which are float32: float32 or bfloat16.

    Raises:
        TypeError, ValueError: an argument has another type or does not fit.
    """

    def __init__(
        self,
        config: Config,
        *,
        process_group: dist.ProcessGroup | None = None,
        max_tokens: int | None = None,
        timeout: float = 300.0,
        recompute: bool = False,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_type(config, Config, _OP, "config", "a Config")
        check_dtype(dtype, _OP, "dtype", PARAM_DTYPES)
        self.config, self.process_group = config, process_group
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        block: dict[str, Any] = {
            "recompute": recompute,
            "experts": {"process_group": process_group, "max_tokens": max_tokens, "timeout": timeout},
            **made,
        }
        self.embedding = torch.nn.Embedding(config.vocabulary, config.hidden, **made)
        self.layers = torch.nn.ModuleList(
            Block(config, dense=index < config.dense_layers, **block) for index in range(config.layers)
        )
        self.norm = RMSNorm(config.hidden, config.norm_eps, **made)
        self.head = torch.nn.Linear(config.hidden, config.vocabulary, bias=False, **made)
        self.mtp = torch.nn.ModuleList(MTP(config, **block) for _ in range(config.mtp_depth))
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int = 0) -> None:
        """Weights normally distributed with ``init_std``, norms 1 (section 4.2). Each matrix has a seed of its own, so
        that neither the ranks nor the other matrices decide what is in it."""
        check_type(seed, int, _OP, "seed", "an int")
        first = {id(p): first for moe in self.mixtures() for p, first in _expert_stacks(moe)}
        for name, param in self.named_parameters():
            if param.is_meta:
                continue
            if param.dim() == 1:
                param.fill_(1.0)
                continue
            stack = param if param.dim() == 3 else param[None]
            for place, matrix in enumerate(stack, first.get(id(param), 0)):
                drawn = torch.empty(matrix.shape)
                drawn.normal_(std=self.config.init_std, generator=_generator(f"{seed}/{name}/{place}"))
                matrix.copy_(drawn)
        for moe in self.mixtures():
            moe.gate.bias.zero_()

    def mixtures(self) -> Iterator[MoE]:
        """Every MoE, those of multi-token prediction too."""
        return (module for module in self.modules() if isinstance(module, MoE))

    def expert_parameters(self) -> list[Tensor]:
        """Those of the routed experts: with a process group, each rank's own."""
        return [param for moe in self.mixtures() for param, _ in _expert_stacks(moe)]

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits of the token after each of ``tokens`` [B, T]: float32 [B, T, vocabulary]."""
        self._check(tokens, 1)
        return self.logits(self.norm(self._stream(tokens)[0]))

    def loss(self, tokens: Tensor) -> Losses:
        """The losses of ``tokens``, int64 or int32 [B, T + 1 + mtp_depth], each token but the last of which is in T
        inputs, and each but the first a target. Run it before backward, once for each.

        Raises:
            TypeError, ValueError: ``tokens`` has another dtype or shape.
        """
        depth = self.config.mtp_depth
        self._check(tokens, depth + 2)
        length = tokens.shape[1] - 1 - depth
        x, by = self._stream(tokens[:, :length])
        main = self._cross_entropy(self.norm(x), tokens[:, 1 : 1 + length])
        mtp = main.new_zeros(())
        for k, module in enumerate(self.mtp, 1):
            assert isinstance(module, MTP)
            x = module(x, self._embed(tokens[:, k : k + length]), by)
            mtp = mtp + self._cross_entropy(module.norm(x), tokens[:, k + 1 : k + 1 + length]) / depth
        losses = [moe.balance_loss for moe in self.mixtures()]
        balance = torch.stack([loss for loss in losses if loss is not None]).sum() if losses else main.new_zeros(())
        total = main + self.config.mtp_weight * mtp + balance
        return Losses(total, main.detach(), mtp.detach(), balance.detach())

    def logits(self, x: Tensor) -> Tensor:
        """The output head, in the precision of its weight (section 3.3.1): float32 [..., vocabulary]."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.head.weight.dtype), self.head.weight).float()

    def update_bias(self, rate: float = 1e-3) -> list[Tensor]:
        """:meth:`fastfp8.nn.MoE.update_bias` of every MoE: after each optimizer step, on all ranks.

        Returns:
            int64 [experts] of each: tokens since the last call.
        """
        return [moe.update_bias(rate) for moe in self.mixtures()]

    def _embed(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embedding(tokens)
        kind = tokens.device.type
        return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x

    def _stream(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self._embed(tokens)
        by = rotations(tokens.shape[1], self.config.rope_dim, self.config.rope_base, tokens.device)
        for layer in self.layers:
            x = layer(x, by)
        return x, by

    def _cross_entropy(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(x).flatten(0, 1), targets.flatten().long())

    def _check(self, tokens: Tensor, least: int) -> None:
        check_tensor(tokens, _OP, "tokens", TOKEN_DTYPES)
        check_value(tokens.shape[1] >= least, _OP, "tokens", f"at least {least} in a row", tuple(tokens.shape))


def _expert_stacks(moe: MoE) -> list[tuple[Tensor, int]]:
    """Stacks of experts, and which expert each begins with."""
    weights = (moe.gate_up.weight, moe.down.weight)
    rank = 0 if moe.process_group is None else dist.get_rank(moe.process_group)
    return [(weight, rank * weight.shape[0]) for weight in weights]


def _generator(name: str) -> torch.Generator:
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") >> 1
    return torch.Generator().manual_seed(seed)
