"""A progress bar with rate and time left on a terminal; plain lines, now and then, when piped."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

LINE_SECONDS = 10.0


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s")


class ProgressBar:
    """Counts ``total`` items of a step on standard error.

    ``with ProgressBar("embedding", 397, quiet=False) as bar: bar.advance(32)``
    """

    def __init__(self, label: str, total: int, *, quiet: bool = False) -> None:
        self._label, self._total, self._done = label, total, 0
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        self._bar = None if quiet or not self._console.is_terminal else self._make_bar()
        self._started = self._last_line = time.monotonic()

    def _make_bar(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
        bar = Progress(*columns, console=self._console)
        bar.add_task(self._label, total=self._total)
        return bar

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count ``count`` more items as done; ``note`` is shown after the label."""
        self._done += count
        if self._bar:
            self._bar.update(self._bar.task_ids[0], advance=count, description=f"{self._label} {note}".rstrip())
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            self._last_line = time.monotonic()
            self._print_line(note)

    def _print_line(self, note: str) -> None:
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = self._done / seconds
        left = (self._total - self._done) / rate if rate else float("inf")
        label = f"{self._label} {note}".rstrip()
        self._console.print(f"{label}: {self._done}/{self._total}, {rate:.1f}/s, {left:.0f} s left", soft_wrap=True)
