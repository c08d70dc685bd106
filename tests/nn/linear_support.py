"""What the tests of fastfp8.nn.Linear share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastfp8
import fastfp8.nn
from fastfp8 import Format, Recipe

E4M3 = torch.float8_e4m3fn
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROW, SQUARE = (1, 128), (128, 128)
# FP32 scales for all but weights, whose are so by default.
FP32_SCALES = Recipe(activation=Format(ROW, pow2=False), gradient=Format(ROW, pow2=False))
# Name to recipe and cache. Squares for the gradient are the experiment of appendix B.2; its weights are powers of two.
RECIPES = {
    "default": (Recipe(), "e4m3"),
    "e5m6": (Recipe(), "e5m6"),
    "bf16": (Recipe(), "bf16"),
    "fp32scales": (FP32_SCALES, "e4m3"),
    "fp32scales-e5m6": (FP32_SCALES, "e5m6"),
    "squares": (Recipe(weight=Format(SQUARE, pow2=True), gradient=Format(SQUARE, pow2=True)), "e4m3"),
}


def sqnr(actual: Tensor, exact: Tensor) -> float:
    """Signal to noise in dB."""
    actual, exact = actual.detach().double(), exact.detach().double()
    return float(10 * torch.log10(exact.square().sum() / (actual - exact).square().sum()))


def values(t: fastfp8.ScaledTensor) -> Tensor:
    """``t`` in FP64, by the definition of a ScaledTensor and no op of ours."""
    scale = t.scale.double().repeat_interleave(t.block[0], 0).repeat_interleave(t.block[1], 1)
    return t.data.to(FP32).double() * scale[: t.shape[0], : t.shape[1]]


def normal_linear(k: int, n: int, bias: bool = True, seed: int = 0, **options: Any) -> fastfp8.nn.Linear:
    torch.manual_seed(seed)
    layer = fastfp8.nn.Linear(k, n, bias, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def gradients(layer: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(layer(x), (x, *parameters), dy)


class QuantizeCalls(TorchDispatchMode):
    """Records the blocks of the calls of fastfp8.quantize, and the names of other ops that quantise or pack."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[tuple[int, ...]] = []
        self.others: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.fastfp8.quantize.default:
            self.blocks.append(tuple(args[1]))
        elif func.namespace == "fastfp8" and ("quantize" in func._opname or "pack" in func._opname):
            self.others.append(func._opname)
        return func(*args, **(kwargs or {}))

    @property
    def of_weights(self) -> int:
        return self.blocks.count((128, 128))
