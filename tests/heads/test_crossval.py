from __future__ import annotations

import numpy as np
import pytest

from pipeline.heads.crossval import (
    expected_calibration_error,
    fit_temperature,
    hold_out,
    missing_rows,
    stratified_group_folds,
)


def test_folds_are_disjoint_cover_everything_and_are_stratified() -> None:
    y = np.repeat([0, 1, 2], [50, 30, 20])
    folds = stratified_group_folds(y, None, 5, seed=0)
    assert np.array_equal(np.sort(np.concatenate([test for _, test in folds])), np.arange(100))
    for train, test in folds:
        assert not set(train) & set(test)
        assert np.bincount(y[test]).tolist() == [10, 6, 4]


def test_groups_are_never_torn() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 30, 200)
    y = groups % 3
    for train, test in stratified_group_folds(y, groups, 5, seed=1):
        assert not set(groups[train]) & set(groups[test])
    inside, held = hold_out(y, groups, 0.2, seed=1)
    assert len(held) and not set(groups[inside]) & set(groups[held])


def test_a_class_with_two_groups_is_in_every_train_part() -> None:
    y = np.r_[np.zeros(40, int), np.ones(2, int), np.full(3, 2)]
    folds = stratified_group_folds(y, None, 5, seed=3)
    assert len(folds) == 5
    assert all(set(y[train]) == {0, 1, 2} for train, _ in folds)
    assert not missing_rows(y, folds).any()


@pytest.mark.parametrize(("shots", "expected"), [(1, 0), (2, 2), (3, 3), (9, 5)])
def test_tiny_classes_give_fewer_folds(shots: int, expected: int) -> None:
    assert len(stratified_group_folds(np.repeat(np.arange(7), shots), None, 5, seed=0)) == expected


def test_rows_of_a_class_with_one_group_are_marked() -> None:
    y = np.r_[np.zeros(10, int), 1]
    folds = stratified_group_folds(y, None, 5, seed=0)
    assert np.flatnonzero(missing_rows(y, folds)).tolist() == [10]


def test_seed_decides() -> None:
    y = np.repeat([0, 1], 50)
    first, again, other = (stratified_group_folds(y, None, 5, seed=s)[0][1].tolist() for s in (0, 0, 1))
    assert first == again != other


def test_hold_out_takes_the_fraction_of_every_class_and_leaves_single_rows() -> None:
    y = np.r_[np.repeat([0, 1], [50, 10]), 2]
    inside, held = hold_out(y, None, 0.2, seed=0)
    assert np.bincount(y[held]).tolist() == [10, 2]
    assert len(inside) + len(held) == 61 and 2 in y[inside]


def test_calibration_error_and_temperature() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 3))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    index = np.array([rng.choice(3, p=row) for row in p])
    assert expected_calibration_error(p, index) < 0.03
    assert fit_temperature(logits * 5, index) == pytest.approx(5, rel=0.1)
    sure = np.eye(3)[np.zeros(10, int)]
    assert expected_calibration_error(sure, np.r_[np.zeros(5, int), np.ones(5, int)]) == pytest.approx(0.5)
    assert 0 < fit_temperature(np.eye(3) * 3, np.arange(3)) < 0.1


@pytest.mark.parametrize("seed", range(40))
def test_a_class_that_is_always_the_minority_of_its_group_stays_in_train(seed: int) -> None:
    """Four patients with mostly one class and four with mostly another; one of each has an image of a third."""
    y = np.array([0, 0, 0] * 4 + [1, 1, 1] * 4)
    groups = np.repeat(np.arange(8), 3)
    y[[0, 12]] = 2
    train, held = hold_out(y, groups, 0.5, seed)
    assert set(y[train]) == {0, 1, 2}
    assert not set(groups[train]) & set(groups[held]) and sorted([*train, *held]) == list(range(len(y)))
