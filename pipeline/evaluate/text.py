"""Numbers and names as text for people."""

from __future__ import annotations

from collections.abc import Sequence


def printable(text: str) -> str:
    """``text`` with everything that is not printable, also bytes that are no UTF-8, written as an escape."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def percent(value: float | None) -> str:
    """``97.4 %``; – for None."""
    return "–" if value is None else f"{100 * value:.1f} %"


def percent_range(bounds: Sequence[float], between: str = " to ") -> str:
    """``93.5 to 99.0``, without the sign."""
    low, high = bounds
    return f"{100 * low:.1f}{between}{100 * high:.1f}"


def images(n: int) -> str:
    """``1 image``, ``1,234 images``."""
    return "1 image" if n == 1 else f"{n:,} images"


def duration(seconds: float) -> str:
    """``75.2`` -> ``1 min 15 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
