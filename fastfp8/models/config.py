"""Sizes of a DeepSeek-V3-like model, and those that have a name."""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import MappingProxyType

from ..errors import check_type, check_value

_OP = "models.Config"


@dataclass(frozen=True, kw_only=True)
class Config:
    """A model of the architecture of the DeepSeek-V3 report (arXiv 2412.19437), sections 2.1 and 2.2.

    Args:
        vocabulary: tokens.
        hidden: H, of the residual stream.
        layers: all layers of the main model.
        dense_layers: how many of the first have a dense SwiGLU layer in place of experts.
        heads: of attention.
        query_rank: of the query's low-rank projection; None for a full one, as DeepSeek-V2-Lite has.
        kv_rank: of the joint one of keys and values: what an inference server would cache.
        head_dim: of a head's query and key without position; its value has ``value_dim``.
        rope_dim: of a head's query and of the one key of all heads that carry position; even.
        value_dim: of a head's value.
        dense_ffn: F of the dense layers.
        expert_ffn: F of an expert.
        experts, top_k: routed experts, and how many a token goes to.
        shared_experts: that every token goes to.
        groups, top_groups: of experts on one node, and how many a token may go to (section 2.1.2).
        route_scale: of the gate's weights.
        balance_alpha: of the sequence-wise balance loss.
        mtp_depth: modules of multi-token prediction (section 2.2), each of which looks one token further.
        mtp_weight: lambda, of their mean loss.
        init_std: of all weights but norms, which start at 1.
        rope_base: wavelengths of the rotary embedding grow to 2 pi times it.
        norm_eps: added to the mean square in RMSNorm.

    Raises:
        TypeError, ValueError: a size has another type or does not fit.
    """

    vocabulary: int
    hidden: int
    layers: int
    dense_layers: int
    heads: int
    query_rank: int | None
    kv_rank: int
    head_dim: int
    rope_dim: int
    value_dim: int
    dense_ffn: int
    expert_ffn: int
    experts: int
    top_k: int
    shared_experts: int
    groups: int = 1
    top_groups: int = 1
    route_scale: float = 1.0
    balance_alpha: float = 1e-4
    mtp_depth: int = 1
    mtp_weight: float = 0.3
    init_std: float = 0.006
    rope_base: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        least = {"dense_layers": 0, "shared_experts": 0, "mtp_depth": 0, "rope_dim": 2}
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if name == "query_rank" and value is None:
                continue
            kinds = (float, int) if isinstance(field.default, float) else int
            check_type(value, kinds, _OP, name, "a number" if kinds is not int else "an int")
            low = 0.0 if kinds is not int else least.get(name, 1)
            check_value(value >= low, _OP, name, f"{low} or more", value)
        check_value(self.dense_layers <= self.layers, _OP, "dense_layers", f"at most layers = {self.layers}", self)
        check_value(self.rope_dim % 2 == 0, _OP, "rope_dim", "an even number", self.rope_dim)

    @property
    def query_dim(self) -> int:
        """Of a head's query and key, with and without position."""
        return self.head_dim + self.rope_dim


# Multiples of 128 where FP8 has its blocks, but few enough products for a CPU.
_MICRO = Config(
    vocabulary=256,
    hidden=128,
    layers=1,
    dense_layers=0,
    heads=2,
    query_rank=None,
    kv_rank=128,
    head_dim=48,
    rope_dim=16,
    value_dim=64,
    dense_ffn=256,
    expert_ffn=128,
    experts=4,
    top_k=2,
    shared_experts=1,
    mtp_depth=0,
    init_std=0.02,
)
_TINY = Config(
    vocabulary=256,
    hidden=256,
    layers=2,
    dense_layers=1,
    heads=4,
    query_rank=128,
    kv_rank=128,
    head_dim=48,
    rope_dim=16,
    value_dim=64,
    dense_ffn=512,
    expert_ffn=128,
    experts=8,
    top_k=2,
    shared_experts=1,
    groups=4,
    top_groups=2,
    init_std=0.02,
)
# The 15.7B of the ablations of section 4.5, whose total and active parameters are those of DeepSeek-V2-Lite
# (arXiv 2405.04434, appendix B): its sizes, with the gate of section 4.5.2.
_16B = Config(
    vocabulary=102400,
    hidden=2048,
    layers=27,
    dense_layers=1,
    heads=16,
    query_rank=None,
    kv_rank=512,
    head_dim=128,
    rope_dim=64,
    value_dim=128,
    dense_ffn=10944,
    expert_ffn=1408,
    experts=64,
    top_k=6,
    shared_experts=2,
)
# Section 4.2; the width of the dense layers and the scale of the gate are those of the published config.json.
_671B = Config(
    vocabulary=129280,
    hidden=7168,
    layers=61,
    dense_layers=3,
    heads=128,
    query_rank=1536,
    kv_rank=512,
    head_dim=128,
    rope_dim=64,
    value_dim=128,
    dense_ffn=18432,
    expert_ffn=2048,
    experts=256,
    top_k=8,
    shared_experts=1,
    groups=8,
    top_groups=4,
    route_scale=2.5,
)
CONFIGS = MappingProxyType({"micro": _MICRO, "tiny": _TINY, "16b": _16B, "671b": _671B})
