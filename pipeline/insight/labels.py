"""Labels in doubt: how likely each is to be wrong, from logits of a head that has not seen the image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TEMPERATURES = np.geomspace(0.1, 10, 41)
ROUNDS = 60
# One wrong label in thirty, which few images cannot contradict: 3.4 % is the mean of ten well-known data sets
# (Northcutt, Athalye, Mueller 2021).
PRIOR_WRONG, PRIOR_LABELS = 1.0, 30.0
NEIGHBOUR_WEIGHT, HALF_A_VOTE = 0.25, 0.5
# Logarithms of probabilities are cut here, so that one very sure mistake does not decide the temperature.
LOWEST = -30.0

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Doubts:
    """How doubtful each of n labels is.

    Attributes:
        wrong: (n,) the probability that the label is wrong; its mean is the estimated share of wrong labels.
        suggestion: (n,) the class of the largest probability other than the label.
        order: rows by doubt, the most doubtful first.
    """

    wrong: Floats
    suggestion: Ints
    order: Ints

    @property
    def doubted(self) -> Ints:
        """Rows that are more likely wrong than right, the most doubtful first."""
        return self.order[self.wrong[self.order] > 0.5]

    def expected_among_first(self, count: int) -> float:
        """How many of the ``count`` most doubtful labels are likely to be wrong."""
        return float(self.wrong[self.order[:count]].sum())


def find_doubts(logits: Floats, labels: Ints, among: NDArray[np.bool_] | None = None) -> Doubts:
    """The doubts about ``labels`` (n,) from logits (n, c), which must be out of fold or of a head fitted elsewhere.

    Ranked by self-confidence, the probability of the given label, with the logit margin for what is beyond the
    resolution of that (arXiv 2510.16211 and Kuan, Mueller 2022 compare such scores; benchmarks/insight.py does on our
    data). The probability of being wrong is that of a noise model: with a small chance, which is estimated, a label is
    replaced by any other class, and the logits, at a temperature estimated with it, tell the true one.

    Args:
        among: (n,) the rows to estimate noise and temperature on; all by default.
    """
    rows = np.ones(len(labels), bool) if among is None or not among.any() else among
    temperature, noise = _noise_model(logits[rows], labels[rows])
    own = _log_softmax(logits / temperature)[np.arange(len(labels)), labels]
    right = np.exp(np.maximum(own, LOWEST))
    classes = logits.shape[1]
    kept, swapped = (1 - noise) * right, noise * (1 - right) / max(classes - 1, 1)
    wrong = swapped / np.maximum(kept + swapped, np.finfo(np.float64).tiny)
    others = logits.copy()
    others[np.arange(len(labels)), labels] = -np.inf
    margin = logits[np.arange(len(labels)), labels] - others.max(axis=1)
    return Doubts(wrong, others.argmax(axis=1), np.lexsort((margin, own)))


def with_neighbours(logits: Floats, near: Ints, targets: Ints) -> Floats:
    """Logits (n, c) of a head and of the labels that an image's nearest neighbours bear, the head counting more.

    Measured on three data sets and two backbones, swapped labels rank higher so, each time (benchmarks/insight.py).

    Args:
        near: (n, k) rows of ``targets`` (m,), an image itself not among its own; a target of -1 has no vote.
    """
    votes = np.zeros_like(logits)
    row, column = np.nonzero(targets[near] >= 0)
    np.add.at(votes, (row, targets[near[row, column]]), 1)
    share = (votes + HALF_A_VOTE) / (votes + HALF_A_VOTE).sum(axis=1, keepdims=True)
    return np.asarray(_log_softmax(logits) + NEIGHBOUR_WEIGHT * np.log(share))


def _noise_model(logits: Floats, labels: Ints) -> tuple[float, float]:
    """The temperature and the share of swapped labels that are most likely, given ``labels`` and a weak prior."""
    classes = logits.shape[1]
    best = (-np.inf, 1.0, 0.0)
    for temperature in TEMPERATURES:
        own = _log_softmax(logits / temperature)[np.arange(len(labels)), labels]
        right = np.exp(np.maximum(own, LOWEST))
        noise = 0.05
        for _ in range(ROUNDS):  # expectation maximisation of the one share
            swapped = noise * (1 - right) / max(classes - 1, 1)
            wrong = float((swapped / ((1 - noise) * right + swapped)).sum()) + PRIOR_WRONG
            noise = wrong / (len(labels) + PRIOR_LABELS)
        likely = float(np.log((1 - noise) * right + noise * (1 - right) / max(classes - 1, 1)).sum())
        likely += PRIOR_WRONG * np.log(noise) + (PRIOR_LABELS - PRIOR_WRONG) * np.log1p(-noise)
        best = max(best, (likely, float(temperature), noise))
    return best[1], best[2]


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def accuracy_range(right: NDArray[np.bool_], doubted: NDArray[np.bool_]) -> tuple[float, float]:
    """Between which the accuracy lies, should any of the ``doubted`` (n,) labels be wrong and the prediction true."""
    n = max(len(right), 1)
    low = float((right & ~doubted).sum()) / n
    return low, float((right | doubted).sum()) / n
