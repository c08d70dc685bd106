"""A mixture of experts in FP64, of the operands that the FP8 one has dequantised."""

from __future__ import annotations

import torch
from linear_support import values
from torch import Tensor

import fastfp8
from fastfp8.nn import MoE

HIDDEN, WIDTH, EXPERTS, TOP_K = 256, 128, 8, 2


def moe(seed: int = 0, **options: object) -> MoE:
    torch.manual_seed(seed)
    made = MoE(HIDDEN, WIDTH, EXPERTS, TOP_K, **{"shared": 0, "scale": 2.5, **options})  # type: ignore[arg-type]
    for weight in (made.gate_up.weight, made.down.weight):
        torch.nn.init.normal_(weight, std=weight.shape[2] ** -0.5)
    return made


def in_fp8(module: MoE, recipe: fastfp8.Recipe | None = None) -> MoE:
    fastfp8.nn.convert(module, recipe or fastfp8.Recipe())
    return module


def exact(module: MoE, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """y and the gradients of x, both weights of the experts and the routing weights, in FP64.

    Gradients are taken where gate and up are as the module keeps them for backward.
    """
    w1, w2 = (values_of(w.detach()).requires_grad_() for w in (module.gate_up.weight, module.down.weight))
    x64 = values(fastfp8.quantize(x, pow2=True)).requires_grad_()
    assert module.routing is not None
    assert module.gate_up.recipe is not None
    idx, topk_weights = module.routing.topk_idx, module.routing.topk_weights.double().requires_grad_()
    results = []
    for cached in ("bf16", module.gate_up.recipe.cached):
        y = torch.zeros_like(x64)
        for expert in range(w1.shape[0]):
            token, slot = (idx == expert).nonzero(as_tuple=True)
            gate_up = x64[token] @ w1[expert].t()
            if cached == "e4m3":
                kept = values(fastfp8.quantize(gate_up.detach().bfloat16(), pow2=True))
                gate_up = gate_up + (kept - gate_up).detach()
            gate, up = gate_up.chunk(2, 1)
            if module.limit is not None:
                gate, up = gate.clamp(max=module.limit), up.clamp(-module.limit, module.limit)
            out = (torch.nn.functional.silu(gate) * up) @ w2[expert].t()
            y = y.index_add(0, token, out * topk_weights[token, slot, None])
        results.append(y)
    leaves = x64, w1, w2, topk_weights
    return results[0].detach(), *torch.autograd.grad(results[1], leaves, values(fastfp8.quantize(dy, pow2=True)))


def values_of(weights: Tensor) -> Tensor:
    return torch.stack([values(fastfp8.quantize(w, (128, 128))) for w in weights])


def found(module: MoE, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """What ``exact`` returns, of the module. The gradient of x has no part through the gate."""
    seen: list[Tensor] = []
    leaf = x.detach().requires_grad_()
    gate = module.gate.weight.requires_grad_(False)  # then only what the experts give reaches x and the weights
    route = fastfp8.nn.moe.route

    def watched(*args: object, **kwargs: object) -> fastfp8.Routing:
        routing = route(*args, **kwargs)  # type: ignore[arg-type]
        seen.append(routing.topk_weights.detach().requires_grad_())
        return routing._replace(topk_weights=seen[0])

    fastfp8.nn.moe.route = watched  # type: ignore[assignment]
    try:
        y = module(leaf)
    finally:
        fastfp8.nn.moe.route = route  # type: ignore[assignment]
    leaves = leaf, module.gate_up.weight, module.down.weight, seen[0]
    out = y.detach(), *torch.autograd.grad(y, leaves, dy)
    gate.requires_grad_(True)
    return out
