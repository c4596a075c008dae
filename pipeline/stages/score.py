"""From a fitted head and a table to predictions, metrics and the records of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..artifacts import Leak, Predictions, RunMetrics
from ..data.source import SPLITS
from ..evaluate import check_leak, evaluate_predictions, leak_sentence
from ..features.cache import FeatureTable
from ..heads import Head


@dataclass(frozen=True)
class Scored:
    """Predicted targets (n,) and probabilities (n, c) over all class names, or None with the head's reason."""

    predicted: NDArray[np.int64]
    probabilities: NDArray[np.float64] | None
    why_none: str | None = None


def apply_head(head: Head, features: NDArray[np.float32], classes: int) -> Scored:
    """Predict rows (n, d); a class that train did not hold gets probability 0."""
    predicted = head.predict(features)
    if not head.has_probabilities:
        return Scored(predicted, None, head.why_no_probabilities)
    probabilities = np.zeros((len(features), classes))
    probabilities[:, head.classes_] = head.predict_proba(features)
    return Scored(predicted, probabilities)


def predictions_of(table: FeatureTable, scored: Scored) -> Predictions:
    """The rows of predictions.csv, all splits."""
    names = table.class_names
    return Predictions(
        paths=table.paths,
        digests=table.digests,
        splits=[SPLITS[split] for split in table.splits],
        labels=[names[target] if target >= 0 else "" for target in table.targets],
        predicted=[names[target] for target in scored.predicted],
        class_names=names,
        probabilities=scored.probabilities,
    )


def score_split(
    table: FeatureTable,
    scored: Scored,
    rows: NDArray[np.bool_],
    *,
    train_digests: NDArray[np.uint8],
    train_counts: NDArray[np.int64],
    facts: dict[str, Any],
) -> RunMetrics:
    """The metrics of the labelled images at ``rows`` (bool (n,)); ``facts`` are further fields of `RunMetrics`."""
    rows = rows & (table.targets >= 0)
    y, predicted = table.targets[rows], scored.predicted[rows]
    values = evaluate_predictions(
        y,
        predicted,
        None if scored.probabilities is None else scored.probabilities[rows],
        table.class_names,
        train_counts=train_counts,
        why_no_probabilities=scored.why_none,
    )
    leak = check_leak(train_digests, table.digests[rows], y, predicted)
    merged = {**values, **facts, "warnings": [*facts.get("warnings", []), *values["warnings"]]}
    return RunMetrics(**merged, leak=Leak(**leak) if leak["leaked"] else None)


def _percent(share: float | None) -> str:
    return "not defined" if share is None else f"{100 * share:.1f} %"


def metric_lines(metrics: RunMetrics) -> list[str]:
    """The scores for the terminal, with intervals, n and the majority baseline, then protocol and warnings."""
    lines = [f"Scores on {metrics.split} ({metrics.n:,} images):"]
    for name, value in metrics.metrics.items():
        if not name.endswith("_ci95"):
            bounds = _interval(name, metrics.metrics.get(f"{name}_ci95"))
            lines.append(f"  {name.replace('_', ' '):<18}{_score(name, value)}{bounds}{_reason(metrics, name)}")
    if metrics.baseline_accuracy is not None:
        share = _percent(metrics.baseline_accuracy)
        lines.append(f"  {'majority baseline':<18}{share}  (always {metrics.baseline_class!r})")
    leak = [leak_sentence(metrics.leak, metrics.split)] if metrics.leak else []
    return [*lines, metrics.protocol, *(f"Warning: {warning}" for warning in [*leak, *metrics.warnings])]


SHARES = ("accuracy", "balanced_accuracy", "macro_f1", "top5", "ece")


def _score(name: str, value: object) -> str:
    if not isinstance(value, float):
        return "not given"
    return _percent(value) if name in SHARES else f"{value:.3f}"


def _interval(name: str, interval: object) -> str:
    if not isinstance(interval, list):
        return ""
    low, high = (f"{100 * bound:.1f}" if name in SHARES else f"{bound:.3f}" for bound in interval)
    return f"  (95 % interval {low} to {high})"


def _reason(metrics: RunMetrics, name: str) -> str:
    reason = metrics.reasons.get(name)
    return f": {reason}" if reason else ""
