"""What storage does to a feature: float16 where it survives, float32 where it does not."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# A row whose direction moves by more than this in float16 keeps float32.
MIN_COSINE = 0.9999

Features = NDArray[np.float32]


def survives_float16(features: Features) -> NDArray[np.bool_]:
    """Which rows (n, d) keep their direction in float16: nothing overflows, and the cosine stays above 0.9999."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = features.astype(np.float16).astype(np.float64)
        exact = features.astype(np.float64)
        product = np.einsum("nd,nd->n", exact, rounded)
        norms = np.sqrt(np.einsum("nd,nd->n", exact, exact) * np.einsum("nd,nd->n", rounded, rounded))
        same_zero = ~exact.any(axis=1)
        return np.asarray(same_zero | (np.isfinite(rounded).all(axis=1) & (product > MIN_COSINE * norms)))


def as_stored(features: Features, dtype: str) -> Features:
    """Features (n, d) as they come back from a cache of ``dtype``: rounded row by row, in float32."""
    if dtype == "float32":
        return features
    with np.errstate(over="ignore"):
        rounded = features.astype(np.float16).astype(np.float32)
    return np.where(survives_float16(features)[:, None], rounded, features)
