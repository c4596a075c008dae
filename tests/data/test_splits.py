"""Splits are stratified, keep together what belongs together, and stay when images come or go."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.splits import assign_splits, group_ids, groups_of
from pipeline.errors import DataError
from pipeline.files import digest_bytes


def make_digests(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16), np.uint8)


def split(
    digests: np.ndarray,
    targets: np.ndarray,
    groups: list[str] | None = None,
    *,
    val: float = 0.2,
    test: float = 0.1,
    seed: int = 0,
) -> np.ndarray:
    return assign_splits(digests, targets, groups, val_fraction=val, test_fraction=test, seed=seed)


def test_fractions_hold_in_every_class() -> None:
    targets = np.arange(12_000) % 4
    splits = split(make_digests(12_000), targets)
    for target in range(4):
        shares = np.bincount(splits[targets == target], minlength=3) / 3000
        assert np.abs(shares - [0.7, 0.2, 0.1]).max() < 0.03


def test_seed_decides_and_order_does_not() -> None:
    digests, targets = make_digests(500), np.arange(500) % 3
    splits = split(digests, targets)
    assert (splits == split(digests, targets)).all()
    assert 100 < (splits != split(digests, targets, seed=1)).sum() < 400
    order = np.random.default_rng(1).permutation(500)
    assert (split(digests[order], targets[order]) == splits[order]).all()


def test_adding_or_removing_images_moves_no_other() -> None:
    digests, targets = make_digests(600), np.arange(600) % 3
    names = [f"p{i % 150}" for i in range(600)]
    for groups in (None, names):
        whole = split(digests, targets, groups)
        for count in (450, 599):
            part = split(digests[:count], targets[:count], groups and groups[:count])
            assert (part == whole[:count]).all()


def test_the_split_of_today_is_the_split_of_tomorrow() -> None:
    digests = np.frombuffer(b"".join(digest_bytes(b"image %d" % i) for i in range(40)), np.uint8).reshape(40, 16)
    splits = split(digests, np.arange(40) % 2, ["patient"] * 2 + [""] * 38)
    assert "".join(map(str, splits)) == "0000001001001001100021020110001001002020"


def test_duplicates_and_groups_stay_on_one_side_also_through_each_other() -> None:
    digests = make_digests(300)
    digests[200:] = digests[:100]  # every third a duplicate, some with another label
    targets = np.random.default_rng(2).integers(0, 3, 300)
    groups = [f"g{i // 4}" if i % 2 else "" for i in range(300)]
    ids = group_ids(digests, groups)
    splits = split(digests, targets, groups)
    assert ids.min() == 0 and ids.max() + 1 == len(np.unique(ids)) and len(np.unique(splits)) == 3
    assert (ids[200:] == ids[:100]).all()
    assert len(set(ids[[1, 3, 201, 203]])) == 1  # a group, its duplicates, and the groups of those
    for unit in np.unique(ids):
        assert len(np.unique(splits[ids == unit])) == 1


def test_group_ids_match_a_plain_search_for_components() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        digests = np.repeat(rng.integers(0, 12, (30, 1), np.uint8), 16, axis=1)
        groups = [str(g) if g else "" for g in rng.integers(0, 8, 30)]
        ids = group_ids(digests, groups)
        same = (digests[:, None, 0] == digests[None, :, 0]) | np.array([[a == b != "" for b in groups] for a in groups])
        for _ in range(5):
            same = same @ same
        assert ((ids[:, None] == ids[None, :]) == same).all()


def test_group_ids_without_groups_are_those_of_the_bytes() -> None:
    digests = make_digests(3)[[0, 1, 0, 2, 1]]
    ids = group_ids(digests, None)
    assert ids[0] == ids[2] and ids[1] == ids[4] and len(set(ids.tolist())) == 3


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_small_classes_have_what_their_size_allows(size: int) -> None:
    targets = np.repeat(np.arange(200), size)
    splits = split(make_digests(200 * size), targets).reshape(200, size)
    has = [(splits == side).any(axis=1).all() for side in range(3)]
    assert has == [True, size >= 2, size >= 3]
    nothing_held_out = split(make_digests(200 * size), targets, val=0.0, test=0.0)
    assert not nothing_held_out.any()


def test_units_of_several_classes_are_moved_only_where_nobody_loses() -> None:
    rng = np.random.default_rng(4)
    for seed in range(30):
        targets = rng.integers(0, 4, 24)
        groups = [f"patient{p}" for p in rng.integers(0, 6, 24)]
        splits = split(make_digests(24, seed), targets, groups, seed=seed)
        ids = group_ids(make_digests(24, seed), groups)
        assert all(len(np.unique(splits[ids == unit])) == 1 for unit in np.unique(ids))
        assert set(targets[splits == 0]) == set(targets)


def test_unlabelled_images_are_split_by_hash_alone() -> None:
    digests = make_digests(1000)
    splits = split(digests, np.full(1000, -1))
    assert 0.6 < (splits == 0).mean() < 0.8
    assert split(digests[:0], np.empty(0, np.int64)).shape == (0,)


def test_groups_of() -> None:
    paths = ["a/patient1_x.jpg", "b/patient1_y.jpg", "b/other.jpg"]
    assert groups_of(paths, r"(patient\d+)_") == ["patient1", "patient1", ""]
    assert groups_of(paths, None) is None
    with pytest.raises(DataError, match="group_pattern"):
        groups_of(paths, r"(nobody\d+)")
