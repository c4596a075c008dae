"""Ctrl-C that stops after the batch in hand."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interruption:
    """Becomes true at the first Ctrl-C or SIGTERM; long loops look at it between batches."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def __bool__(self) -> bool:
        return self._event.is_set()

    def request(self) -> None:
        """Ask the loop to stop after the batch in hand."""
        self._event.set()


@contextmanager
def stop_after_batch() -> Iterator[Interruption]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop; the second Ctrl-C interrupts at once.

    Outside the main thread, where signals cannot be handled, the interruption is only ever requested by code.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return

    def handle(number: int, _frame: FrameType | None) -> None:
        if interruption and number == signal.SIGINT:
            raise KeyboardInterrupt
        interruption.request()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interruption
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
