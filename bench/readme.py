"""README's results: written from ``bench/results/``, so that each figure is one that was measured, and says where."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

from . import FAMILIES, history
from .report import MEASURED, Table, commit_text, counted, markdown_block, number, spread_text
from .rows import KINDS, Row, Run

README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- results: written by python -m bench readme -->"
END = "<!-- end of results -->"

ABOUT = 'Medians with their quartiles. "1.3 times X" is the own time over that of X, which took turns in the same run.'

#: Rows of one table; the rest is in the file that the table names. The most important rows were measured first.
MOST = 12


def update(check: bool) -> int:
    """Writes the section, or with ``check`` prints how it differs from what it should be.

    Returns:
        The exit status: 1 if ``check`` found it out of date.

    Raises:
        ValueError: README has not the two comments that the section stands between.
    """
    old = README.read_text()
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        raise ValueError(f"{README} must have {BEGIN!r} and, below it, {END!r}, once each")
    new = old[: old.index(BEGIN)] + f"{BEGIN}\n\n{section()}\n\n" + old[old.index(END) :]
    if not check:
        README.write_text(new)
        return 0
    before, after = (text.splitlines(keepends=True) for text in (old, new))
    sys.stdout.writelines(difflib.unified_diff(before, after, "README.md", "as bench/results/ has it"))
    return int(old != new)


def section() -> str:
    """For each machine, the newest run of each family, own rows only."""
    tables: dict[str, list[str]] = {kind: [] for kind in MEASURED}
    for folder in sorted(path for path in history.RESULTS.glob("*") if path.is_dir()):
        runs = history.files_of(folder)
        for family in FAMILIES:
            for kind in MEASURED:
                found = next(
                    ((path, run, rows) for path, run in reversed(runs) if (rows := _rows(run, family, kind))), None
                )
                if found:
                    tables[kind].append(_table(*found))
    if not tables["gpu"]:
        tables["gpu"] = ["There is no GPU figure: no run on a GPU is in `bench/results/`."]
    return "\n\n".join([ABOUT, *(part for kind in MEASURED for part in tables[kind])])


def _rows(run: Run, family: str, kind: str) -> list[Row]:
    rows = [row for row in run.rows if row.family == family and row.kind == kind]
    return [row for row in rows if row.ours] or rows


def _verdict(row: Row) -> str:
    if row.disturbed:
        return "disturbed by other processes, not judged by"
    return "within" if row.passed else "over"


def _table(path: Path, run: Run, rows: Sequence[Row]) -> str:
    where = run.environment
    machine = where.gpu or f"{where.cpu}, {counted(where.threads, 'thread')}"
    versions = f"torch {where.versions.get('torch', 'unknown')}"
    about = f"`{rows[0].family}`, {KINDS[rows[0].kind]}: {machine}, {versions}; {commit_text(where.commit)}"
    # Only a family without own rows, as the ceilings, has to say whose they are.
    columns = ["op", "shape", "backend", "median (quartiles)", "rate", "against peers", "bar"]
    cells = [
        [
            *(row.op, row.shape, "" if row.ours else row.backend, _median(row)),
            "" if row.rate is None else f"{number(row.rate)} {row.rate_unit or ''}".strip(),
            ", ".join(f"{spread_text(ratio)} times {peer}" for peer, ratio in row.ratios.items()),
            "" if row.bar is None else f"{_verdict(row)} {number(row.bar)}",
        ]
        for row in rows[:MOST]
    ]
    file = f"`bench/results/{path.parent.name}/{path.name}`"
    more = f"; {len(rows) - MOST} more rows are there" if len(rows) > MOST else ""
    return f"{about}, {where.date[:10]} ({file}{more}).\n\n{markdown_block(Table.of(columns, cells))}"


def _median(row: Row) -> str:
    quartiles = "" if row.lower == row.upper else f" ({number(row.lower)} to {number(row.upper)})"
    return f"{number(row.median)} {row.unit}{quartiles}"
