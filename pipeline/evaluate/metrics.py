"""From targets and predictions to metrics with intervals, all as plain values for ``metrics.json``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .intervals import centred_interval, percentile_interval, resample_weights, wilson
from .scores import BINS, TOP, ClassSums, Floats, Ints, RowScores, loss_and_calibration, row_scores

MAX_CONFUSION = 1000
_SHOWN_PAIRS = 50
_NO_SPREAD = 1e-12  # rounding alone makes resamples differ by less
_NEED_PROBABILITIES = ("log_loss", "ece", "top5")


def evaluate_predictions(
    y: ArrayLike,
    predicted: ArrayLike,
    probabilities: ArrayLike | None,
    class_names: Sequence[str],
    *,
    train_counts: ArrayLike | None = None,
    seed: int = 0,
    why_no_probabilities: str | None = None,
) -> dict[str, Any]:
    """Everything that can be said about predictions, as JSON values under the names of ``RunMetrics``' fields.

    Accuracy and top-5 carry Wilson intervals, the other metrics bootstrap percentile intervals (1000 resamples of
    the images; that of ``ece`` is centred, see `centred_interval`). What cannot be given is
    None, and ``reasons`` says why under the same name. ``log_loss`` clips probabilities at 2.2e-16; ``ece`` uses 15
    equal-width bins of the top probability; ``top5`` is there only for more than five classes.

    Args:
        y: (n,) true classes, each in [0, c).
        predicted: (n,) predicted classes, each in [0, c).
        probabilities: (n, c) with rows that sum to 1, or None.
        class_names: the c names.
        train_counts: (c,) images of each class in train: its largest class is the majority baseline.
        seed: of the bootstrap.
        why_no_probabilities: the head's reason, shown where ``probabilities`` is None.

    Raises:
        ValueError: shapes, classes or probabilities that do not fit together.
    """
    targets, chosen = _classes(y, "y", len(class_names)), _classes(predicted, "predicted", len(class_names))
    chances = _checked_probabilities(probabilities, len(targets), len(class_names))
    if len(targets) != len(chosen):
        raise ValueError(f"y has {len(targets)} rows, predicted has {len(chosen)}")
    rows = None if chances is None or len(targets) == 0 else row_scores(targets, chances)
    values, reasons = _metrics(targets, chosen, rows, len(class_names), seed)
    if chances is None:
        reason = why_no_probabilities or "the head gives no probabilities"
        reasons |= dict.fromkeys((name for name in _NEED_PROBABILITIES if name in values), reason)
    counts = None if train_counts is None else np.asarray(train_counts)
    return {
        "n": len(targets),
        "metrics": values,
        "class_names": list(class_names),
        **_baseline(targets, counts, class_names, reasons),
        **_confusion(targets, chosen, class_names, reasons),
        "per_class": per_class_table(targets, chosen, class_names),
        "reliability": None if rows is None else _reliability(rows),
        "warnings": _warnings(targets, class_names),
        "reasons": reasons,
    }


def per_class_table(y: Ints, predicted: Ints, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """One row a class: images, predictions, precision, recall with its Wilson interval, F1 (None where undefined)."""
    size = len(class_names)
    there, chosen = np.bincount(y, minlength=size), np.bincount(predicted, minlength=size)
    hits = np.bincount(y[y == predicted], minlength=size)
    counts = zip(class_names, there.tolist(), chosen.tolist(), hits.tolist(), strict=True)
    return [
        {
            "label": label,
            "n": n,
            "predicted": m,
            "precision": hit / m if m else None,
            "recall": hit / n if n else None,
            "recall_ci95": wilson(hit, n),
            "f1": 2 * hit / (n + m) if n + m else None,
        }
        for label, n, m, hit in counts
    ]


def _classes(values: ArrayLike, name: str, classes: int) -> Ints:
    array = np.asarray(values)
    if array.ndim != 1 or (len(array) and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{name} must be one row of integers, not {array.dtype} of shape {array.shape}")
    if len(array) and (array.min() < 0 or array.max() >= classes):
        raise ValueError(f"{name} must lie in [0, {classes}), but holds {array.min()} to {array.max()}")
    return array.astype(np.int64)


def _checked_probabilities(values: ArrayLike | None, n: int, classes: int) -> Floats | None:
    if values is None:
        return None
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (n, classes):
        raise ValueError(f"probabilities must have shape {(n, classes)}, not {array.shape}")
    # Summing catches NaN and infinity too. Heads that compute in float32 miss 1 by some 1e-6.
    if n and not (np.abs(array.sum(axis=1) - 1).max() < 1e-3 and array.min() >= 0):
        raise ValueError("each row of probabilities must be non-negative and sum to 1")
    return array


def _metrics(
    y: Ints, predicted: Ints, rows: RowScores | None, classes: int, seed: int
) -> tuple[dict[str, Any], dict[str, str]]:
    names = ["accuracy", "balanced_accuracy", "macro_f1", "log_loss", "ece", *(["top5"] if classes > TOP else [])]
    values: dict[str, Any] = {}
    for name in names:
        values |= {name: None, f"{name}_ci95": None}
    n = len(y)
    if n == 0:
        return values, dict.fromkeys(names, "there are no images to score")
    hits = int((y == predicted).sum())
    values |= {"accuracy": hits / n, "accuracy_ci95": wilson(hits, n)}
    if rows is not None and classes > TOP:
        top = int(rows.in_top.sum())
        values |= {"top5": top / n, "top5_ci95": wilson(top, n)}
    return values, _bootstrapped(values, ClassSums(y, predicted), rows, seed)


def _bootstrapped(values: dict[str, Any], sums: ClassSums, rows: RowScores | None, seed: int) -> dict[str, str]:
    """Fill in the metrics that have bootstrap intervals; return reasons for intervals that cannot be given."""
    n, reasons = len(sums.y), {}
    once = _weighted(np.ones((1, n)), sums, rows)
    values |= {name: float(value[0]) for name, value in once.items()}
    blocks = [] if n == 1 else [_weighted(block, sums, rows) for block in resample_weights(n, seed=seed)]
    for name in once:
        interval = _interval(name, np.concatenate([block[name] for block in blocks]), values[name]) if blocks else None
        if interval is not None and interval[1] - interval[0] > _NO_SPREAD:
            values[f"{name}_ci95"] = interval
        else:
            reasons[f"{name}_ci95"] = "resampling the images changes nothing, so it cannot say how sure this is"
    return reasons


def _interval(name: str, resampled: Floats, value: float) -> list[float]:
    return centred_interval(resampled, value) if name == "ece" else percentile_interval(resampled)


def _weighted(weights: Floats, sums: ClassSums, rows: RowScores | None) -> dict[str, Floats]:
    balanced, f1 = sums.balanced_accuracy_and_f1(weights)
    found = {"balanced_accuracy": balanced, "macro_f1": f1}
    if rows is not None:
        found["log_loss"], found["ece"] = loss_and_calibration(rows, weights)
    return found


def _baseline(
    y: Ints, counts: NDArray[Any] | None, class_names: Sequence[str], reasons: dict[str, str]
) -> dict[str, Any]:
    if counts is None or len(y) == 0:
        why = "there are no images to score" if len(y) == 0 else "the labels of train are not known"
        reasons["baseline_accuracy"] = why
        return {"baseline_accuracy": None, "baseline_class": None}
    if counts.shape != (len(class_names),):
        raise ValueError(f"train_counts must have shape {(len(class_names),)}, not {counts.shape}")
    majority = int(counts.argmax())
    return {"baseline_accuracy": float((y == majority).mean()), "baseline_class": class_names[majority]}


def _confusion(y: Ints, predicted: Ints, class_names: Sequence[str], reasons: dict[str, str]) -> dict[str, Any]:
    size = len(class_names)
    cells, counts = np.unique(y * size + predicted, return_counts=True)
    wrong = cells // size != cells % size
    order = np.lexsort((cells[wrong], -counts[wrong]))[:_SHOWN_PAIRS]
    pairs = zip(cells[wrong][order].tolist(), counts[wrong][order].tolist(), strict=True)
    confused = [{"label": class_names[c // size], "predicted": class_names[c % size], "n": k} for c, k in pairs]
    if size > MAX_CONFUSION:
        reasons["confusion"] = f"more than {MAX_CONFUSION} classes"
        return {"confusion": None, "confused": confused}
    matrix = np.zeros(size * size, dtype=np.int64)
    matrix[cells] = counts
    return {"confusion": matrix.reshape(size, size).tolist(), "confused": confused}


def _reliability(rows: RowScores) -> list[dict[str, Any]]:
    count = np.bincount(rows.bins, minlength=BINS)
    sure = np.bincount(rows.bins, rows.confidence, minlength=BINS)
    right = np.bincount(rows.bins, rows.right, minlength=BINS)
    return [
        {
            "low": index / BINS,
            "high": (index + 1) / BINS,
            "n": int(count[index]),
            "confidence": min(1.0, float(sure[index] / count[index])),
            "accuracy": float(right[index] / count[index]),
        }
        for index in np.flatnonzero(count).tolist()
    ]


def _warnings(y: Ints, class_names: Sequence[str]) -> list[str]:
    absent = np.flatnonzero(np.bincount(y, minlength=len(class_names)) == 0)
    if len(y) == 0 or len(absent) == 0:
        return []
    named = ", ".join(class_names[index] for index in absent[:5].tolist())
    more = ", ..." if len(absent) > 5 else ""
    return [
        f"{len(absent)} of {len(class_names)} classes have no images in the scored set ({named}{more}); "
        "averages over classes leave them out."
    ]
