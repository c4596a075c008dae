"""What to label next: images that a head is unsure of and that differ from one another; at first typical ones."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..features.rows import mean_row, row_blocks

if TYPE_CHECKING:
    from .gallery import Curator

COMPONENTS = 64
UNSURE = 10  # so many times as many images as asked for are considered, the least sure ones
FIT_ROWS = 20_000
NEAR, NEAR_ROWS = 20, 4000  # neighbours that make an image typical, among so many of its cluster

Features = NDArray[np.float32]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Pick:
    """A row of the pool that is worth a label, and why, in words."""

    row: int
    reason: str


@dataclass(frozen=True)
class Next:
    """The picks of a pool, their whole ``paths``, and a curator of the pool to show them."""

    picks: list[Pick]
    paths: list[str]
    curator: Curator


def next_csv(chosen: Next) -> bytes:
    """``rank,path,reason``, names as the bytes they have on disk."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("rank", "path", "reason"))
    for rank, (path, pick) in enumerate(zip(chosen.paths, chosen.picks, strict=True), start=1):
        writer.writerow((rank, path, pick.reason))
    return buffer.getvalue().encode("utf-8", "surrogateescape")


def label_next(
    pool: Features, probabilities: Floats | None, class_names: Sequence[str], count: int, *, seed: int = 0
) -> list[Pick]:
    """At most ``count`` rows of the ``pool`` (n, d), the most useful first.

    With probabilities (n, c) of a head the least sure images are clustered, weighted by how unsure the head is, and of
    each cluster the one in its middle is taken (Zhdanov 2019): uncertainty within, coverage across. Without any, the
    whole pool is clustered, and of each cluster, the largest first, the image most like its neighbours is taken
    (Hacohen et al. 2022): with few labels typical images teach more than hard ones.
    """
    count = min(count, len(pool))
    if not count:
        return []
    Z = _reduced(pool, seed)
    return _typical(Z, count, seed) if probabilities is None else _unsure(Z, probabilities, class_names, count, seed)


def _typical(Z: Floats, count: int, seed: int) -> list[Pick]:
    cluster = _clusters(Z, None, count, seed)[0]
    picks = []
    for number in np.argsort(-np.bincount(cluster), kind="stable"):
        rows = np.flatnonzero(cluster == number)
        if len(rows):
            some = np.random.default_rng(seed).permutation(rows)[:NEAR_ROWS]
            near = np.sort(Z[some] @ Z[some].T, axis=1)[:, -NEAR:].mean(axis=1)
            picks.append(Pick(int(some[near.argmax()]), f"typical of {len(rows):,} images"))
    return picks


def _unsure(Z: Floats, probabilities: Floats, names: Sequence[str], count: int, seed: int) -> list[Pick]:
    best = np.sort(probabilities, axis=1)[:, -2:]
    unsure = 1 - (best[:, 1] - best[:, 0])
    rows = np.argsort(-unsure, kind="stable")[: UNSURE * count]
    cluster, distance = _clusters(Z[rows], unsure[rows], count, seed)
    picks = []
    for number in range(distance.shape[1]):
        mine = np.flatnonzero(cluster == number)
        if len(mine):
            place = mine[distance[mine, number].argmin()]
            picks.append((float(unsure[rows[mine]].sum()), int(rows[place]), len(mine)))
    picks.sort(key=lambda pick: (-pick[0], pick[1]))
    return [
        Pick(row, f"unsure: {_best_two(probabilities[row], names)}; stands for {size:,} like it")
        for _, row, size in picks
    ]


def _best_two(chances: Floats, names: Sequence[str]) -> str:
    best = np.argsort(-chances, kind="stable")[:2]
    return " or ".join(f"{names[target]} ({100 * chances[target]:.0f} %)" for target in best)


def _clusters(Z: Floats, weight: Floats | None, count: int, seed: int) -> tuple[Ints, Floats]:
    """The cluster (n,) of each row, and its distances (n, count) from their centres."""
    from sklearn.cluster import KMeans, MiniBatchKMeans

    kind = KMeans if len(Z) <= FIT_ROWS else MiniBatchKMeans
    fitted = kind(count, n_init=1, max_iter=50, random_state=seed).fit(Z, sample_weight=weight)
    return fitted.labels_.astype(np.int64), fitted.transform(Z)


def _reduced(features: Features, seed: int) -> Floats:
    """Unit rows (n, k) in the first principal components of the directions from the mean."""
    from sklearn.decomposition import PCA

    mean = mean_row(features)

    def unit(rows: slice | Ints) -> Floats:
        return _unit((features[rows] - mean).astype(np.float64))

    if len(features) < 2:
        return unit(slice(None))
    fit = np.random.default_rng(seed).permutation(len(features))[:FIT_ROWS]
    size = min(COMPONENTS, len(fit), features.shape[1])
    components = PCA(size, svd_solver="randomized", random_state=seed).fit(unit(fit))
    return _unit(np.concatenate([components.transform(unit(rows)) for rows in row_blocks(features)]))


def _unit(rows: Floats) -> Floats:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))
