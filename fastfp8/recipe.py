"""Recipe: in which format each tensor of a training step is, and what stays in high precision."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, fields

from .errors import check_type, check_value
from .layout import BLOCK, BLOCKS, Block, as_block

_OP = "Recipe"
CACHES = ("e4m3", "e5m6", "bf16")


@dataclass(frozen=True)
class Format:
    """E4M3 with one scale a block.

    Args:
        block: (1, 128), (128, 1) or (128, 128).
        pow2: whether scales are rounded up to powers of two; else they are any FP32 number.
    """

    block: Block
    pow2: bool

    def __post_init__(self) -> None:
        as_block(self.block, "Format", allowed=BLOCKS)
        check_type(self.pow2, bool, "Format", "pow2", "a bool")

    def __str__(self) -> str:
        rows, cols = self.block
        return f"e4m3 {rows}x{cols}, {'power-of-two' if self.pow2 else 'fp32'} scales"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model trains in FP8: by default as the DeepSeek-V3 report does (arXiv 2412.19437), whose sections each line
    of ``print(recipe)`` names. ``None`` in place of a Recipe is BF16 throughout.

    Args:
        activation: the inputs of Linears, as Fprop takes them (section 3.3.2). Wgrad takes the same numbers in
            128 x 1 blocks. Powers of two, so that this re-tiling loses nothing but subnormals.
        weight: section 3.3.2; always (128, 128), whose transpose is exact.
        gradient: of the outputs of Linears, as Dgrad takes them. (128, 128) blocks are for experiments: with them a 16B
            model diverged (appendix B.2). Wgrad takes (128, 1) blocks of the same rounding, or these.
        dispatched: tokens on their way to their experts, and the gradients that go the same way (section 3.3.3).
        cached: in what the input of a Linear and that of SwiGLU are kept for backward: "e4m3", in the format of
            ``activation``, or "bf16" (section 3.3.3).
        cached_after_attention: the same of the Linear after attention: "e5m6", "e4m3" or "bf16" (section 3.3.3).
        after_attention: patterns of the names of such Linears.
        high_precision: patterns of the names of Linears that stay as they are: the output head, the gate (section
            3.3.1). Embeddings, norms and what is between the projections of attention are no Linears and stay anyway.
        promotion: elements of K between two additions to the FP32 accumulator: 128 (section 3.3.2). None never leaves
            the tensor core's accumulator of 14 bits: an experiment of what that costs, with one scale a row, for which
            the CPU goes through a model of the hardware (:mod:`fastfp8.reference.tensor_core`), slowly.

    A pattern is that of a shell (``*`` is any text), for the whole qualified name or what follows one of its dots.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a format that nothing here computes with.
    """

    activation: Format = Format((1, BLOCK), pow2=True)
    weight: Format = Format((BLOCK, BLOCK), pow2=False)
    gradient: Format = Format((1, BLOCK), pow2=True)
    dispatched: Format = Format((1, BLOCK), pow2=True)
    cached: str = "e4m3"
    cached_after_attention: str = "e5m6"
    after_attention: tuple[str, ...] = ("o_proj", "out_proj", "wo")
    high_precision: tuple[str, ...] = ("lm_head", "head", "gate", "router", "score")
    promotion: int | None = BLOCK

    def __post_init__(self) -> None:
        row, square = (1, BLOCK), (BLOCK, BLOCK)
        legal = {"activation": (row,), "weight": (square,), "gradient": (row, square), "dispatched": (row,)}
        for name, blocks in legal.items():
            value = getattr(self, name)
            check_type(value, Format, _OP, name, "a Format")
            check_value(value.block in blocks, _OP, name, f"blocks of {' or '.join(map(str, blocks))}", value.block)
        for name, caches in (("cached", ("e4m3", "bf16")), ("cached_after_attention", CACHES)):
            check_value(getattr(self, name) in caches, _OP, name, " or ".join(map(repr, caches)), getattr(self, name))
        for name in ("after_attention", "high_precision"):
            value = getattr(self, name)
            check_type(value, tuple, _OP, name, "a tuple of patterns")
            for pattern in value:
                check_type(pattern, str, _OP, name, "patterns, each a str")
        check_value(self.promotion in (BLOCK, None), _OP, "promotion", f"{BLOCK} or None", self.promotion)

    def keeps(self, name: str) -> bool:
        """Whether the Linear of this qualified name stays in high precision."""
        return self.kept_by(name) is not None

    def kept_by(self, name: str) -> str | None:
        """The first pattern of ``high_precision`` that matches this qualified name."""
        return next((pattern for pattern in self.high_precision if _matches(name, (pattern,))), None)

    def cache_of(self, name: str) -> str:
        """In what the input of the Linear of this qualified name is kept for backward."""
        return self.cached_after_attention if _matches(name, self.after_attention) else self.cached

    def __str__(self) -> str:
        lines = [f"{'Recipe':<26}{'':<38}DeepSeek-V3 report"]
        for field in fields(self):
            value = getattr(self, field.name)
            text = ", ".join(value) if isinstance(value, tuple) else str(value)
            lines.append(f"  {field.name:<22}  {text:<36}  {_SECTIONS[field.name]}")
        return "\n".join(lines)


_SECTIONS = {
    "activation": "3.3.2; power-of-two scales: ours, as 3.3.3 has them after attention",
    "weight": "3.3.2",
    "gradient": "3.3.2, appendix B.2; power-of-two scales: ours",
    "dispatched": "3.3.3",
    "cached": "3.3.3",
    "cached_after_attention": "3.3.3",
    "after_attention": "3.3.3",
    "high_precision": "3.3.1",
    "promotion": "3.3.2",
}


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    parts = name.split(".")
    tails = [".".join(parts[i:]) for i in range(len(parts))]
    return any(fnmatch.fnmatchcase(tail, pattern) for tail in tails for pattern in patterns)
