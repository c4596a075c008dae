"""Copies are found, mere likeness is not, and the bar says how often it errs."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pipeline.insight.duplicates import (
    Bar,
    Copies,
    alignment,
    calibrate,
    copies_of,
    duplicate_groups,
    near_leaks,
    pairs_over,
    proposed_pairs,
)
from pipeline.insight.looks import icon_of
from pipeline.insight.neighbours import find_neighbours


def picture(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def feature(image: Image.Image) -> np.ndarray:
    """A stand-in for a backbone: the picture and its mirror image at 6 x 6."""
    small = np.asarray(image.resize((6, 6), Image.Resampling.BOX), np.float32)
    return np.concatenate([(small + small[:, ::-1]).ravel(), np.abs(small - small[:, ::-1]).ravel()])


@pytest.mark.parametrize("kind", ["re-encoded", "resized", "cropped", "flipped", "rotated"])
def test_a_copy_aligns_and_another_picture_does_not(kind: str) -> None:
    generator = np.random.default_rng(0)
    icons = np.stack([icon_of(picture(seed)) for seed in range(12)])
    copies = np.stack([icon_of(copies_of(picture(seed), generator)[kind]) for seed in range(12)])
    rows = np.arange(12)
    own = alignment(icons, copies, np.stack([rows, rows], 1))
    other = alignment(icons, copies, np.stack([rows, np.roll(rows, 1)], 1))
    assert own.min() > 0.93 and other.max() < 0.8
    np.testing.assert_allclose(alignment(copies, icons, np.stack([rows, rows], 1)), own, atol=1e-5)


def survey(count: int = 300, planted: int = 20) -> tuple[Bar, np.ndarray, set[tuple[int, int]]]:
    """The pairs that are found among ``count`` pictures of which the last are copies of the first."""
    generator = np.random.default_rng(1)
    originals = [picture(seed) for seed in range(count - planted)]
    kinds = ("re-encoded", "resized", "cropped", "flipped", "rotated")
    images = originals + [copies_of(originals[i], generator)[kinds[i % 5]] for i in range(planted)]
    features = np.stack([feature(image) for image in images])
    icons = np.stack([icon_of(image) for image in images])
    digests = np.random.default_rng(2).integers(0, 256, (count, 16)).astype(np.uint8)
    near = find_neighbours(digests, features)
    pairs = proposed_pairs(near, icons)
    made = [(i, kind, copy) for i in range(100, 130) for kind, copy in copies_of(images[i], generator).items()]
    copies = Copies(
        np.array([i for i, _, _ in made]),
        [kind for _, kind, _ in made],
        np.stack([feature(copy) for *_, copy in made]),
        np.stack([icon_of(copy) for *_, copy in made]),
    )
    bar = calibrate(copies, features, near.mean, icons, pairs)
    found, scores = pairs_over(pairs, bar)
    assert (np.diff(scores) <= 0).all()
    return bar, found, {(i, count - planted + i) for i in range(planted)}


def test_planted_copies_are_found_at_a_bar_that_is_measured() -> None:
    bar, found, planted = survey()
    pairs = set(map(tuple, found.tolist()))
    assert len(pairs & planted) >= 18 and len(pairs - planted) <= 1
    assert (
        bar.copies == 150
        and bar.miss_rate < 0.1
        and set(bar.missed) == set(copies_of(picture(0), np.random.default_rng(0)))
    )
    assert Bar.from_json(bar.as_json()) == bar


def test_groups_say_what_they_cross_and_the_worst_come_first() -> None:
    content = np.array([0, 1, 2, 3, 4, 0, 5])
    pairs, scores = np.array([[1, 2], [3, 4]]), np.array([0.5, 0.9])
    splits = np.array([0, 0, 1, 0, 0, 0, 1], np.int8)
    targets = np.array([0, 0, 0, 0, 1, 0, -1])
    leak, disputed, same = duplicate_groups(content, pairs, scores, splits, targets)
    assert (leak.rows, leak.leaks, leak.disputed, leak.score) == ([1, 2], True, False, 0.5)
    assert (disputed.rows, disputed.leaks, disputed.disputed) == ([3, 4], False, True)
    assert (same.rows, same.score) == ([0, 5], np.inf)
    assert list(near_leaks([leak, disputed, same], splits, 1, 0)) == [2]


def test_without_pairs_there_are_no_groups() -> None:
    none = np.empty((0, 2), np.int64)
    assert duplicate_groups(np.arange(3), none, np.empty(0), np.zeros(3, np.int8), np.zeros(3, np.int64)) == []
    assert duplicate_groups(np.arange(0), none, np.empty(0), np.zeros(0, np.int8), np.zeros(0, np.int64)) == []
