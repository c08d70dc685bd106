"""A training step of one layer of the 16B model: attention and experts, forward, backward and AdamW, and its memory.

Ours in FP8 beside the same module in BF16 with torch's AdamW, and beside TransformerEngine's block scaling in its place
where that is installed. Times are between events on the GPU and include what the host cannot hide: that is a step.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import fastfp8
from fastfp8 import Recipe
from fastfp8.models import CONFIGS, Config
from fastfp8.models.attention import rotations
from fastfp8.models.deepseek import Block

from .case import Case, Contestant, Session, Subject, Unavailable, Work, turns
from .device import require
from .rows import Row

FAMILY, OURS = "layer", "fastfp8 FP8"
TOKENS = (1, 4096)  # sequences, and tokens of each
TINY = (1, 64)
WARM_UP = 3
Step = Callable[[], None]


def made(config: Config, device: torch.device) -> Block:
    """The layer with experts, with BF16 weights."""
    torch.manual_seed(0)
    return Block(config, dense=False, recompute=False, experts={}, device=device, dtype=torch.bfloat16)


def step_of(block: torch.nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, dy: Tensor, by: Tensor) -> Step:
    def step() -> None:
        leaf = x.detach().requires_grad_()
        block(leaf, by).backward(dy)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def ours(block: Block, *given: Tensor) -> Step:
    """By the default recipe; the optimizer's kernel writes the FP8 weights of the next step."""
    fastfp8.nn.convert(block, Recipe())
    optimizer = fastfp8.optim.AdamW(block.parameters(), emit_fp8=True)
    fastfp8.nn.share_weights(block, optimizer)
    return step_of(block, optimizer, *given)


def bf16(block: Block, *given: Tensor) -> Step:
    """As it was made, with torch's fused AdamW on BF16 weights, which has no master weights."""
    optimizer = torch.optim.AdamW(block.parameters(), fused=given[0].is_cuda)
    return step_of(block, optimizer, *given)


def bf16_masters(block: Block, *given: Tensor) -> Step:
    """As it was made, with our AdamW: FP32 masters and BF16 moments, as ours has."""
    return step_of(block, fastfp8.optim.AdamW(block.parameters()), *given)


def transformer_engine(block: Block, *given: Tensor) -> Step:
    """Its Linears and grouped Linears in the places of ours, under Float8BlockScaling."""
    require(importlib.util.find_spec("transformer_engine"), "TransformerEngine is not installed")
    te = importlib.import_module("transformer_engine.pytorch")
    recipe = importlib.import_module("transformer_engine.common.recipe").Float8BlockScaling()
    for parent in list(block.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(parent, name, _te_linear(te, child))
            elif isinstance(child, fastfp8.nn.GroupedLinear):
                setattr(parent, name, _TEGrouped(te, child))
    plain = step_of(block, fastfp8.optim.AdamW(block.parameters()), *given)

    def step() -> None:
        with te.fp8_autocast(enabled=True, fp8_recipe=recipe):
            plain()

    return step


def _te_linear(te: Any, linear: torch.nn.Linear) -> torch.nn.Module:
    sizes = linear.in_features, linear.out_features
    new: torch.nn.Module = te.Linear(*sizes, bias=False, params_dtype=linear.weight.dtype, device=linear.weight.device)
    new.load_state_dict({"weight": linear.weight}, strict=False)
    return new


class _TEGrouped(torch.nn.Module):
    """TransformerEngine's grouped Linear, which wants the sizes of groups on the host, as we have them on the GPU."""

    recipe = None

    def __init__(self, te: Any, grouped: fastfp8.nn.GroupedLinear) -> None:
        super().__init__()
        (groups, n, k), weight = grouped.weight.shape, grouped.weight
        self.inner = te.GroupedLinear(groups, k, n, bias=False, params_dtype=weight.dtype, device=weight.device)
        self.inner.load_state_dict({f"weight{g}": weight[g] for g in range(groups)}, strict=False)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        ends = offsets.tolist()
        out: Tensor = self.inner(x, [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)])
        return out


CONTESTANTS: dict[str, Callable[..., Step]] = {
    OURS: ours,
    "torch BF16": bf16,
    "BF16, fastfp8 AdamW": bf16_masters,
    "TransformerEngine block scaling": transformer_engine,
}


def flops(config: Config, tokens: int) -> float:
    """Of the products with weights, forward and backward: 6 for each weight that a token meets."""
    block = made(config, torch.device("meta"))
    active = 0.0
    for param in block.parameters():
        if param.dim() > 1:
            active += param.numel() * (config.top_k / config.experts if param.dim() == 3 else 1)
    return 6.0 * tokens * active


def steps(config: Config, shape: tuple[int, int], device: torch.device) -> Iterator[tuple[str, Step | None, str]]:
    """Each contestant's step on the same weights and inputs; or None, and why not."""
    template = made(config, device)
    x, dy = (torch.randn(*shape, config.hidden, device=device, dtype=torch.bfloat16) for _ in range(2))
    by = rotations(shape[1], config.rope_dim, config.rope_base, device)
    for name, make in CONTESTANTS.items():
        try:
            step = make(copy.deepcopy(template), x, dy, by)
            step()
        except Unavailable as reason:
            yield name, None, str(reason)
        except Exception as error:
            if name == OURS:
                raise
            # A library may refuse in any way it likes.
            yield name, None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            yield name, step, ""


@dataclasses.dataclass(frozen=True)
class LayerStep:
    """One configuration: a row of time and one of peak memory for each contestant."""

    config: str
    tokens: tuple[int, int]
    op: str = "training step"
    priority: int = 0

    @property
    def shape(self) -> str:
        return f"{self.config} layer, {self.tokens[0] * self.tokens[1]} tokens"

    def measure(self, session: Session) -> list[Row]:
        if "gpu" not in session.timers:
            raise Unavailable("there is no GPU to measure on")
        config, device = CONFIGS[self.config], torch.device("cuda")
        found, missing, peaks = [], {}, {}
        for name, step, why in steps(config, self.tokens, device):
            if step is None:
                missing[name] = why
                continue
            for _ in range(WARM_UP):
                step()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            torch.cuda.synchronize()
            peaks[name] = torch.cuda.max_memory_allocated() - before
            found.append(Contestant(name, functools.partial(_run, step)))
        subject = Subject(found, flops=flops(config, self.tokens[0] * self.tokens[1]), missing=missing)
        times: list[list[float]] = [[] for _ in found]
        for order in turns(len(found), session.samples):
            for index in order:
                times[index].append(_seconds(found[index]))
        case = Case(FAMILY, self.op, self.shape, "gpu", lambda: subject)
        rows = case.rows(subject, times, session.ceilings, {})
        for name, peak in peaks.items():
            size = peak / 2**20
            kind = (FAMILY, "peak memory of a step", self.shape, name, "gpu", "MiB", size, size, size)
            rows.append(Row(*kind, note="over what stays from step to step"))
        return rows


def _run(step: Step, _: int) -> None:
    step()


def _seconds(contestant: Contestant) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    contestant.run(0)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3


def works(tiny: bool) -> list[Work]:
    return [LayerStep("tiny", TINY) if tiny else LayerStep("16b", TOKENS)]
