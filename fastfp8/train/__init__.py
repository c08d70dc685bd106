"""Training of :mod:`fastfp8.models` on real text, in BF16 and in FP8. ``python -m fastfp8.train --help``."""

from .curve import Curve, Gap, gap, smoothed
from .loop import Trainer, train
from .options import PRECISIONS, Options, Precision
from .ranks import RankLost, Ranks
from .text import Batches, load_text

__all__ = [
    "PRECISIONS",
    "Batches",
    "Curve",
    "Gap",
    "Options",
    "Precision",
    "RankLost",
    "Ranks",
    "Trainer",
    "gap",
    "load_text",
    "smoothed",
    "train",
]
