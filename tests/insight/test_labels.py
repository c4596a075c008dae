"""Wrong labels rank first, their number is estimated, and clean labels are left alone."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from pipeline.insight.labels import accuracy_range, find_doubts, with_neighbours


def made_up(
    noise: float, n: int = 3000, classes: int = 5, sharp: float = 3.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits that are calibrated up to a temperature of 2, labels of which a share is swapped, and which are."""
    generator = np.random.default_rng(seed)
    logits = sharp * generator.normal(size=(n, classes))
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    truth = (chances.cumsum(1) > generator.random((n, 1))).argmax(1)
    swapped = generator.random(n) < noise
    labels = np.where(swapped, (truth + generator.integers(1, classes, n)) % classes, truth)
    return 2 * logits, labels, swapped


@pytest.mark.parametrize("noise", [0.02, 0.05, 0.2])
def test_the_number_of_wrong_labels_is_estimated(noise: float) -> None:
    logits, labels, swapped = made_up(noise)
    doubts = find_doubts(logits, labels)
    assert doubts.wrong.sum() == pytest.approx(swapped.sum(), rel=0.35)
    count = len(doubts.doubted)
    assert doubts.expected_among_first(count) == pytest.approx(swapped[doubts.doubted].sum(), rel=0.25)
    assert roc_auc_score(swapped, doubts.wrong) > 0.9
    assert (np.diff(doubts.wrong[doubts.order]) <= 1e-12).all()


def test_clean_labels_are_left_alone() -> None:
    logits, labels, _ = made_up(0.0)
    doubts = find_doubts(logits, labels)
    assert doubts.wrong.sum() < 30 and len(doubts.doubted) < 15


def test_the_labels_of_neighbours_have_a_say() -> None:
    logits, labels, swapped = made_up(0.05, n=600)
    generator = np.random.default_rng(1)
    truth = np.where(swapped, logits.argmax(1), labels)
    near = np.array([generator.choice(np.flatnonzero(truth == truth[row]), 10) for row in range(600)])
    joined = with_neighbours(logits, near, labels)
    plain, helped = (roc_auc_score(swapped, find_doubts(each, labels).wrong) for each in (logits, joined))
    assert helped > plain
    unlabelled = with_neighbours(logits, near, np.full(600, -1))
    np.testing.assert_allclose(np.diff(unlabelled, axis=1), np.diff(logits, axis=1))


def test_the_suggestion_is_the_best_other_class() -> None:
    logits = np.array([[5.0, 1.0, 0.0], [5.0, 1.0, 0.0]])
    doubts = find_doubts(logits, np.array([0, 2]))
    assert doubts.suggestion.tolist() == [1, 0] and doubts.order[0] == 1


def test_it_ranks_as_cleanlab_does_on_the_same_probabilities() -> None:
    rank = pytest.importorskip("cleanlab.rank")
    logits, labels, swapped = made_up(0.05)
    chances = np.exp(logits - logits.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    theirs = -rank.get_label_quality_scores(labels, chances, method="self_confidence")
    assert roc_auc_score(swapped, find_doubts(logits, labels).wrong) >= roc_auc_score(swapped, theirs) - 1e-3


def test_the_accuracy_lies_between_what_doubts_allow() -> None:
    right, doubted = np.array([True, True, False, False]), np.array([True, False, True, False])
    assert accuracy_range(right, doubted) == (0.25, 0.75)
    assert accuracy_range(right, np.zeros(4, bool)) == (0.5, 0.5)
