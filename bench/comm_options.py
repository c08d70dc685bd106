"""The command line of ``bench comm`` where torchrun started it; apart, for it is read without torch."""

from __future__ import annotations

import argparse

from .shapes import EXPERTS

MODEL = EXPERTS[0]  # DeepSeek-V3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is taken where torchrun started the ranks."""
    group = parser.add_argument_group("over ranks of torchrun")
    group.add_argument("--way", choices=("collective", "kernels"), help="(default: kernels on GPUs)")
    group.add_argument("--tune", action="store_true", help="find and keep settings first (Buffer.tune)")
    group.add_argument("--tokens", type=int, help="of a rank (default: 4096 on GPUs, 256 on CPUs)")
    for name, value, about in (
        ("hidden", MODEL.hidden, ""),
        ("experts", MODEL.count, "of all ranks"),
        ("top-k", MODEL.top_k, ""),
        ("top-nodes", 4, "that a token may go to"),
        ("num-sms", 20, ""),
    ):
        group.add_argument(f"--{name}", type=int, default=value, help=f"{about} (default: %(default)s)".strip())
    group.add_argument("--ranks-per-node", type=int, help="(default: ranks of a machine)")
