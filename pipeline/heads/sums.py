"""A few rows that stand for many: estimators that know rows by sums alone learn the same from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..features.rows import Rows
from .common import Floats, Ints

# Estimators that class means and the scatter within classes determine, as long as no other parameter is set.
PARAMETERS = {
    "LinearDiscriminantAnalysis": frozenset({"n_components", "priors", "tol"}),
    "NearestCentroid": frozenset[str](),
    "RidgeClassifier": frozenset({"alpha", "fit_intercept"}),
}
# What of a sum of squares may be rounding; a feature may vary by its root.
ROUNDING = 1e-12


def learns_from_sums(estimator: type[Any], parameters: Mapping[str, Any]) -> bool:
    """Whether `fit_to_sums` gives what the rows themselves would."""
    return parameters.keys() <= PARAMETERS.get(estimator.__name__, frozenset()) and estimator.__name__ in PARAMETERS


@dataclass(frozen=True)
class Sums:
    """What one pass over rows keeps: ``weight`` (c,) and ``mean`` (c, d) of each class, their count, and ``scatter``.

    The scatter (d, d) is the weighted sum of squares of what rows differ by from the mean of their class.
    """

    rows: int
    weight: Floats
    mean: Floats
    scatter: Floats

    @classmethod
    def read(cls, X: Rows, index: Ints, weights: Floats, centre: Floats, scale: Floats) -> Sums:
        """Of ``(X - centre) / scale``, in float64, with class positions ``index`` (n,) and ``weights`` (c,) of classes.

        The centre is to be about that of the rows, so that no difference of large numbers is left of the scatter. A
        feature that does not vary within classes, but for rounding, has none.
        """
        classes, width = len(weights), X.shape[1]
        sums, scatter = np.zeros((classes, width)), np.zeros((width, width))
        for rows in X.blocks():
            root = np.sqrt(weights[index[rows]])[:, None]
            block = (X[rows] - centre) / scale * root
            scatter += block.T @ block
            sums += (root * (index[rows, None] == np.arange(classes))).T @ block
        weight = weights * np.bincount(index, minlength=classes)
        mean = sums / weight[:, None]
        total = scatter.diagonal().copy()
        scatter -= (weight * mean.T) @ mean
        constant = scatter.diagonal() <= ROUNDING * total
        scatter[constant], scatter[:, constant] = 0, 0
        return cls(len(X), weight, mean, scatter)

    def stand_ins(self, spread: float) -> tuple[Floats, Ints]:
        """Rows (c + 2 d, d) and their class positions: first the mean of each class, then d pairs around the heaviest.

        The means are kept, and the scatter of the rows is ``spread`` times that of all.
        """
        root = np.sqrt(self.scatter.diagonal())
        inverse = np.divide(1, root, out=np.zeros_like(root), where=root > 0)
        values, vectors = np.linalg.eigh(self.scatter * inverse * inverse[:, None])
        values[values <= ROUNDING * values[-1]] = 0
        aside = (vectors * np.sqrt(0.5 * spread * values)).T * root
        heaviest = int(self.weight.argmax())
        middle = self.mean[heaviest]
        labels = np.append(np.arange(len(self.mean)), np.full(2 * len(aside), heaviest))
        return np.concatenate([self.mean, middle + aside, middle - aside]), labels


def fit_to_sums(estimator: Any, sums: Sums, centre: Floats | float = 0.0) -> None:
    """Fit an estimator of `PARAMETERS` to the rows that were summed, to which ``centre`` (d,) is added again.

    Weights of the classes are in the sums already.
    """
    name, (classes, width) = type(estimator).__name__, sums.mean.shape
    count = classes + 2 * width
    if name == "RidgeClassifier":
        heaviest = sums.weight.argmax()
        rows, labels = sums.stand_ins(4 * width / sums.weight[heaviest])
        weights = np.append(sums.weight, np.full(2 * width, sums.weight[heaviest] / (4 * width)))
        weights[heaviest] /= 2
        _fit_with(estimator, {"class_weight": None}, rows + centre, labels, sample_weight=weights)
    elif name == "NearestCentroid":
        rows, labels = sums.stand_ins((count - classes) / (sums.rows - classes))
        estimator.fit(rows + centre, labels)
    else:
        priors = sums.weight / sums.rows if estimator.priors is None else estimator.priors
        rows, labels = sums.stand_ins(count / sums.rows)
        _fit_with(estimator, {"priors": priors}, rows + centre, labels)


def _fit_with(estimator: Any, parameters: Mapping[str, Any], *rows: Any, **more: Any) -> None:
    """Fit with other parameters than it keeps."""
    kept = {name: getattr(estimator, name) for name in parameters}
    estimator.set_params(**parameters).fit(*rows, **more)
    estimator.set_params(**kept)
