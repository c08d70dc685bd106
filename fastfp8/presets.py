"""How other projects quantise to FP8, for :func:`fastfp8.quantize`: the same codes and scales, bit for bit.

Each of them divides, multiplies, floors and treats what is not finite in a way of its own, which decides the last bit
of a scale and, of BF16 input, a code in a thousand or so. A :class:`Preset` says in which. All agree with ours, and
with each other, on powers of two (``pow2=True``) of BF16 input whose amax is finite and above their floors.

=================== =================================== ========================= ======================= ============
preset              floor of amax, scale                code, before rounding     power of two            NaN in x
=================== =================================== ========================= ======================= ============
(ours)              2**-110; amax / 448; 1 of zeros     x * (448 / amax)          scale, up               its own code
DEEPGEMM            1e-4; amax * fl(1 / 448)            x * (1 / scale)           scale, up; 2**127 most  its block
TILEKERNELS         1e-4; amax / 448                    x * (448 / amax)          scale, up               its own code
TRANSFORMER_ENGINE  none; 1 / multiplier;               x * (448 / amax)          multiplier, down        its own code
                    1 of zeros and of infinity
VLLM                1e-10; amax / 448                   x / scale                 scale, 1e-10 least, up  -448
TORCHAO             1e-12; 1 / multiplier               x * (448 / amax)          none                    448
=================== =================================== ========================= ======================= ============

fl() is rounding to FP32, and each operation is rounded once. In all of these projects an infinity counts for amax; ours
takes it over what is finite. But for TransformerEngine's, and DeepGEMM's powers of two, the scale is infinite then, the
finite values of the block become 0, and the infinity itself becomes what ``inf * 0`` or ``inf / inf`` is there, a NaN.
(TileKernels' powers of two have a multiplier of minus infinity there, by the integer formula.) Six things to know:

- **A tensor divided by 448.0 in PyTorch on CUDA is multiplied by fl(1 / 448)**; on a CPU it is divided. More than half
  of the scales differ in the last bit. ``DEEPGEMM`` is what its helpers give on a GPU;
  ``dataclasses.replace(DEEPGEMM, rules=dataclasses.replace(DEEPGEMM.rules, scale="divide"))`` what they give on a CPU.
- Scales agree to a bit or differ in the last one; codes of BF16 differ more often than of FP32, because BF16 hits ties.
- Powers of two by integer bits agree wherever they are taken. vLLM has a path by ``log2`` and ``exp2`` too, which is
  wrong next to powers of two of FP32 input; ``VLLM`` is the one by bits.
- Codes round to nearest even and saturate. PyTorch did the latter only from 2.12 on; before, what an infinite amax or
  ``pow2=True`` pushes beyond 448 became NaN in the projects that cast by PyTorch (DeepGEMM).
- torchao clamps by Triton, whose code for sm_90 (3.9; ``min.xorsign.abs``) gives 448 the sign of a NaN, which the
  multiplication before it has cleared. vLLM's ``fminf(fmaxf())`` gives -448.
- TransformerEngine takes 1 for the multiplier where amax is 0 or infinite, and the largest number of the type of ``x``
  where 448 / amax overflows. That is its CUDA code; its Python reference says 0 of an infinite amax.

Layouts: a ScaledTensor keeps its scale as :mod:`fastfp8.layout` says, whatever the preset. That is what DeepGEMM
("MN-major, TMA-aligned"), TileKernels and vLLM with column-major scales, and torchao for left operands take as it is,
and the transpose of what TransformerEngine calls GEMM-ready; elsewhere ``scale.contiguous()`` is row-major.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, fields
from typing import Literal, get_args, get_type_hints

from .errors import check_value


@dataclass(frozen=True)
class Rules:
    """Where FP32 operations of quantisers differ, but for the floor of amax. ``most`` is 448."""

    scale: Literal["divide", "multiply", "inverse"]
    """``amax / most``, ``amax * fl(1 / most)`` or ``1 / multiplier``."""
    codes: Literal["multiply", "divide", "inverse"]
    """``x * (most / amax)``, ``x / scale`` or ``x * (1 / scale)``."""
    pow2: Literal["up", "up_finite", "up_floored", "down", "none"]
    """The scale rounded up, to at most 2**127, or after a floor of 1e-10; the multiplier rounded down; or neither."""
    extremes: Literal["as_others", "one"]
    """What a block of zeros or with an infinity has for its scale: what the rest says, or 1."""
    nan_block: Literal["as_others", "nan"]
    """Whether a NaN makes the amax of its block one."""
    nan_code: Literal["nan", "lowest", "largest"]
    """What becomes of a NaN that is to be rounded: code 0x7F, or that of -448 or of 448."""
    text: str = field(init=False, repr=False, compare=False)
    """All of them in one word, as ``torch.ops.fastfp8.quantize`` takes them."""

    def __post_init__(self) -> None:
        for name, choices in _choices().items():
            value = getattr(self, name)
            check_value(value in choices, "presets.Rules", name, " or ".join(choices), value)
        inverse = self.scale == "inverse"
        allowed = ("down", "none") if inverse else ("up", "up_finite", "up_floored", "none")
        because = f" with scale {self.scale!r}"
        check_value(self.pow2 in allowed, "presets.Rules", "pow2", " or ".join(allowed) + because, self.pow2)
        multiply = self.codes == "multiply" or not inverse
        check_value(multiply, "presets.Rules", "codes", "multiply" + because, self.codes)
        object.__setattr__(self, "text", ",".join(getattr(self, name) for name in _choices()))

    @classmethod
    def parse(cls, op: str, text: str) -> Rules:
        """The rules of which ``text`` is that, argument 'rules' of ``op``."""
        values = text.split(",")
        check_value(len(values) == len(_choices()), op, "rules", "the text of fastfp8.presets.Rules", text)
        return cls(*values)  # type: ignore[arg-type]


@functools.cache
def _choices() -> dict[str, tuple[str, ...]]:
    hints = get_type_hints(Rules)
    return {f.name: get_args(hints[f.name]) for f in fields(Rules) if f.init}


@dataclass(frozen=True)
class Preset:
    """A project's numerics. ``print`` shows them all; ``dataclasses.replace`` makes another of one."""

    name: str
    eps: float
    """The floor of amax, in units of ``x``; 0 for none."""
    rules: Rules
    layout: str
    """The layout of (1, 128) scales that the project has. Scales made here have ours."""


DEEPGEMM = Preset(
    "DeepGEMM",
    1e-4,
    Rules("multiply", "inverse", "up_finite", "as_others", "nan", "nan"),
    "[M, K / 128] row-major, then MN-major with columns padded to 16 bytes",
)
TILEKERNELS = Preset(
    "TileKernels",
    1e-4,
    Rules("divide", "multiply", "up", "as_others", "as_others", "nan"),
    "[M, K / 128] row-major, or K-major with columns padded to 16 bytes",
)
TRANSFORMER_ENGINE = Preset(
    "TransformerEngine",
    0.0,
    Rules("inverse", "multiply", "down", "one", "as_others", "nan"),
    "[K / 128, M rounded up to 4] row-major (GEMM-ready), or [M, K / 128] (compact)",
)
VLLM = Preset(
    "vLLM",
    1e-10,
    Rules("divide", "divide", "up_floored", "as_others", "as_others", "lowest"),
    "[M, K / 128] row-major or column-major",
)
TORCHAO = Preset(
    "torchao",
    1e-12,
    Rules("inverse", "multiply", "none", "as_others", "as_others", "largest"),
    "[M, K / 128] column-major for left operands",
)
ALL = (DEEPGEMM, TILEKERNELS, TRANSFORMER_ENGINE, VLLM, TORCHAO)
