"""Which images a report shows, and the map of all: chosen here, drawn by the report."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..features.cache import FeatureTable
from ..features.rows import mean_row, row_blocks, take_rows
from ..heads.common import one_library_thread
from .thumbnails import Thumbnails

MISTAKES, EXPLAINED_BY = 24, 3
PAIRS, EXAMPLES = 8, 6
CLASSES, OF_A_CLASS = 20, 4
MAP_POINTS = 1500
ATLAS_SIDE = 44
COMPONENTS = 50  # of the features that t-SNE is given
FIT_ROWS = 20_000
NEAREST_ROWS = 20_000  # training images among which the nearest are looked for

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Features = NDArray[np.float32]


@dataclass(frozen=True)
class Picture:
    """An image as a report shows it; ``uri`` is None where it has gone."""

    path: str
    label: str
    split: str
    uri: str | None


@dataclass(frozen=True)
class Mistake:
    """An image that was classified wrongly, with the training images nearest to it."""

    picture: Picture
    predicted: str
    probability: float | None
    nearest: list[Picture]


@dataclass(frozen=True)
class Confusion:
    """Two classes of which ``n`` images of the one were taken for the other."""

    label: str
    predicted: str
    n: int
    examples: list[Picture]


@dataclass(frozen=True)
class ClassPictures:
    """Images in the middle of a class, and those farthest from it."""

    label: str
    typical: list[Picture]
    odd: list[Picture]


@dataclass(frozen=True)
class FeatureMap:
    """p images in two dimensions.

    Attributes:
        x, y: (p,) in 0..1.
        target: (p,) index into ``class_names``, -1 for none.
        wrong: (p,) whether the image was classified wrongly.
        total: how many images there are, of which these are a sample.
        atlas: a JPEG with a picture of ``ATLAS_SIDE`` for each point, 40 in a line, as a ``data:`` address; or None.
    """

    method: Literal["PCA", "t-SNE"]
    x: Floats
    y: Floats
    target: Ints
    wrong: NDArray[np.bool_]
    paths: list[str]
    class_names: tuple[str, ...]
    total: int
    atlas: str | None = None


@dataclass(frozen=True)
class Gallery:
    """The pictures of a report."""

    mistakes: list[Mistake] = field(default_factory=list)
    mistaken: int = 0
    confused: list[Confusion] = field(default_factory=list)
    classes: list[ClassPictures] = field(default_factory=list)
    map: FeatureMap | None = None


class Curator:
    """Chooses and frames images of one table."""

    def __init__(self, table: FeatureTable, thumbnails: Thumbnails, split_names: Sequence[str]) -> None:
        self.table, self.thumbnails, self._splits = table, thumbnails, split_names

    def label(self, row: int) -> str:
        """The class of a row, or "" where it has none."""
        target = int(self.table.targets[row])
        return self.table.class_names[target] if target >= 0 else ""

    def pictures(self, rows: Iterable[int]) -> list[Picture]:
        """The images at ``rows``, framed."""
        rows = [int(row) for row in rows]
        self.thumbnails.make(rows)
        return [
            Picture(
                self.table.paths[row],
                self.label(row),
                self._splits[self.table.splits[row]],
                self.thumbnails.uri(row),
            )
            for row in rows
        ]

    # -- what went wrong --------------------------------------------------------------------------------------------

    def mistakes(self, rows: Ints, predicted: Ints, probabilities: Floats | None) -> Gallery:
        """The most confident mistakes among ``rows`` (m,), and examples of the pairs that are confused most.

        Args:
            predicted: (m,) classes; probabilities: (m, c) or None.
        """
        wrong = np.flatnonzero(predicted != self.table.targets[rows])
        sure = None if probabilities is None else probabilities[np.arange(len(rows)), predicted]
        order = wrong if sure is None else wrong[np.argsort(-sure[wrong], kind="stable")]
        shown = order[:MISTAKES]
        near = self.nearest_in_train(rows[shown], EXPLAINED_BY)
        self.thumbnails.make([*rows[shown].tolist(), *near.ravel().tolist()])
        names = self.table.class_names
        mistakes = [
            Mistake(
                self.pictures([rows[place]])[0],
                names[predicted[place]],
                None if sure is None else float(sure[place]),
                self.pictures(near[number]),
            )
            for number, place in enumerate(shown)
        ]
        return Gallery(mistakes, len(wrong), self._confused(rows[order], predicted[order]))

    def _confused(self, rows: Ints, predicted: Ints) -> list[Confusion]:
        names = self.table.class_names
        pairs = list(zip(self.table.targets[rows].tolist(), predicted.tolist(), strict=True))
        found = []
        for (target, taken_for), n in Counter(pairs).most_common(PAIRS):
            mine = [row for row, pair in zip(rows.tolist(), pairs, strict=True) if pair == (target, taken_for)]
            found.append(Confusion(names[target], names[taken_for], n, self.pictures(mine[:EXAMPLES])))
        return found

    def nearest_in_train(self, rows: Ints, count: int) -> Ints:
        """The ``count`` training images (m, count) nearest to each of ``rows``, other than itself."""
        train = np.flatnonzero(self.table.train)
        train = train[np.linspace(0, len(train) - 1, min(len(train), NEAREST_ROWS)).astype(np.int64)]
        if not len(train) or not len(rows):
            return np.empty((len(rows), 0), np.int64)
        others = take_rows(self.table.features, train)
        mean = mean_row(others)
        unit = _unit(self.table.features[rows] - mean)
        near = np.concatenate([unit @ _unit(others[block] - mean).T for block in row_blocks(others)], axis=1)
        near[rows[:, None] == train[None, :]] = -np.inf
        return np.asarray(train[np.argsort(-near, axis=1, kind="stable")[:, :count]])

    # -- what there is ----------------------------------------------------------------------------------------------

    def classes(self, outlier: Floats) -> list[ClassPictures]:
        """Typical and odd images of each class, of the first `CLASSES` of them.

        Args:
            outlier: (n,) how far each image is from its class.
        """
        found = []
        for target, name in enumerate(self.table.class_names[:CLASSES]):
            rows = np.flatnonzero(self.table.targets == target)
            unit = _unit(self.table.features[rows] - mean_row(self.table.features))
            typical = rows[np.argsort(-(unit @ unit.mean(axis=0)), kind="stable")[:OF_A_CLASS]]
            odd = rows[np.argsort(-outlier[rows], kind="stable")[:OF_A_CLASS]]
            odd = odd[~np.isin(odd, typical)]
            found.append(ClassPictures(name, self.pictures(typical), self.pictures(odd)))
        return found

    def map(self, wrong: Ints, *, method: Literal["PCA", "t-SNE"], pictures: bool, seed: int = 0) -> FeatureMap | None:
        """The features in two dimensions, of a sample of `MAP_POINTS` where there are more; None for less than three.

        Args:
            wrong: rows that were classified wrongly.
            pictures: give each point a picture.
        """
        total = len(self.table)
        if total < 3:
            return None
        rows = np.sort(np.random.default_rng(seed).permutation(total)[:MAP_POINTS])
        place = _two_dimensions(self.table.features, rows, method, seed)
        low, high = place.min(axis=0), place.max(axis=0)
        place = (place - low) / np.maximum(high - low, 1e-12)
        drawn = FeatureMap(
            method,
            place[:, 0],
            place[:, 1],
            self.table.targets[rows],
            np.isin(rows, wrong),
            [self.table.paths[row] for row in rows],
            self.table.class_names,
            total,
        )
        if not pictures:
            return drawn
        atlas = base64.b64encode(self.thumbnails.atlas(rows.tolist(), ATLAS_SIDE)).decode("ascii")
        return replace(drawn, atlas=f"data:image/jpeg;base64,{atlas}")


def _two_dimensions(features: Features, rows: Ints, method: str, seed: int) -> Floats:
    generator = np.random.default_rng(seed)
    fit = generator.permutation(len(features))[:FIT_ROWS]
    count = min(COMPONENTS if method == "t-SNE" else 2, len(fit) - 1, features.shape[1])
    mean, components = _principal_components(features[fit], max(count, 2), generator)
    reduced = (features[rows] - mean) @ components
    if method == "PCA" or len(rows) < 10:
        return np.asarray(reduced[:, :2], np.float64)
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(rows) - 1) / 3)
    tsne = TSNE(2, perplexity=perplexity, init="pca", learning_rate="auto", random_state=seed)
    return np.asarray(tsne.fit_transform(reduced), np.float64)


def _principal_components(X: Features, count: int, generator: np.random.Generator) -> tuple[Features, Features]:
    """The mean (d,) of X (n, d), which is then taken from it, and about its leading principal components (d, count).

    Halko et al. 2011, 4.4.
    As scikit-learn's randomized PCA, which takes longer to import than this takes to run.
    """
    mean = X.mean(axis=0)
    X -= mean
    sample = generator.normal(size=(X.shape[1], count + 10)).astype(np.float32)
    with one_library_thread():
        for _ in range(7):
            sample = np.linalg.qr(X.T @ (X @ sample)).Q
        image = X @ sample
        vectors = (sample @ np.linalg.eigh(image.T @ image).eigenvectors)[:, ::-1][:, :count]
    largest = np.abs(vectors).argmax(axis=0)
    return mean, vectors * np.sign(vectors[largest, np.arange(count)])


def _unit(rows: Features) -> Features:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))
