"""What a run tells: progress bars on a terminal, plain lines elsewhere, and log.jsonl for programs, always."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

PLAIN_EVERY_S = 15.0


class Task:
    """Progress of one piece of work."""

    def __init__(self, reporter: Reporter, title: str, total: int) -> None:
        self._reporter, self._title, self._total = reporter, title, total
        self._done, self._last = 0, time.monotonic()
        self._bar: Progress | None = None
        self._id: TaskID | None = None

    def advance(self, count: int = 1, note: str = "") -> None:
        """Say that `count` more units are done; `note` is shown beside them (a loss, a slide name)."""
        self.reach(self._done + count, self._total, note)

    def reach(self, done: int, total: int, note: str = "") -> None:
        """Say that `done` of `total` units are done."""
        gained, self._done, self._total = done - self._done, done, total
        if self._bar is not None and self._id is not None:
            self._bar.update(self._id, advance=gained, total=total, note=note)
        elif time.monotonic() - self._last > PLAIN_EVERY_S and self._done < self._total:
            self._last = time.monotonic()
            self._reporter.line(f"  {self._title}: {self._done}/{self._total} {note}".rstrip())


class Reporter:
    """Console and log of a run. `log` may be None (a call without an output folder)."""

    def __init__(self, log: Path | None = None, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.console = Console(file=stream or sys.stderr, highlight=False)
        self.quiet = quiet
        self.fancy = self.console.is_terminal and not quiet
        self._log = log

    def line(self, text: str) -> None:
        """Print one line (nothing if quiet)."""
        if not self.quiet:
            self.console.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print one line that must not be missed, and log it."""
        self.console.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)
        self.event("warning", text=text)

    def event(self, kind: str, **facts: Any) -> None:
        """Append one line to log.jsonl."""
        if self._log is not None:
            # Made here and not before: a call that is refused should leave no folder behind.
            self._log.parent.mkdir(parents=True, exist_ok=True)
            record = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": kind, **facts}
            with self._log.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(record, default=str) + "\n")

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        """Announce a stage, and say and log how long it took."""
        self.line(title)
        self.event("stage started", stage=name)
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        self.event("stage finished", stage=name, seconds=round(seconds, 2))
        self.line(f"  done in {_duration(seconds)}")

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Task]:
        """Show progress of `total` units: a bar on a terminal, else a line every now and then."""
        task = Task(self, title, total)
        if not self.fancy or total == 0:
            yield task
            return
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("[dim]{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as bar:
            task._bar, task._id = bar, bar.add_task(title, total=total, note="")
            yield task


@contextmanager
def without_python_warnings() -> Iterator[None]:
    """Silence the package's own Python warnings, for work whose notes are told by `Reporter.warn` afterwards."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"lrmil\.")
        yield


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"
