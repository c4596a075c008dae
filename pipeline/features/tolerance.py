"""How closely a feature that is computed again must agree with the stored one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .rounding import Features


@dataclass(frozen=True)
class Tolerance:
    """Bounds of one precision.

    Args:
        min_cosine: between the stored and the recomputed feature.
        max_difference: largest difference of a value, as a share of the feature's largest value.
    """

    min_cosine: float
    max_difference: float


# On one machine and thread count features are equal to the bit. The bounds leave room for other devices, batch sizes
# and libraries (convolutions in TF32, another order of sums), and are far below the distance of two images.
TOLERANCES = {
    "float32": Tolerance(0.9999, 0.01),
    "float16": Tolerance(0.999, 0.05),
    "bfloat16": Tolerance(0.98, 0.25),
}


@dataclass(frozen=True)
class Agreement:
    """How n stored features compare with their recomputed ones: cosine and largest relative difference, each (n,)."""

    cosines: NDArray[np.float64]
    differences: NDArray[np.float64]

    def within(self, tolerance: Tolerance) -> NDArray[np.bool_]:
        """Which of the n features agree; one that is not finite never does."""
        close = self.differences <= tolerance.max_difference
        return np.asarray(close & (self.cosines >= tolerance.min_cosine))


def compare_features(stored: Features, computed: Features) -> Agreement:
    """Compare features (n, d) row by row; two rows of zeros agree."""
    old, new = stored.astype(np.float64), computed.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        norms = np.linalg.norm(old, axis=1) * np.linalg.norm(new, axis=1)
        zeros = ~old.any(axis=1) & ~new.any(axis=1)
        cosines = np.where(zeros, 1.0, np.einsum("nd,nd->n", old, new) / norms)
        largest = np.maximum(np.abs(old).max(axis=1, initial=0.0), np.abs(new).max(axis=1, initial=0.0))
        differences = np.where(zeros, 0.0, np.abs(old - new).max(axis=1, initial=0.0) / largest)
    return Agreement(cosines, differences)
