"""The learning curve: would more labels help?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import HeadError
from ..features.rows import take_rows
from ..runtime.seeds import make_generator
from .base import Head
from .common import Features, Ints

FRACTIONS = (0.1, 0.2, 0.4, 0.7, 1.0)


def learning_curve(
    make: Callable[[], Head],
    X: Features,
    y: Ints,
    groups: Ints | None,
    X_val: Features,
    y_val: Ints,
    *,
    fractions: Sequence[float] = FRACTIONS,
    repeats: int = 3,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Accuracy on ``X_val`` of heads fitted to growing parts of train, ``repeats`` times with other rows.

    Within a repeat a smaller part lies inside a larger one; parts are stratified and keep groups together. All of
    train is fitted once, since repeats could not differ. The head chooses its parameters anew on each part.

    Args:
        X, y, groups: as `Head.fit` takes them; a part holds all views of an image or none.

    Returns:
        One row a fit: ``fraction, repeat, images, accuracy``.
    """
    rows = []
    for repeat in range(repeats):
        order = nested_order(y, groups, seed=seed + repeat)
        for fraction in sorted(fractions):
            if fraction >= 1 and repeat:
                continue
            taken = np.sort(order[: max(1, round(fraction * len(order)))]) if fraction < 1 else np.arange(len(y))
            taken = _whole_groups(taken, groups)
            try:
                head = make().fit(take_rows(X, taken), y[taken], None if groups is None else groups[taken])
            except HeadError:
                if fraction >= 1:
                    raise
                continue  # a part this small may hold a single class; the curve then starts later
            accuracy = float((head.predict(X_val) == y_val).mean())
            rows.append({"fraction": fraction, "repeat": repeat, "images": len(taken), "accuracy": accuracy})
    return rows


def curve_band(rows: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Per fraction the mean number of images, and the mean, lowest and highest accuracy, for a line with a band."""
    band = []
    for fraction in sorted({row["fraction"] for row in rows}):
        own = [row for row in rows if row["fraction"] == fraction]
        accuracies = [row["accuracy"] for row in own]
        band.append(
            {
                "fraction": fraction,
                "images": math.fsum(row["images"] for row in own) / len(own),
                "accuracy": math.fsum(accuracies) / len(own),
                "low": min(accuracies),
                "high": max(accuracies),
            }
        )
    return band


def nested_order(y: Ints, groups: Ints | None, *, seed: int) -> Ints:
    """An order of all rows whose every beginning is close to stratified, rows of a group side by side.

    Each class's groups are shuffled and spread evenly: the ``i``-th of ``m`` stands at ``(i + 0.5) / m``.
    """
    group = np.arange(len(y)) if groups is None else np.unique(groups, return_inverse=True)[1]
    _, first = np.unique(group, return_index=True)
    group_class = np.asarray(y)[first]
    shuffled = make_generator("learning curve", seed).permutation(len(first))
    place = np.empty(len(first))
    for target in np.unique(group_class):
        members = shuffled[group_class[shuffled] == target]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    rank = np.empty(len(first))
    rank[shuffled] = np.arange(len(first))
    return np.lexsort((np.arange(len(y)), rank[group], place[group]))


def _whole_groups(taken: Ints, groups: Ints | None) -> Ints:
    return taken if groups is None else np.flatnonzero(np.isin(groups, groups[taken]))
