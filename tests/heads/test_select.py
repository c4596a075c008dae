from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from pipeline.errors import HeadError
from pipeline.heads import Selection, choose_head, curve_band, learning_curve, make_head, stratified_group_folds
from pipeline.heads.curve import nested_order
from pipeline.heads.select import baseline_answers
from pipeline.params import HeadParams, LogisticParams, NetworkParams, SklearnParams

from .conftest import make_features

NAMES = ["a", "b", "c"]


def params(kind: str | list[str], **rest: object) -> HeadParams:
    return HeadParams(kind=kind, folds=3, **rest)  # type: ignore[arg-type]


def test_a_single_kind_is_fitted_with_cheap_baselines_beside_it() -> None:
    X, y = make_features()
    choice = choose_head(params("logistic"), X, y, class_names=NAMES)
    assert choice.head.kind == "logistic"
    rows = choice.leaderboard
    assert [(row["kind"], row["chosen"], row["baseline"]) for row in rows] == [
        ("logistic", True, False),
        ("nearest_centroid", False, True),
        ("knn", False, True),
    ]
    assert all(0 < row["cv_accuracy"] <= 1 for row in rows)
    assert choice.selections == (Selection("the strength C", "by 3-fold cross-validation", "train"),)
    json.dumps(rows, allow_nan=False)


def test_cross_validation_chooses_between_kinds() -> None:
    X, y = make_features(150, 24, 3)
    bad = SklearnParams(estimator="sklearn.dummy.DummyClassifier", params={})
    choice = choose_head(params(["sklearn", "logistic"], sklearn=bad), X, y, class_names=NAMES)
    assert choice.head.kind == "logistic"
    assert choice.entries[0].cv is not None and choice.entries[0].cv.weighted_accuracy is None
    assert Selection("the kind of head", "by 3-fold cross-validation", "train") in choice.selections


@pytest.mark.parametrize("kind", ["logistic", "linear", "svm"])
def test_the_leaderboard_shows_a_calibrated_head_as_it_is_used(kind: str) -> None:
    X, y = make_features(120, 12, 3)
    section = NetworkParams(epochs=5, lr=0.01)
    choice = choose_head(params(kind, calibrate="temperature", linear=section), X, y, class_names=NAMES)
    selected = choice.head.selected
    expected = selected.get("cv_log_loss_calibrated", selected["cv_log_loss"])
    assert choice.leaderboard[0]["cv_log_loss"] == expected
    assert selected["temperature"] != 1


def test_a_held_out_set_decides_where_it_is_given() -> None:
    X, y = make_features(150, 24, 3)
    flipped = (y + 1) % 3  # a validation set on which only being wrong helps
    choice = choose_head(
        params(["logistic", "sklearn"], sklearn=SklearnParams(estimator="sklearn.dummy.DummyClassifier")),
        X,
        y,
        class_names=NAMES,
        held_out=(X, flipped),
    )
    assert choice.head.kind == "sklearn"
    assert Selection("the kind of head", "by accuracy", "val") in choice.selections


@pytest.mark.parametrize("on_val", [False, True])
def test_with_class_weights_the_classes_count_and_not_the_images(on_val: bool) -> None:
    X, y = make_features(300, 24, 2, spread=0.3)
    keep = np.flatnonzero((y == 0) | (np.arange(300) % 8 == 0))
    X, y = X[keep], y[keep]
    largest = SklearnParams(estimator="sklearn.dummy.DummyClassifier", params={"strategy": "constant", "constant": 0})
    kinds, held_out = ["sklearn", "logistic"], (X[100:], y[100:]) if on_val else None
    X, y = (X[:100], y[:100]) if on_val else (X, y)
    plain, balanced, named = (
        choose_head(params(kinds, sklearn=largest, class_weight=weight), X, y, class_names=NAMES[:2], held_out=held_out)
        for weight in (None, "balanced", {"b": 7.0})
    )
    by_kind = {row["kind"]: row for row in balanced.leaderboard}
    name = "val" if on_val else "cv"
    assert by_kind["sklearn"][f"{name}_weighted_accuracy"] == pytest.approx(0.5)
    assert by_kind["logistic"][f"{name}_weighted_accuracy"] > 0.55
    assert by_kind["logistic"][f"{name}_accuracy"] < by_kind["sklearn"][f"{name}_accuracy"]
    assert f"{name}_weighted_accuracy" in by_kind["knn"] and f"{name}_weighted_accuracy" not in plain.leaderboard[0]
    assert balanced.head.kind == named.head.kind == "logistic"
    how = {choice.selections[-1].how for choice in (balanced, named)}
    ending = "" if on_val else " in 3-fold cross-validation"
    assert how == {f"by balanced accuracy{ending}", f"by weighted accuracy{ending}"}


def test_a_head_without_probabilities_has_a_row_too() -> None:
    X, y = make_features(120, 10, 4)
    section = SklearnParams(estimator="svm", params={"decision_function_shape": "ovo"})
    choice = choose_head(params(["sklearn", "logistic"], sklearn=section), X, y, class_names=[*NAMES, "d"])
    row = next(row for row in choice.leaderboard if row["kind"] == "sklearn")
    assert row["cv_log_loss"] is None and row["cv_accuracy"] > 0


def test_single_rows_of_each_class_cannot_compare_kinds() -> None:
    X, y = np.eye(3, 8, dtype=np.float32), np.arange(3)
    assert choose_head(params("logistic"), X, y, class_names=NAMES).head.kind == "logistic"
    with pytest.raises(HeadError, match="impossible"):
        choose_head(params(["logistic", "knn"]), X, y, class_names=NAMES)


@pytest.mark.parametrize("kind", ["knn", "nearest_centroid"])
def test_baselines_are_about_what_scikit_learn_says(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr("pipeline.heads.select.BLOCK", 48)
    X, y = make_features(200, 24, 3, spread=0.5)
    folds = stratified_group_folds(y, None, 3, 0)
    (rows, cv), (picked, val) = baseline_answers(kind, X, y, folds, X[:50], 0)
    ours, other = (cv == y[rows]).mean(), (val == y[picked]).mean()
    assert len(rows) == 200 and len(picked) == 50
    head = make_head(kind, params(kind), class_names=NAMES).fit(X, y)
    assert ours == pytest.approx(head.cross_validate(X, y).accuracy, abs=1e-9)
    assert other == pytest.approx((head.predict(X[:50]) == y[:50]).mean(), abs=1e-9)


def test_a_head_that_was_watched_with_a_part_of_train_shows_its_score_where_it_stands_alone() -> None:
    X, y = make_features()
    choice = choose_head(params("linear", linear=NetworkParams(epochs=3)), X, y, class_names=NAMES)
    row = choice.leaderboard[0]
    assert 0 < row["held_out_accuracy"] <= 1 and row["cv_accuracy"] is None
    both = choose_head(params(["linear", "knn"], linear=NetworkParams(epochs=3)), X, y, class_names=NAMES)
    assert all("held_out_accuracy" not in row and row["cv_accuracy"] for row in both.leaderboard)


def test_the_default_head_does_without_importing_scikit_learn() -> None:
    code = (
        "import sys, numpy as np; from pipeline.heads import choose_head; from pipeline.params import HeadParams\n"
        "X = np.random.default_rng(0).normal(size=(40, 6)).astype('float32'); y = (X[:, 0] > 0).astype(int)\n"
        "choose_head(HeadParams(), X, y, class_names=['a', 'b'])\n"
        "print([name for name in ('sklearn', 'skops', 'scipy', 'joblib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_curve_rises_with_images_and_parts_are_nested_and_stratified() -> None:
    X, y = make_features(300, 24, 3)
    X_val, y_val = X[200:], y[200:]
    chosen = params("logistic", logistic=LogisticParams(strengths=5))
    rows = learning_curve(
        lambda: make_head("logistic", chosen, class_names=NAMES),
        X[:200],
        y[:200],
        None,
        X_val,
        y_val,
        fractions=(0.1, 0.4, 1.0),
        repeats=2,
    )
    assert [(row["repeat"], row["images"]) for row in rows] == [(0, 20), (0, 80), (0, 200), (1, 20), (1, 80)]
    band = curve_band(rows)
    assert band[0]["accuracy"] < band[-1]["accuracy"]
    assert all(point["low"] <= point["accuracy"] <= point["high"] for point in band)


def test_the_curve_counts_images_and_not_their_views() -> None:
    X, y = make_features(90, 12, 3)
    chosen = params("logistic", logistic=LogisticParams(strengths=5))
    views = np.stack([X, X + 0.1, X - 0.1])
    rows = learning_curve(
        lambda: make_head("logistic", chosen, class_names=NAMES), views, y, None, X, y, fractions=(0.5, 1.0), repeats=1
    )
    assert [row["images"] for row in rows] == [45, 90]


def test_every_beginning_of_the_order_is_stratified_and_keeps_groups() -> None:
    y = np.repeat([0, 1], [80, 20])
    order = nested_order(y, None, seed=0)
    assert sorted(order) == list(range(100)) and np.bincount(y[order[:10]]).tolist() == [8, 2]
    groups = np.arange(100) // 4
    ids = groups[nested_order(y, groups, seed=0)]
    assert (np.diff(ids) != 0).sum() == 24  # each group once, side by side
