"""Probabilities that mean what they say: temperature scaling (Guo et al. 2017) and the calibration error."""

from __future__ import annotations

from typing import Any

import numpy as np

from .base import Floats, Ints, log_losses, softmax

ECE_BINS = 15
SMALLEST_BETA, LARGEST_BETA = 1e-3, 1e3


def expected_calibration_error(probabilities: Floats, index: Ints, bins: int = ECE_BINS) -> float:
    """Mean distance of confidence and accuracy over ``bins`` equal-width bins of the top probability, by rows."""
    if not len(index):
        return float("nan")
    top = probabilities.max(axis=1)
    hit = probabilities.argmax(axis=1) == index
    place = np.clip(np.ceil(top * bins).astype(np.int64) - 1, 0, bins - 1)
    difference = np.bincount(place, weights=hit - top, minlength=bins)
    return float(np.abs(difference).sum() / len(index))


def fit_temperature(logits: Floats, index: Ints) -> float:
    """The temperature that minimises the mean log loss of ``logits / temperature`` (n, c).

    The loss is convex in the inverse temperature, so that its minimum is found by halving an interval of the sign of
    its slope. Data that is perfectly separated would ask for 0: the result stays between 1e-3 and 1e3.
    """
    low, high = np.log(SMALLEST_BETA), np.log(LARGEST_BETA)
    own = logits[np.arange(len(index)), index]
    for _ in range(40):
        middle = 0.5 * (low + high)
        expected = (softmax(np.exp(middle) * logits) * logits).sum(axis=1)
        if (expected - own).mean() < 0:
            low = middle
        else:
            high = middle
    return float(np.exp(-0.5 * (low + high)))


def calibrate(logits: Floats, index: Ints, known: np.ndarray) -> tuple[float, dict[str, Any]]:
    """A temperature from out-of-fold ``logits`` and the record of it for ``selected``.

    Rows not ``known`` (their class was missing from their fold's train part) are left out. Where no row is left, or
    the fit would not lower the log loss, the temperature is 1.
    """
    logits, index = logits[known], index[known]
    temperature = fit_temperature(logits, index) if len(index) else 1.0
    before, after = softmax(logits), softmax(logits / temperature)
    if len(index) and log_losses(after, index).mean() >= log_losses(before, index).mean():
        temperature, after = 1.0, before
    return temperature, {
        "temperature": temperature,
        "ece_before": _number(expected_calibration_error(before, index)),
        "ece_after": _number(expected_calibration_error(after, index)),
    }


def _number(value: float) -> float | None:
    return None if np.isnan(value) else value
