"""Nearest centroid and nearest neighbours on the folds of train: what a head should beat, at almost no cost."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..runtime.seeds import make_generator
from .base import Features, Ints
from .folds import Fold
from .layers import standardisation

NEIGHBOURS = 5
KNN_QUERIES = 4_000
KNN_REFERENCES = 20_000
BATCH = 1024

Predict = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def baseline_accuracies(
    kind: str, X: Features, index: Ints, folds: list[Fold], other: tuple[Features, Ints] | None, seed: int
) -> tuple[float | None, float | None]:
    """Accuracy of ``nearest_centroid`` or ``knn`` out of fold on train, and on ``other`` rows; features standardised.

    Args:
        index: class positions (n,); those of ``other`` may hold -1 for a class that train does not have.
        folds: none where nothing can be held out; the first accuracy is then None.
    """
    predict = {"nearest_centroid": nearest_centroid, "knn": nearest_neighbours}[kind]
    mean, scale = standardisation(X, True)

    def scaled(rows: Features) -> Tensor:
        return torch.from_numpy(((rows - mean) / scale).astype(np.float32))

    rows, target = scaled(X), torch.from_numpy(index)
    generator = make_generator("baseline", seed)
    hits = asked = 0
    for train, test in folds:
        test = _part(test, KNN_QUERIES // len(folds), generator)
        hits += int((_predicted(predict, rows, target, train, rows[test], generator) == target[test]).sum())
        asked += len(test)
    on_other = None
    if other is not None and len(other[0]):
        picked = _part(np.arange(len(other[0])), KNN_QUERIES, generator)
        answers = _predicted(predict, rows, target, np.arange(len(X)), scaled(other[0][picked]), generator)
        on_other = float((answers.numpy() == other[1][picked]).mean())
    return hits / asked if asked else None, on_other


def nearest_centroid(queries: Tensor, rows: Tensor, target: Tensor, classes: int) -> Tensor:
    """The class (m,) of the nearest class mean; classes without rows are never the answer."""
    counts = torch.bincount(target, minlength=classes)
    sums = torch.zeros(classes, rows.shape[1]).index_add_(0, target, rows)
    distances = _distances(queries, sums / counts.clamp_min(1)[:, None])
    return distances.masked_fill(counts == 0, torch.inf).argmin(1)


def nearest_neighbours(queries: Tensor, rows: Tensor, target: Tensor, classes: int) -> Tensor:
    """The commonest class (m,) among the five nearest rows; the nearer neighbours decide a tie."""
    count = min(NEIGHBOURS, len(rows))
    votes = 1 + 0.01 * torch.arange(count, 0, -1)
    answers = []
    for part in torch.split(queries, BATCH):
        near = _distances(part, rows).topk(count, dim=1, largest=False).indices
        ballot = torch.zeros(len(part), classes).scatter_add_(1, target[near], votes.expand(len(part), -1))
        answers.append(ballot.argmax(1))
    return torch.cat(answers)


def _distances(left: Tensor, right: Tensor) -> Tensor:
    """Squared Euclidean distances (m, n), up to what is the same for every column."""
    return right.square().sum(1) - 2 * left @ right.T


def _predicted(
    predict: Predict, rows: Tensor, target: Tensor, train: Ints, queries: Tensor, generator: np.random.Generator
) -> Tensor:
    train = _part(train, KNN_REFERENCES, generator)
    return predict(queries, rows[train], target[train], int(target.max()) + 1)


def _part(positions: Ints, limit: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """At most ``limit`` of the positions, by chance."""
    return positions if len(positions) <= limit else np.sort(generator.choice(positions, limit, replace=False))
