"""Train several kinds of head and choose one; simple baselines are shown beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..params import HeadParams
from ..runtime.seeds import make_generator
from .base import Head, Selection
from .common import Features, Floats, Ints, check_training_data, few_threads, log_losses, standardisation
from .crossval import Fold, ranking, stratified_group_folds
from .kinds import make_head

NEIGHBOURS = 5
KNN_QUERIES = 4_000
KNN_REFERENCES = 20_000
BATCH = 1024

HeldOut = tuple[Features, Ints]
Baseline = Callable[[Tensor, Tensor, Tensor, int], Tensor]


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
    """The chosen ``head``, the entries of the leaderboard (best first, baselines last), and all choices in order."""

    head: Head
    entries: tuple[Entry, ...]
    selections: tuple[Selection, ...]

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
    several: bool = False,
    jobs: int = 1,
    device: str = "cpu",
) -> Choice:
    """Fit every kind of ``params.kinds`` and choose the most accurate, by log loss among equals.

    Judged out of fold on train, all kinds on the same folds; or on ``held_out``, features and targets of val, to be
    given only where a test split is left to report on. A single kind is cross-validated only where its own fitting
    does so anyway, or where ``several`` choices will be compared by `choose_among`.

    Raises:
        HeadError: a kind that does not exist or cannot be fitted, or data that cannot be cross-validated.
    """
    kinds = params.kinds
    heads = [make_head(kind, params, class_names=class_names, jobs=jobs, device=device) for kind in kinds]
    judged = (several or len(kinds) > 1) and held_out is None
    entries = [_entry(head, X, y, groups, held_out, judged=judged) for head in heads]
    on_val = held_out is not None
    best = min(range(len(entries)), key=lambda number: (_rank(entries[number], on_val), number))
    entries[best] = replace(entries[best], chosen=True)
    entries.sort(key=lambda entry: (not entry.chosen, _rank(entry, on_val)))
    head = heads[best]
    entries += _baselines(params, X, y, groups, held_out)
    selections = head.selections
    if len(kinds) > 1:
        selections += (_selection("the kind of head", params, on_val),)
    return Choice(head, tuple(entries), selections)


def choose_among(choices: Mapping[str, Choice], params: HeadParams, *, on_val: bool) -> tuple[str, Choice]:
    """The name of the best of several choices on as many poolings of the same images, and it with the others' entries.

    Args:
        on_val: they were made on a ``held_out`` val.
    """
    if len(choices) == 1:
        return next(iter(choices.items()))
    best = min(choices, key=lambda name: _rank(choices[name].entries[0], on_val))
    entries = [
        replace(entry, kind=f"{entry.kind} on {name}", chosen=entry.chosen and name == best)
        for name, choice in choices.items()
        for entry in choice.entries
    ]
    entries.sort(key=lambda entry: (not entry.chosen, entry.baseline, _rank(entry, on_val)))
    selections = (*choices[best].selections, _selection("the pooling", params, on_val))
    return best, Choice(choices[best].head, tuple(entries), selections)


def _selection(what: str, params: HeadParams, on_val: bool) -> Selection:
    how, on = ("by accuracy", "val") if on_val else (f"by {params.folds}-fold cross-validation", "train")
    return Selection(what, how, on)


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
    seen = head.cross_validate(X, y, groups) if judged else head.out_of_fold
    index = np.searchsorted(head.classes_, y)
    val_accuracy, val_log_loss = _scores(head, *held_out) if held_out else (None, None)
    return Entry(
        head.kind,
        head,
        seconds,
        None if seen is None else seen.accuracy(index),
        None if seen is None else seen.log_loss(index),
        val_accuracy,
        val_log_loss,
        out_of_fold=None if seen is None else seen.probabilities(),
    )


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


# -- baselines ------------------------------------------------------------------------------------------------------


def nearest_centroid(queries: Tensor, rows: Tensor, target: Tensor, classes: int) -> Tensor:
    """The class (m,) of the nearest class mean; classes without rows are never the answer."""
    counts = torch.bincount(target, minlength=classes)
    sums = torch.zeros(classes, rows.shape[1]).index_add_(0, target, rows)
    distances = _distances(queries, sums / counts.clamp_min(1)[:, None])
    return distances.masked_fill(counts == 0, torch.inf).argmin(1)


def nearest_neighbours(queries: Tensor, rows: Tensor, target: Tensor, classes: int) -> Tensor:
    """The commonest class (m,) among the five nearest rows; the nearer neighbours decide a tie."""
    count = min(NEIGHBOURS, len(rows))
    votes = 1 + 0.01 * torch.arange(count, 0, -1)
    answers = []
    for part in torch.split(queries, BATCH):
        near = _distances(part, rows).topk(count, dim=1, largest=False).indices
        ballot = torch.zeros(len(part), classes).scatter_add_(1, target[near], votes.expand(len(part), -1))
        answers.append(ballot.argmax(1))
    return torch.cat(answers)


BASELINES: dict[str, Baseline] = {"nearest_centroid": nearest_centroid, "knn": nearest_neighbours}


def baseline_accuracies(
    kind: str, X: Features, index: Ints, folds: list[Fold], other: HeldOut | None, seed: int
) -> tuple[float | None, float | None]:
    """Accuracy of ``nearest_centroid`` or ``knn`` out of fold on train, and on ``other`` rows; features standardised.

    Args:
        index: class positions (n,); those of ``other`` may hold -1 for a class that train does not have.
        folds: none where nothing can be held out; the first accuracy is then None.
    """
    predict = BASELINES[kind]
    mean, scale = standardisation(X, True)

    def scaled(rows: Features) -> Tensor:
        return torch.from_numpy(((rows - mean) / scale).astype(np.float32))

    rows, target = scaled(X), torch.from_numpy(index)
    generator = make_generator("baseline", seed)
    hits = asked = 0
    for train, test in folds:
        test = _part(test, KNN_QUERIES // len(folds), generator)
        hits += int((_predicted(predict, rows, target, train, rows[test], generator) == target[test]).sum())
        asked += len(test)
    on_other = None
    if other is not None and len(other[0]):
        picked = _part(np.arange(len(other[0])), KNN_QUERIES, generator)
        answers = _predicted(predict, rows, target, np.arange(len(X)), scaled(other[0][picked]), generator)
        on_other = float((answers.numpy() == other[1][picked]).mean())
    return hits / asked if asked else None, on_other


def _distances(left: Tensor, right: Tensor) -> Tensor:
    """Squared Euclidean distances (m, n), up to what is the same for every column."""
    return right.square().sum(1) - 2 * left @ right.T


def _predicted(
    predict: Baseline, rows: Tensor, target: Tensor, train: Ints, queries: Tensor, generator: np.random.Generator
) -> Tensor:
    train = _part(train, KNN_REFERENCES, generator)
    return predict(queries, rows[train], target[train], int(target.max()) + 1)


def _part(positions: Ints, limit: int, generator: np.random.Generator) -> Ints:
    """At most ``limit`` of the positions, by chance."""
    return positions if len(positions) <= limit else np.sort(generator.choice(positions, limit, replace=False))
