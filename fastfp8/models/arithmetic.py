"""What a model is made of and what training it takes, from its shapes alone."""

from __future__ import annotations

import re
from typing import NamedTuple

from ..layout import BLOCK
from .config import Config
from .deepseek import DeepSeek

# Of names of parameters, the first that fits.
_PARTS = {
    "embedding": r"^embedding\.",
    "output head": r"^head\.",
    "norms": r"norm(_weight|\.weight)$",
    "attention": r"\.attention\.",
    "gates": r"\.ffn\.gate\.",
    "shared experts": r"\.ffn\.shared\.",
    "routed experts": r"\.ffn\.(gate_up|down)\.weight$",
    "projections": r"\.projection\.",
}
_DENSE = "dense layers"
_FP8_PARTS = ("attention", _DENSE, "shared experts", "routed experts", "projections")


class Count(NamedTuple):
    """Parameters, and those of them that a product of each token takes."""

    total: int
    active: int


class Parameters(NamedTuple):
    """Those of a model."""

    main: dict[str, Count]
    """Of the main model by part, as published totals count it. An embedding is looked up and so not active."""
    mtp: dict[str, Count]
    """What multi-token prediction has beyond the main model's embedding and head."""

    def sum(self, *, mtp: bool = False) -> Count:
        """Of the main model, or of multi-token prediction."""
        counts = list((self.mtp if mtp else self.main).values())
        return Count(sum(c.total for c in counts), sum(c.active for c in counts))

    @property
    def fp8(self) -> int:
        """Weights that :func:`fastfp8.nn.convert` makes FP8."""
        return sum(of.get(part, Count(0, 0)).total for of in self for part in _FP8_PARTS)


def parameters(config: Config) -> Parameters:
    """Counts of the model of this configuration, made on the meta device."""
    counts: tuple[dict[str, Count], dict[str, Count]] = ({}, {})
    for name, param in DeepSeek(config, device="meta").named_parameters():
        part = next((part for part, pattern in _PARTS.items() if re.search(pattern, name)), _DENSE)
        # Layers of the main model without experts have the names of these, but no third dimension.
        if part == "routed experts" and param.dim() == 2:
            part = _DENSE
        size = active = param.numel()
        if part == "embedding":
            active = 0
        elif part == "routed experts":
            active = size * config.top_k // config.experts
        of = counts[name.startswith("mtp.")]
        before = of.get(part, Count(0, 0))
        of[part] = Count(before.total + size, before.active + active)
    return Parameters(*counts)


class Bytes(NamedTuple):
    """What one thing takes in BF16 and in FP8."""

    what: str
    bf16: float
    fp8: float


def state(counts: Parameters) -> list[Bytes]:
    """Bytes of all ranks together that stay from step to step, multi-token prediction too.

    BF16: AdamW with moments in FP32. FP8: :class:`fastfp8.optim.AdamW`, the weights of products in FP8, as they are and
    transposed, and what stays in high precision used as it is (DeepSeek-V3 report, section 3.3.3).
    """
    total = counts.sum().total + counts.sum(mtp=True).total
    scaled = 1 + 4 / BLOCK**2  # bytes of an element and its share of the scale
    return [
        Bytes("master weights", 4.0 * total, 4.0 * total),
        Bytes("weights of products", 2.0 * total, 2 * scaled * counts.fp8),
        Bytes("gradients", 4.0 * total, 4.0 * total),
        Bytes("moments", 8.0 * total, 4.0 * total),
    ]


def activations(config: Config, *, recompute: bool) -> list[Bytes]:
    """Bytes a token that are kept from forward to backward, multi-token prediction and loss too.

    BF16: the model as it is made, in bfloat16, which computes RMSNorms again but nothing else. FP8: converted with
    ``Recipe()``. What does not grow with the tokens is left out, and indices of routing. A test compares with
    :func:`fastfp8.numerics.memory`.

    Args:
        config: the model.
        recompute: see :class:`fastfp8.models.attention.Attention`.
    """
    h, heads, depth = config.hidden, config.heads, config.mtp_depth
    blocks, mixtures = config.layers + depth, config.layers - config.dense_layers + depth
    code = 1 + 4 / BLOCK  # bytes of an element and its share of the scale
    first = heads * config.query_dim if config.query_rank is None else config.query_rank
    latents = 2.0 * (first + config.kv_rank + config.rope_dim)
    out = heads * config.value_dim
    per_head = 0.0 if recompute else 2.0 * (heads * 2 * config.query_dim + out)
    kept_after = out * (1.5 + 4 / BLOCK)  # what the Linear after attention keeps in 12 bits
    stream = 2.0 * h * (1 + 2 * blocks + 2 * depth)  # embeddings, and the sums after attention and after experts
    normed = 2.0 * h * (1 + depth)  # before the head
    logits = 4.0 * config.vocabulary * (1 + depth)
    f, k, shared, dense = config.expert_ffn, config.top_k, config.shared_experts * config.expert_ffn, config.dense_ffn
    return [
        Bytes("residual stream", stream, stream),
        Bytes("latents of attention", blocks * latents, blocks * latents),
        Bytes("queries, keys, values", blocks * per_head, blocks * per_head),
        Bytes("output of attention", blocks * (2.0 * out + 4 * heads), blocks * (2.0 * out + 4 * heads + kept_after)),
        # BF16: the input, gate and up, silu(gate) and the activation; FP8: the input, and gate and up.
        Bytes(
            "dense layers", config.dense_layers * (2.0 * h + 8 * dense), config.dense_layers * code * (h + 2 * dense)
        ),
        Bytes("shared experts", mixtures * 8.0 * shared, mixtures * code * (h + 2 * shared) if shared else 0.0),
        # The input of gate and, in BF16, shared experts; rows of the routed ones, and in BF16 what comes out of them.
        Bytes("gates", mixtures * 2.0 * h, mixtures * 2.0 * h),
        Bytes("routed experts", mixtures * k * (4.0 * h + 8 * f), mixtures * k * code * (h + 2 * f)),
        Bytes("multi-token projection", depth * 4.0 * h, depth * code * 2 * h),
        Bytes("head and loss", normed + logits, normed + logits),
    ]
