"""``python -m bench FAMILY``, ``nightly``, ``keep`` or ``readme``; the exit status is 1 where something failed."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from . import FAMILIES, SAMPLES


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, about in FAMILIES.items():
        family = commands.add_parser(name, help=about, description=about)
        family.add_argument("--json", action="store_true", help="one JSON object instead of the tables")
        family.add_argument(
            "--only", metavar="TEXT", help='cases whose "op shape" has TEXT in it, or is in a JSON list'
        )
        family.add_argument("--samples", type=int, default=SAMPLES, help="rounds that count (default: %(default)s)")
        family.add_argument("--seconds", type=float, help="stop after so long; what is left is listed as not run")
        family.add_argument("--tiny", action="store_true", help="shapes for trying out the benchmark itself")
        family.add_argument("--report", type=Path, metavar="FILE", help="append each row to FILE as it comes")
        family.add_argument("--ceilings", type=Path, metavar="FILE", help="a report of the family ceilings")
        if name == "gemm":
            explain = "instead: the planner's candidates for one product, with what the model says of each"
            family.add_argument("--explain", type=int, nargs=3, metavar=("M", "N", "K"), help=explain)
            tiles = "instead: for each dense product of the table the planner's choice, and DeepGEMM's by its rule"
            family.add_argument("--tiles", action="store_true", help=tiles)
            family.add_argument(
                "--machine", default="H100", choices=("H100", "H200", "H800", "H20"), help="for --explain and --tiles"
            )
        if name == "comm":
            simulate = "instead: what the model predicts from 8 to 2048 GPUs; with --json a row a line"
            family.add_argument("--simulate", action="store_true", help=simulate)
            family.add_argument(
                "--machine", default="H800", choices=("H800", "H100", "H200", "H20"), help="for --simulate"
            )
            from .comm_options import add_arguments

            add_arguments(family)
    night = commands.add_parser("nightly", help="tests, every family, report, regression gate")
    night.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    night.add_argument("--baseline", type=Path, help="a run or a folder of runs (default: this machine's history)")
    night.add_argument("--minutes", type=float, default=9.0, help="for all of it (default: %(default)s)")
    keep = commands.add_parser("keep", help="put a night's results into bench/results/")
    keep.add_argument("directory", type=Path, metavar="DIR", help="what nightly --out was given")
    readme = commands.add_parser("readme", help="write README's results section from bench/results/")
    readme.add_argument("--check", action="store_true", help="only say whether it is up to date")
    return parser.parse_args(argv)


def run_family(options: argparse.Namespace) -> int:
    from . import family
    from .case import Session
    from .machine import environment
    from .report import text_tables
    from .rows import Run

    module = importlib.import_module(f".{options.command}", __package__)
    session = Session(options.samples, options.tiny, family.read_ceilings(options.ceilings), family.timers())
    found = Run(environment())
    report = family.Report(options.report)
    works = family.select(module.works(options.tiny), options.only)
    family.run(options.command, works, session, report, options.seconds)
    found.rows, found.not_run = report.rows, report.not_run
    if options.json:
        print(json.dumps({**dataclasses.asdict(found), "passed": passed(found)}))
    else:
        print(text_tables(found))
    return 0 if passed(found) else 1


def started_by_torchrun() -> bool:
    from torch.distributed import is_torchelastic_launched

    return is_torchelastic_launched()


def passed(run: Run) -> bool:  # type: ignore[name-defined]  # noqa: F821
    return all(row.passed for row in run.rows) and not any(n.failed for n in run.not_run)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if getattr(options, "explain", None):
        from .explain import explain

        m, n, k = options.explain
        print(explain(m, n, k, options.machine))
        return 0
    if getattr(options, "tiles", False):
        from .explain import tiles

        print(tiles(options.machine))
        return 0
    if getattr(options, "simulate", False):
        from . import comm_simulate
        from .rows import to_line

        if options.json:
            print(*map(to_line, comm_simulate.rows(options.machine)), sep="\n")
        else:
            print(comm_simulate.tables(options.machine))
        return 0
    if options.command == "comm" and started_by_torchrun():
        from .comm_torchrun import run

        return run(options)
    if options.command in FAMILIES:
        return run_family(options)
    if options.command == "nightly":
        from .nightly import nightly

        return nightly(options.out, options.baseline, options.minutes)
    if options.command == "keep":
        from .history import keep

        print(keep(options.directory))
        return 0
    from .readme import update

    return update(check=options.check)


if __name__ == "__main__":
    sys.exit(main())
