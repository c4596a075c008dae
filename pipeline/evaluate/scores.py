"""The scores as weighted sums over rows, so that one formula gives the value and all its bootstrap resamples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 15
TOP = 5
_SMALLEST = float(np.finfo(np.float64).eps)
_ROWS = 1 << 16

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class RowScores:
    """What each of n rows adds to the scores that need probabilities.

    Args:
        loss: (n,) -log of the true class's probability, which is clipped to [2.2e-16, 1] as scikit-learn does: one
            confident mistake costs 36, not infinity.
        confidence: (n,) the largest probability.
        right: (n,) whether the class of the largest probability is the true one.
        bins: (n,) index of the confidence among `BINS` equal-width bins (low, high].
        in_top: (n,) whether the true class is among the five most probable, ties going to the lower class index.
    """

    loss: Floats
    confidence: Floats
    right: NDArray[np.bool_]
    bins: Ints
    in_top: NDArray[np.bool_]


def row_scores(y: Ints, probabilities: Floats) -> RowScores:
    """`RowScores` of targets (n,) and probabilities (n, c), in blocks so that memory stays bounded."""
    n = len(y)
    true, confidence = np.empty(n), np.empty(n)
    right, in_top = np.empty(n, dtype=bool), np.empty(n, dtype=bool)
    for start in range(0, n, _ROWS):
        rows = slice(start, start + _ROWS)
        block, target = probabilities[rows], y[rows]
        true[rows] = block[np.arange(len(block)), target]
        confidence[rows] = block.max(axis=1)
        right[rows] = block.argmax(axis=1) == target
        in_top[rows] = _rank(block, target) < TOP
    loss = -np.log(np.clip(true, _SMALLEST, 1.0))
    bins = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    return RowScores(loss + 0.0, confidence, right, bins, in_top)


def _rank(block: Floats, target: Ints) -> Ints:
    own = block[np.arange(len(block)), target][:, None]
    before = np.arange(block.shape[1])[None, :] < target[:, None]
    rank: Ints = np.count_nonzero((block > own) | ((block == own) & before), axis=1)
    return rank


def loss_and_calibration(rows: RowScores, weights: Floats) -> tuple[Floats, Floats]:
    """Mean log loss and expected calibration error for each row of ``weights`` (b, n), as two arrays (b,).

    The calibration error is the mean over images of |accuracy - confidence| of their bin.
    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    total = weights.sum(axis=1)
    gaps = rows.right - rows.confidence
    by_bin = np.array([np.bincount(rows.bins, row * gaps, minlength=BINS) for row in weights])
    return weights @ rows.loss / total, np.abs(by_bin).sum(axis=1) / total


class ClassSums:
    """Sums of row weights per class: how many there are, how many were predicted, how many of these rightly.

    Args:
        y, predicted: (n,) indices of classes.
    """

    def __init__(self, y: Ints, predicted: Ints) -> None:
        self.classes = np.union1d(y, predicted)
        self.y = np.searchsorted(self.classes, y)
        self.predicted = np.searchsorted(self.classes, predicted)
        self.right = y == predicted

    def balanced_accuracy_and_f1(self, weights: Floats) -> tuple[Floats, Floats]:
        """Balanced accuracy and macro F1 for each row of ``weights`` (b, n), as two arrays (b,).

        As in scikit-learn, balanced accuracy averages over classes that have images, F1 over classes that have
        images or were predicted; in a resample these are the classes of that resample.
        """
        there, predicted = self._sums(weights, self.y), self._sums(weights, self.predicted)
        hits = self._sums(weights * self.right, self.y)
        recall = np.divide(hits, there, out=np.zeros_like(hits), where=there > 0)
        either = there + predicted
        f1 = np.divide(2 * hits, either, out=np.zeros_like(hits), where=either > 0)
        return recall.sum(axis=1) / (there > 0).sum(axis=1), f1.sum(axis=1) / (either > 0).sum(axis=1)

    def _sums(self, weights: Floats, index: Ints) -> Floats:
        return np.array([np.bincount(index, row, minlength=len(self.classes)) for row in weights], dtype=np.float64)
