"""Modules composed of fastfp8 ops, and the swap that puts them into a model."""

from .convert import convert
from .linear import Linear

__all__ = ["Linear", "convert"]
