"""Train several kinds of head and choose one; simple baselines are shown beside it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..params import HeadParams
from .base import Features, Floats, Head, Ints, check_training_data, few_threads, log_losses
from .baselines import baseline_accuracies
from .crossval import OutOfFold, ranking
from .folds import stratified_group_folds
from .make import make_head

BASELINES = ("nearest_centroid", "knn")

HeldOut = tuple[Features, Ints]


@dataclass(frozen=True)
class Entry:
    """One kind on the leaderboard. ``baseline`` kinds are shown only and keep no head; one other is ``chosen``.

    ``out_of_fold`` (n, c) are cross-validated probabilities of the rows of train, columns as ``head.classes_``.
    """

    kind: str
    head: Head | None
    seconds: float
    cv_accuracy: float | None
    cv_log_loss: float | None
    val_accuracy: float | None
    val_log_loss: float | None
    baseline: bool = False
    chosen: bool = False
    out_of_fold: Floats | None = field(default=None, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON."""
        return {
            "kind": self.kind,
            "chosen": self.chosen,
            "baseline": self.baseline,
            "cv_accuracy": self.cv_accuracy,
            "cv_log_loss": self.cv_log_loss,
            "val_accuracy": self.val_accuracy,
            "val_log_loss": self.val_log_loss,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class Choice:
    """The chosen ``head``, the entries of the leaderboard (best first, baselines last), and what was chosen how.

    ``selections`` holds (what, how, on which split) in the order in which the choices were made.
    """

    head: Head
    entries: tuple[Entry, ...]
    selections: tuple[tuple[str, str, str], ...]

    @property
    def leaderboard(self) -> list[dict[str, Any]]:
        """The table as JSON."""
        return [entry.as_dict() for entry in self.entries]


def choose_head(
    params: HeadParams,
    X: Features,
    y: Ints,
    groups: Ints | None = None,
    *,
    class_names: Sequence[str],
    held_out: HeldOut | None = None,
    jobs: int = 1,
    device: str = "cpu",
    baselines: bool = True,
) -> Choice:
    """Fit every kind of ``params.kinds`` and choose the most accurate, by log loss among equals.

    Judged out of fold on train, all kinds on the same folds; or on ``held_out``, features and targets of val, to be
    given only where a test split is left to report on. A single kind is cross-validated only where its own fitting
    does so anyway.

    Raises:
        HeadError: a kind that does not exist or cannot be fitted, or data that cannot be cross-validated.
    """
    kinds = params.kinds
    heads = [make_head(kind, params, class_names=class_names, jobs=jobs, device=device) for kind in kinds]
    judged = len(kinds) > 1 and held_out is None
    entries = [_entry(head, X, y, groups, held_out, judged=judged) for head in heads]
    on_val = held_out is not None
    best = min(range(len(entries)), key=lambda number: (_rank(entries[number], on_val), number))
    entries[best] = replace(entries[best], chosen=True)
    entries.sort(key=lambda entry: (not entry.chosen, _rank(entry, on_val)))
    head = heads[best]
    if baselines:
        entries += _baselines(params, X, y, groups, held_out)
    return Choice(head, tuple(entries), tuple(_selections(head, len(kinds), on_val)))


def _selections(head: Head, kinds: int, on_val: bool) -> Iterator[tuple[str, str, str]]:
    folds = f"by {head.params.folds}-fold cross-validation"
    if head.selected.get("folds"):
        yield "the strength C", f"by {head.selected['folds']}-fold cross-validation", "train"
    if "search" in head.selected:
        yield f"the parameters of {head.kind}", folds, "train"
    if "held_out" in head.selected:
        yield "the number of epochs", "on a held-out part", "train"
    if "temperature" in head.selected:
        yield "the temperature", "out of fold", "train"
    if kinds > 1:
        yield "the kind of head", "by accuracy" if on_val else folds, "val" if on_val else "train"


def _entry(
    head: Head,
    X: Features,
    y: Ints,
    groups: Ints | None,
    held_out: HeldOut | None,
    *,
    judged: bool,
) -> Entry:
    started = time.perf_counter()
    head.fit(X, y, groups)
    seconds = time.perf_counter() - started
    result = head.cross_validate(X, y, groups) if judged or head.out_of_fold is not None else None
    cv_accuracy, cv_log_loss, probabilities = _out_of_fold_scores(head, result, y)
    val_accuracy, val_log_loss = _scores(head, *held_out) if held_out else (None, None)
    return Entry(
        head.kind,
        head,
        seconds,
        cv_accuracy,
        cv_log_loss,
        val_accuracy,
        val_log_loss,
        out_of_fold=probabilities,
    )


def _out_of_fold_scores(
    head: Head, result: OutOfFold | None, y: Ints
) -> tuple[float | None, float | None, Floats | None]:
    if result is None:
        return None, None, None
    index = np.searchsorted(head.classes_, y)
    temperature = float(getattr(head, "temperature", 1.0))
    return result.accuracy(index), result.log_loss(index, temperature), result.probabilities(temperature)


def _scores(head: Head, X: Features, y: Ints) -> tuple[float, float | None]:
    """Accuracy and log loss on other rows; a class that train does not have counts as a probability of 0."""
    accuracy = float((head.predict(X) == y).mean())
    if not head.has_probabilities:
        return accuracy, None
    padded = np.concatenate([head.predict_proba(X), np.zeros((len(y), 1))], axis=1)
    return accuracy, float(log_losses(padded, _positions(head.classes_, y)).mean())


def _rank(entry: Entry, on_val: bool) -> tuple[float, float]:
    accuracy = entry.val_accuracy if on_val else entry.cv_accuracy
    log_loss = entry.val_log_loss if on_val else entry.cv_log_loss
    return ranking(accuracy or 0.0, log_loss)


def _baselines(
    params: HeadParams, X: Features, y: Ints, groups: Ints | None, held_out: HeldOut | None
) -> Iterator[Entry]:
    """Nearest centroid and nearest neighbours, where they are not among the kinds that were asked for."""
    _, classes, index = check_training_data(X, y)
    folds = stratified_group_folds(index, groups, params.folds, params.seed)
    other = None if held_out is None else (held_out[0], _positions(classes, held_out[1]))
    for kind in BASELINES:
        if kind not in params.kinds:
            started = time.perf_counter()
            with few_threads(X):
                accuracies = baseline_accuracies(kind, X, index, folds, other, params.seed)
            seconds = time.perf_counter() - started
            yield Entry(kind, None, seconds, accuracies[0], None, accuracies[1], None, baseline=True)


def _positions(classes: Ints, y: Ints) -> Ints:
    """Each target's position among the sorted ``classes``, -1 where it is not among them."""
    place = np.minimum(np.searchsorted(classes, y), len(classes) - 1)
    return np.where(classes[place] == y, place, -1)
