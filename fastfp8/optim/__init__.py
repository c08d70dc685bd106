"""Optimizers composed of fastfp8 ops."""

from .adamw import AdamW
from .ema import EMA

__all__ = ["EMA", "AdamW"]
