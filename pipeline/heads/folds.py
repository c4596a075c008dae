"""Stratified folds that keep groups together, also where classes are tiny."""

from __future__ import annotations

import numpy as np

from ..runtime.seeds import make_generator
from .base import Ints

Fold = tuple[Ints, Ints]


def stratified_group_folds(y: Ints, groups: Ints | None, folds: int, seed: int) -> list[Fold]:
    """Train and test positions of each fold; the test parts are disjoint and cover all rows.

    Rows with one group id share a fold. The groups of a class are dealt out so that each fold gets its share, so a
    class with two groups or more is never missing from a fold's train part (a group with several classes counts for
    its most frequent one). There are fewer folds where no class has that many groups, and none at all where every
    class has one group only, since nothing can then be held out and still be learnt. Deterministic in ``seed``.
    """
    y = np.asarray(y)
    group, group_class, sizes = _groups(y, groups)
    per_class = np.bincount(group_class) if len(group_class) else np.zeros(1, dtype=np.int64)
    folds = min(folds, int(per_class.max()))
    if folds < 2:
        return []
    fold_of_group = _deal(group_class, sizes, folds, seed)
    fold = fold_of_group[group]
    return [(np.flatnonzero(fold != number), np.flatnonzero(fold == number)) for number in range(folds)]


def hold_out(y: Ints, groups: Ints | None, fraction: float, seed: int) -> Fold:
    """Positions of a stratified, group-wise train part and of a held-out part of about ``fraction`` of the rows.

    A class with a single group stays in the train part. The held-out part is empty where every class has one group.
    """
    y = np.asarray(y)
    group, group_class, sizes = _groups(y, groups)
    order = make_generator("hold out", seed).permutation(len(group_class))
    held = np.zeros(len(group_class), dtype=bool)
    for target in np.unique(group_class):
        members = order[group_class[order] == target]
        taken = np.cumsum(sizes[members]) <= max(fraction * sizes[members].sum(), sizes[members[0]])
        held[members[taken & (np.arange(len(members)) < len(members) - 1)]] = True
    return np.flatnonzero(~held[group]), np.flatnonzero(held[group])


def missing_rows(y: Ints, folds: list[Fold]) -> np.ndarray:
    """True (n,) for rows whose class has no row in the train part of their fold: nobody could have known them."""
    missing = np.zeros(len(y), dtype=bool)
    for train, test in folds:
        missing[test] = ~np.isin(y[test], y[train])
    return missing


def _groups(y: Ints, groups: Ints | None) -> tuple[Ints, Ints, Ints]:
    """Each row's group position (n,), and each group's class position and size (g,)."""
    _, target = np.unique(y, return_inverse=True)
    if groups is None:
        return np.arange(len(y)), target, np.ones(len(y), dtype=np.int64)
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    pairs, counts = np.unique(np.stack([group, target], axis=1), axis=0, return_counts=True)
    by_frequency = np.lexsort((pairs[:, 1], -counts, pairs[:, 0]))
    first = by_frequency[np.r_[True, np.diff(pairs[by_frequency, 0]) > 0]]
    return group, pairs[first, 1], np.bincount(group)


def _deal(group_class: Ints, sizes: Ints, folds: int, seed: int) -> Ints:
    """A fold for each group: large groups first, each to the fold with fewest rows of its class, then of all."""
    shuffled = make_generator("folds", seed).permutation(len(sizes))
    order = shuffled[np.lexsort((group_class[shuffled], -sizes[shuffled]))]
    of_class = [[0] * folds for _ in range(int(group_class.max()) + 1)]
    total = [0] * folds
    fold = np.empty(len(sizes), dtype=np.int64)
    for group in order.tolist():
        counts, size = of_class[group_class[group]], int(sizes[group])
        best = min(range(folds), key=lambda number: (counts[number], total[number], number))
        counts[best] += size
        total[best] += size
        fold[group] = best
    return fold
