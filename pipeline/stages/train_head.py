"""Stage two: a head on cached features, its score, and a run folder that predicts."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..artifacts import RunMetrics, check_run_name, default_run_name
from ..data.scan import SPLITS
from ..errors import DataError
from ..evaluate import Selection, protocol_sentence
from ..features.rounding import Features
from ..features.table import FeatureTable
from ..heads import Choice, choose_head, curve_band, learning_curve, make_head
from ..params import Params
from ..runtime.device import usable_cores
from .load import Opened, open_features
from .publish import publish_run
from .records import class_counts, parameter_line, run_model
from .score import Scored, apply_head, metric_lines, predictions_of, score_split
from .sources import batch_size

Say = Callable[[str], None]
TRAIN, VAL, TEST = range(3)


def train_head(params: Params, say: Say = print, *, curve: bool = False) -> dict[str, Any]:
    """Fit the head of ``params.head`` on train, score it on test (on val where there is no test), publish a run.

    Args:
        say: takes the lines meant for the user.
        curve: also fit on growing parts of train, to see whether more labels would help.

    Returns:
        the summary of ``--json``.

    Raises:
        MissingFeaturesError: run extract first.
        DataError: fewer than two classes, or nothing to report on.
        HeadError, RunError: see their messages.
    """
    started = time.perf_counter()
    if params.runs.name:
        check_run_name(params.runs.dir, params.runs.name)
    opened = open_features(params)
    table = opened.table
    reported = check_trainable(table)
    say(_data_line(table))
    choice = _choose(params, opened, reported)
    head = choice.head
    scored = apply_head(head, table.features, len(table.class_names))
    points = _learning_curve(params, opened, head.kind, reported) if curve else []
    metrics = _score(opened, scored, choice, reported, points)
    model = run_model(
        table,
        opened.origin,
        head,
        dtype=params.cache.dtype,
        batch=batch_size(params.extract, opened.origin),
        key=opened.key,
    )
    for line in [parameter_line(model.parameters), *_leaderboard_lines(choice), *metric_lines(metrics)]:
        say(line)
    for line in _curve_lines(points):
        say(line)
    model = model.model_copy(update={"seconds": time.perf_counter() - started})
    name = params.runs.name or default_run_name(params.data.root, opened.origin.identity.name, head.kind)
    predictions = predictions_of(table, scored)
    path = publish_run(params, name, head=head, model=model, metrics=metrics, predictions=predictions)
    say(f"Run: {path} (report.html shows the scores)")
    return metrics.summary(str(path))


def check_trainable(table: FeatureTable) -> int:
    """The split to report on: test where there is one, else val.

    Raises:
        DataError: fewer than two classes, a class without images in train, or nothing to report on.
    """
    counts = class_counts(table, table.splits == TRAIN)
    if len(table.class_names) < 2:
        raise _untrainable(table, f"it has {len(table.class_names)} class folder(s), and a classifier needs two")
    if empty := [name for name, count in zip(table.class_names, counts, strict=True) if not count]:
        raise _untrainable(table, f"train has no usable image of {', '.join(empty)}")
    for split in (TEST, VAL):
        if ((table.splits == split) & (table.targets >= 0)).any():
            return split
    raise _untrainable(table, "no image is left to report on: val and test are empty")


def _untrainable(table: FeatureTable, why: str) -> DataError:
    return DataError(
        "A head cannot be trained on this folder.",
        where=table.root,
        why=why,
        remedy="give each class a folder with several images; data.val_fraction sets some aside to report on",
    )


def _data_line(table: FeatureTable) -> str:
    counts = [f"{int((table.splits == number).sum()):,} {name}" for number, name in enumerate(SPLITS)]
    size = f"{len(table.class_names)} classes, {table.features.shape[1]} features"
    return f"{len(table):,} images ({', '.join(counts)}), {size}"


def _training_rows(opened: Opened) -> tuple[Features, NDArray[np.int64], NDArray[np.int64]]:
    """Features, targets and groups of train; the augmented views of an image follow with its target and group."""
    table = opened.table
    train = table.splits == TRAIN
    copies = 1 + len(opened.views)
    features = np.concatenate([table.features[train], *opened.views])
    return features, np.tile(table.targets[train], copies), np.tile(table.groups[train], copies)


def _choose(params: Params, opened: Opened, reported: int) -> Choice:
    """Fit the kinds of the params on train; the best is chosen on train, or on val where a test split exists."""
    table = opened.table
    val = (table.splits == VAL) & (table.targets >= 0)
    held_out = (table.features[val], table.targets[val]) if reported == TEST and val.any() else None
    return choose_head(
        params.head,
        *_training_rows(opened),
        class_names=table.class_names,
        jobs=usable_cores(),
        device=str(opened.origin.device) if opened.origin.device.type == "cuda" else "cpu",
        held_out=held_out,
    )


def _learning_curve(params: Params, opened: Opened, kind: str, reported: int) -> list[dict[str, Any]]:
    """Points ``images, accuracy, low, high`` of heads fitted to growing parts of train, on the reported split."""
    table = opened.table
    rows = (table.splits == reported) & (table.targets >= 0)
    fits = learning_curve(
        lambda: make_head(kind, params.head, class_names=table.class_names, jobs=usable_cores()),
        *_training_rows(opened),
        table.features[rows],
        table.targets[rows],
        seed=params.head.seed,
    )
    return [{**point, "images": round(point["images"])} for point in curve_band(fits)]


def _score(opened: Opened, scored: Scored, choice: Choice, reported: int, curve: list[dict[str, Any]]) -> RunMetrics:
    table, head = opened.table, choice.head
    train: NDArray[np.bool_] = table.splits == TRAIN
    rows: NDArray[np.bool_] = table.splits == reported
    facts = {
        "split": SPLITS[reported],
        "selected": head.selected,
        "history": head.history,
        "leaderboard": [{**row, "selected": row["chosen"]} for row in choice.leaderboard],
        "curve": curve,
        "warnings": [*opened.warnings, *head.warnings],
        "protocol": protocol_sentence(
            [Selection(made.what, made.how, made.on) for made in choice.selections],
            fitted=f"the {head.kind} head",
            fitted_on="train",
            n_fitted=int(train.sum()),
            reported_on=SPLITS[reported],
            n=int((rows & (table.targets >= 0)).sum()),
        ),
    }
    return score_split(
        table,
        scored,
        rows,
        train_digests=table.digests[train],
        train_counts=class_counts(table, train),
        facts=facts,
    )


def _leaderboard_lines(choice: Choice) -> list[str]:
    """One line a kind; those that were only shown beside the chosen one say so."""
    lines = ["Heads:"]
    for entry in choice.entries:
        scores = [("cross-validated", entry.cv_accuracy), ("val", entry.val_accuracy)]
        shown = ", ".join(f"{name} accuracy {100 * value:.1f} %" for name, value in scores if value is not None)
        mark = "chosen" if entry.chosen else "baseline" if entry.baseline else ""
        lines.append(f"  {entry.kind:<18}{mark:<10}{shown}  {entry.seconds:.1f} s")
    return lines


def _curve_lines(points: list[dict[str, Any]]) -> list[str]:
    """The learning curve as lines: images, mean accuracy, lowest to highest."""
    lines = []
    for point in points:
        mean, low, high = (100 * point[name] for name in ("accuracy", "low", "high"))
        lines.append(f"  {point['images']:>8,} images: {mean:.1f} % ({low:.1f} to {high:.1f})")
    return ["Learning curve:", *lines] if lines else []
