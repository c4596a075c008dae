"""The calibration error, without what chance alone makes of it."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..runtime.seeds import make_generator
from .intervals import Floats, Interval, Ints, design_effect

BINS: Final = 15
_DRAWS = 500
_SHARES = np.concatenate([np.linspace(0, 2, 41), np.linspace(2.2, 6, 20)])


def bins_of(confidence: Floats) -> Ints:
    """(n,) index of each confidence among `BINS` equal-width bins (low, high]."""
    return np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)


def calibration_error(confidence: Floats, right: NDArray[np.bool_], groups: Ints) -> tuple[float, Interval]:
    """The mean over images of |accuracy - confidence| of their bin, and its 95 % interval.

    Computed plainly (Guo et al., ICML 2017) it is above 0 for a perfectly calibrated head too: by 4 % on 355 images.
    So it is asked which true errors would give the plain value: right answers are drawn as often as the confidence
    says, moved by some share of the gap to the accuracy that was seen (share 0 is the consistency resampling of
    Bröcker and Smith, Weather and Forecasting 22, 2007). The value is the error of the share whose draws lie below the
    plain value half of the time, and the interval holds the shares that the plain value does not contradict, whether
    the gaps are those of each bin or one for all bins. The upper bound is held against what a calibrated head would
    give (Read, J. Phys. G 28, 2002), so that it is never empty.

    Args:
        confidence: (n,) the largest probability.
        right: (n,) whether its class is the true one.
        groups: (n,) images of one group do not vary independently.
    """
    place, n = np.unique(bins_of(confidence), return_inverse=True)[1], len(right)
    count, sure, hits = np.bincount(place), np.bincount(place, confidence), np.bincount(place, right)
    mean, accuracy = np.minimum(sure / count, 1.0), hits / count
    plain = np.abs(hits - count * mean).sum() / n
    generator = make_generator("calibration", n)
    likeness, common = _of_groups(right - accuracy[place], place, groups, generator)
    found = []
    for gaps in (accuracy - mean, np.copysign(plain, hits.sum() - sure.sum())):
        errors, below = np.empty(len(_SHARES)), np.empty(len(_SHARES))
        for number, share in enumerate(_SHARES):
            chance = np.clip(mean + share * gaps, 0.0, 1.0)
            drawn = np.sqrt(1 - likeness) * (generator.binomial(count, chance, (_DRAWS, len(count))) - count * chance)
            drawn += np.sqrt(likeness * chance * (1 - chance)) * common
            values = np.abs(count * (chance - mean) + drawn).sum(axis=1) / n
            errors[number] = np.abs(count * (chance - mean)).sum() / n
            below[number] = ((values < plain - 1e-12).mean() + (values <= plain + 1e-12).mean()) / 2
        errors, below = np.maximum.accumulate(errors), np.minimum.accumulate(below)
        found.append(np.interp((0.5, 0.975, 0.025 * below[0]), below[::-1], errors[::-1]).tolist())
    (value, *_), (_, lows, highs) = found[0], zip(*found, strict=True)
    return value, [min(lows), max(highs)]


def _of_groups(
    residuals: Floats, place: Ints, groups: Ints, generator: np.random.Generator
) -> tuple[float, Floats | float]:
    """How alike the images of a group are (0 to 1), and draws (draws, bins) of what groups add to all bins at once."""
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    worst = float((sizes**2).sum()) / len(groups)
    if worst == 1:
        return 0.0, 0.0
    shape = (len(sizes), int(place.max()) + 1)
    members = np.bincount(group * shape[1] + place, minlength=shape[0] * shape[1]).reshape(shape)
    common = generator.multivariate_normal(np.zeros(shape[1]), members.T @ members, _DRAWS)
    return min(1.0, (design_effect(residuals, groups) - 1) / (worst - 1)), common
