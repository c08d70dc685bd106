"""Shapes of real models: the weights that their layers multiply activations by, and how their experts are routed.

A weight is [n, k]; M, the rows of the activations, is the batch's. Sharded or quantised deployments cut them further.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Linear:
    """A weight [n, k] of a layer."""

    model: str
    layer: str
    n: int
    k: int

    def shape(self, m: int) -> str:
        """MxNxK, as the rows of every family name it."""
        return f"{m}x{self.n}x{self.k}"


@dataclasses.dataclass(frozen=True)
class Experts:
    """The routed experts of a layer: ``count`` weights of each kind, of which a token meets ``top_k``."""

    model: str
    hidden: int
    inner: int
    count: int
    top_k: int

    @property
    def gate_up(self) -> Linear:
        return Linear(self.model, "expert gate and up", 2 * self.inner, self.hidden)

    @property
    def down(self) -> Linear:
        return Linear(self.model, "expert down", self.hidden, self.inner)


# DeepSeek-V3 (arXiv 2412.19437, section 4.2): hidden 7168; 128 heads of 128 + 64 for queries and keys and 128 for
# values; queries through 1536, keys and values through 512 and 64 of position; a shared expert of 2048. The tests of
# DeepGEMM use the same seven.
DEEPSEEK_V3 = (
    Linear("DeepSeek-V3", "down to q, kv and position", 1536 + 512 + 64, 7168),
    Linear("DeepSeek-V3", "down to kv and position", 512 + 64, 7168),
    Linear("DeepSeek-V3", "q up", 128 * (128 + 64), 1536),
    Linear("DeepSeek-V3", "kv up", 128 * (128 + 128), 512),
    Linear("DeepSeek-V3", "attention out", 7168, 128 * 128),
    Linear("DeepSeek-V3", "shared expert gate and up", 2 * 2048, 7168),
    Linear("DeepSeek-V3", "shared expert down", 7168, 2048),
)

# M of the table of dense products: decoding, from one token on, to training and prefill.
DENSE_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)

# Qwen3-235B-A22B (its configuration in MindSpeed-RL, qwen3_235b_a22b.yaml): hidden 4096; 64 heads of queries and 4 of
# keys and values, each of 128.
QWEN3_235B = (
    Linear("Qwen3-235B-A22B", "qkv", (64 + 2 * 4) * 128, 4096),
    Linear("Qwen3-235B-A22B", "attention out", 4096, 64 * 128),
)

# GLM-4.5 (Megatron Bridge's page on it; the head's width from the config.json of GLM-4.7, of the same sizes): hidden
# 5120; 96 heads of queries and 8 of keys and values, each of 128; dense layers of 12288.
GLM_45 = (
    Linear("GLM-4.5", "qkv", (96 + 2 * 8) * 128, 5120),
    Linear("GLM-4.5", "attention out", 5120, 96 * 128),
    Linear("GLM-4.5", "gate and up", 2 * 12288, 5120),
    Linear("GLM-4.5", "down", 5120, 12288),
)

# Sources as above; Kimi K2 from its config.json (hidden_size, moe_intermediate_size, n_routed_experts,
# num_experts_per_tok), whose experts have the shape of DeepSeek-V3's.
EXPERTS = (
    Experts("DeepSeek-V3", hidden=7168, inner=2048, count=256, top_k=8),
    Experts("Kimi K2", hidden=7168, inner=2048, count=384, top_k=8),
    Experts("Qwen3-235B-A22B", hidden=4096, inner=1536, count=128, top_k=8),
    Experts("GLM-4.5", hidden=5120, inner=1536, count=160, top_k=8),
)

# What DeepGEMM's tests multiply in groups (tests/generators.py there).
GROUPED_WEIGHTS = (
    Linear("DeepGEMM's tests", "grouped", 6144, 7168),
    Linear("DeepGEMM's tests", "grouped", 7168, 3072),
    Linear("DeepGEMM's tests", "grouped", 4096, 4096),
    Linear("DeepGEMM's tests", "grouped", 4096, 2048),
)
