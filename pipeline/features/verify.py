"""Compute a sample of stored features again from the images, and say how closely they agree."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backbones import Backbone, Pixels
from ..data.decode import BadImage
from ..data.digests import stack_digests
from ..data.images import Images
from .decoding import Decoding, as_the_rule_says
from .extractor import single_threaded_torch
from .rounding import Features, as_stored
from .store import FeatureStore
from .views import View


@dataclass(frozen=True)
class Tolerance:
    """Bounds of one precision.

    Args:
        min_cosine: between the stored and the recomputed feature.
        max_difference: largest difference of a value, as a share of the feature's largest value.
        noise: distance of the two, as a share of the feature's length, that rounding alone may give.
    """

    min_cosine: float
    max_difference: float
    noise: float


# On one machine and thread count features are equal to the bit. The bounds leave room for other devices, batch sizes
# and libraries (convolutions in TF32, another order of sums), and are far below the distance of two images.
TOLERANCES = {
    "float32": Tolerance(0.9999, 0.01, 1e-3),
    "tf32": Tolerance(0.999, 0.05, 3e-3),
    "float16": Tolerance(0.999, 0.05, 3e-3),
    "bfloat16": Tolerance(0.98, 0.25, 5e-3),
}
# The features of a network with random weights lie so close together that the bounds above tell no images apart. So
# the distance may also be no larger than this share of the typical distance between two images (measured: bfloat16
# on networks random and trained stays below 0.024; nearer pairs of photographs than this were not found).
MAX_SHARE_OF_SPREAD = 0.1
SPREAD_ROWS = 256


@dataclass(frozen=True)
class Agreement:
    """How n stored features compare with their recomputed ones, each (n,).

    Attributes:
        differences: largest difference of a value, as a share of the feature's largest value.
        distances: Euclidean, as a share of the feature's length.
        spread: the typical distance of two images, in the same unit.
    """

    cosines: NDArray[np.float64]
    differences: NDArray[np.float64]
    distances: NDArray[np.float64]
    spread: float

    def within(self, tolerance: Tolerance) -> NDArray[np.bool_]:
        """Which of the n features agree; one that is not finite never does."""
        close = (self.differences <= tolerance.max_difference) & (self.cosines >= tolerance.min_cosine)
        return np.asarray(close & (self.distances <= max(MAX_SHARE_OF_SPREAD * self.spread, tolerance.noise)))


def compare_features(stored: Features, computed: Features, others: Features) -> Agreement:
    """Compare features (n, d) row by row; two rows of zeros agree.

    Args:
        others: (m, d) of any images of the same key, whose distances are the measure.
    """
    old, new = stored.astype(np.float64), computed.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        length = np.linalg.norm(old, axis=1)
        zeros = ~old.any(axis=1) & ~new.any(axis=1)
        cosines = np.where(zeros, 1.0, np.einsum("nd,nd->n", old, new) / (length * np.linalg.norm(new, axis=1)))
        largest = np.maximum(np.abs(old).max(axis=1, initial=0.0), np.abs(new).max(axis=1, initial=0.0))
        differences = np.where(zeros, 0.0, np.abs(old - new).max(axis=1, initial=0.0) / largest)
        distances = np.where(zeros, 0.0, np.linalg.norm(old - new, axis=1) / length)
    return Agreement(cosines, differences, distances, _spread(others.astype(np.float64)))


def _spread(features: NDArray[np.float64]) -> float:
    """The median distance of two rows, as a share of their typical length; infinite where there is no pair."""
    if len(features) < 2:
        return float("inf")
    distances = np.linalg.norm(features - np.roll(features, 1, axis=0), axis=1)
    return float(np.median(distances) / max(np.median(np.linalg.norm(features, axis=1)), np.finfo(float).tiny))


@dataclass(frozen=True)
class Recomputed:
    """How a sample of stored features compares with features computed again; ``problems`` are sentences."""

    paths: list[str]
    agreement: Agreement
    tolerance: Tolerance
    problems: list[str]

    @property
    def note(self) -> str:
        """The comparison in a sentence."""
        if not self.paths:
            return "no image of data.root has a feature here, so only the bytes could be verified"
        return (
            f"{len(self.paths)} features computed again; cosine at least {self.agreement.cosines.min():.6f}"
            f" (tolerance {self.tolerance.min_cosine}), largest relative difference"
            f" {self.agreement.differences.max():.2g} (tolerance {self.tolerance.max_difference})"
        )

    def summary(self) -> dict[str, Any]:
        """The comparison as JSON."""
        values = {
            "min_cosine": self.agreement.cosines.min(initial=1.0),
            "max_difference": self.agreement.differences.max(initial=0.0),
        }
        finite = {name: float(value) if np.isfinite(value) else None for name, value in values.items()}
        return {"images": len(self.paths), **finite, "tolerance": vars(self.tolerance)}


@dataclass(frozen=True)
class _Chosen:
    """Contents that have a feature, and what was wrong with those looked at."""

    paths: list[str] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    pixels: list[Pixels] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def recompute(
    images: Images, backbone: Backbone, view: View, store: FeatureStore, *, sample: int, seed: int
) -> Recomputed:
    """Compute up to ``sample`` features of ``images`` again; ``seed`` chooses which."""
    chosen = _choose(images, backbone, view, store, sample=sample, seed=seed)
    tolerance = TOLERANCES[store.spec.precision]
    stored = store.read(stack_digests(chosen.digests))
    # As extract runs it, so that on the machine that stored them features come out equal to the bit.
    with single_threaded_torch(backbone.device.type == "cpu"):
        computed = as_stored(backbone(chosen.pixels), store.spec.dtype) if chosen.pixels else stored
    agreement = compare_features(stored, computed, store.read(store.digests[:SPREAD_ROWS]))
    problems = [
        f"{store.spec.folder_name}: the feature of {chosen.paths[row]!r} comes out differently when computed again"
        f" (cosine {agreement.cosines[row]:.6f}, largest relative difference {agreement.differences[row]:.2g})."
        for row in np.flatnonzero(~agreement.within(tolerance)).tolist()
    ]
    return Recomputed(chosen.paths, agreement, tolerance, [*chosen.problems, *problems])


def _choose(images: Images, backbone: Backbone, view: View, store: FeatureStore, *, sample: int, seed: int) -> _Chosen:
    """Up to ``sample`` different contents that have a feature, in a random order that the seed gives."""
    chosen = _Chosen()
    decode = as_the_rule_says(Decoding(backbone.decoder, view, backbone.transform.framing), backbone.device)
    for row in _candidates(images, store, seed):
        if len(chosen.digests) >= sample:
            break
        remembered = images.digest(row) if images.known[row] else None
        data = images.read(row)
        if data is None:
            continue
        digest, path = images.digest(row), images.paths[row]
        if remembered not in (None, digest) and images.is_unchanged(row):
            file = images.index_file
            chosen.problems.append(f"{file} remembers another content of {path!r}; remove the index file.")
        if digest in chosen.digests or not store.contains(stack_digests([digest]))[0]:
            continue
        try:
            pixels = decode(data, digest)
        except BadImage as bad:
            chosen.problems.append(f"{path!r} has a feature but no longer decodes: {bad}.")
            continue
        chosen.paths.append(path)
        chosen.digests.append(digest)
        chosen.pixels.append(pixels)
    return chosen


def _candidates(images: Images, store: FeatureStore, seed: int) -> list[int]:
    """Images that the index knows to have a feature, in random order; then those that would have to be read first."""
    order = np.random.default_rng(seed).permutation(len(images))
    promising = images.known & store.contains(images.digests)
    return [*order[promising[order]].tolist(), *order[~images.known[order]].tolist()]
