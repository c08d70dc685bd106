"""Optimizers composed of fastfp8 ops."""

from .adamw import AdamW

__all__ = ["AdamW"]
