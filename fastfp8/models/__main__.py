"""``python -m fastfp8.models [NAME ...]``: parameters of the named configurations, and what training them takes.

With ``--saved T`` also what a forward pass of T tokens keeps for backward, a token, in FP8 and in BF16. It is run with
tensors that have shapes and no memory, so that any configuration will do, with attention as a CPU computes it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch._subclasses import FakeTensorMode

from ..nn import convert
from ..recipe import Recipe
from ..saved import Saved, memory
from .arithmetic import Bytes, Parameters, activations, parameters, state
from .config import CONFIGS
from .deepseek import DeepSeek


def _number(count: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:,.2f}{unit}"
    return f"{count:,.0f}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{c:>{w}}" if i else f"{c:<{w}}" for i, (c, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    ]


def _counts(counts: Parameters) -> list[str]:
    rows: list[tuple[str, ...]] = [("parameters", "total", "active")]
    rows += [(f"  {part}", _number(of.total), _number(of.active)) for part, of in counts.main.items()]
    rows.append(("the model", *map(_number, counts.sum())))
    if counts.mtp:
        rows.append(("multi-token prediction", *map(_number, counts.sum(mtp=True))))
    rows.append(("weights in FP8", _number(counts.fp8), ""))
    return _table(rows)


def _bytes(title: str, unit: str, size: float, found: Sequence[Bytes]) -> list[str]:
    total = Bytes("sum", sum(row.bf16 for row in found), sum(row.fp8 for row in found))
    rows = [(f"{title}, {unit}", "BF16", "FP8")]
    rows += [(f"  {what}", f"{bf16 / size:,.1f}", f"{fp8 / size:,.1f}") for what, bf16, fp8 in (*found, total)]
    return _table(rows)


def report(name: str) -> str:
    """The tables of a configuration."""
    config = CONFIGS[name]
    counts = parameters(config)
    size, unit = (1e9, "GB") if counts.sum().total > 1e9 else (1e6, "MB")
    lines = [f"{name}: {config}", "", *_counts(counts)]
    lines += ["", *_bytes("state of all ranks", unit, size, state(counts))]
    for recompute in (False, True):
        how = "kept for backward, queries, keys and values computed again" if recompute else "kept for backward"
        lines += ["", *_bytes(how, "KB a token", 1e3, activations(config, recompute=recompute))]
    return "\n".join(lines)


def saved(name: str, tokens: int, recipe: Recipe | None) -> Saved:
    """What the model keeps of ``tokens`` in one sequence; attention's queries, keys and values are computed again."""
    config = CONFIGS[name]
    with FakeTensorMode():
        model = DeepSeek(config, recompute=True, dtype=torch.bfloat16)
        convert(model, recipe)
        batch = torch.zeros((1, tokens + 1 + config.mtp_depth), dtype=torch.int64)
        return memory(model, batch, run=lambda tokens: model.loss(tokens).total)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastfp8.models", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", choices=[*CONFIGS, []], metavar="NAME", help=", ".join(CONFIGS))
    parser.add_argument("--saved", type=int, metavar="T", help="and what a forward pass of T tokens keeps for backward")
    given = parser.parse_args(arguments)
    for name in given.names or CONFIGS:
        print(report(name), end="\n\n")
        if given.saved:
            ours, theirs = (saved(name, given.saved, recipe) for recipe in (Recipe(), None))
            print(f"kept for backward, bytes a token\n{ours.beside(theirs)}", end="\n\n")


if __name__ == "__main__":
    main()
