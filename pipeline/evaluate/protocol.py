"""How a score came about, in one sentence, and what it is without images that train holds too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..artifacts import CurvePoint, Leak, Uncorrected
from ..data.source import SPLITS, TRAIN
from .intervals import Ints, share_interval
from .metrics import METRICS
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
        fitted_on: the splits that these are of.
        selections: the choices, in the order they were made.
        selected, leaderboard, history, curve, warnings: as in `RunMetrics`.
    """

    fitted: str
    train_digests: NDArray[np.uint8]
    train_counts: Ints
    fitted_on: str = "train"
    selections: Sequence[Selection] = ()
    selected: dict[str, Any] = field(default_factory=dict)
    leaderboard: Sequence[dict[str, Any]] = ()
    history: Sequence[dict[str, Any]] = ()
    curve: Sequence[CurvePoint] = ()
    warnings: Sequence[str] = ()


def protocol_sentence(provenance: Provenance, reported_on: str, n: int, groups: int) -> str:
    """The protocol of a score on ``n`` images in so many ``groups``; it admits it when the reported set has chosen."""
    parts = [f"{each.what} {_was(each.what)} chosen {each.how} on {each.on}" for each in provenance.selections]
    parts.append(
        f"{provenance.fitted} was fitted on {images(int(provenance.train_counts.sum()))} of {provenance.fitted_on}"
    )
    biased = [choice.what for choice in provenance.selections if choice.on == reported_on]
    verdict = (
        f"which also chose {_listed(biased)}, so the score is too good" if biased else "on which nothing was chosen"
    )
    if reported_on == SPLITS[TRAIN]:
        verdict = "which it was fitted on, so the score says nothing of other images"
    sentence = f"{_listed(parts)}; reported are {images(n)} of {reported_on}, {verdict}."
    grouped = f" Intervals take the {groups:,} groups of these images, not the images, as independent."
    return sentence[0].upper() + sentence[1:] + (grouped if groups < n else "")


def _was(what: str) -> str:
    return "were" if what.startswith("the parameters") else "was"


def find_leak(
    train_digests: NDArray[np.uint8],
    digests: NDArray[np.uint8],
    groups: Ints,
    rows: NDArray[np.bool_],
    right: NDArray[np.bool_],
) -> Leak | None:
    """Scored images that train holds byte for byte or by their group, and the accuracy of the others.

    Args:
        train_digests: (m, 16).
        digests, groups: (n, 16) and (n,) of all images at hand.
        rows: (n,) which of them are scored.
        right: (s,) which of the scored ones were classified rightly.

    Returns:
        None where nothing has leaked.
    """
    known = {row.tobytes() for row in train_digests}
    in_train = np.array([row.tobytes() in known for row in digests], dtype=bool)
    leaked = np.isin(groups[rows], groups[in_train])
    if not leaked.any():
        return None
    clean, by_group = right[~leaked], leaked & ~in_train[rows]
    return Leak(
        leaked=int(leaked.sum()),
        by_group=int(by_group.sum()),
        n=len(clean),
        accuracy=float(clean.mean()) if len(clean) else None,
        accuracy_ci95=share_interval(clean, groups[rows][~leaked]),
    )


def leak_sentence(leak: Leak, split: str) -> str:
    """What `find_leak` found, in a sentence or two."""
    start = f"{leak.leaked:,} of the {leak.leaked + leak.n:,} images of {split} are"
    if not leak.by_group:
        start += " also in train, byte for byte"
    else:
        same = leak.leaked - leak.by_group
        start += " of groups that train has too" + (f" ({same:,} of them byte for byte)" if same else "")
    if leak.accuracy is None:
        return f"{start}: this score says nothing about new images."
    accuracy = METRICS["accuracy"]
    bounds = f"95 %: {accuracy.show_interval(leak.accuracy_ci95)} %, " if leak.accuracy_ci95 else ""
    return f"{start}. Without them the accuracy is {accuracy.show(leak.accuracy)} ({bounds}{images(leak.n)})."


def uncorrected_sentence(uncorrected: Uncorrected, split: str) -> str:
    """The score by the labels as found, to stand before the one by the labels as corrected."""
    accuracy = METRICS["accuracy"]
    bounds = f"95 %: {accuracy.show_interval(uncorrected.accuracy_ci95)} %, " if uncorrected.accuracy_ci95 else ""
    return (
        f"By the labels as found the accuracy on {split} is {accuracy.show(uncorrected.accuracy)} "
        f"({bounds}{images(uncorrected.n)}). You corrected {images(uncorrected.corrected)} of {split}; the scores "
        "below are by the labels as corrected."
    )


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
