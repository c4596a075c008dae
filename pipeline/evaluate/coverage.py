"""Coverage: how accurate a classifier is on the images it is surest of, and so what it could decide by itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..artifacts import CoveragePoint
from .intervals import Floats, Ints, share_interval
from .text import images, percent, percent_range

POINTS = 100
WANTED = 0.99


def coverage_curve(confidence: Floats, right: NDArray[np.bool_], groups: Ints) -> list[CoveragePoint]:
    """The accuracy on the surest images, for about `POINTS` shares of n images; images of one confidence stay together.

    Source: El-Yaniv and Wiener, JMLR 11 (2010), where it is called the risk-coverage curve.

    Args:
        confidence, right, groups: (n,) largest probability, whether its class is the true one, and the group.
    """
    order = np.argsort(-confidence, kind="stable")
    sure, hits = confidence[order], np.cumsum(right[order])
    ends = np.flatnonzero(np.append(sure[1:] < sure[:-1], True)) + 1 if len(sure) else np.empty(0, np.int64)
    if len(ends) > POINTS:
        ends = ends[np.unique(np.searchsorted(ends, np.linspace(1, len(sure), POINTS)))]
    return [
        CoveragePoint(
            n=int(count),
            confidence=min(1.0, float(sure[count - 1])),
            accuracy=float(hits[count - 1] / count),
            accuracy_ci95=share_interval(right[order[:count]], groups[order[:count]]),
        )
        for count in ends.tolist()
    ]


def coverage_sentence(points: Sequence[CoveragePoint], n: int) -> str:
    """What share of ``n`` images can be decided automatically at 99 %."""
    enough = [point for point in points if point.accuracy >= WANTED]
    if not enough:
        return f"No share of the images is decided at {percent(WANTED)}, not even the surest."
    best = max(enough, key=lambda point: point.n)
    bounds = f" (95 %: {percent_range(best.accuracy_ci95)} %)" if best.accuracy_ci95 else ""
    return (
        f"{images(best.n)}, {percent(best.n / n)} of all, are decided with a probability of {percent(best.confidence)} "
        f"or more, and of these {percent(best.accuracy)} rightly{bounds}: so many could be decided automatically, and "
        "the rest be looked at. The bar was read off these images; try it on others."
    )
