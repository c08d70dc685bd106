"""RMSNormLinear: an RMSNorm and the Linear after it, of which backward keeps the norm's input alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import check_dtype, check_value
from ..ops.quantize import INPUT_DTYPES
from ..recipe import Recipe
from .dense import call_dense, check_input
from .weight import FP8Weight

_OP = "nn.RMSNormLinear"


class RMSNormLinear(FP8Weight, torch.nn.Module):
    """``y = Linear(RMSNorm(x))``, quantised as it is normalised, and normalised once more in backward.

    The normalised activation is never written in high precision with a recipe, and never kept: saved for backward are
    the input ``x``, which a residual connection has anyway, and a float32 number a row (DeepSeek-V3 report, section
    3.2; RMSNorm: arXiv 1910.07467). Wgrad's operand is quantised from the values themselves, not re-tiled from FP8.

    Args:
        in_features, out_features, bias, device, dtype: as for torch.nn.Linear; dtype bfloat16, float16 or float32.
        eps: what is added to the mean of the squares.
        recipe: the formats of normalised input, weight and gradients: see :class:`fastfp8.Recipe`; its caches do not
            matter here. In FP8 ``in_features`` is a multiple of 16. None computes in high precision, with the same
            saving.

    Parameters: ``norm_weight`` [in_features], ones at first; ``weight`` [out_features, in_features] and ``bias``
    [out_features] or None, drawn as torch.nn.Linear does. The input is [..., in_features] of bfloat16, float16 or
    float32 and returns [..., out_features] of the same dtype, or of autocast's where that is on. All that
    :class:`fastfp8.nn.Linear` tells of its weight is true here: :func:`share_weights`, ``main_grad``, FSDP2.

    Raises:
        TypeError: the input, the recipe or a parameter has another type or dtype.
        ValueError: ``in_features`` is no multiple of 16 in FP8; ``eps`` is out of range; the input's last dimension is
            not ``in_features``, or it is on another device; ``weight.main_grad`` does not fit.
    """

    norm_weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        super().__init__()
        check_value(2.0**-100 <= eps <= 2.0**100, _OP, "eps", "a positive number from 2**-100 to 2**100", eps)
        self.in_features, self.out_features, self.eps = in_features, out_features, eps
        self.norm_weight = torch.nn.Parameter(torch.empty(in_features, device=device, dtype=dtype))
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        check_dtype(self.weight.dtype, _OP, "dtype", INPUT_DTYPES)
        self.bias = torch.nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()
        self.set_recipe(recipe)

    def reset_parameters(self) -> None:
        """``norm_weight`` ones, the others uniform up to 1 / sqrt(in_features), as in torch.nn.Linear."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        with torch.no_grad():
            self.norm_weight.fill_(1.0)
            self.weight.uniform_(-bound, bound)
            if self.bias is not None:
                self.bias.uniform_(-bound, bound)

    def set_recipe(self, recipe: Recipe | None, cache: str | None = None) -> None:
        fits = recipe is None or (self.in_features > 0 and self.in_features % 16 == 0)
        check_value(fits, _OP, "in_features", "a multiple of 16 in FP8", self.in_features)
        super().set_recipe(recipe, cache)

    def describe(self) -> str:
        return f"{type(self).__name__}, the norm's input kept"

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (as torch.nn.Linear names it)
        check_input(_OP, input, self.in_features, self.weight)
        return call_dense(_OP, self, input, self.norm_weight, self.weight, self.bias, self.out_features, self.eps)

    def extra_repr(self) -> str:
        how = "recipe=None" if self.recipe is None else "fp8"
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, eps={self.eps}, {how}"
