"""Decide by hash which images are for training, validation and test.

What goes to one side together is a unit: all images with the same bytes, and all images of one group. A unit's
place between 0 and 1 is a hash of the seed and of what it is, nothing else, and the fractions cut that line. So
adding or removing images never moves another one, and each class (each being many units) has the fractions up to
chance. Chance alone may leave a small class without training or validation images; such a gap is filled by the
unit nearest to it. Only there a later image may move an earlier one: when it fills the gap by itself.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..files import DIGEST_BYTES, digest_bytes
from .digests import Digests
from .source import SPLITS, TEST, TRAIN, VAL


def groups_of(paths: Sequence[str], pattern: str | None) -> list[str] | None:
    """The group of each path: what the parentheses of ``pattern`` match, searched in the path relative to the root.

    ``""`` where the pattern does not match: such an image stands for itself. None without a pattern.

    Raises:
        DataError: the pattern matches no path at all, so it groups nothing.
    """
    if pattern is None:
        return None
    find = re.compile(pattern).search
    groups = [(match.group(1) or "") if (match := find(path)) else "" for path in paths]
    if paths and not any(groups):
        raise DataError(
            "data.group_pattern matches no image.",
            where=repr(pattern),
            why=f"it is searched in paths like {paths[0]!r}",
            remedy=r"correct it, for example `(patient\d+)_`; its parentheses hold the name of the group",
        )
    return groups


def group_ids(digests: Digests, groups: Sequence[str] | None) -> NDArray[np.int64]:
    """One number a unit: rows with the same digest or the same group, also through others, share it.

    Args:
        digests: uint8 (n, 16).
        groups: n names, ``""`` for no group, or None.

    Returns:
        int64 (n,), from 0 to the number of units - 1.
    """
    ids = _number(_words(digests))
    if groups is None or not len(ids):
        return ids
    joined = _Joined(int(ids.max()) + 1)
    first: dict[str, int] = {}
    for image, group in zip(ids.tolist(), groups, strict=True):
        if group:
            joined.join(first.setdefault(group, image), image)
    roots = np.array([joined.find(image) for image in range(len(joined.parents))], np.int64)
    return np.unique(roots[ids], return_inverse=True)[1].astype(np.int64)


def assign_splits(
    digests: Digests,
    targets: NDArray[np.integer],
    groups: Sequence[str] | None,
    *,
    val_fraction: float,
    test_fraction: float,
    seed: int,
) -> NDArray[np.int8]:
    """A split for each image, int8 (n,), index into `SPLITS`.

    A class with one unit trains; one with two or more has a unit in train and, unless ``val_fraction`` is 0, in
    val; one with three or more in test, too, unless ``test_fraction`` is 0. A unit of several classes (a
    duplicate with two labels, a patient) is moved only where that leaves no other class with a gap.

    Args:
        digests: uint8 (n, 16).
        targets: int (n,), -1 for unlabelled; these follow their hash alone.
        groups: n names, ``""`` for no group, or None.
    """
    units = group_ids(digests, groups)
    places = _places(digests, groups, units, seed)
    bounds = {TEST: (0.0, test_fraction), VAL: (test_fraction, test_fraction + val_fraction)}
    bounds[TRAIN] = (test_fraction + val_fraction, 1.0)
    splits = np.full(len(places), TRAIN, np.int8)
    for split in (VAL, TEST):
        low, high = bounds[split]
        splits[(places >= low) & (places < high)] = split
    _fill_gaps(splits, places, bounds, _members(units, targets))
    return splits[units]


def _words(digests: Digests) -> NDArray[np.void]:
    """Each digest as one value that sorts by its bytes: (n,)."""
    return np.ascontiguousarray(digests).view(np.dtype((np.void, DIGEST_BYTES)))[:, 0]


def _number(words: NDArray[np.void]) -> NDArray[np.int64]:
    """Equal values as equal numbers from 0."""
    return np.unique(words, return_inverse=True)[1].astype(np.int64)


def _places(digests: Digests, groups: Sequence[str] | None, units: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """Each unit's place in [0, 1): float64 (units,), from the seed and the smallest key among its rows.

    A row's key is its group's digest or, without a group, its own. The smallest is chosen before the seed comes
    in, so it favours no place; another image of a known group or content does not change it.
    """
    keys = np.ascontiguousarray(digests)
    if groups is not None:
        key_of = {group: digest_bytes(group.encode("utf-8", "surrogateescape")) for group in set(groups) if group}
        own = (keys[row].tobytes() for row in range(len(keys)))
        joined = b"".join(key_of.get(group, digest) for group, digest in zip(groups, own, strict=True))
        keys = np.frombuffer(joined, np.uint8).reshape(-1, DIGEST_BYTES)
    halves = keys.view(">u8").astype(np.uint64)
    order = np.lexsort((halves[:, 1], halves[:, 0], units))
    first = np.unique(units[order], return_index=True)[1]
    smallest = halves[order[first]]
    salt = np.frombuffer(digest_bytes(f"split {seed}".encode()), "<u8")
    mixed = _mix(_mix(smallest[:, 0] ^ salt[0]) + smallest[:, 1] ^ salt[1])
    # 53 bits: every one of them survives in a float64, and 1.0 is never reached.
    return (mixed >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): each bit of the input flips half of the output's."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class _Joined:
    """Disjoint sets of the numbers below ``count`` (union-find with path halving)."""

    def __init__(self, count: int) -> None:
        self.parents = list(range(count))

    def find(self, item: int) -> int:
        parents = self.parents
        while parents[item] != item:
            parents[item] = item = parents[parents[item]]
        return item

    def join(self, left: int, right: int) -> None:
        left, right = self.find(left), self.find(right)
        self.parents[max(left, right)] = min(left, right)


class _Members:
    """Which units hold images of which classes."""

    def __init__(self, pairs: NDArray[np.int64]) -> None:
        self.units_of: dict[int, list[int]] = defaultdict(list)
        self.classes_of: dict[int, list[int]] = defaultdict(list)
        for target, unit in pairs.tolist():
            self.units_of[target].append(unit)
            self.classes_of[unit].append(target)


def _members(units: NDArray[np.int64], targets: NDArray[np.integer]) -> _Members:
    labelled = targets >= 0
    pairs = np.stack([targets[labelled].astype(np.int64), units[labelled]], axis=1)
    return _Members(np.unique(pairs, axis=0))


def _fill_gaps(
    splits: NDArray[np.int8],
    places: NDArray[np.float64],
    bounds: dict[int, tuple[float, float]],
    members: _Members,
) -> None:
    """Give every class that is large enough a unit in each split; changes ``splits`` (units,) in place.

    Train goes before val and val before test: filling one may empty a later one, never an earlier one.
    """
    counts = {
        target: np.bincount(splits[units], minlength=len(SPLITS)).tolist() for target, units in members.units_of.items()
    }
    for split in (TRAIN, VAL, TEST):
        low, high = bounds[split]
        if low == high:
            continue
        for target, units in members.units_of.items():
            if counts[target][split] or len(units) <= split:
                continue
            donors = [unit for unit in units if _may_leave(unit, splits[unit], split, counts, members)]
            if not donors:
                continue
            emptied = {unit: any(counts[c][splits[unit]] == 1 for c in members.classes_of[unit]) for unit in donors}
            unit = min(donors, key=lambda u: (emptied[u], max(low - places[u], places[u] - high), places[u]))
            for touched in members.classes_of[unit]:
                counts[touched][splits[unit]] -= 1
                counts[touched][split] += 1
            splits[unit] = split


def _may_leave(unit: int, now: int, goal: int, counts: dict[int, list[int]], members: _Members) -> bool:
    """Whether moving ``unit`` opens no gap in a split that goes before ``goal``."""
    return now > goal or all(counts[target][now] > 1 for target in members.classes_of[unit])
