"""Rounding passes, another image or another transform does not."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.features.rounding import Features
from pipeline.features.verify import TOLERANCES, Agreement, compare_features


def relu_features(seed: int, count: int = 20) -> Features:
    """Features as backbones give them: not negative, correlated between images."""
    random = np.random.default_rng(seed)
    common = random.random(256) * 2
    return np.maximum(common + 0.5 * random.standard_normal((count, 256)), 0).astype(np.float32)


FEATURES = relu_features(0)


def compare(stored: Features, computed: Features) -> Agreement:
    """Among images as different as the examples."""
    return compare_features(stored, computed, FEATURES)


@pytest.mark.parametrize(("precision", "noise"), [("float32", 1e-3), ("float16", 3e-3), ("bfloat16", 2e-2)])
def test_the_noise_of_a_precision_is_within_its_tolerance(precision: str, noise: float) -> None:
    noisy = FEATURES * (1 + noise * np.random.default_rng(1).standard_normal(FEATURES.shape)).astype(np.float32)
    assert compare(FEATURES, noisy).within(TOLERANCES[precision]).all()


@pytest.mark.parametrize("precision", sorted(TOLERANCES))
def test_another_image_is_not(precision: str) -> None:
    assert not compare(FEATURES, np.roll(FEATURES, 1, axis=0)).within(TOLERANCES[precision]).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_one_wild_value_is_not(value: float) -> None:
    wild = FEATURES.copy()
    wild[3, 7] = value
    expected = [row != 3 for row in range(len(FEATURES))]
    assert compare(FEATURES, wild).within(TOLERANCES["bfloat16"]).tolist() == expected
    assert compare(wild, FEATURES).within(TOLERANCES["bfloat16"]).tolist() == expected


def test_the_scale_counts_though_the_direction_agrees() -> None:
    agreement = compare(FEATURES, FEATURES * 2)
    assert np.allclose(agreement.cosines, 1) and not agreement.within(TOLERANCES["bfloat16"]).any()


def test_zeros_agree_with_zeros_only() -> None:
    zeros = np.zeros((2, 4), np.float32)
    other = np.array([[0, 0, 0, 0], [0, 0, 1e-6, 0]], np.float32)
    assert compare(zeros, other).within(TOLERANCES["bfloat16"]).tolist() == [True, False]


def test_no_rows_agree() -> None:
    none = np.empty((0, 4), np.float32)
    assert compare(none, none).within(TOLERANCES["float32"]).tolist() == []


def test_many_small_values_that_are_all_wrong_are_not_hidden_by_a_large_one() -> None:
    old = np.full((1, 256), 0.009, np.float32)
    old[0, 0] = 1.0
    new = np.where(old == 1.0, 1.0, 0.0).astype(np.float32)
    agreement = compare(old, new)
    assert agreement.differences[0] < 0.01 and not agreement.within(TOLERANCES["float32"]).any()


@pytest.mark.parametrize("precision", sorted(TOLERANCES))
def test_images_of_a_random_network_are_told_apart(precision: str) -> None:
    """Its features nearly equal each other: cosines of different images lie above 0.999."""
    common = np.random.default_rng(0).random(256)
    alike = (common + 0.01 * np.random.default_rng(1).standard_normal((40, 256))).astype(np.float32)
    swapped = compare_features(alike, np.roll(alike, 1, axis=0), alike)
    assert (swapped.cosines > 0.999).all() and not swapped.within(TOLERANCES[precision]).any()
    noisy = alike * (1 + 2e-4 * np.random.default_rng(2).standard_normal(alike.shape)).astype(np.float32)
    assert compare_features(alike, noisy, alike).within(TOLERANCES[precision]).all()
