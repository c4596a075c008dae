"""Images that come in groups: intervals and tests by group, groups that cross the splits, and how runs record them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import t

from pipeline.artifacts import RunMetrics, read_metrics
from pipeline.evaluate import Provenance, compare_runs, comparison_notes, metric_lines, score, wilson
from pipeline.evaluate.compare import mcnemar_exact
from pipeline.evaluate.intervals import design_effect, share_interval, student95
from pipeline.features.cache import FeatureTable

from ..artifacts.examples import make_run, metrics_values, predictions, score_of

NAMES = ("ant", "bee")


class Says:
    """A head that answers the number in the first feature, and is as sure as the second says."""

    has_probabilities, why_no_probabilities, classes_ = True, None, np.array([0, 1])

    def predict(self, features: np.ndarray) -> np.ndarray:
        return features[:, 0].astype(np.int64)

    def predict_proba(self, features: np.ndarray) -> np.ndarray:
        sure = features[:, 1].astype(np.float64)
        first = np.where(features[:, 0] == 0, sure, 1 - sure)
        return np.stack([first, 1 - first], axis=1)


def scored(y: Sequence[int], right: Sequence[bool], groups: Sequence[int], val_from: int = 0) -> RunMetrics:
    """The metrics of a table whose rows from ``val_from`` on are val; those before are train."""
    n, targets = len(y), np.asarray(y)
    predicted = np.where(right, targets, 1 - targets)
    digests = np.arange(16 * n).reshape(n, 16).astype(np.uint8)
    digests[:, :4] = np.arange(n, dtype="<u4")[:, None].view(np.uint8)
    splits = np.where(np.arange(n) < val_from, 0, 1).astype(np.int8)
    features = np.stack([predicted, np.full(n, 0.9)], axis=1).astype(np.float32)
    paths = [f"{number}.jpg" for number in range(n)]
    table = FeatureTable(Path("/x"), NAMES, features, targets, paths, splits, digests, np.asarray(groups))
    provenance = Provenance("the head", digests[splits == 0], np.array([3, 1]))
    head: Any = Says()
    return score(head, table, table.labelled(1), provenance, split="val")[0]


def patients(count: int, images: int, share: float = 0.8, seed: int = 0) -> tuple[list[int], list[bool], list[int]]:
    """All images of a patient are right, or all wrong."""
    generator = np.random.default_rng(seed)
    right = np.repeat(generator.random(count) < share, images)
    return [0, 1] * (len(right) // 2), right.tolist(), np.repeat(np.arange(count), images).tolist()


# -- intervals -------------------------------------------------------------------------------------------------------


def test_images_of_one_group_are_no_more_evidence_than_one() -> None:
    y, right, groups = patients(30, 10)
    alone, grouped = scored(y, right, list(range(300))), scored(y, right, groups)
    assert alone.metrics["accuracy"] == grouped.metrics["accuracy"]
    assert alone.metrics["accuracy_ci95"] == wilson(sum(right), 300)
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "log_loss", "ece"):
        low, high = alone.metrics[f"{name}_ci95"]  # type: ignore[misc]
        wide_low, wide_high = grouped.metrics[f"{name}_ci95"]  # type: ignore[misc]
        assert wide_high - wide_low > 1.5 * (high - low), name
    low, high = grouped.metrics["accuracy_ci95"]  # type: ignore[misc]
    assert [low, high] == pytest.approx(wilson(sum(right) / 10, 30, student95(29)), rel=0.05)
    narrow, wide = alone.per_class[0].recall_ci95, grouped.per_class[0].recall_ci95
    assert narrow and wide and wide[1] - wide[0] > 1.5 * (narrow[1] - narrow[0])


@pytest.mark.parametrize(("share", "count"), [(0.5, 20), (0.8, 40), (0.95, 100)])
def test_intervals_by_group_cover(share: float, count: int) -> None:
    covered = {"images": 0, "groups": 0}
    for seed in range(200):
        _, right, groups = patients(count, 5, share, seed)
        for name, own in (("images", np.arange(len(right))), ("groups", np.array(groups))):
            low, high = share_interval(np.array(right), own) or (0, 0)
            covered[name] += low <= share <= high
    assert covered["groups"] >= 180 and covered["images"] < 160


def test_groups_without_effect_change_little() -> None:
    generator = np.random.default_rng(0)
    right, groups = generator.random(1000) < 0.8, np.repeat(np.arange(200), 5)
    low, high = share_interval(right, groups) or (0, 0)
    assert high - low == pytest.approx(np.ptp(wilson(int(right.sum()), 1000) or [0]), rel=0.1)


def test_a_perfect_score_counts_groups_as_images() -> None:
    assert share_interval(np.ones(40, bool), np.repeat(np.arange(8), 5)) == wilson(8, 8, student95(7))
    assert design_effect(np.zeros(40), np.repeat(np.arange(8), 5)) == 5
    assert share_interval(np.ones(40, bool), np.zeros(40, np.int64)) is None
    assert share_interval(np.ones(0, bool), np.zeros(0, np.int64)) is None


@pytest.mark.parametrize("freedom", [3, 5, 10, 100])
def test_students_quantile(freedom: int) -> None:
    assert student95(freedom) == pytest.approx(t.ppf(0.975, freedom), rel=0.01)


def test_it_is_said_when_intervals_go_by_group() -> None:
    y, right, groups = patients(30, 10)
    assert "Intervals take the 30 groups of these images" in scored(y, right, groups).protocol
    assert "group" not in scored(y, right, list(range(300))).protocol
    few = scored(*patients(4, 10))
    assert any("4 groups only" in warning for warning in few.warnings)
    one = scored([0, 1] * 5, [True] * 10, [7] * 10)
    assert one.metrics["accuracy_ci95"] is None and "of one group" in one.reasons["accuracy_ci95"]


# -- groups that cross the splits ------------------------------------------------------------------------------------


def test_groups_that_cross_the_splits_are_leaks() -> None:
    # Train holds groups 0 and 1; of the six images of val four are of these, and right.
    metrics = scored([0, 1] * 4, [True] * 6 + [False, True], [0, 1, 0, 0, 1, 1, 2, 3], val_from=2)
    leak = metrics.leak
    assert leak is not None and (leak.leaked, leak.by_group, leak.n, leak.accuracy) == (4, 4, 2, 0.5)
    said = "4 of the 6 images of val are of groups that train has too. Without them the accuracy is 50.0 %"
    assert any(said in line for line in metric_lines(metrics))
    assert scored([0, 1] * 4, [True] * 8, list(range(8)), val_from=2).leak is None


# -- comparison ------------------------------------------------------------------------------------------------------


def flips(differences: np.ndarray) -> float:
    """The sign-flip test by trying all signs."""
    sums = [0]
    for difference in differences.tolist():
        sums = [total + sign * difference for total in sums for sign in (-1, 1)]
    return float(np.mean(np.abs(sums) >= abs(differences.sum())))


def test_whole_groups_take_the_coin_tosses() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        groups = generator.integers(0, 9, 60)
        first, second = generator.random(60) < 0.8, generator.random(60) < 0.6
        expected = flips(np.array([(first.astype(int) - second)[groups == group].sum() for group in range(9)]))
        assert mcnemar_exact(first, second, groups) == pytest.approx(expected, abs=1e-12)
    assert mcnemar_exact(first, second, np.arange(60)) == mcnemar_exact(first, second)


def test_one_group_alone_is_no_difference() -> None:
    first, second = np.arange(100) < 50, np.arange(100) < 35
    assert mcnemar_exact(first, second) < 1e-3
    assert mcnemar_exact(first, second, np.repeat(np.arange(2), 50)) == 1.0


def test_runs_remember_their_groups(tmp_path: Path) -> None:
    """Twenty images of one patient make no difference real; the same images without groups do."""
    y = [0, 1] * 50
    wrong = [1 - each if place < 20 else each for place, each in enumerate(y)]
    groups = [0] * 20 + list(range(1, 81))
    runs = {}
    for name, predicted in (("good", y), ("bad", wrong)):
        runs[name] = make_run(tmp_path, name, y, predicted)
        grouped = score_of(y, predicted, None, groups=groups)
        runs[f"{name} grouped"] = make_run(tmp_path, f"{name}-grouped", y, predicted, metrics=grouped)
    apart = compare_runs([runs["good"], runs["bad"]])
    assert apart.pairs[0].p == pytest.approx(2**-19) and apart.pairs[0].groups == apart.pairs[0].n == 100
    by_group = compare_runs([runs["good grouped"], runs["bad grouped"]])
    assert (by_group.pairs[0].n, by_group.pairs[0].groups, by_group.pairs[0].p) == (100, 81, 1.0)
    assert any("Images of one group" in note for note in comparison_notes(by_group))
    mixed = compare_runs([runs["good"], runs["bad grouped"]])
    assert mixed.pairs[0].p == 1.0, "what one run knows of groups holds for the other too"
    assert json.loads(json.dumps(by_group.as_dict()))["pairs"][0]["groups"] == 81


def test_groups_are_recorded_where_there_are_any_and_must_fit() -> None:
    assert scored(*patients(5, 2)).groups == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert scored([0, 1], [True, True], [5, 3]).groups is None
    with pytest.raises(ValueError, match="groups has 2 entries"):
        RunMetrics.model_validate(metrics_values([0], [0], groups=[0, 0]))


def test_a_run_whose_groups_do_not_fit_its_predictions_is_damaged(tmp_path: Path) -> None:
    grouped = score_of([0, 1, 0, 1], [0, 1, 0, 1], None, groups=[0, 0, 1, 1])
    run = make_run(tmp_path, "a", [0, 1], [0, 1], rows=predictions([0, 1], [0, 1]), metrics=grouped)
    assert read_metrics(run).groups == [0, 0, 1, 1]
    notes = compare_runs([run], skip_damaged=True).notes
    assert "predictions.csv is damaged" in notes[0]
