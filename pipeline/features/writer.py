"""Collect rows and publish them as parts in the background, often enough that a kill loses little."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from ..data.digests import Digests
from .parts import PART_ROWS
from .rounding import Features

Publish = Callable[[Features, Digests], list[Path]]


class PartWriter:
    """A sink that publishes at least every ``part_seconds`` or 4096 rows, and what is left when it closes.

    ``published`` counts durable rows. An error while publishing is raised by the next call, or on closing.
    """

    def __init__(self, publish: Publish, part_seconds: float, *, after: Callable[[], None] | None = None) -> None:
        self._publish, self._part_seconds, self._after = publish, part_seconds, after
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self._features: list[Features] = []
        self._digests: list[Digests] = []
        self._oldest = 0.0
        self.published = 0
        self.seconds = 0.0

    def __call__(self, features: Features, digests: Digests) -> None:
        """Take rows (n, d) and digests (n, 16)."""
        if not self._features:
            self._oldest = time.monotonic()
        self._features.append(features)
        self._digests.append(digests)
        full = sum(map(len, self._features)) >= PART_ROWS
        if full or time.monotonic() - self._oldest >= self._part_seconds:
            self.flush()

    def flush(self) -> None:
        """Begin to publish what has come so far; waits for the part before, so at most one is in memory twice."""
        self._wait()
        if self._features:
            rows = np.concatenate(self._features), np.concatenate(self._digests)
            self._features, self._digests = [], []
            self._pending = self._pool.submit(self._write, *rows)

    def _write(self, features: Features, digests: Digests) -> None:
        started = time.perf_counter()
        self._publish(features, digests)
        self.published += len(features)
        if self._after:
            self._after()
        self.seconds += time.perf_counter() - started

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Publish the rest, also when the block failed: what was computed is kept."""
        try:
            self.flush()
            self._wait()
        finally:
            self._pool.shutdown()
