"""How a score came about, in one sentence, and what it is without images that train holds too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..artifacts import Leak
from .intervals import wilson
from .text import interval, percent


@dataclass(frozen=True)
class Selection:
    """One choice: ``what`` was chosen, ``how``, ``on`` which split.

    ``Selection("the strength C", "by 5-fold cross-validation", "train")``
    """

    what: str
    how: str
    on: str


def protocol_sentence(
    selections: Sequence[Selection], *, fitted: str, fitted_on: str, n_fitted: int, reported_on: str, n: int
) -> str:
    """The protocol of a score in one sentence; it admits it when a choice was made on the reported set.

    Args:
        selections: the choices, in the order they were made.
        fitted: what was fitted ("the logistic head").
        fitted_on, n_fitted: the split it was fitted on and its number of images.
        reported_on, n: the set the score is for and its number of images.
    """
    parts = [f"{choice.what} was chosen {choice.how} on {choice.on}" for choice in selections]
    parts.append(f"{fitted} was fitted on {_images(n_fitted)} of {fitted_on}")
    biased = [choice.what for choice in selections if choice.on == reported_on]
    verdict = (
        f"which also chose {_listed(biased)}, so the score is too good" if biased else "on which nothing was chosen"
    )
    sentence = f"{_listed(parts)}; reported are {_images(n)} of {reported_on}, {verdict}."
    return sentence[0].upper() + sentence[1:]


def check_leak(
    train_digests: NDArray[np.uint8], digests: NDArray[np.uint8], y: ArrayLike, predicted: ArrayLike
) -> dict[str, Any]:
    """Count scored images that train holds byte for byte, and the accuracy of the others.

    Args:
        train_digests: (m, 16) of the images that were trained on.
        digests: (n, 16) of the scored images.
        y, predicted: (n,) true and predicted classes.

    Returns:
        ``leaked``, and for the ``n`` images left ``accuracy`` and ``accuracy_ci95`` (None where none is left).
    """
    known = set(_rows(train_digests))
    clean = np.array([digest not in known for digest in _rows(digests)], dtype=bool)
    right = np.asarray(y)[clean] == np.asarray(predicted)[clean]
    n, hits = len(right), int(right.sum())
    return {
        "leaked": len(clean) - n,
        "n": n,
        "accuracy": hits / n if n else None,
        "accuracy_ci95": wilson(hits, n),
    }


def leak_sentence(leak: Leak, split: str) -> str:
    """What `check_leak` found, in a sentence or two; "" where nothing leaked."""
    if not leak.leaked:
        return ""
    start = f"{leak.leaked:,} of the {leak.leaked + leak.n:,} images of {split} are also in train, byte for byte"
    if leak.accuracy is None:
        return f"{start}: this score says nothing about new images."
    bounds = interval("accuracy", leak.accuracy_ci95)
    return f"{start}. Without them the accuracy is {percent(leak.accuracy)} (95 %: {bounds} %, {_images(leak.n)})."


def _rows(digests: NDArray[np.uint8]) -> list[bytes]:
    return [row.tobytes() for row in digests]


def _images(n: int) -> str:
    return "1 image" if n == 1 else f"{n:,} images"


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
