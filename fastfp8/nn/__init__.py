"""Modules composed of fastfp8 ops, and the swap that puts them into a model."""

from .convert import Conversion, convert
from .convertible import Convertible
from .grouped_linear import GroupedLinear
from .linear import Linear
from .moe import MoE, SwiGLU
from .norm_linear import RMSNormLinear
from .weight import FP8Weight, share_weights, use_main_grad

__all__ = [
    "Conversion",
    "Convertible",
    "FP8Weight",
    "GroupedLinear",
    "Linear",
    "MoE",
    "RMSNormLinear",
    "SwiGLU",
    "convert",
    "share_weights",
    "use_main_grad",
]
