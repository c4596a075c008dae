"""From a fitted head and a table of features to the metrics and the predictions of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..artifacts import ClassScores, ConfusedPair, Predictions, ReliabilityBin, RunMetrics
from ..data.source import SPLITS
from .intervals import wilson
from .metrics import BINS, METRICS, Floats, Ints, ScoredImages, measure
from .protocol import Provenance, find_leak, leak_sentence, protocol_sentence
from .text import percent

if TYPE_CHECKING:  # a comparison of finished runs needs no torch
    from ..features.cache import FeatureTable
    from ..heads import Head

MAX_CONFUSION = 1000
_SHOWN_PAIRS = 50
_NO_IMAGES = "there are no images to score"


@dataclass(frozen=True)
class ClassifierOutput:
    """What a classifier makes of n images.

    Args:
        predicted: (n,) classes, each in [0, c).
        probabilities: (n, c) with rows that sum to 1, or None.
        why_none: the head's reason, where there are no probabilities.
    """

    predicted: Ints
    probabilities: Floats | None = None
    why_none: str | None = None


def apply_head(head: Head, features: NDArray[np.float32], classes: int) -> ClassifierOutput:
    """The output for features (n, d); a class that train did not hold gets probability 0."""
    predicted = head.predict(features)
    if not head.has_probabilities:
        return ClassifierOutput(predicted, None, head.why_no_probabilities)
    probabilities = np.zeros((len(features), classes))
    probabilities[:, head.classes_] = head.predict_proba(features)
    return ClassifierOutput(predicted, probabilities)


def score(
    head: Head, table: FeatureTable, rows: NDArray[np.bool_], provenance: Provenance, *, split: str, where: str = ""
) -> tuple[RunMetrics, Predictions]:
    """The metrics of the labelled images at ``rows`` (bool (n,)), and the predictions of all images of the table.

    Args:
        provenance: how the head came about.
        split: what the scored set is called.
        where: the same in the protocol's sentence, should that say more.
    """
    output = apply_head(head, table.features, len(table.class_names))
    rows = rows & (table.targets >= 0)
    scored = ClassifierOutput(
        output.predicted[rows],
        None if output.probabilities is None else output.probabilities[rows],
        output.why_none,
    )
    metrics = score_images(
        table.targets[rows], scored, table.digests[rows], table.class_names, provenance, split=split, where=where
    )
    return metrics, _predictions(table, output)


def score_images(
    y: Ints,
    output: ClassifierOutput,
    digests: NDArray[np.uint8],
    class_names: Sequence[str],
    provenance: Provenance,
    *,
    split: str,
    where: str = "",
) -> RunMetrics:
    """Everything that can be said about the output for images of the classes ``y`` (n,) and ``digests`` (n, 16).

    Raises:
        ValueError: shapes, classes or probabilities that do not fit together.
    """
    _check(y, output, class_names)
    images = ScoredImages(y, output.predicted, output.probabilities)
    n, majority = len(images), int(provenance.train_counts.argmax())
    values, reasons = measure(images, len(class_names), output.why_none)
    if not n:
        reasons["baseline_accuracy"] = _NO_IMAGES
    if len(class_names) > MAX_CONFUSION:
        reasons["confusion"] = f"more than {MAX_CONFUSION} classes"
    matrix, pairs = _confusion(images, class_names)
    return RunMetrics(
        split=split,
        n=n,
        metrics=values,
        reasons=reasons,
        baseline_accuracy=float((y == majority).mean()) if n else None,
        baseline_class=class_names[majority] if n else None,
        class_names=list(class_names),
        confusion=matrix,
        confused=pairs,
        per_class=_per_class(images, class_names),
        reliability=_reliability(images) if images.has_probabilities and n else None,
        protocol=protocol_sentence(provenance, reported_on=where or split, n=n),
        leak=find_leak(provenance.train_digests, digests, images.right),
        warnings=[*provenance.warnings, *_warnings(images, class_names)],
        selected=provenance.selected,
        leaderboard=list(provenance.leaderboard),
        history=list(provenance.history),
        curve=list(provenance.curve),
    )


def metric_lines(metrics: RunMetrics) -> list[str]:
    """The scores for the terminal, with intervals, n and the majority baseline, then protocol and warnings."""
    lines = [f"Scores on {metrics.split} ({metrics.n:,} images):"]
    shown = {name: metric for name, metric in METRICS.items() if name in metrics.metrics}
    width = 1 + max(len(title) for title in ("majority baseline", *(metric.title for metric in shown.values())))
    for name, metric in shown.items():
        value, bounds = metrics.metrics[name], metric.show_interval(metrics.metrics.get(f"{name}_ci95"))
        text = "not given" if value is None else metric.show(value)
        sure = f"  (95 % interval {bounds})" if bounds else ""
        why = f": {metrics.reasons[name]}" if name in metrics.reasons else ""
        lines.append(f"  {metric.title:<{width}}{text}{sure}{why}")
    if metrics.baseline_accuracy is not None:
        share = percent(metrics.baseline_accuracy)
        lines.append(f"  {'majority baseline':<{width}}{share}  (always {metrics.baseline_class!r})")
    leak = [leak_sentence(metrics.leak, metrics.split)] if metrics.leak else []
    return [*lines, metrics.protocol, *(f"Warning: {warning}" for warning in [*leak, *metrics.warnings])]


def _check(y: Ints, output: ClassifierOutput, class_names: Sequence[str]) -> None:
    n, classes = len(y), len(class_names)
    for name, array in (("y", y), ("predicted", output.predicted)):
        if array.shape != (n,) or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"{name} must be {n} rows of integers, not {array.dtype} of shape {array.shape}")
        if n and (array.min() < 0 or array.max() >= classes):
            raise ValueError(f"{name} must lie in [0, {classes}), but holds {array.min()} to {array.max()}")
    chances = output.probabilities
    if chances is None:
        return
    if chances.shape != (n, classes):
        raise ValueError(f"probabilities must have shape {(n, classes)}, not {chances.shape}")
    # Summing catches NaN and infinity too. Heads that compute in float32 miss 1 by some 1e-6.
    if n and not (np.abs(chances.sum(axis=1) - 1).max() < 1e-3 and chances.min() >= 0):
        raise ValueError("each row of probabilities must be non-negative and sum to 1")


def _predictions(table: FeatureTable, output: ClassifierOutput) -> Predictions:
    names = table.class_names
    return Predictions(
        paths=table.paths,
        digests=table.digests,
        splits=[SPLITS[split] for split in table.splits],
        labels=[names[target] if target >= 0 else "" for target in table.targets],
        predicted=[names[target] for target in output.predicted],
        class_names=names,
        probabilities=output.probabilities,
    )


def _per_class(images: ScoredImages, class_names: Sequence[str]) -> list[ClassScores]:
    size = len(class_names)
    there, chosen, hits = (
        np.bincount(classes, minlength=size).tolist()
        for classes in (images.y, images.predicted, images.y[images.right])
    )
    return [
        ClassScores(
            label=label,
            n=n,
            predicted=m,
            precision=hit / m if m else None,
            recall=hit / n if n else None,
            recall_ci95=wilson(hit, n),
            f1=2 * hit / (n + m) if n + m else None,
        )
        for label, n, m, hit in zip(class_names, there, chosen, hits, strict=True)
    ]


def _confusion(images: ScoredImages, class_names: Sequence[str]) -> tuple[list[list[int]] | None, list[ConfusedPair]]:
    """The matrix (c, c), None above `MAX_CONFUSION` classes, and the pairs most often confused."""
    size = len(class_names)
    cells, counts = np.unique(images.y * size + images.predicted, return_counts=True)
    wrong = cells // size != cells % size
    order = np.lexsort((cells[wrong], -counts[wrong]))[:_SHOWN_PAIRS]
    pairs = [
        ConfusedPair(label=class_names[cell // size], predicted=class_names[cell % size], n=n)
        for cell, n in zip(cells[wrong][order].tolist(), counts[wrong][order].tolist(), strict=True)
    ]
    if size > MAX_CONFUSION:
        return None, pairs
    matrix = np.zeros(size * size, dtype=np.int64)
    matrix[cells] = counts
    return matrix.reshape(size, size).tolist(), pairs


def _reliability(images: ScoredImages) -> list[ReliabilityBin]:
    count = np.bincount(images.bins, minlength=BINS)
    sure = np.bincount(images.bins, images.confidence, minlength=BINS)
    right = np.bincount(images.bins, images.top_right, minlength=BINS)
    return [
        ReliabilityBin(
            low=index / BINS,
            high=(index + 1) / BINS,
            n=int(count[index]),
            confidence=min(1.0, float(sure[index] / count[index])),
            accuracy=float(right[index] / count[index]),
        )
        for index in np.flatnonzero(count).tolist()
    ]


def _warnings(images: ScoredImages, class_names: Sequence[str]) -> list[str]:
    absent = np.flatnonzero(np.bincount(images.y, minlength=len(class_names)) == 0)
    if not len(images) or not len(absent):
        return []
    named = ", ".join(class_names[index] for index in absent[:5].tolist())
    more = ", ..." if len(absent) > 5 else ""
    return [
        f"{len(absent)} of {len(class_names)} classes have no images in the scored set ({named}{more}); "
        "averages over classes leave them out."
    ]
