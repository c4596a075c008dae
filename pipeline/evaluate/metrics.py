"""The metrics: one entry of `METRICS` each, which JSON, terminal, comparison and report all read.

To add one, write its entry; nothing else has to change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .calibration import calibration_error
from .intervals import Floats, Interval, Ints, percentile_interval, resample_weights, share_interval
from .text import percent, percent_range

Values = dict[str, float | list[float] | None]
Estimate = tuple[float, Interval | None]

TOP: Final = 5
NO_IMAGES: Final = "there are no images to score"
_SMALLEST = float(np.finfo(np.float64).eps)
_ROWS = 1 << 16
_NO_SPREAD = 1e-12  # rounding alone makes resamples differ by less


class ScoredImages:
    """What n images and a classifier's output say, image by image.

    Args:
        y, predicted: (n,) true and predicted classes, each in [0, c).
        probabilities: (n, c), or None where the head gives none: then only `right` and the classes can be asked for.
        groups: (n,) equal for images that are not independent of one another; None where all are. Kept from 0 on.
    """

    def __init__(self, y: Ints, predicted: Ints, probabilities: Floats | None, groups: Ints | None = None) -> None:
        self.y, self.predicted = y, predicted
        self._probabilities = probabilities
        self.right: NDArray[np.bool_] = y == predicted
        numbered = np.arange(len(y)) if groups is None else np.unique(groups, return_inverse=True)[1]
        self.units = int(numbered.max()) + 1 if len(y) else 0
        self.groups: Ints = numbered if self.units < len(y) else np.arange(len(y))

    def __len__(self) -> int:
        return len(self.y)

    def check(self, classes: int) -> None:
        """Refuse what a mistake of the program would make.

        Raises:
            ValueError: classes outside [0, ``classes``), other shapes, or rows of probabilities that are none.
        """
        n, chances = len(self), self._probabilities
        for name, array in (("y", self.y), ("predicted", self.predicted)):
            if array.shape != (n,) or not np.issubdtype(array.dtype, np.integer):
                raise ValueError(f"{name} must be {n} rows of integers, not {array.dtype} of shape {array.shape}")
            if n and (array.min() < 0 or array.max() >= classes):
                raise ValueError(f"{name} must lie in [0, {classes}), but holds {array.min()} to {array.max()}")
        if chances is not None and chances.shape != (n, classes):
            raise ValueError(f"probabilities must have shape {(n, classes)}, not {chances.shape}")
        # Summing catches NaN and infinity too. Heads that compute in float32 miss 1 by some 1e-6.
        if chances is not None and n and not (np.abs(chances.sum(axis=1) - 1).max() < 1e-3 and chances.min() >= 0):
            raise ValueError("each row of probabilities must be non-negative and sum to 1")

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


def share(of: Callable[[ScoredImages], NDArray[np.bool_]]) -> Callable[[ScoredImages], Estimate]:
    """The share of images for which ``of`` says yes (n,), with Wilson's interval."""

    def estimate(images: ScoredImages) -> Estimate:
        yes = of(images)
        return float(yes.mean()), share_interval(yes, images.groups)

    return estimate


def resampled(compute: Callable[[Weighted], Floats], images: ScoredImages) -> Estimate:
    """Any other score: ``compute`` gives its values (b,) for b weightings, and resampled groups its bounds."""
    value = float(compute(Weighted(images, np.ones((1, len(images)))))[0])
    if images.units < 2:
        return value, None
    values = [compute(Weighted(images, weights)) for weights in resample_weights(images.groups)]
    return value, percentile_interval(np.concatenate(values), images.units)


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


def _calibration_error(images: ScoredImages) -> Estimate:
    return calibration_error(images.confidence, images.top_right, images.groups)


@dataclass(frozen=True)
class Metric:
    """How a metric is called, estimated and shown.

    Attributes:
        title, short_title: for people; the short one (``title`` where it is empty) heads a column.
        compute: its values (b,) for b weightings, from which its interval follows by the bootstrap (`resampled`).
        estimate: its value and its 95 % interval at once, for a metric that has a better one.
        is_share: shown in per cent, other numbers with three decimals.
        needs_probabilities: None, with a reason, where the head gives none.
        above_classes: there only for more classes than this.
    """

    title: str
    compute: Callable[[Weighted], Floats] | None = None
    estimate: Callable[[ScoredImages], Estimate] | None = None
    short_title: str = ""
    is_share: bool = True
    lower_is_better: bool = False
    needs_probabilities: bool = False
    above_classes: int = 0

    def measure(self, images: ScoredImages) -> Estimate:
        """Its value, and its interval where that can be told."""
        if self.estimate is not None:
            value, bounds = self.estimate(images)
        else:
            assert self.compute is not None, f"{self.title} has neither compute nor estimate"
            value, bounds = resampled(self.compute, images)
        return value, bounds if bounds and bounds[1] - bounds[0] > _NO_SPREAD else None

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
    "accuracy": Metric("accuracy", estimate=share(lambda images: images.right)),
    "balanced_accuracy": Metric("balanced accuracy", _balanced_accuracy, short_title="bal. acc."),
    "macro_f1": Metric("macro F1", _macro_f1),
    "log_loss": Metric("log loss", _log_loss, is_share=False, lower_is_better=True, needs_probabilities=True),
    "ece": Metric(
        "calibration error",
        estimate=_calibration_error,
        short_title="ECE",
        lower_is_better=True,
        needs_probabilities=True,
    ),
    "top5": Metric(
        "top-5 accuracy",
        estimate=share(lambda images: images.rank < TOP),
        short_title="top-5",
        needs_probabilities=True,
        above_classes=TOP,
    ),
}


def measure(images: ScoredImages, classes: int, why_no_probabilities: str | None) -> tuple[Values, dict[str, str]]:
    """Every metric and its 95 % interval under ``NAME_ci95``; what cannot be given is None, and why by the same name.

    Args:
        classes: c, how many the classifier knows.
        why_no_probabilities: the head's reason, where ``images`` have none.
    """
    values: Values = {}
    reasons: dict[str, str] = {}
    for name, metric in METRICS.items():
        if classes <= metric.above_classes:
            continue
        values[name] = values[f"{name}_ci95"] = None
        if not len(images):
            reasons[name] = NO_IMAGES
        elif metric.needs_probabilities and not images.has_probabilities:
            reasons[name] = why_no_probabilities or "the head gives no probabilities"
        else:
            values[name], values[f"{name}_ci95"] = metric.measure(images)
            if values[f"{name}_ci95"] is None:
                reasons[f"{name}_ci95"] = _why_no_interval(images)
    return values, reasons


def _why_no_interval(images: ScoredImages) -> str:
    if 1 == images.units < len(images):
        return "all images are of one group, so nothing says how sure this is"
    return "resampling the images changes nothing, so it cannot say how sure this is"
