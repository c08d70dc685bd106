"""What a training run is told: numbers, and how it computes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any

from ..errors import check_type, check_value
from ..layout import BLOCK
from ..models import CONFIGS
from ..recipe import Format, Recipe

_OP = "train.Options"
SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class Precision:
    """How a model computes.

    Args:
        recipe: of its GEMMs; None leaves them as they are.
        autocast: whether what is not FP8 is in bfloat16 where torch's autocast says so; else all that is float32.
    """

    recipe: Recipe | None
    autocast: bool = True


PRECISIONS = MappingProxyType(
    {
        "fp32": Precision(None, autocast=False),
        "bf16": Precision(None),
        "fp8": Precision(Recipe()),
        # What the DeepSeek-V3 report says not to do: appendix B.2, and section 3.3.2.
        "fp8-block-gradients": Precision(Recipe(gradient=Format((BLOCK, BLOCK), pow2=True))),
        "fp8-no-promotion": Precision(Recipe(promotion=None)),
    }
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Numbers of a run, the same for every precision.

    Args:
        config: the name of one of :data:`fastfp8.models.CONFIGS`.
        steps: optimizer steps of the whole run, for the schedule too.
        batch: sequences of a step, of all ranks and micro-batches together.
        length: tokens of a sequence that the model reads.
        accumulate: micro-batches of a step.
        lr: the highest learning rate.
        warmup: steps in which it rises to that, linearly.
        schedule: "cosine" falls to a tenth of it; "constant" stays.
        clip: the greatest norm of the gradients, in FP32.
        weight_decay: see :class:`fastfp8.optim.AdamW`.
        bias_rate: how far a step moves the bias of an expert: see :func:`fastfp8.update_bias`.
        ema: decay of the averages of the parameters.
        seed: of the weights, and of the order of the data.
        recompute: see :class:`fastfp8.models.attention.Attention`.

    Raises:
        TypeError, ValueError: a number has another type or is out of its range.
    """

    config: str = "tiny"
    steps: int = 1000
    batch: int = 8
    length: int = 128
    accumulate: int = 1
    lr: float = 3e-4
    warmup: int = 100
    schedule: str = "cosine"
    clip: float = 1.0
    weight_decay: float = 0.1
    bias_rate: float = 1e-3
    ema: float = 0.99
    seed: int = 0
    recompute: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            kinds = (float, int) if kind is float else kind
            check_type(value, kinds, _OP, field.name, "a number" if kind is float else f"{kind.__name__}")
        for name, choices in (("config", tuple(CONFIGS)), ("schedule", SCHEDULES)):
            value = getattr(self, name)
            check_value(value in choices, _OP, name, " or ".join(map(repr, choices)), repr(value))
        for name in ("steps", "batch", "length", "accumulate"):
            check_value(getattr(self, name) > 0, _OP, name, "a positive number", getattr(self, name))
        for name in ("lr", "clip"):
            check_value(getattr(self, name) > 0, _OP, name, "a positive number", getattr(self, name))
        for name in ("warmup", "weight_decay", "bias_rate", "seed"):
            check_value(getattr(self, name) >= 0, _OP, name, "0 or more", getattr(self, name))
        check_value(0 <= self.ema <= 1, _OP, "ema", "a number from 0 to 1", self.ema)

    def as_dict(self) -> dict[str, Any]:
        """By name, for JSON."""
        return asdict(self)
