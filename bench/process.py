"""Child processes of the night: each with a log and a limit, and none of them left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[1]
#: Seconds between being asked to stop and being killed, for pytest to write down what it has.
GRACE = 5.0
#: What a process must have to be worth starting.
MIN_SECONDS = 5.0
#: For the plots and pages at the end, and for stopping what runs too long.
REPORT_SECONDS = 15.0
_POLL = 0.05


class Clock:
    """The night's time. ``left`` is until the report must be begun."""

    def __init__(self, minutes: float) -> None:
        self._start, self.total = time.monotonic(), 60 * minutes
        self._reserve = min(REPORT_SECONDS, self.total / 10)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start

    @property
    def left(self) -> float:
        return self.total - self._reserve - self.elapsed


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a child ended. ``code`` is None where it had to be stopped, and ``hung`` says that it had to be killed."""

    code: int | None
    seconds: float
    log: Path
    hung: bool = False

    @property
    def how(self) -> str:
        if self.hung:
            return f"hung and was killed after {self.seconds:.0f} s"
        if self.code is None:
            return f"was stopped after {self.seconds:.0f} s"
        if self.code < 0:
            return f"died of {signal.Signals(-self.code).name} after {self.seconds:.0f} s"
        return f"ended with status {self.code} after {self.seconds:.0f} s"

    @property
    def why(self) -> str:
        """How it ended, with the end of its log."""
        end = tail(self.log)
        return f"{self.how}; its log {self.log.name} ends with:\n{end}" if end else f"{self.how} without a word"


class Child:
    """A process in a session of its own, so that whatever it starts goes when it goes. Use it as a context."""

    def __init__(self, command: Sequence[str | Path], log: Path, *, echo: bool = False, cwd: Path = ROOT) -> None:
        """``echo`` shows the log on stderr as it grows, where that is a terminal: the families' progress bars."""
        self.log, self._shown, self._echo = log, 0, echo and sys.stderr.isatty()
        self._started = time.monotonic()
        # Straight into the file: nothing breaks or blocks if a grandchild keeps its end open.
        with log.open("wb") as sink:
            self._process = subprocess.Popen(
                [str(c) for c in command],
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_heed_interrupts,
            )

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    def wait(self, seconds: float) -> Ended:
        """Until it ends, or for so many seconds: then it is asked to stop, and after ``GRACE`` killed."""
        limit = time.monotonic() + seconds
        try:
            while self._process.poll() is None and time.monotonic() < limit:
                self._show()
                time.sleep(_POLL)
            stopped = self._process.poll() is None
            hung = stopped and not self._stop()
        finally:
            self.kill()
        self._show()
        took = time.monotonic() - self._started
        return Ended(None if stopped else self._process.returncode, took, self.log, hung)

    def kill(self) -> None:
        """The whole group, also when the process itself has ended: what it left running would disturb the rest."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _stop(self) -> bool:
        self._signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        return self._process.poll() is not None

    def _signal(self, number: signal.Signals) -> None:
        # No such group: everything in it has ended.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _show(self) -> None:
        if not self._echo:
            return
        with self.log.open("rb") as log:
            log.seek(self._shown)
            new = log.read()
        self._shown += len(new)
        if new:
            sys.stderr.write(new.decode(errors="replace"))
            sys.stderr.flush()


def _heed_interrupts() -> None:
    """A shell's background job ignores SIGINT, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def tail(log: Path, lines: int = 6) -> str:
    """The last lines that say something, of a progress bar its last state, without the folders of this machine."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16384))
        text = file.read().decode(errors="replace")
    for folder, short in ((str(ROOT) + os.sep, ""), (sys.prefix + os.sep, ".../"), (sys.base_prefix + os.sep, ".../")):
        text = text.replace(folder, short)
    # A terminal shows what follows the last carriage return.
    shown = [line.rstrip("\r").rsplit("\r", 1)[-1].rstrip() for line in text.split("\n")]
    # Without the marks below a traceback's lines.
    return "\n".join([line for line in shown if line.strip(" ^~")][-lines:])
