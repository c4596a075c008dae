"""Out-of-fold predictions, and the search of a head's parameters on the same folds."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import HeadError
from .base import Features, Floats, Ints, log_losses, near, one_thread, softmax
from .folds import Fold, missing_rows
from .solver import ABSENT

SECONDS_FOR_WORKERS = 5.0

Scores = tuple[Ints, Floats | None]


class FoldModel(Protocol):
    """What is fitted on one fold: class positions and, where it has them, logits (m, c) of the held-out rows."""

    def fit_fold(self, X: Features, index: Ints, groups: Ints | None, fold: Fold) -> Scores:
        """Fit on the fold's train positions, score its test positions; an absent class has the logit `ABSENT`."""
        ...


@dataclass(frozen=True)
class OutOfFold:
    """What cross-validation says of each row of train: ``predicted`` class positions (n,), ``logits`` (n, c).

    ``known`` is False for rows whose class was missing from their fold's train part; they cannot be right under any
    head or parameter, so the log loss leaves them out, while accuracy counts them as wrong.
    """

    predicted: Ints
    logits: Floats | None
    known: NDArray[np.bool_]

    def accuracy(self, index: Ints) -> float:
        """Share of rows predicted right."""
        return float((self.predicted == index).mean())

    def log_loss(self, index: Ints, temperature: float = 1.0) -> float | None:
        """Mean log loss of the known rows; None without probabilities or known rows."""
        if self.logits is None or not self.known.any():
            return None
        probabilities = softmax(self.logits[self.known] / temperature)
        return float(log_losses(probabilities, index[self.known]).mean())

    def probabilities(self, temperature: float = 1.0) -> Floats | None:
        """Softmax of the logits (n, c)."""
        return None if self.logits is None else softmax(self.logits / temperature)


def _fit_fold(model: FoldModel, X: Features, index: Ints, groups: Ints | None, fold: Fold) -> Scores:
    with one_thread():
        return model.fit_fold(X, index, groups, fold)


def out_of_fold(
    models: Sequence[FoldModel], X: Features, index: Ints, groups: Ints | None, folds: list[Fold], *, jobs: int
) -> list[OutOfFold]:
    """One `OutOfFold` a model, all models and folds in parallel, one BLAS thread each.

    Worker processes take seconds to start: they are used where the first fit says that the others will take longer.

    Raises:
        HeadError: there are no folds, because every class has a single independent row.
    """
    if not folds:
        raise no_folds()
    tasks = [(model, fold) for model in models for fold in folds]
    started = time.perf_counter()
    scores = [_fit_fold(tasks[0][0], X, index, groups, tasks[0][1])]
    left = (time.perf_counter() - started) * (len(tasks) - 1)
    if jobs == 1 or left < SECONDS_FOR_WORKERS:
        scores += [_fit_fold(model, X, index, groups, fold) for model, fold in tasks[1:]]
    else:
        import joblib  # here, as few runs come by

        with joblib.parallel_config("loky", inner_max_num_threads=1):
            scores += joblib.Parallel(n_jobs=min(jobs, len(tasks)))(
                joblib.delayed(_fit_fold)(model, X, index, groups, fold) for model, fold in tasks[1:]
            )
    known = ~missing_rows(index, folds)
    count = len(folds)
    return [_gather(scores[i * count : (i + 1) * count], folds, known) for i in range(len(models))]


def no_folds() -> HeadError:
    """The error for data on which nothing can be held out."""
    return HeadError(
        "Cross-validation is impossible on this data.",
        why="no class has two independent images, so nothing can be held out",
        remedy="add images, or choose head.kind=logistic alone and without a search, which then uses a fixed strength",
    )


def _gather(scores: Sequence[Scores], folds: list[Fold], known: NDArray[np.bool_]) -> OutOfFold:
    predicted = np.empty(len(known), dtype=np.int64)
    parts = [logits for _, logits in scores if logits is not None]
    logits = np.empty((len(known), parts[0].shape[1])) if len(parts) == len(folds) else None
    for (_, test), (positions, part) in zip(folds, scores, strict=True):
        predicted[test] = positions
        if logits is not None and part is not None:
            logits[test] = part
    return OutOfFold(predicted, logits, known)


def align(logits: Floats, seen: Ints, classes: int) -> Floats:
    """Logits (m, c) from those (m, s) of the classes ``seen``; the others get `ABSENT`."""
    result = np.full((len(logits), classes), ABSENT)
    result[:, seen] = logits
    return result


def candidates(search: Mapping[str, Sequence[Any]], kind: str, kinds: Sequence[str]) -> list[dict[str, Any]]:
    """The combinations of ``head.search`` that concern ``kind``; keys are `kind.parameter` with several kinds.

    Raises:
        HeadError: a key that names no kind, or a parameter without values.
    """
    own: dict[str, Sequence[Any]] = {}
    for key, values in search.items():
        if not values:
            raise HeadError("A parameter to search has no values.", where=f"head.search.{key}")
        owner = next((name for name in sorted(kinds, key=len, reverse=True) if key.startswith(f"{name}.")), None)
        if owner is None and len(kinds) > 1:
            raise HeadError(
                f"With several kinds of head it is not clear whose parameter {key!r} is.",
                where="head.search",
                remedy=f"{near(key.partition('.')[0], kinds)}write kind.parameter, with a kind of {', '.join(kinds)}",
            )
        if owner in (None, kind):
            own[key.removeprefix(f"{owner}.")] = values
    return [dict(zip(own, chosen, strict=True)) for chosen in itertools.product(*own.values())] if own else []


def ranking(accuracy: float, log_loss: float | None) -> tuple[float, float]:
    """Sort key, best first: accuracy, then log loss; a head without probabilities comes last among equals."""
    return -accuracy, float("inf") if log_loss is None else log_loss


def best_candidate(
    models: Sequence[FoldModel],
    values: Sequence[dict[str, Any]],
    X: Features,
    index: Ints,
    groups: Ints | None,
    folds: list[Fold],
    *,
    jobs: int,
) -> tuple[int, list[dict[str, Any]]]:
    """The position of the best candidate and a row for each: its parameters, accuracy and log loss out of fold."""
    rows, keys = [], []
    for result, chosen in zip(out_of_fold(models, X, index, groups, folds, jobs=jobs), values, strict=True):
        accuracy, log_loss = result.accuracy(index), result.log_loss(index)
        rows.append({"params": dict(chosen), "cv_accuracy": accuracy, "cv_log_loss": log_loss})
        keys.append(ranking(accuracy, log_loss))
    return min(range(len(keys)), key=lambda number: (keys[number], number)), rows
