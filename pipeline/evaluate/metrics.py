"""The metrics: one entry of `METRICS` each, which JSON, terminal, comparison and report all read.

To add one, write its entry; nothing else has to change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from .intervals import centred_interval, percentile_interval, resample_weights, wilson
from .text import percent, percent_range

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Values = dict[str, float | list[float] | None]

BINS: Final = 15
TOP: Final = 5
_SMALLEST = float(np.finfo(np.float64).eps)
_ROWS = 1 << 16
_NO_SPREAD = 1e-12  # rounding alone makes resamples differ by less


class ScoredImages:
    """What n images and a classifier's answers say, image by image.

    Args:
        y, predicted: (n,) true and predicted classes, each in [0, c).
        probabilities: (n, c), or None where the head gives none: then only `right` and the classes can be asked for.
    """

    def __init__(self, y: Ints, predicted: Ints, probabilities: Floats | None) -> None:
        self.y, self.predicted = y, predicted
        self._probabilities = probabilities
        self.right: NDArray[np.bool_] = y == predicted

    def __len__(self) -> int:
        return len(self.y)

    @property
    def has_probabilities(self) -> bool:
        return self._probabilities is not None

    @property
    def probabilities(self) -> Floats:
        """(n, c)."""
        if self._probabilities is None:
            raise ValueError("the metric needs probabilities, but its entry does not say so")
        return self._probabilities

    @cached_property
    def seen_classes(self) -> Ints:
        """The sorted classes that are true or predicted for any image."""
        return np.union1d(self.y, self.predicted)

    @cached_property
    def places(self) -> tuple[Ints, Ints]:
        """Where each image's true and predicted class stand in `seen_classes`, (n,) each."""
        return np.searchsorted(self.seen_classes, self.y), np.searchsorted(self.seen_classes, self.predicted)

    @cached_property
    def loss(self) -> Floats:
        """(n,) -log of the true class's probability, which is clipped to [2.2e-16, 1] as scikit-learn does: one
        confident mistake costs 36, not infinity."""
        own = self._by_block(lambda chances, y: chances[np.arange(len(y)), y])
        return np.asarray(-np.log(np.clip(own, _SMALLEST, 1.0)) + 0.0)

    @cached_property
    def confidence(self) -> Floats:
        """(n,) the largest probability."""
        return self._by_block(lambda chances, _: chances.max(axis=1))

    @cached_property
    def top_right(self) -> NDArray[np.bool_]:
        """(n,) whether the class of the largest probability is the true one."""
        return self._by_block(lambda chances, y: chances.argmax(axis=1) == y)

    @cached_property
    def bins(self) -> Ints:
        """(n,) index of the confidence among `BINS` equal-width bins (low, high]."""
        return np.clip(np.ceil(self.confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)

    @cached_property
    def rank(self) -> Ints:
        """(n,) how many classes are more probable than the true one, ties going to the lower class index."""

        def of_block(chances: Floats, y: Ints) -> Ints:
            own = chances[np.arange(len(y)), y][:, None]
            before = np.arange(chances.shape[1])[None, :] < y[:, None]
            return np.asarray(np.count_nonzero((chances > own) | ((chances == own) & before), axis=1))

        return self._by_block(of_block)

    def _by_block(self, function: Callable[[Floats, Ints], NDArray[Any]]) -> NDArray[Any]:
        """``function`` of probabilities (b, c) and classes (b,), block by block so that memory stays bounded."""
        starts = range(0, len(self), _ROWS)
        return np.concatenate(
            [function(self.probabilities[start : start + _ROWS], self.y[start : start + _ROWS]) for start in starts]
        )


@dataclass(frozen=True)
class Weighted:
    """Scored images under b weightings at once, so that one formula gives a value and all its bootstrap resamples.

    Args:
        weights: (b, n), how often each image counts.
    """

    images: ScoredImages
    weights: Floats

    @cached_property
    def total(self) -> Floats:
        """(b,)."""
        return np.asarray(self.weights.sum(axis=1))

    def mean(self, values: NDArray[Any]) -> Floats:
        """The mean (b,) of a value of each image (n,)."""
        return np.asarray(self.weights @ values / self.total)

    @cached_property
    def class_sums(self) -> tuple[Floats, Floats, Floats]:
        """How many images there are of each seen class, were predicted to be, and were so rightly, (b, seen) each."""
        true, predicted = self.images.places
        hits = self.weights * self.images.right
        return self._sums(self.weights, true), self._sums(self.weights, predicted), self._sums(hits, true)

    def _sums(self, weights: Floats, places: Ints) -> Floats:
        size = len(self.images.seen_classes)
        return np.array([np.bincount(places, row, minlength=size) for row in weights], dtype=np.float64)


def _accuracy(of: Weighted) -> Floats:
    return of.mean(of.images.right)


def _balanced_accuracy(of: Weighted) -> Floats:
    """The mean recall; as in scikit-learn over classes that have images, which may be fewer in a resample."""
    there, _, hits = of.class_sums
    recall = np.divide(hits, there, out=np.zeros_like(hits), where=there > 0)
    return np.asarray(recall.sum(axis=1) / (there > 0).sum(axis=1))


def _macro_f1(of: Weighted) -> Floats:
    """As in scikit-learn the mean over classes that have images or were predicted."""
    there, predicted, hits = of.class_sums
    either = there + predicted
    f1 = np.divide(2 * hits, either, out=np.zeros_like(hits), where=either > 0)
    return np.asarray(f1.sum(axis=1) / (either > 0).sum(axis=1))


def _log_loss(of: Weighted) -> Floats:
    return of.mean(of.images.loss)


def _calibration_error(of: Weighted) -> Floats:
    """The mean over images of |accuracy - confidence| of their bin.

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """
    gaps, bins = of.images.top_right - of.images.confidence, of.images.bins
    by_bin = np.array([np.bincount(bins, row * gaps, minlength=BINS) for row in of.weights])
    return np.asarray(np.abs(by_bin).sum(axis=1) / of.total)


def _top5(of: Weighted) -> Floats:
    return of.mean(of.images.rank < TOP)


@dataclass(frozen=True)
class Metric:
    """How a metric is called, computed and shown.

    Attributes:
        title, short_title: for people; the short one (``title`` where it is empty) heads a column.
        compute: its values (b,) for b weightings.
        interval: ``wilson`` for a share of independent images; else 1000 bootstrap resamples, ``percentile`` or,
            where noise can only raise the value, ``centred`` on it.
        is_share: shown in per cent, other numbers with three decimals.
        needs_probabilities: None, with a reason, where the head gives none.
        above_classes: there only for more classes than this.
    """

    title: str
    compute: Callable[[Weighted], Floats]
    interval: Literal["wilson", "percentile", "centred"] = "percentile"
    short_title: str = ""
    is_share: bool = True
    lower_is_better: bool = False
    needs_probabilities: bool = False
    above_classes: int = 0

    @property
    def heading(self) -> str:
        return self.short_title or self.title

    def show(self, value: object) -> str:
        """``97.4 %`` or ``0.123``; – for None."""
        if not isinstance(value, (int, float)):
            return "–"
        return percent(value) if self.is_share else f"{value:.3f}"

    def show_interval(self, bounds: object, between: str = " to ") -> str:
        """The bounds in the unit of `show`, without its sign; "" for None."""
        if not isinstance(bounds, list):
            return ""
        return percent_range(bounds, between) if self.is_share else f"{bounds[0]:.3f}{between}{bounds[1]:.3f}"


METRICS: Final[dict[str, Metric]] = {
    "accuracy": Metric("accuracy", _accuracy, "wilson"),
    "balanced_accuracy": Metric("balanced accuracy", _balanced_accuracy, short_title="bal. acc."),
    "macro_f1": Metric("macro F1", _macro_f1),
    "log_loss": Metric("log loss", _log_loss, is_share=False, lower_is_better=True, needs_probabilities=True),
    "ece": Metric(
        "calibration error",
        _calibration_error,
        "centred",
        short_title="ECE",
        lower_is_better=True,
        needs_probabilities=True,
    ),
    "top5": Metric("top-5 accuracy", _top5, "wilson", short_title="top-5", needs_probabilities=True, above_classes=TOP),
}


def measure(images: ScoredImages, classes: int, why_no_probabilities: str | None) -> tuple[Values, dict[str, str]]:
    """Every metric and its 95 % interval under ``NAME_ci95``; what cannot be given is None, and why by the same name.

    Args:
        classes: c, how many the classifier knows.
        why_no_probabilities: the head's reason, where ``images`` have none.
    """
    there = {name: metric for name, metric in METRICS.items() if classes > metric.above_classes}
    values: Values = {key: None for name in there for key in (name, f"{name}_ci95")}
    reasons = {name: why for name, metric in there.items() if (why := _missing(metric, images, why_no_probabilities))}
    given = {name: metric for name, metric in there.items() if name not in reasons}
    once = Weighted(images, np.ones((1, len(images))))
    resampled = _resampled(images, {name: metric for name, metric in given.items() if metric.interval != "wilson"})
    for name, metric in given.items():
        values[name] = value = float(metric.compute(once)[0])
        values[f"{name}_ci95"] = bounds = _interval(metric, value, len(images), resampled.get(name))
        if bounds is None:
            reasons[f"{name}_ci95"] = "resampling the images changes nothing, so it cannot say how sure this is"
    return values, reasons


def _missing(metric: Metric, images: ScoredImages, why_no_probabilities: str | None) -> str | None:
    """Why the metric cannot be given, or None."""
    if metric.needs_probabilities and not images.has_probabilities:
        return why_no_probabilities or "the head gives no probabilities"
    return None if len(images) else "there are no images to score"


def _resampled(images: ScoredImages, metrics: dict[str, Metric]) -> dict[str, Floats]:
    """Each metric in every bootstrap resample of the images; {} for a single image, which has but one."""
    if len(images) < 2:
        return {}
    found: dict[str, list[Floats]] = {name: [] for name in metrics}
    for weights in resample_weights(len(images)):
        block = Weighted(images, weights)
        for name, metric in metrics.items():
            found[name].append(metric.compute(block))
    return {name: np.concatenate(blocks) for name, blocks in found.items()}


def _interval(metric: Metric, value: float, n: int, resampled: Floats | None) -> list[float] | None:
    if metric.interval == "wilson":
        return wilson(round(value * n), n)
    if resampled is None:
        return None
    bounds = centred_interval(resampled, value) if metric.interval == "centred" else percentile_interval(resampled)
    return bounds if bounds[1] - bounds[0] > _NO_SPREAD else None
