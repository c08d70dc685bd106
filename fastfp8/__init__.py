"""FP8 training kernels of the DeepSeek-V3 report as torch ops. See README.md for the map and the contracts."""

from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  (its libraries must be loaded before _C is)

from . import _C, backends, nn, numerics, optim, presets  # _C registers the schemas of torch.ops.fastfp8.*
from .error_word import check
from .ops.balance import balance_loss, update_bias
from .ops.dequantize import dequantize
from .ops.e5m6 import pack_e5m6, requantize_e5m6, unpack_e5m6
from .ops.gemm import gemm
from .ops.gemm_swiglu_quantize import gemm_swiglu_quantize
from .ops.grouped_gemm import grouped_gemm, masked_grouped_gemm
from .ops.grouped_wgrad import grouped_wgrad
from .ops.permute import RowMap, permute, permute_quantize, row_map, unpermute
from .ops.quantize import quantize
from .ops.quantize_both import quantize_both, quantize_grouped_both
from .ops.requantize_transpose import requantize_transpose
from .ops.rmsnorm import Normalized, rmsnorm_backward, rmsnorm_quantize, rmsnorm_quantize_transpose
from .ops.route import Routing, route
from .ops.swiglu_backward_quantize import SwiGluGradients, swiglu_backward_quantize
from .ops.swiglu_quantize import swiglu_quantize
from .packed_e5m6 import PackedE5M6
from .recipe import Format, Recipe
from .scaled_tensor import ScaledTensor

__version__ = _C.version

backends.announce()

if TYPE_CHECKING:
    from . import comm

__all__ = [
    "Format",
    "Normalized",
    "PackedE5M6",
    "Recipe",
    "Routing",
    "RowMap",
    "ScaledTensor",
    "SwiGluGradients",
    "balance_loss",
    "check",
    "comm",
    "dequantize",
    "gemm",
    "gemm_swiglu_quantize",
    "grouped_gemm",
    "grouped_wgrad",
    "masked_grouped_gemm",
    "nn",
    "numerics",
    "optim",
    "pack_e5m6",
    "permute",
    "permute_quantize",
    "presets",
    "quantize",
    "quantize_both",
    "quantize_grouped_both",
    "requantize_e5m6",
    "requantize_transpose",
    "rmsnorm_backward",
    "rmsnorm_quantize",
    "rmsnorm_quantize_transpose",
    "route",
    "row_map",
    "swiglu_backward_quantize",
    "swiglu_quantize",
    "unpack_e5m6",
    "unpermute",
    "update_bias",
]


def __getattr__(name: str) -> Any:
    """``comm`` when it is first asked for: it and torch.distributed take longer to import than all the rest."""
    if name == "comm":
        import importlib

        return importlib.import_module(".comm", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
