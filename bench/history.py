"""``bench/results/``: a folder for each kind of machine, a compact file for each run that was kept."""

from __future__ import annotations

from pathlib import Path

from .rows import Run

RESULTS = Path(__file__).parent / "results"


def runs_of(machine: str) -> list[Run]:
    """The runs kept of a machine, oldest first."""
    return [run for _, run in files_of(RESULTS / machine)]


def files_of(folder: Path) -> list[tuple[Path, Run]]:
    """The files in a machine's folder with the runs they hold, oldest first."""
    found = [(path, Run.load(path)) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda pair: (pair[1].environment.date, pair[0].name))


def keep(directory: Path) -> Path:
    """Puts a night's results into the history and returns the file. Kept twice, a run is there once.

    A commit with uncommitted changes is kept under a name that says so.

    Raises:
        ValueError: the directory holds no run.
    """
    run = Run.load(directory)
    where = run.environment
    commit = (where.commit or "unknown").replace("+", "-dirty")
    folder = RESULTS / where.machine
    folder.mkdir(parents=True, exist_ok=True)
    text, stem = run.compact(), f"{where.date[:10]}-{commit}"
    number = 1
    while True:  # two runs of one commit on one day are two files
        path = folder / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")
        if not path.exists():
            path.write_text(text)
            return path
        if path.read_text() == text:
            return path
        number += 1
