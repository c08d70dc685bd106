"""A run or a night as sections of sentences, lists and tables; rendered for a terminal and as GitHub's Markdown.

A table never mixes kinds of rows, and its heading says how its values were had. ``page.py`` renders the same sections.
"""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from . import goals, regression
from .night import Comparison, Night, name
from .rows import KINDS, NotRun, Row, Run, Spread

MEASURED = ("gpu", "cpu")

#: Columns whose cells are words even where they begin with a digit.
WORDS = ("", "op", "shape", "backend", "config", "suite", "what", "what failed", "why")

#: How many rows' names stand before a note that they share.
NAMES = 12


@dataclasses.dataclass(frozen=True)
class Table:
    columns: list[str]
    rows: list[list[str]]
    #: For each row, what a page may set it off by: "ours", "failed" or "".
    marks: list[str]

    @staticmethod
    def of(columns: Sequence[str], rows: Sequence[Sequence[str]], marks: Sequence[str] = ()) -> Table:
        """Without the columns that no row uses."""
        used = [i for i in range(len(columns)) if any(row[i] for row in rows)]
        kept = [[row[i] for i in used] for row in rows]
        return Table([columns[i] for i in used], kept, list(marks) or [""] * len(rows))

    @property
    def numeric(self) -> list[bool]:
        """The columns to be set flush right."""
        columns = zip(self.columns, zip(*self.rows, strict=True), strict=True)
        return [
            title not in WORDS and all(re.match(r"-?\d", cell) for cell in cells if cell) for title, cells in columns
        ]


#: A sentence, a list of sentences, or a table.
Block = str | list[str] | Table


@dataclasses.dataclass(frozen=True)
class Section:
    title: str
    blocks: list[Block]
    #: False for what no clock measured: a page may fold it.
    measured: bool = True


def number(value: float) -> str:
    """Four significant digits, in full."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def spread_text(spread: Spread) -> str:
    """A ratio with its quartiles, where they are known."""
    lower, median, upper = (f"{v:.2f}" if v >= 0.1 else f"{v:.2g}" for v in spread)
    return median if spread[0] == spread[2] else f"{median} ({lower} to {upper})"


def commit_text(commit: str | None) -> str:
    if commit is None:
        return "unknown commit"
    return f"commit {commit[:-1]} with uncommitted changes" if commit.endswith("+") else f"commit {commit}"


def text_tables(run: Run) -> str:
    """For a terminal: a table a family and kind, then what was not run."""
    return "\n\n".join(section_text(section) for section in [*family_sections(run), *not_run_section(run)])


def markdown(night: Night) -> str:
    """The night's report, the verdict first. It is also GitHub's summary of the job."""
    title, sentence = verdict(night)
    lines = [f"# Nightly benchmark: {title}", escape(sentence)]
    if night.failures:
        lines.append(markdown_block(night.failures))
    if missing := no_gpu(night.run):
        lines.append(escape(missing))
    for section in sections(night):
        lines += [f"## {escape(section.title)}", *map(markdown_block, section.blocks)]
    return "\n\n".join(lines) + "\n"


def verdict(night: Night) -> tuple[str, str]:
    """ "green" or "red", and the sentence that says why."""
    failures = night.failures
    if failures:
        return "red", f"{counted(len(failures), 'failure')}:"
    tests = sum(suite.passed for suite in night.run.suites)
    tested = f"{counted(tests, 'test')} passed" if tests else "No test was run"
    compared = "there was no baseline to compare with" if night.baseline is None else "nothing regressed"
    return "green", f"{tested}, no bar was missed, {compared}."


def sections(night: Night) -> list[Section]:
    """Everything below the verdict."""
    return [
        _machine(night),
        *_tests(night),
        _baseline(night),
        Section("Goals", [goals.lines(night.run.rows)]),
        *peer_sections(night.run),
        *family_sections(night.run),
        *not_run_section(night.run),
    ]


def no_gpu(run: Run) -> str | None:
    """What a reader must know before looking for a GPU's figure."""
    if any(row.kind == "gpu" for row in run.rows):
        return None
    if run.environment.gpu is None:
        return "No GPU figure was measured: torch sees no GPU on this machine."
    return "No GPU figure was measured: there is a GPU, but no measurement on it came to its end."


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _machine(night: Night) -> Section:
    where = night.run.environment
    facts = [
        ("GPU", where.gpu or "none"),
        ("driver", where.driver or ""),
        ("CPU", f"{where.cpu}, {counted(where.threads, 'thread')}, load {where.load:g} at the start"),
        ("commit", commit_text(where.commit).removeprefix("commit ")),
        ("date", where.date),
        ("versions", ", ".join(f"{package} {version}" for package, version in where.versions.items())),
        ("history", f"{where.machine}, {counted(len(night.history), 'earlier run')}"),
    ]
    blocks: list[Block] = [Table.of(["", ""], [fact for fact in facts if fact[1]])]
    if night.stages:
        total = sum(night.stages.values())
        stages = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in night.stages.items())
        blocks.append(f"{total / 60:.1f} of {night.minutes:g} minutes were used: {stages}.")
    return Section("Machine", blocks)


def _tests(night: Night) -> list[Section]:
    suites = night.run.suites
    if not suites:
        return []
    columns = ["suite", "passed", "failed", "skipped", "seconds", "what failed"]
    rows = [
        [s.name, str(s.passed), str(s.failed), str(s.skipped), f"{s.seconds:.0f}", "; ".join(s.failures)]
        for s in suites
    ]
    return [Section("Tests", [Table.of(columns, rows, ["" if s.ok else "failed" for s in suites])])]


def _baseline(night: Night) -> Section:
    title = "Against the baseline"
    if night.baseline is None:
        why = next((f": {entry.reason}" for entry in night.run.not_run if entry.family == "baseline"), "")
        return Section(title, [f"There was no baseline to compare with{why}."])
    where, verdicts = night.baseline.environment, [c.verdict for c in night.comparisons]
    both = len(verdicts) - verdicts.count("new") - verdicts.count("gone")
    blocks: list[Block] = [
        f"The baseline is {commit_text(where.commit)} of {where.date[:10]} on {where.machine}. "
        f"{counted(both, 'row')} compared, {verdicts.count('same')} as before."
    ]
    if different := regression.why_not(night.run.environment, where):
        blocks.append(f"Nothing was compared: {different}.")
    outcomes = dict.fromkeys(["regressed", "suspect", "improved", *verdicts])
    for outcome in outcomes:
        found = [c for c in night.comparisons if c.verdict == outcome]
        if found and outcome in ("new", "gone"):
            blocks.append(f"{outcome.capitalize()}, {len(found)}: {_some(_comparison_name(c) for c in found)}.")
        elif found and outcome != "same":
            mark = "failed" if outcome == "regressed" else ""
            blocks += [f"{outcome.capitalize()}, {len(found)}:", _comparisons(found, mark)]
    return Section(title, [*blocks, regression.RULE])


def _comparisons(found: Sequence[Comparison], mark: str) -> Table:
    def value(spread: Spread, unit: str) -> str:
        quartiles = "" if spread[0] == spread[2] else f" ({number(spread[0])} to {number(spread[2])})"
        return f"{number(spread[1])}{quartiles} {unit}"

    rows = [[_comparison_name(c), value(c.before, c.unit), value(c.now, c.unit), c.why] for c in found]
    return Table.of(["what", "before", "now", "why"], rows, [mark] * len(rows))


def _comparison_name(comparison: Comparison) -> str:
    return name(*comparison.key[1:5])


def peer_sections(run: Run) -> list[Section]:
    """How the own ops stand against each peer, over all shapes: a section for each kind of measurement."""
    found = []
    for kind in MEASURED:
        ratios: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        for row in run.rows:
            if row.kind == kind and row.ours:
                for peer, (_, median, _) in row.ratios.items():
                    ratios[row.family, row.op, peer].append(median)
        columns = ["family", "op", "peer", "shapes", "ratio, geometric mean", "best", "worst", "faster in"]
        rows = [
            [*key, str(len(values)), *(f"{v:.2f}" for v in _summary(values)), str(sum(v < 1 for v in values))]
            for key, values in ratios.items()
        ]
        if rows:
            about = "Own time over the peer's, timed in turns in one process: below 1 fastfp8 is faster."
            found.append(Section(f"Against peers, {KINDS[kind]}", [about, Table.of(columns, rows)]))
    return found


def _summary(values: Sequence[float]) -> tuple[float, float, float]:
    positive = [value for value in values if value > 0]
    return statistics.geometric_mean(positive) if positive else 0.0, min(values), max(values)


def family_sections(run: Run) -> list[Section]:
    """A section for each family and kind, in the order in which they were measured; kinds by their trust."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in run.rows:
        groups[row.family, row.kind].append(row)
    families = list(dict.fromkeys(row.family for row in run.rows))
    kinds = list(KINDS)
    ordered = sorted(groups, key=lambda key: (kinds.index(key[1]), families.index(key[0])))
    return [
        Section(
            f"{family}, {KINDS[kind]}",
            measured_blocks(groups[family, kind]) if kind in MEASURED else computed_blocks(groups[family, kind]),
            kind in MEASURED,
        )
        for family, kind in ordered
    ]


def measured_blocks(rows: Sequence[Row]) -> list[Block]:
    """Own rows and peers of each case; a peer's row has the own time over the peer's."""
    ratios = {_case(row): row.ratios for row in rows if row.ratios}
    listed = {(_case(row), row.backend) for row in rows}
    samples = {row.samples for row in rows}

    def compared(row: Row) -> str:
        own = "; ".join(f"{spread_text(r)} of {p}" for p, r in row.ratios.items() if (_case(row), p) not in listed)
        peer = ratios.get(_case(row), {}).get(row.backend)
        return own if peer is None else spread_text(peer)

    cells: dict[str, Callable[[Row], str]] = {
        "op": lambda r: r.op,
        "shape": lambda r: r.shape,
        "backend": lambda r: r.backend,
        "config": lambda r: r.config or "",
        "median": lambda r: f"{number(r.median)} {r.unit}",
        "quartiles": lambda r: "" if r.lower == r.upper else f"{number(r.lower)} to {number(r.upper)}",
        "fastfp8 / peer": compared,
        "rate": lambda r: "" if r.rate is None else f"{number(r.rate)} {r.rate_unit or ''}".strip(),
        "of ceiling": lambda r: "" if r.share is None else f"{r.share:.0%}",
        "others' CPU": lambda r: "" if r.foreign_cores is None else f"{r.foreign_cores:.1f} cores",
        "bar": _bar,
        "samples": lambda r: str(r.samples) if len(samples) > 1 else "",
        "GPU": _gpu_state,
        "throttled by": lambda r: r.throttle or "",
    }
    marks = ["failed" if not row.passed else "ours" if row.ours else "" for row in rows]
    table = Table.of(list(cells), [[cell(row) for cell in cells.values()] for row in rows], marks)
    about = [f"Median and quartiles of {counted(samples.pop(), 'sample')}."] if len(samples) == 1 else []
    return [*about, table, *_notes(rows)]


def computed_blocks(rows: Sequence[Row]) -> list[Block]:
    """Values that nobody timed: a line for each work, a column for each unit."""
    units = list(dict.fromkeys(row.unit for row in rows))
    works: dict[tuple[str, ...], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        works[row.op, row.shape, row.backend, row.config or ""][row.unit] = row
    cells, marks = [], []
    for work, found in works.items():
        missed = [f"{row.unit} ≤ {number(row.bar)}" for row in found.values() if row.bar is not None and not row.passed]
        values = [number(found[unit].median) if unit in found else "" for unit in units]
        cells.append([*work, *values, "FAIL: " + ", ".join(missed) if missed else ""])
        marks.append("failed" if missed else "")
    table = Table.of(["op", "shape", "backend", "config", *units, "bar"], cells, marks)
    return [table, *_notes(rows)]


def not_run_section(run: Run) -> list[Section]:
    """What was not measured and why; what shares a reason is one line."""
    groups: dict[tuple[bool, str, str], list[NotRun]] = defaultdict(list)
    for entry in run.not_run:
        groups[not entry.failed, entry.family, entry.reason].append(entry)
    rows = [
        [family, "" if fine else "failed", ", ".join(_names(name(e.op, e.shape) or "all" for e in entries)), reason]
        for (fine, family, reason), entries in sorted(groups.items(), key=lambda pair: pair[0][0])
    ]
    marks = ["failed" if row[1] else "" for row in rows]
    return [Section("Not run", [Table.of(["family", "", "what", "why"], rows, marks)])] if rows else []


def _case(row: Row) -> tuple[str, ...]:
    return (row.kind, row.family, row.op, row.shape)


def _gpu_state(row: Row) -> str:
    parts = [(row.clock_mhz, "MHz"), (row.power_w, "W"), (row.temperature_c, "°C")]
    return ", ".join(f"{value:.0f} {unit}" for value, unit in parts if value is not None)


def _bar(row: Row) -> str:
    if row.bar is None:
        return ""
    return f"{'not judged' if row.disturbed else 'pass' if row.passed else 'FAIL'} (≤ {number(row.bar)})"


def _notes(rows: Sequence[Row]) -> list[Block]:
    """Each part of a note once, with the rows it is of, unless it is of all."""
    backends = {row.backend for row in rows}
    groups: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        for part in row.note.split("; ") if row.note else []:
            groups[part].append(name(row.op, row.shape, row.backend if len(backends) > 1 else ""))
    lines = [note if len(of) == len(rows) else f"{_some(of)}: {note}" for note, of in groups.items()]
    return [lines] if lines else []


def _some(names: Iterable[str]) -> str:
    """The first of the names, each once, and how many more there are."""
    found = _names(names)
    return ", ".join(found[:NAMES]) + (f" and {len(found) - NAMES} more" if len(found) > NAMES else "")


def _names(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name for name in names if name))


def section_text(section: Section) -> str:
    lines = [section.title]
    for block in section.blocks:
        if isinstance(block, Table):
            lines += _aligned(block)
        else:
            lines += [f"  {line}" for line in ([block] if isinstance(block, str) else block)]
    return "\n".join(lines)


def _aligned(table: Table) -> list[str]:
    whole = [table.columns, *(["  ".join(cell.split("\n")) for cell in row] for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    pads = ["rjust" if right else "ljust" for right in table.numeric]

    def line(row: Sequence[str]) -> str:
        cells = (getattr(cell, pad)(width) for cell, pad, width in zip(row, pads, widths, strict=True))
        return ("  " + "  ".join(cells)).rstrip()

    return [line(row) for row in whole]


def escape(text: str) -> str:
    """Text that GitHub's Markdown shows as it is, in a table as elsewhere."""
    for character in "\\`*[]|~$":
        text = text.replace(character, "\\" + character)
    text = re.sub(r"(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])", r"\_", text)
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())


def markdown_block(block: Block) -> str:
    if isinstance(block, str):
        return escape(block)
    if isinstance(block, list):
        return "\n".join(f"- {escape(line)}" for line in block)
    rules = ["---:" if right else "---" for right in block.numeric]
    rows = [
        [f"**{cell}**" if mark == "failed" and cell else cell for cell in map(escape, row)]
        for row, mark in zip(block.rows, block.marks, strict=True)
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(map(escape, block.columns)), rules, *rows])
