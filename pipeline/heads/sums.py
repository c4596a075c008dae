"""A few rows that stand for many: estimators that know rows by sums alone learn the same from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    """What one pass over rows keeps: ``weight`` (c,) and ``mean`` (c, d) of each class, and ``scatter``.

    The scatter (d, d) is the weighted sum of squares of what rows differ by from the mean of their class; or its
    diagonal (d,) alone.
    """

    weight: Floats
    mean: Floats
    scatter: Floats

    @classmethod
    def read(
        cls, X: Rows, index: Ints, weights: Floats, centre: Floats, scale: Floats, *, diagonal: bool = False
    ) -> Sums:
        """Of ``(X - centre) / scale``, in float64, with class positions ``index`` (n,) and ``weights`` (c,) of classes.

        The centre is to be about that of the rows, so that no difference of large numbers is left of the scatter. A
        feature that does not vary within classes, but for rounding, has none.
        """
        squares = _diagonal if diagonal else _gram
        sums = np.zeros((len(weights), X.shape[1]))
        scatter = squares(sums)
        for rows in X.blocks():
            root = np.sqrt(weights[index[rows]])[:, None]
            block = (X[rows] - centre) / scale * root
            scatter += squares(block)
            sums += (root * (index[rows, None] == np.arange(len(weights)))).T @ block
        weight = weights * np.bincount(index, minlength=len(weights))
        mean = sums / weight[:, None]
        total = _diagonal_of(scatter).copy()
        scatter -= squares(np.sqrt(weight)[:, None] * mean)
        constant = _diagonal_of(scatter) <= ROUNDING * total
        scatter[constant], scatter[..., constant] = 0, 0
        return cls(weight, mean, scatter)

    def stand_ins(self, spread: float) -> tuple[Floats, Ints]:
        """Rows (c + 2 m, d) and their class positions: first the mean of each class, then m pairs around the heaviest.

        The means are kept, and the scatter of the rows is ``spread`` times that of all. There are d pairs; one, where
        the diagonal of the scatter is all that is known.
        """
        root = np.sqrt(_diagonal_of(self.scatter))
        aside = np.sqrt(0.5 * spread) * root[None]
        if self.scatter.ndim == 2:
            inverse = np.divide(1, root, out=np.zeros_like(root), where=root > 0)
            values, vectors = np.linalg.eigh(self.scatter * inverse * inverse[:, None])
            values[values <= ROUNDING * values[-1]] = 0
            aside = (vectors * np.sqrt(values)).T * aside
        heaviest = int(self.weight.argmax())
        middle = self.mean[heaviest]
        labels = np.append(np.arange(len(self.mean)), np.full(2 * len(aside), heaviest))
        return np.concatenate([self.mean, middle + aside, middle - aside]), labels


def _gram(rows: Floats) -> Floats:
    return rows.T @ rows


def _diagonal(rows: Floats) -> Floats:
    return np.asarray(np.square(rows).sum(axis=0))


def _diagonal_of(scatter: Floats) -> Floats:
    return scatter.diagonal() if scatter.ndim == 2 else scatter


def fit_to_sums(
    estimator: Any,
    X: Rows,
    index: Ints,
    weights: Floats,
    moments: tuple[Floats, Floats],
    *,
    centred: bool,
) -> None:
    """Fit an estimator of `PARAMETERS` to ``X`` (n, d) divided by a scale and, if ``centred``, less a mean.

    Args:
        index: class positions (n,).
        weights: (c,) of the classes; 1 where the estimator takes none.
        moments: mean (d,) and scale (d,).
    """
    name, width, classes = type(estimator).__name__, X.shape[1], len(weights)
    sums = Sums.read(X, index, weights, *moments, diagonal=name == "NearestCentroid")
    if not centred:
        sums = replace(sums, mean=sums.mean + moments[0])
    if name == "RidgeClassifier":
        heaviest, weight = sums.weight.argmax(), sums.weight.copy()
        weight[heaviest] /= 2  # the other half is that of the pairs around it
        pairs = np.full(2 * width, weight[heaviest] / (2 * width))
        rows = sums.stand_ins(1 / pairs[0])
        _fit_with(estimator, {"class_weight": None}, *rows, sample_weight=np.append(weight, pairs))
    elif name == "NearestCentroid":
        estimator.fit(*sums.stand_ins(2 / (len(X) - classes)))
    else:
        priors = sums.weight / len(X) if estimator.priors is None else estimator.priors
        _fit_with(estimator, {"priors": priors}, *sums.stand_ins((classes + 2 * width) / len(X)))


def _fit_with(estimator: Any, parameters: Mapping[str, Any], *rows: Any, **more: Any) -> None:
    """Fit with other parameters than it keeps."""
    kept = {name: getattr(estimator, name) for name in parameters}
    estimator.set_params(**parameters).fit(*rows, **more)
    estimator.set_params(**kept)
