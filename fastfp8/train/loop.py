"""The loop: gradients of micro-batches and ranks, a step of the optimizer, what belongs to it, and checkpoints."""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor

from .. import numerics
from ..errors import check_value, value_error
from ..models import CONFIGS, DeepSeek
from ..nn import FP8Weight, convert, share_weights, use_main_grad
from ..optim import EMA, AdamW
from . import checkpoint
from .curve import Curve, smoothed
from .options import Options, Precision
from .ranks import Ranks
from .text import Batches

_FLOOR = 0.1  # of the learning rate, where the cosine ends
_HELD_OUT = 32  # sequences


class Measured(NamedTuple):
    """Of a step, over all ranks."""

    loss: float
    mtp: float
    balance: float
    norm: float


def learning_rate(options: Options, step: int) -> float:
    """Of a step, counted from 0."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    if options.schedule == "constant":
        return options.lr
    done = (step - options.warmup) / max(options.steps - options.warmup, 1)
    return options.lr * (_FLOOR + (1 - _FLOOR) * (1 + math.cos(math.pi * min(done, 1.0))) / 2)


class Trainer:
    """A model, its optimizer, averages and data, one step at a time.

    Parameters are float32, the master weights. Dense ones are on every rank and their gradients the mean over ranks;
    experts are spread over the ranks.

    Args:
        options, precision: see there.
        text: to train on.
        ranks: of the run.
        device: of the model.

    Raises:
        TypeError, ValueError: the options do not fit the text or the ranks.
    """

    def __init__(
        self, options: Options, precision: Precision, text: bytes, ranks: Ranks, device: torch.device | str = "cpu"
    ) -> None:
        parts = ranks.world * options.accumulate
        expected = f"a multiple of ranks times accumulate, {parts}"
        check_value(options.batch % parts == 0, "train.Options", "batch", expected, options.batch)
        self.options, self.precision, self.ranks, self.device = options, precision, ranks, torch.device(device)
        config = CONFIGS[options.config]
        self.model = DeepSeek(
            config,
            process_group=ranks.group,
            max_tokens=options.batch // parts * options.length,
            timeout=ranks.timeout,
            recompute=options.recompute,
            seed=options.seed,
            device=self.device,
        )
        self.conversion = None if precision.recipe is None else convert(self.model, precision.recipe)
        self.optimizer = AdamW(_groups(self.model, options.weight_decay), lr=options.lr)
        if self.conversion is not None:
            share_weights(self.model, self.optimizer)
        self.ema = EMA(self.model, self.optimizer, options.ema)
        self.batches = Batches(
            text,
            batch=options.batch,
            length=options.length,
            ahead=1 + config.mtp_depth,
            seed=options.seed,
            rank=ranks.rank,
            world=ranks.world,
        )
        own = self.model.expert_parameters() if ranks.world > 1 else []
        self._own = {id(param) for param in own}
        self.step = 0

    @property
    def tokens(self) -> int:
        """Of a step, on all ranks."""
        return self.options.batch * self.options.length

    def run_step(self) -> Measured:
        """One step of the optimizer."""
        losses = torch.zeros(3, device=self.device)
        if self.conversion is not None:
            use_main_grad(self.model)
        parts = self.batches[self.step].to(self.device).chunk(self.options.accumulate)
        for part in parts:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision.autocast):
                loss = self.model.loss(part)
            (loss.total / len(parts)).backward()  # type: ignore[no-untyped-call]
            losses += torch.stack(loss[1:]) / len(parts)
        norm = self._finish_gradients(losses)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.options, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.update_bias(self.options.bias_rate)
        self.step += 1
        loss, mtp, balance = losses.tolist()
        return Measured(loss, mtp, balance, norm)

    def _finish_gradients(self, losses: Tensor) -> float:
        """The mean over ranks, of the losses too, no longer than ``clip``. Returns the norm before that."""
        found = [(param, _gradient(param)) for param in self.model.parameters()]
        dense = [grad for param, grad in found if grad is not None and id(param) not in self._own]
        own = [grad for param, grad in found if grad is not None and id(param) in self._own]
        self.ranks.sum([losses, *dense])
        if self.ranks.world > 1:
            torch._foreach_mul_([losses, *dense, *own], 1 / self.ranks.world)  # experts have the sum over ranks already
        square = _square(own, self.device)
        self.ranks.sum([square])
        norm = (square + _square(dense, self.device)).sqrt().item()
        if norm > self.options.clip:
            torch._foreach_mul_([*dense, *own], self.options.clip / norm)
        return norm

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Cross entropy of the next token on text that no step reads. Every rank reads the same."""
        self.model.eval()
        total, sequences = 0.0, self.batches.held_out(_HELD_OUT)
        parts = sequences.split(max(self.options.batch // (self.ranks.world * self.options.accumulate), 1))  # type: ignore[no-untyped-call]
        for part in parts:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision.autocast):
                total += self.model.loss(part.to(self.device)).main.item() * part.shape[0]
        self.model.train()
        return total / sequences.shape[0]

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, of this rank."""
        return {
            "options": self.options.as_dict(),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a ``state_dict()``: bit for bit as if there had been no break. Raises ValueError where its options
        are others."""
        mine = self.options.as_dict()
        others = {
            name: state["options"].get(name) for name, value in mine.items() if state["options"].get(name) != value
        }
        if others:
            given = {name: mine[name] for name in others}
            raise value_error("train", "resume", f"the options of the checkpoint, {others}", given)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.step = state["step"]

    def close(self) -> None:
        """End the thread of the averages."""
        self.ema.close()


def _groups(model: DeepSeek, weight_decay: float) -> list[dict[str, Any]]:
    """Norms do not decay. Weights of FP8 products come out of the optimizer's step in FP8."""
    in_fp8 = {id(m.weight) for m in model.modules() if isinstance(m, FP8Weight) and m.recipe is not None}
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for param in model.parameters():
        groups.setdefault((param.dim() > 1, id(param) in in_fp8), []).append(param)
    return [
        {"params": params, "weight_decay": weight_decay if decays else 0.0, "emit_fp8": emits}
        for (decays, emits), params in groups.items()
    ]


def _gradient(param: torch.nn.Parameter) -> Tensor | None:
    """As :class:`fastfp8.optim.AdamW` takes it."""
    main_grad: Tensor | None = getattr(param, "main_grad", None)
    return param.grad if main_grad is None else main_grad


def _square(tensors: list[Tensor], device: torch.device) -> Tensor:
    """The sum of all squares, float32 [1]."""
    norms = torch._foreach_norm([t.float() for t in tensors]) if tensors else ()
    return torch.stack(norms).square().sum().view(1) if norms else torch.zeros(1, device=device)


class Progress:
    """A line now and then: where the run is, what it measures, how fast, and how long it will take."""

    def __init__(self, name: str, options: Options, every: int, tokens: int, file: TextIO | None) -> None:
        self.name, self.steps, self.every, self.tokens, self.file = name, options.steps, every, tokens, file
        self._options = options

    def show(self, curve: Curve) -> None:
        """After a step."""
        step = len(curve.loss)
        if self.file is None or (step % self.every and step != self.steps):
            return
        recent = curve.seconds[-self.every :]
        a_step = sum(recent) / len(recent)
        left = int(a_step * (self.steps - step))
        print(
            f"{self.name}: step {step}/{self.steps}  loss {smoothed(curve.loss)[-1]:.4f}  mtp {curve.mtp[-1]:.4f}  "
            f"norm {curve.norm[-1]:.2f}  lr {learning_rate(self._options, step - 1):.2e}  "
            f"{self.tokens / a_step:,.0f} tokens/s  ETA {left // 60}:{left % 60:02d}",
            file=self.file,
            flush=True,
        )


def train(
    options: Options,
    precision: Precision,
    name: str,
    text: bytes,
    ranks: Ranks,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    resume: bool = False,
    save_every: int = 0,
    stop_after: int | None = None,
    log_every: int = 10,
    watch_every: int = 0,
    file: TextIO | None = None,
) -> Curve:
    """Train, from the last checkpoint in ``out`` if there is one and ``resume``.

    Args:
        options, precision, text, ranks, device: see :class:`Trainer`.
        name: of the precision, for the curve.
        out: the folder of its checkpoints.
        save_every: steps between checkpoints, at the end too; 0 for none.
        stop_after: end there, with a checkpoint, as if it was interrupted.
        log_every: steps between lines of progress.
        watch_every: steps between those that :func:`fastfp8.numerics.watch` looks at; 0 for none. Rank 0 leaves what it
            saw in ``out``, as ``numerics.json`` and, where there is matplotlib, ``numerics.png``.
        file: where those go, from rank 0; None for none.

    Returns:
        What each step measured, from the first on.

    Raises:
        RankLost: another rank ended or does not answer.
        FloatingPointError: the loss is no longer finite.
    """
    torch.manual_seed(options.seed)
    trainer = Trainer(options, precision, text, ranks, device)
    curve = Curve(name)
    progress = Progress(name, options, log_every, trainer.tokens, file if ranks.rank == 0 else None)
    watch = numerics.watch(trainer.model, every=watch_every) if watch_every else None
    try:
        state = checkpoint.load(out, ranks) if resume else None
        if state is not None:
            trainer.load_state_dict(state)
            curve = Curve(**state["curve"])
        if progress.file is not None and trainer.conversion is not None:
            print(f"{name}: {str(trainer.conversion).splitlines()[0]}", file=progress.file, flush=True)
        last = options.steps if stop_after is None else min(stop_after, options.steps)
        if watch is not None:
            watch.begin(trainer.step)
        while trainer.step < last:
            with ranks.naming(trainer.step, max(curve.seconds, default=0.0)):
                start = time.perf_counter()
                measured = trainer.run_step()
                seconds = time.perf_counter() - start
                for values, value in zip((curve.loss, curve.mtp, curve.balance, curve.norm), measured, strict=True):
                    values.append(value)
                curve.seconds.append(seconds)
                if not math.isfinite(measured.loss):
                    raise FloatingPointError(
                        f"fastfp8.train: {name}: the loss is {measured.loss} in step {trainer.step}"
                    )
                if watch is not None:
                    watch.step()
                progress.show(curve)
                ends = trainer.step == last
                if save_every and (trainer.step % save_every == 0 or ends):
                    checkpoint.save(out, trainer.step, {**trainer.state_dict(), "curve": vars(curve).copy()}, ranks)
        if trainer.step == options.steps:
            with ranks.naming(trainer.step, _HELD_OUT * max(curve.seconds, default=0.0)):
                curve.held_out["parameters"] = trainer.held_out_loss()
                with trainer.ema.applied():
                    curve.held_out["averages"] = trainer.held_out_loss()
        if watch is not None and watch.rows and ranks.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            watch.json(out / "numerics.json")
            if progress.file is not None:
                print(watch, file=progress.file)
            with contextlib.suppress(ImportError):
                watch.plot(out / "numerics.png")
    finally:
        if watch is not None:
            watch.end()
        trainer.close()
    return curve
