"""A progress bar with rate and time left on a terminal; one line that is written over in a notebook; plain lines, now
and then, when piped.

On a terminal a bar is gone when its step ends, and lines that are told meanwhile stand above it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

LINE_SECONDS, NOTEBOOK_SECONDS = 10.0, 0.5
STDERR = 2


_shown: list[Progress] = []  # the bars that are on the screen, the last on top


def print_above(line: str) -> bool:
    """Print a line above the bar on the screen; False where there is none, and the line is still to be printed."""
    if not _shown:
        return False
    _shown[-1].console.print(line, markup=False, highlight=False, soft_wrap=True)
    return True


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep what C libraries (libtiff, libpng) write about single files off the screen, which Python's own words keep.

    Nothing is done where standard error is not the process's own, as in a notebook, or not a terminal.
    """
    try:
        redirects = sys.stderr.fileno() == STDERR and os.isatty(STDERR)
    except (OSError, ValueError, AttributeError):
        redirects = False
    if not redirects:
        yield
        return
    own, before = os.dup(STDERR), sys.stderr
    nowhere = os.open(os.devnull, os.O_WRONLY)
    before.flush()
    with open(own, "w", encoding=before.encoding, errors=before.errors, buffering=1) as screen:
        os.dup2(nowhere, STDERR)
        sys.stderr = screen
        try:
            yield
        finally:
            sys.stderr = before
            os.dup2(own, STDERR)
            os.close(nowhere)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s")


class ProgressBar:
    """Counts ``total`` items of a step on standard error; None: it is only shown that the step goes on.

    ``with ProgressBar("embedding", 397, quiet=False) as bar: bar.advance(32)``
    """

    def __init__(self, label: str, total: int | None = None, *, quiet: bool = False) -> None:
        self._label, self._total, self._done = label, total, 0
        self._console = Console(stderr=True, quiet=quiet, highlight=False)
        moves = self._console.is_terminal and not self._console.is_dumb_terminal
        self._bar = self._make_bar() if moves and not quiet else None
        self._started = self._last_line = time.monotonic()

    def _make_bar(self) -> Progress:
        counts = (MofNCompleteColumn(), _Rate(), TimeRemainingColumn()) if self._total is not None else ()
        columns = (TextColumn("{task.description}"), BarColumn(), *counts)
        bar = Progress(*columns, console=self._console, transient=True, redirect_stdout=False, redirect_stderr=False)
        bar.add_task(self._label, total=self._total)
        return bar

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
            _shown.append(self._bar)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            _shown.remove(self._bar)
            self._bar.stop()
        elif self._console.is_jupyter and self._last_line > self._started:
            print(f"\r{'':<60}\r", end="", file=sys.stderr)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count ``count`` more items as done; ``note`` is shown after the label."""
        self._done += count
        if self._bar:
            self._bar.update(self._bar.task_ids[0], advance=count, description=f"{self._label} {note}".rstrip())
        elif time.monotonic() - self._last_line >= (NOTEBOOK_SECONDS if self._console.is_jupyter else LINE_SECONDS):
            self._last_line = time.monotonic()
            self._print_line(note)

    def _print_line(self, note: str) -> None:
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = self._done / seconds
        total = self._done if self._total is None else self._total
        left = (total - self._done) / rate if rate else float("inf")
        label = f"{self._label} {note}".rstrip()
        line = f"{label}: {self._done}/{total}, {rate:.1f}/s, {left:.0f} s left"
        if self._console.is_jupyter and not self._console.quiet:
            print(f"\r{line:<60}", end="", file=sys.stderr)  # over the last one
        else:
            self._console.print(line, soft_wrap=True)
