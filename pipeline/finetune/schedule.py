"""Learning-rate schedules as functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..params.sections import FinetuneParams

Schedule = Callable[[int], float]

WARMUP_SHARE = 0.3  # of a one-cycle schedule, and its first and last factor: as in torch's OneCycleLR
FIRST_DIVISOR = 25.0
LAST_DIVISOR = 1e4


def make_schedule(params: FinetuneParams, steps_per_epoch: int) -> Schedule:
    """The factor on every group's rate at optimizer step 0, 1, ... of the whole training."""
    total = max(steps_per_epoch * params.epochs, 1)
    match params.schedule:
        case "one_cycle":
            return lambda step: params.one_cycle_peak * one_cycle(step, total)
        case "cosine":
            warmup = round(params.warmup_epochs * steps_per_epoch)
            return lambda step: cosine(step, total, min(warmup, total - 1))
        case "step":
            return lambda step: float(params.step_gamma ** (step // (params.step_epochs * steps_per_epoch)))
        case "none":
            return lambda step: 1.0


def one_cycle(step: int, total: int) -> float:
    """From 1/25 up to 1 and down to nearly 0, both along a cosine (Smith and Topin 2018)."""
    peak = WARMUP_SHARE * total - 1
    first, last = 1 / FIRST_DIVISOR, 1 / FIRST_DIVISOR / LAST_DIVISOR
    if step <= peak:
        return _along_cosine(first, 1.0, step / peak)
    return _along_cosine(1.0, last, min((step - peak) / max(total - 1 - peak, 1e-9), 1.0))


def cosine(step: int, total: int, warmup: int) -> float:
    """Linear to 1 within ``warmup`` steps, then along a cosine; the step after the last would be at 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return _along_cosine(1.0, 0.0, (step - warmup) / (total - warmup))


def _along_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
