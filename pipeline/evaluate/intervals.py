"""95 % intervals: Wilson's for a proportion, a seeded percentile bootstrap for everything else."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..runtime.seeds import make_generator

Z95 = 1.959963984540054  # the 97.5 % quantile of the normal distribution
RESAMPLES = 1000
_CHUNK = 1 << 21  # weights held at once: 16 MiB, and another array of that size beside them


def wilson(successes: int, n: int) -> list[float] | None:
    """Wilson's score interval of ``successes / n``, at 95 %; None where n is 0.

    Unlike the normal approximation it stays in [0, 1] and is not empty at 0 % or 100 %.
    Source: E. B. Wilson, JASA 22 (1927); recommended by Brown, Cai, DasGupta, Statistical Science 16 (2001).
    """
    if n == 0:
        return None
    share, squared = successes / n, Z95 * Z95
    centre = (share + squared / (2 * n)) / (1 + squared / n)
    half = Z95 / (1 + squared / n) * math.sqrt(share * (1 - share) / n + squared / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return [low, high]


def resample_weights(n: int, *, seed: int = 0) -> Iterator[NDArray[np.float64]]:
    """How often each of n rows occurs in each bootstrap resample, in blocks (b, n) of bounded memory.

    The resamples depend on ``seed`` and n alone, so that all metrics of a run share them.
    """
    generator = make_generator("bootstrap", seed, n)
    block = max(1, min(RESAMPLES, _CHUNK // n))
    for start in range(0, RESAMPLES, block):
        weights = np.empty((min(block, RESAMPLES - start), n))
        for row in weights:
            row[:] = np.bincount(generator.integers(n, size=n, dtype=np.int32), minlength=n)
        yield weights


def percentile_interval(values: NDArray[np.float64]) -> list[float]:
    """The middle 95 % of the resampled ``values`` (resamples,)."""
    low, high = np.percentile(values, (2.5, 97.5))
    return [float(low), float(high)]


def centred_interval(values: NDArray[np.float64], value: float) -> list[float]:
    """`percentile_interval` moved so that the resamples centre on ``value``, and cut off at 0.

    For scores that noise can only raise, such as the calibration error: resampling adds noise of its own, so that
    the plain interval lies too high and can even miss the value.
    """
    low, high = percentile_interval(values)
    shift = value - float(values.mean())
    return [max(0.0, low + shift), high + shift]
