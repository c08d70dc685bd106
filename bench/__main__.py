"""``python -m bench FAMILY [--json]``: prints the rows of a family; the exit status is 1 where a bar is missed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from . import SAMPLES, cpu, emulator, environment, table

FAMILIES = {"cpu": cpu.measure, "emulator": emulator.measure}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    families = parser.add_subparsers(dest="family", required=True, metavar="FAMILY")
    for name in FAMILIES:
        family = families.add_parser(name, help=f"the measurements of bench/{name}.py")
        family.add_argument("--json", action="store_true", help="one JSON object instead of the table")
        family.add_argument("--samples", type=int, default=SAMPLES, help="rounds that count (default: %(default)s)")
        family.add_argument("--tiny", action="store_true", help="shapes for trying out the benchmark itself")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    where = environment()
    rows = FAMILIES[options.family](options.samples, options.tiny)
    passed = all(row.passed for row in rows)
    if options.json:
        report = {"family": options.family, "environment": where, "passed": passed, "rows": [r.as_dict() for r in rows]}
        print(json.dumps(report))
    else:
        print(", ".join(f"{name} {value}" for name, value in where.items()))
        print(table(rows))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
