"""How a score came about, in one sentence, and what it is without images that train holds too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..artifacts import CurvePoint, Leak
from .intervals import wilson
from .metrics import METRICS, Ints
from .text import images

if TYPE_CHECKING:  # a comparison of finished runs needs no torch
    from ..heads import Selection


@dataclass(frozen=True)
class Provenance:
    """How a classifier was made, as far as its score and its report tell.

    Attributes:
        fitted: what was fitted ("the logistic head").
        train_digests: (m, 16) of all images of train; scored images among them have leaked.
        train_counts: (c,) images of each class that it was fitted on; the largest class is the majority baseline.
        selections: the choices, in the order they were made.
        selected, leaderboard, history, curve, warnings: as in `RunMetrics`.
    """

    fitted: str
    train_digests: NDArray[np.uint8]
    train_counts: Ints
    selections: Sequence[Selection] = ()
    selected: dict[str, Any] = field(default_factory=dict)
    leaderboard: Sequence[dict[str, Any]] = ()
    history: Sequence[dict[str, Any]] = ()
    curve: Sequence[CurvePoint] = ()
    warnings: Sequence[str] = ()


def protocol_sentence(provenance: Provenance, *, reported_on: str, n: int) -> str:
    """The protocol of a score on ``n`` images; it admits it when a choice was made on the reported set."""
    parts = [f"{choice.what} was chosen {choice.how} on {choice.on}" for choice in provenance.selections]
    parts.append(f"{provenance.fitted} was fitted on {images(int(provenance.train_counts.sum()))} of train")
    biased = [choice.what for choice in provenance.selections if choice.on == reported_on]
    verdict = (
        f"which also chose {_listed(biased)}, so the score is too good" if biased else "on which nothing was chosen"
    )
    sentence = f"{_listed(parts)}; reported are {images(n)} of {reported_on}, {verdict}."
    return sentence[0].upper() + sentence[1:]


def find_leak(train_digests: NDArray[np.uint8], digests: NDArray[np.uint8], right: NDArray[np.bool_]) -> Leak | None:
    """Scored images that train holds byte for byte, and the accuracy of the others; None where there are none.

    Args:
        train_digests: (m, 16).
        digests: (n, 16) of the scored images.
        right: (n,) which of them were classified rightly.
    """
    known = {row.tobytes() for row in train_digests}
    clean = np.array([row.tobytes() not in known for row in digests], dtype=bool)
    n, hits = int(clean.sum()), int(right[clean].sum())
    if n == len(clean):
        return None
    return Leak(leaked=len(clean) - n, n=n, accuracy=hits / n if n else None, accuracy_ci95=wilson(hits, n))


def leak_sentence(leak: Leak, split: str) -> str:
    """What `find_leak` found, in a sentence or two."""
    start = f"{leak.leaked:,} of the {leak.leaked + leak.n:,} images of {split} are also in train, byte for byte"
    if leak.accuracy is None:
        return f"{start}: this score says nothing about new images."
    accuracy = METRICS["accuracy"]
    bounds = f"95 %: {accuracy.show_interval(leak.accuracy_ci95)} %, {images(leak.n)}"
    return f"{start}. Without them the accuracy is {accuracy.show(leak.accuracy)} ({bounds})."


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
