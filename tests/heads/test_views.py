"""Augmented views of images are learnt from; what is chosen goes by the plain images."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from pipeline.errors import HeadError
from pipeline.heads import choose_head, make_head, standardisation, stratified_group_folds
from pipeline.heads.network import NetworkHead
from pipeline.params import HeadParams, LogisticParams, NetworkParams

from .conftest import make_features

NAMES = ["a", "b", "c"]


def with_views(n: int = 90, d: int = 16) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features (3, n, d) of which the views tell less than the plain images, targets, and groups of two."""
    X, y = make_features(n, d, 3, spread=1.5)
    rng = np.random.default_rng(1)
    noise = [rng.normal(size=X.shape).astype(np.float32) * X.std(axis=0) * 0.7 for _ in range(2)]
    return np.stack([X, *(X + part for part in noise)]), y, np.arange(n) // 2


def test_the_strength_is_judged_on_plain_images_alone() -> None:
    X, y, _ = with_views()
    params = LogisticParams(strengths=4, c_min=1e-3, c_max=1.0, path="full")
    head = make_head("logistic", HeadParams(folds=3, logistic=params), class_names=NAMES).fit(X, y)
    mean, scale = standardisation(X.reshape(-1, 16), True)
    scaled = (X - mean) / scale
    for C, loss in head.selected["curve"]:
        total, right = 0.0, 0
        for train, test in stratified_group_folds(y, None, 3, 0):
            rows, targets = scaled[:, train].reshape(-1, 16), np.tile(y[train], 3)
            model = LogisticRegression(C=C, tol=1e-10, max_iter=20_000).fit(rows, targets)
            total -= model.predict_log_proba(scaled[0, test])[np.arange(len(test)), y[test]].sum()
            right += int((model.predict(scaled[0, test]) == y[test]).sum())
        assert loss == pytest.approx(total / len(y), rel=2e-3)
        if head.selected["C"] == pytest.approx(C):
            assert head.selected["cv_accuracy"] == pytest.approx(right / len(y), abs=0.012)


@pytest.mark.parametrize("kind", ["logistic", "linear", "svm", "knn"])
def test_every_kind_is_judged_on_plain_images_alone(kind: str) -> None:
    X, y, groups = with_views()
    section = NetworkParams(epochs=15, lr=0.01)
    params = HeadParams(kind=kind, folds=3, calibrate="temperature", linear=section)
    head = make_head(kind, params, class_names=NAMES).fit(X, y, groups)
    seen = head.cross_validate(X, y, groups)
    assert seen.predicted.shape == (90,) and seen.index.tolist() == y.tolist() and seen.known.all()
    assert head.selected["cv_accuracy"] == seen.accuracy
    alone = make_head(kind, params, class_names=NAMES).fit(X[0], y, groups)
    assert (head.logits(X[0]) != alone.logits(X[0])).any()  # though all views are learnt from
    if isinstance(head, NetworkHead):
        assert head.selected["held_out"] == alone.selected["held_out"] < 30


def test_no_view_of_an_image_trains_what_is_tested_on_it() -> None:
    X, y, groups = with_views(30)
    head = make_head("svm", HeadParams(kind="svm", folds=3), class_names=NAMES)
    _, index, rows = head._take(X, y, groups)
    train, held = head.held_out(index, rows, 0.3)
    for inside, outside in [*head.folds(index, rows), (train, held)]:
        assert len(inside) % 3 == 0 and outside.max() < 30
        assert not set(groups[inside % 30]) & set(groups[outside])
        assert len(set(inside % 30)) == len(inside) / 3 == 30 - len(outside)


def test_few_images_with_many_views_are_still_few() -> None:
    X, y, _ = with_views(9)
    head = make_head("logistic", HeadParams(), class_names=NAMES).fit(X, y)
    assert any("fewer than 5 images" in warning for warning in head.warnings)


def test_the_leaderboard_judges_all_kinds_on_plain_images() -> None:
    X, y, groups = with_views()
    section = NetworkParams(epochs=5, lr=0.01)
    choice = choose_head(
        HeadParams(kind=["knn", "linear"], folds=3, linear=section), X, y, groups, class_names=NAMES, held_out=None
    )
    for entry in choice.entries[:2]:
        assert entry.head is not None and entry.cv is not None
        assert entry.cv.accuracy == entry.head.cross_validate(X, y, groups).accuracy
        assert round(90 * entry.cv.accuracy, 6) == round(90 * entry.cv.accuracy)


def test_views_that_do_not_fit_are_refused() -> None:
    X, y, _ = with_views()
    with pytest.raises(HeadError, match="do not fit"):
        make_head("logistic", HeadParams(), class_names=NAMES).fit(X, np.tile(y, 3))
