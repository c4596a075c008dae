"""From a fitted head and a table of features to the metrics and the predictions of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..artifacts import ClassScores, ConfusedPair, Leak, Predictions, ReliabilityBin, RunMetrics, Uncorrected
from ..data.source import SPLITS
from .calibration import BINS, bins_of
from .coverage import coverage_curve
from .intervals import Floats, Ints, share_interval
from .metrics import METRICS, NO_IMAGES, ScoredImages, measure
from .protocol import Provenance, find_leak, leak_sentence, protocol_sentence, uncorrected_sentence
from .text import percent

if TYPE_CHECKING:  # a comparison of finished runs needs no torch
    from ..features.cache import FeatureTable
    from ..heads import Head

MAX_CONFUSION = 1000
FEW_GROUPS = 20
_SHOWN_PAIRS = 50


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
    output, names = apply_head(head, table.features, len(table.class_names)), table.class_names
    rows = rows & (table.targets >= 0)
    probabilities = None if output.probabilities is None else output.probabilities[rows]
    images = ScoredImages(table.targets[rows], output.predicted[rows], probabilities, table.groups[rows])
    leak = find_leak(provenance.train_digests, table.digests, table.groups, rows, images.right)
    metrics = score_images(images, names, provenance, split=split, where=where, leak=leak, why_none=output.why_none)
    uncorrected = _uncorrected(table, np.isin(table.splits, table.splits[rows]), output)
    return metrics.model_copy(update={"uncorrected": uncorrected}), _predictions(table, output)


def _uncorrected(table: FeatureTable, rows: NDArray[np.bool_], output: ClassifierOutput) -> Uncorrected | None:
    """The score on ``rows`` (bool (n,)) by the labels as found, where some of them were corrected."""
    if table.found is None or not (corrected := int((table.found != table.targets)[rows].sum())):
        return None
    rows = rows & (table.found >= 0)
    right = output.predicted[rows] == table.found[rows]
    return Uncorrected(
        corrected=corrected,
        n=len(right),
        accuracy=float(right.mean()) if len(right) else None,
        accuracy_ci95=share_interval(right, table.groups[rows]),
    )


def score_images(
    images: ScoredImages,
    class_names: Sequence[str],
    provenance: Provenance,
    *,
    split: str,
    where: str = "",
    leak: Leak | None = None,
    why_none: str | None = None,
) -> RunMetrics:
    """Everything that can be said about a classifier's output for images.

    Raises:
        ValueError: shapes, classes or probabilities that do not fit together.
    """
    images.check(len(class_names))
    n, majority = len(images), int(provenance.train_counts.argmax())
    values, reasons = measure(images, len(class_names), why_none)
    if not n:
        reasons["baseline_accuracy"] = NO_IMAGES
    if len(class_names) > MAX_CONFUSION:
        reasons["confusion"] = f"more than {MAX_CONFUSION} classes"
    matrix, pairs = _confusion(images, class_names)
    grouped = images.units < n
    return RunMetrics(
        split=split,
        n=n,
        metrics=values,
        reasons=reasons,
        baseline_accuracy=float((images.y == majority).mean()) if n else None,
        baseline_class=class_names[majority] if n else None,
        class_names=list(class_names),
        confusion=matrix,
        confused=pairs,
        per_class=_per_class(images, class_names),
        reliability=_reliability(images) if images.has_probabilities and n else None,
        coverage=(
            coverage_curve(images.confidence, images.top_right, images.groups) if images.has_probabilities else []
        ),
        protocol=protocol_sentence(provenance, where or split, n, images.units),
        leak=leak,
        groups=images.groups.tolist() if grouped else None,
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
    if metrics.uncorrected is not None:
        lines.insert(0, uncorrected_sentence(metrics.uncorrected, metrics.split))
    leak = [leak_sentence(metrics.leak, metrics.split)] if metrics.leak else []
    return [*lines, metrics.protocol, *(f"Warning: {warning}" for warning in [*leak, *metrics.warnings])]


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
    predicted = np.bincount(images.predicted, minlength=size).tolist()
    order = np.argsort(images.y, kind="stable")
    starts = np.searchsorted(images.y[order], np.arange(size + 1))
    rows = []
    for number, label in enumerate(class_names):
        own = order[starts[number] : starts[number + 1]]
        n, m, hit = len(own), predicted[number], int(images.right[own].sum())
        rows.append(
            ClassScores(
                label=label,
                n=n,
                predicted=m,
                precision=hit / m if m else None,
                recall=hit / n if n else None,
                recall_ci95=share_interval(images.right[own], images.groups[own]),
                f1=2 * hit / (n + m) if n + m else None,
            )
        )
    return rows


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
    place = bins_of(images.confidence)
    count, sure, right = (
        np.bincount(place, values, minlength=BINS) for values in (None, images.confidence, images.top_right)
    )
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
    warnings = []
    if images.units < min(len(images), FEW_GROUPS):
        few = "1 group" if images.units == 1 else f"{images.units} groups"
        warnings.append(f"The scored images are of {few} only, so that their intervals are rough.")
    absent = np.flatnonzero(np.bincount(images.y, minlength=len(class_names)) == 0)
    if len(images) and len(absent):
        named = ", ".join(class_names[index] for index in absent[:5].tolist())
        warnings.append(
            f"{len(absent)} of {len(class_names)} classes have no images in the scored set"
            f" ({named}{', ...' if len(absent) > 5 else ''}); averages over classes leave them out."
        )
    return warnings
