"""Numbers and names as text for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Metrics that are shares and are shown in per cent; the others (losses) are plain numbers.
TITLES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "top5": "top-5 accuracy",
    "log_loss": "log loss",
    "ece": "calibration error",
}
SHORT_TITLES = TITLES | {"balanced_accuracy": "bal. acc.", "top5": "top-5", "ece": "ECE"}
SHARES = frozenset({"accuracy", "balanced_accuracy", "macro_f1", "top5", "ece"})
LOWER_IS_BETTER = frozenset({"log_loss", "ece", "seconds"})


def printable(text: str) -> str:
    """``text`` with everything that is not printable, also bytes that are no UTF-8, written as an escape."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def score(name: str, value: Any) -> str:
    """A metric's value: shares in per cent, losses with three decimals, – for None."""
    if not isinstance(value, (int, float)):
        return "–"
    return percent(value) if name in SHARES else f"{value:.3f}"


def interval(name: str, bounds: Sequence[float] | None, *, between: str = " to ") -> str:
    """A metric's interval in the unit of `score`, or nothing."""
    if bounds is None:
        return ""
    low, high = bounds
    if name in SHARES:
        return f"{100 * low:.1f}{between}{100 * high:.1f}"
    return f"{low:.3f}{between}{high:.3f}"


def duration(seconds: float) -> str:
    """``75.2`` -> ``1 min 15 s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
