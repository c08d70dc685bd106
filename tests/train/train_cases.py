"""A run small enough for a test, and what ranks of it do."""

from __future__ import annotations

import io
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastfp8.train import PRECISIONS, Options, Ranks, Trainer, train


def _text(words: int) -> bytes:
    """Words of a small vocabulary, the first ones often: bytes that a model can learn, the same for ever."""
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 8))) for _ in range(200)]
    return " ".join(draw.choices(vocabulary, [1 / (i + 1) for i in range(200)], k=words)).encode()


TEXT = _text(12_000)
HANGS_S = 30.0
SMALL = Options(config="micro", steps=8, batch=4, length=32, warmup=2, lr=3e-3, ema=0.9)


def run(out: Path, precision: str = "bf16", options: Options = SMALL, **how: Any) -> Any:
    """The curve, and the last line of progress."""
    lines = io.StringIO()
    curve = train(options, PRECISIONS[precision], precision, TEXT, Ranks(), out, file=lines, **how)
    return curve, lines.getvalue()


def of_rank(group: dist.ProcessGroup, options: Options, precision: str, steps: int) -> Any:
    """What a rank measures, and its parameters afterwards."""
    trainer = Trainer(options, PRECISIONS[precision], TEXT, Ranks())
    measured = [trainer.run_step() for _ in range(steps)]
    held_out = trainer.held_out_loss()
    trainer.close()
    own = {id(param) for param in trainer.model.expert_parameters()}
    params = {name: (p.detach(), id(p) in own) for name, p in trainer.model.named_parameters()}
    biases = [moe.gate.bias for moe in trainer.model.mixtures()]
    return measured, held_out, params, biases


def train_until_killed(group: dist.ProcessGroup, out: Path, victim: int, at: int, how: str) -> Any:
    """Train; one rank ends in the middle of a step, or does something wrong in it, or nothing any more."""
    ranks = Ranks(timeout=HANGS_S / 6)
    if ranks.rank == victim:
        step = Trainer.run_step

        def last(self: Trainer) -> Any:
            if self.step == at:
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if how == "hang":
                    time.sleep(HANGS_S)
                    os._exit(1)
                self.batches[self.step].item()  # raises
            return step(self)

        Trainer.run_step = last  # type: ignore[method-assign]
    options = Options(config="micro", steps=20, batch=2 * ranks.world, length=32, warmup=2)
    torch.set_num_threads(1)
    try:
        train(options, PRECISIONS["bf16"], "bf16", TEXT, ranks, out, save_every=2)
    except Exception as error:
        if ranks.rank == victim:
            os._exit(1)  # as a process ends, and its sockets with it
        return type(error).__name__, str(error)
    return None
