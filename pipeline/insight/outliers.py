"""Images that are unlike the others of their class, and images that are hardly to be seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..features.rows import row_blocks
from .looks import Looks

COMPONENTS = 64
FIT_ROWS = 20_000  # of the principal components and the covariance; more change nothing
FAR = 4.0  # robust standard deviations above the median

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def outlier_scores(features: NDArray[np.float32], targets: Ints, looks: Looks, seed: int = 0) -> Floats:
    """How far (n,) each image is from its class (from all, without labels), in robust deviations; `FAR` is an outlier.

    The larger of two distances: Mahalanobis' in the first principal components of the features, with one shrunk
    covariance for all classes (Lee et al. 2018; Ledoit, Wolf 2004), and the same of size, light, sharpness and colour.
    Distance to the nearest neighbours was tried: a handful of foreign images that are alike are their own neighbours,
    and look perfectly normal to it.
    """
    from sklearn.decomposition import PCA

    if len(features) < 3 or all((features[rows] == features[:1]).all() for rows in row_blocks(features)):
        return np.zeros(len(features))
    fit = np.random.default_rng(seed).permutation(len(features))[:FIT_ROWS]
    scale = features[fit].std(axis=0) + 1e-6
    count = min(COMPONENTS, len(fit) - 1, features.shape[1])
    components = PCA(count, svd_solver="randomized", random_state=seed).fit(features[fit] / scale)
    reduced = np.concatenate([components.transform(features[rows] / scale) for rows in row_blocks(features)])
    near = _deviations(_class_distance(reduced, targets, fit))
    seen = _measures(looks)
    spread = np.median(np.abs(seen - np.median(seen, axis=0)), axis=0) + 0.02
    return np.maximum(near, _deviations(_class_distance(seen / spread, np.zeros_like(targets), fit)))


def _class_distance(X: Floats, targets: Ints, fit: Ints) -> Floats:
    from sklearn.covariance import LedoitWolf

    classes = np.unique(targets)
    centres = np.stack([np.median(X[targets == target], axis=0) for target in classes])
    offset = X - centres[np.searchsorted(classes, targets)]
    precision = LedoitWolf(assume_centered=True).fit(offset[fit]).precision_
    return np.asarray(np.sqrt(np.maximum(np.einsum("nd,de,ne->n", offset, precision, offset, optimize=True), 0)))


def _deviations(values: Floats) -> Floats:
    middle = np.median(values)
    return np.asarray((values - middle) / max(1.4826 * np.median(np.abs(values - middle)), 1e-9))


def _measures(looks: Looks) -> Floats:
    """(n, 6) of which each is comparable by difference."""
    sizes = (np.log(np.maximum(looks.width * looks.height, 1)), np.log(_aspect(looks)))
    return np.stack([*sizes, looks.dark, looks.bright, np.sqrt(looks.sharpness), np.sqrt(looks.colour)], 1).astype(
        float
    )


def _aspect(looks: Looks) -> NDArray[np.float32]:
    return np.asarray(np.maximum(looks.width, 1) / np.maximum(looks.height, 1))


# -- what is hardly to be seen ----------------------------------------------------------------------------------------


def _blurred(looks: Looks) -> Floats:
    """Under a third of the usual sharpness; from 1 at the bar to 2 without any edge."""
    bar = float(np.median(looks.sharpness)) / 3
    return np.where(looks.width > 0, 2 - looks.sharpness / max(bar, 1e-6), 0.0)


def _tiny(looks: Looks) -> Floats:
    """Shorter side under 32 pixels, or under a quarter of the usual."""
    side = np.minimum(looks.width, looks.height)
    bar = max(32.0, float(np.median(side)) / 4)
    return np.where(side > 0, 2 - side / bar, 0.0)


def _odd(looks: Looks) -> Floats:
    """Three times as long as wide, or more."""
    aspect = _aspect(looks)
    return np.asarray(np.where(looks.width > 0, np.maximum(aspect, 1 / aspect) / 3, 0.0), np.float64)


def _grey(looks: Looks) -> Floats:
    """Grey, where nine of ten images have colour."""
    grey = looks.colour < 0.004
    return np.where(grey & (looks.width > 0), 1.5, 0.0) if grey.mean() < 0.1 else np.zeros(len(looks))


# What is wrong with an image, and how badly: above 1 it is.
QUALITIES: Final[dict[str, Callable[[Looks], Floats]]] = {
    "too dark": lambda looks: np.where(looks.width > 0, 2 - looks.dark / 0.2, 0.0),
    "too bright": lambda looks: np.where(looks.width > 0, (looks.bright - 0.8) / 0.1, 0.0),
    "blurred": _blurred,
    "tiny": _tiny,
    "odd shape": _odd,
    "grey": _grey,
}


def quality_problems(looks: Looks) -> tuple[Floats, list[str]]:
    """How bad (n,) the worst of `QUALITIES` is, above 1 where something is wrong, and its names ("" where nothing)."""
    if not len(looks):
        return np.zeros(0), []
    values = np.stack([measure(looks) for measure in QUALITIES.values()], axis=1)
    names = [", ".join(np.array(list(QUALITIES))[row > 1].tolist()) for row in values]
    return np.asarray(values.max(axis=1), np.float64), names
