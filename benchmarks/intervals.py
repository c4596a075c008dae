"""How often a 95 % interval holds the truth, on simulated heads and images in groups: ours beside the plain ones.

    python benchmarks/intervals.py --tries 300

Calibration: heads with two or five classes, calibrated, or surer than right (their logits should be divided by 1.5 or
3). The baseline is the plain error of Guo et al. with a bootstrap interval of images, centred on it. Groups: each group
has a probability of its own to be right, alike by ``likeness`` (0: independent images, 1: all right or all wrong). The
baseline is Wilson's interval of images, and McNemar's exact test of images between two equally good heads.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluate import mcnemar_exact, wilson
from pipeline.evaluate.calibration import BINS, bins_of, calibration_error
from pipeline.evaluate.intervals import share_interval

Floats = NDArray[np.float64]
HEADS = {"two classes, sharp": (2, 3.0), "two classes, near certain": (2, 8.0), "five classes": (5, 1.2)}
RESAMPLES = 300


def softmax_top(logits: Floats) -> Floats:
    """(n,) the largest probability of logits (n, c)."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(1 / powers.sum(axis=1))


def draw(head: str, cooled: float, n: int, generator: np.random.Generator) -> tuple[Floats, Floats]:
    """Confidences (n,) and how often each is right (n,)."""
    classes, scale = HEADS[head]
    logits = generator.normal(0, scale, (n, classes))
    return softmax_top(logits), softmax_top(logits / cooled)


def plain_error(confidence: Floats, right: Floats) -> float:
    return float(np.abs(np.bincount(bins_of(confidence), right - confidence, minlength=BINS)).sum() / len(right))


def centred_bootstrap(confidence: Floats, right: Floats, generator: np.random.Generator) -> tuple[float, float]:
    """What was reported before: percentiles of resampled images, moved onto the plain value and cut off at 0."""
    rows = generator.integers(len(right), size=(RESAMPLES, len(right)))
    values = [plain_error(confidence[row], right[row]) for row in rows]
    low, high = np.percentile(values, (2.5, 97.5)) + plain_error(confidence, right) - np.mean(values)
    return max(0.0, float(low)), float(high)


def calibration_table(sizes: list[int], tries: int) -> None:
    print("| head | n | true error | plain, mean | ours, mean | plain, covers | ours, covers |")
    print("| :-- | --: | --: | --: | --: | --: | --: |")
    for head in HEADS:
        for cooled in (1.0, 1.5, 3.0):
            generator = np.random.default_rng(0)
            truth = plain_error(*draw(head, cooled, 1_000_000, generator))
            for n in sizes:
                rows = [calibration_try(head, cooled, n, generator) for _ in range(tries)]
                plain, ours, plain_bounds, bounds = (np.array(column) for column in zip(*rows, strict=True))
                shares = [f"{100 * value:.1f} %" for value in (truth, plain.mean(), ours.mean())]
                covers = [f"{100 * covered(each, truth):.0f} %" for each in (plain_bounds, bounds)]
                print(f"| {head}, {cooled:g} | {n} | {' | '.join([*shares, *covers])} |", flush=True)


def calibration_try(head: str, cooled: float, n: int, generator: np.random.Generator) -> tuple[object, ...]:
    confidence, chance = draw(head, cooled, n, generator)
    right = generator.random(n) < chance
    ours, bounds = calibration_error(confidence, right, np.arange(n))
    plain_bounds = centred_bootstrap(confidence, right.astype(float), generator)
    return plain_error(confidence, right.astype(float)), ours, plain_bounds, bounds


def covered(bounds: Floats, truth: float) -> float:
    return float(((bounds[:, 0] <= truth) & (truth <= bounds[:, 1])).mean())


def group_table(tries: int) -> None:
    print("| groups of images | accuracy | likeness | Wilson, covers | ours, covers | McNemar, false | ours, false |")
    print("| :-- | --: | --: | --: | --: | --: | --: |")
    for count, size in ((10, 20), (30, 10), (100, 5)):
        groups = np.repeat(np.arange(count), size)
        for accuracy in (0.6, 0.8, 0.95):
            for likeness in (0.0, 0.2, 0.6):
                generator = np.random.default_rng(0)
                draw_right = group_draw(accuracy, likeness, count, size, generator)
                first = [draw_right() for _ in range(tries)]
                plain = np.array([wilson(int(right.sum()), len(right)) for right in first])
                ours = np.array([share_interval(right, groups) for right in first])
                pairs = [(right, draw_right()) for right in first]
                false = [np.mean([mcnemar_exact(*pair, by) < 0.05 for pair in pairs]) for by in (None, groups)]
                shares = [covered(plain, accuracy), covered(ours, accuracy), *false]
                cells = " | ".join(f"{100 * share:.0f} %" for share in shares)
                print(f"| {count} of {size} | {accuracy} | {likeness} | {cells} |", flush=True)


def group_draw(
    accuracy: float, likeness: float, count: int, size: int, generator: np.random.Generator
) -> Callable[[], NDArray[np.bool_]]:
    def right() -> NDArray[np.bool_]:
        chances = np.full(count, accuracy)
        if likeness:
            spread = (1 - likeness) / likeness
            chances = generator.beta(accuracy * spread, (1 - accuracy) * spread, count)
        return generator.random(count * size) < np.repeat(chances, size)

    return right


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=300)
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 355, 1000, 5000])
    arguments = parser.parse_args()
    calibration_table(arguments.sizes, arguments.tries)
    print()
    group_table(arguments.tries)
