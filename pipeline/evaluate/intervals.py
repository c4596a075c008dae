"""95 % intervals where images come in groups (patients, videos, byte-identical copies): groups are independent of one
another, the images of a group are not. Where each image is a group of its own, these are the usual intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ..runtime.seeds import make_generator

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Interval = list[float]

Z95 = NormalDist().inv_cdf(0.975)
RESAMPLES = 1000
_CHUNK = 1 << 21  # weights held at once: 16 MiB, and another array of that size beside them


def wilson(successes: float, n: float, z: float = Z95) -> Interval | None:
    """Wilson's score interval of ``successes / n``, at 95 %; None where n is 0.

    Unlike the normal approximation it stays in [0, 1] and is not empty at 0 % or 100 %.
    Source: E. B. Wilson, JASA 22 (1927); recommended by Brown, Cai, DasGupta, Statistical Science 16 (2001).
    """
    if n == 0:
        return None
    share, squared = successes / n, z * z
    centre = (share + squared / (2 * n)) / (1 + squared / n)
    half = z / (1 + squared / n) * math.sqrt(share * (1 - share) / n + squared / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return [low, high]


def share_interval(right: NDArray[np.bool_], groups: Ints) -> Interval | None:
    """Wilson's interval of the share of ``right`` (n,), for as many independent images as the groups (n,) are worth.

    That number is n over the design effect, and the normal quantile becomes Student's for the number of groups.
    Source: Korn and Graubard, Survey Methodology 24 (1998); Dean and Pagano, JSSAM 3 (2015).

    Returns:
        None for no image, and for several images of a single group.
    """
    n, units = len(right), len(np.unique(groups))
    if units == n:
        return wilson(int(right.sum()), n)
    if units < 2:
        return None
    share = float(right.mean())
    worth = n / design_effect(right - share, groups)
    return wilson(share * worth, worth, student95(units - 1))


def design_effect(residuals: NDArray[np.floating], groups: Ints) -> float:
    """How many times the variance of a mean over images grows by their groups; at least 1.

    Args:
        residuals: (n,) what each image differs by from what is expected of it. Where they are all 0 nothing tells how
            alike the images of a group are, and they count as one (Kish).
        groups: (n,).
    """
    _, place, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(sizes) == len(groups):
        return 1.0
    sums, spread = np.bincount(place, residuals), float((residuals**2).sum())
    if spread == 0 or len(sizes) < 2:
        return float((sizes**2).sum() / len(groups))
    return max(1.0, len(sizes) / (len(sizes) - 1) * float((sums**2).sum()) / spread)


def student95(freedom: int) -> float:
    """The 97.5 % quantile of Student's t distribution; from 3 degrees of ``freedom`` on within 1 %.

    Source: Abramowitz and Stegun (1964), 26.7.5.
    """
    z, v = Z95, freedom
    first, second = (z**3 + z) / (4 * v), (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    return z + first + second + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)


def resample_weights(groups: Ints, *, seed: int = 0) -> Iterator[Floats]:
    """How often each of n rows occurs in each bootstrap resample of their groups, in blocks (b, n) of bounded memory.

    The resamples depend on ``seed`` and the number of groups alone, so that all metrics of a run share them.
    """
    names, place = np.unique(groups, return_inverse=True)
    generator, units, n = make_generator("bootstrap", seed, len(names)), len(names), len(groups)
    block = max(1, min(RESAMPLES, _CHUNK // n))
    for start in range(0, RESAMPLES, block):
        weights = np.empty((min(block, RESAMPLES - start), n))
        for row in weights:
            row[:] = np.bincount(generator.integers(units, size=units, dtype=np.int32), minlength=units)[place]
        yield weights


def percentile_interval(values: Floats, units: int) -> Interval:
    """The middle 95 % of the resampled ``values`` (resamples,), widened for few ``units`` that were resampled.

    Source: Hesterberg, The American Statistician 69 (2015), expanded percentile interval.
    """
    tail = 100 * NormalDist().cdf(-math.sqrt(units / (units - 1)) * student95(units - 1))
    low, high = np.percentile(values, (tail, 100 - tail))
    return [float(low), float(high)]
