"""What train says of rows that a head did not see: folds, predictions out of fold, and what is chosen by them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import HeadError
from ..runtime.seeds import make_generator
from .common import Features, Floats, Ints, log_losses, near, one_thread, softmax

ABSENT = -1e30
SECONDS_FOR_WORKERS = 5.0
ECE_BINS = 15
SMALLEST_BETA, LARGEST_BETA = 1e-3, 1e3

Fold = tuple[Ints, Ints]
Scores = tuple[Ints, Floats | None]
FitFold = Callable[[Features, Ints, Ints | None, Fold], Scores]


# -- folds ----------------------------------------------------------------------------------------------------------


def stratified_group_folds(y: Ints, groups: Ints | None, folds: int, seed: int) -> list[Fold]:
    """Train and test positions of each fold; the test parts are disjoint and cover all rows.

    Rows with one group id share a fold. The groups of a class are dealt out so that each fold gets its share, so a
    class with two groups or more is never missing from a fold's train part. A group with several classes counts for
    its most frequent one: only a class that is nowhere the most frequent may be missing. There are fewer folds where no
    class has that many groups, and none at all where every class has one group only, since nothing can then be held
    out and still be learnt. Deterministic in ``seed``.
    """
    y = np.asarray(y)
    group, group_class, sizes = _groups(y, groups)
    per_class = np.bincount(group_class) if len(group_class) else np.zeros(1, dtype=np.int64)
    folds = min(folds, int(per_class.max()))
    if folds < 2:
        return []
    fold_of_group = _deal(group_class, sizes, folds, seed)
    fold = fold_of_group[group]
    return [(np.flatnonzero(fold != number), np.flatnonzero(fold == number)) for number in range(folds)]


def hold_out(y: Ints, groups: Ints | None, fraction: float, seed: int) -> Fold:
    """Positions of a stratified, group-wise train part and of a held-out part of about ``fraction`` of the rows.

    A class with a single group stays in the train part. The held-out part is empty where every class has one group.
    """
    y = np.asarray(y)
    group, group_class, sizes = _groups(y, groups)
    order = make_generator("hold out", seed).permutation(len(group_class))
    held = np.zeros(len(group_class), dtype=bool)
    for target in np.unique(group_class):
        members = order[group_class[order] == target]
        taken = np.cumsum(sizes[members]) <= max(fraction * sizes[members].sum(), sizes[members[0]])
        held[members[taken & (np.arange(len(members)) < len(members) - 1)]] = True
    _keep_every_class(held, group, sizes, y)
    return np.flatnonzero(~held[group]), np.flatnonzero(held[group])


def stratified_sample(y: Ints, groups: Ints | None, rows: int, seed: int) -> Ints:
    """Positions of about ``rows`` rows: whole groups, of each class its share and at least one."""
    return hold_out(y, groups, max(1 - rows / len(y), 0.0), seed)[0] if rows < len(y) else np.arange(len(y))


def _keep_every_class(held: NDArray[np.bool_], group: Ints, sizes: Ints, y: Ints) -> None:
    """Give train a group of each class that is nowhere the most frequent of its group, and would be held out whole."""
    targets, target = np.unique(y, return_inverse=True)
    kept = np.bincount(target[~held[group]], minlength=len(targets))
    for lost in np.flatnonzero(kept == 0):
        holders = np.unique(group[target == lost])
        held[holders[sizes[holders].argmin()]] = False


def missing_rows(y: Ints, folds: list[Fold]) -> np.ndarray:
    """True (n,) for rows whose class has no row in the train part of their fold: nobody could have known them.

    The rows are those that the folds test; views of them, which only train, may follow in ``y``.
    """
    missing = np.zeros(sum(len(test) for _, test in folds), dtype=bool)
    for train, test in folds:
        missing[test] = ~np.isin(y[test], y[train])
    return missing


def in_every_view(images: Ints, count: int, views: int) -> Ints:
    """The rows of ``images`` where ``count`` images stand one after another, ``views`` times."""
    return (count * np.arange(views)[:, None] + images).ravel()


def _groups(y: Ints, groups: Ints | None) -> tuple[Ints, Ints, Ints]:
    """Each row's group position (n,), and each group's class position and size (g,)."""
    _, target = np.unique(y, return_inverse=True)
    if groups is None:
        return np.arange(len(y)), target, np.ones(len(y), dtype=np.int64)
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    pairs, counts = np.unique(np.stack([group, target], axis=1), axis=0, return_counts=True)
    by_frequency = np.lexsort((pairs[:, 1], -counts, pairs[:, 0]))
    first = by_frequency[np.r_[True, np.diff(pairs[by_frequency, 0]) > 0]]
    return group, pairs[first, 1], np.bincount(group)


def _deal(group_class: Ints, sizes: Ints, folds: int, seed: int) -> Ints:
    """A fold for each group: large groups first, each to the fold with fewest rows of its class, then of all."""
    shuffled = make_generator("folds", seed).permutation(len(sizes))
    order = shuffled[np.lexsort((group_class[shuffled], -sizes[shuffled]))]
    of_class = [[0] * folds for _ in range(int(group_class.max()) + 1)]
    total = [0] * folds
    fold = np.empty(len(sizes), dtype=np.int64)
    for group in order.tolist():
        counts, size = of_class[group_class[group]], int(sizes[group])
        best = min(range(folds), key=lambda number: (counts[number], total[number], number))
        counts[best] += size
        total[best] += size
        fold[group] = best
    return fold


# -- out of fold ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """How well images were classified that a head has not learnt from.

    ``weighted_accuracy`` is by ``head.class_weight``, for "balanced" the mean recall of the classes; None without.
    ``log_loss`` is None without probabilities.
    """

    accuracy: float
    log_loss: float | None = None
    weighted_accuracy: float | None = None

    @property
    def rank(self) -> tuple[float, float]:
        """Sort key, best first: accuracy as it is weighted, then log loss, without one last among equals."""
        accuracy = self.accuracy if self.weighted_accuracy is None else self.weighted_accuracy
        return -accuracy, float("inf") if self.log_loss is None else self.log_loss

    def named(self, name: str) -> dict[str, float | None]:
        """As JSON: ``cv_accuracy`` and so on for the ``name`` "cv"; no weighted accuracy where there is none."""
        return {f"{name}_{key}": value for key, value in vars(self).items() if value is not None or key == "log_loss"}


@dataclass(frozen=True)
class OutOfFold:
    """What cross-validation says of each image of train: ``predicted`` class positions (n,), ``logits`` (n, c).

    ``index`` (n,) are the true ones. ``known`` is False for images whose class was missing from their fold's train
    part; they cannot be right under any head or parameter, so the log loss leaves them out, while accuracy counts them
    as wrong.
    """

    predicted: Ints
    logits: Floats | None
    index: Ints
    known: NDArray[np.bool_]

    @property
    def right(self) -> NDArray[np.bool_]:
        """Which images (n,) were predicted right."""
        return np.equal(self.predicted, self.index)

    @property
    def accuracy(self) -> float:
        """Share of images predicted right."""
        return float(self.right.mean())

    @property
    def log_loss(self) -> float | None:
        """Mean log loss of the known images; None without probabilities or known images."""
        if self.logits is None or not self.known.any():
            return None
        return float(log_losses(softmax(self.logits[self.known]), self.index[self.known]).mean())

    def probabilities(self) -> Floats | None:
        """Softmax of the logits (n, c)."""
        return None if self.logits is None else softmax(self.logits)

    def cooled(self, temperature: float) -> OutOfFold:
        """The same with its logits divided by ``temperature``."""
        return self if self.logits is None else replace(self, logits=self.logits / temperature)


def _fit_fold(fit: FitFold, X: Features, index: Ints, groups: Ints | None, fold: Fold) -> Scores:
    with one_thread():
        return fit(X, index, groups, fold)


def out_of_fold(
    fits: Sequence[FitFold], X: Features, index: Ints, groups: Ints | None, folds: list[Fold], *, jobs: int
) -> list[OutOfFold]:
    """One `OutOfFold` for each of ``fits`` (`Head.fit_fold`), all of them and all folds in parallel, one thread each.

    Worker processes take seconds to start: they are used where the first fit says that the others will take longer.

    Raises:
        HeadError: there are no folds, because every class has a single independent row.
    """
    if not folds:
        raise no_folds()
    tasks = [(fit, fold) for fit in fits for fold in folds]
    started = time.perf_counter()
    scores = [_fit_fold(tasks[0][0], X, index, groups, tasks[0][1])]
    left = (time.perf_counter() - started) * (len(tasks) - 1)
    if jobs == 1 or left < SECONDS_FOR_WORKERS:
        scores += [_fit_fold(fit, X, index, groups, fold) for fit, fold in tasks[1:]]
    else:
        import joblib  # here, as few runs come by

        with joblib.parallel_config("loky", inner_max_num_threads=1):
            scores += joblib.Parallel(n_jobs=min(jobs, len(tasks)))(
                joblib.delayed(_fit_fold)(fit, X, index, groups, fold) for fit, fold in tasks[1:]
            )
    known = ~missing_rows(index, folds)
    count = len(folds)
    return [_gather(scores[i * count : (i + 1) * count], folds, index[: len(known)], known) for i in range(len(fits))]


def no_folds() -> HeadError:
    """The error for data on which nothing can be held out."""
    return HeadError(
        "Cross-validation is impossible on this data.",
        why="no class has two independent images, so nothing can be held out",
        remedy="add images, or choose head.kind=logistic alone and without a search, which then uses a fixed strength",
    )


def _gather(scores: Sequence[Scores], folds: list[Fold], index: Ints, known: NDArray[np.bool_]) -> OutOfFold:
    predicted = np.empty(len(known), dtype=np.int64)
    parts = [logits for _, logits in scores if logits is not None]
    logits = np.empty((len(known), parts[0].shape[1])) if len(parts) == len(folds) else None
    for (_, test), (positions, part) in zip(folds, scores, strict=True):
        predicted[test] = positions
        if logits is not None and part is not None:
            logits[test] = part
    return OutOfFold(predicted, logits, index, known)


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


def edges(values: Mapping[str, Any], tried: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The parameters of ``values`` that are the ``smallest`` or the ``largest`` of the numbers tried.

    Whole numbers up to 1 are no edge: there is often nothing below (one neighbour, no dropout).
    """
    found = {}
    for name, value in values.items():
        numbers = {row[name] for row in tried if _is_number(row[name])}
        if not _is_number(value) or len(numbers) < 2:
            continue
        if value == max(numbers):
            found[name] = "largest"
        elif value == min(numbers) and (isinstance(value, float) or value > 1):
            found[name] = "smallest"
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# -- temperature ----------------------------------------------------------------------------------------------------


def expected_calibration_error(probabilities: Floats, index: Ints) -> float | None:
    """Mean distance of confidence and accuracy over equal-width bins of the top probability; None without rows."""
    if not len(index):
        return None
    top = probabilities.max(axis=1)
    hit = probabilities.argmax(axis=1) == index
    place = np.clip(np.ceil(top * ECE_BINS).astype(np.int64) - 1, 0, ECE_BINS - 1)
    difference = np.bincount(place, weights=hit - top, minlength=ECE_BINS)
    return float(np.abs(difference).sum() / len(index))


def fit_temperature(logits: Floats, index: Ints) -> float:
    """The temperature that minimises the mean log loss of ``logits / temperature`` (n, c): Guo et al. 2017.

    The loss is convex in the inverse temperature, so that its minimum is found by halving an interval of the sign of
    its slope. Data that is perfectly separated would ask for 0: the result stays between 1e-3 and 1e3.
    """
    low, high = np.log(SMALLEST_BETA), np.log(LARGEST_BETA)
    own = logits[np.arange(len(index)), index]
    for _ in range(40):
        middle = 0.5 * (low + high)
        expected = (softmax(np.exp(middle) * logits) * logits).sum(axis=1)
        if (expected - own).mean() < 0:
            low = middle
        else:
            high = middle
    return float(np.exp(-0.5 * (low + high)))


def choose_temperature(result: OutOfFold) -> tuple[float, dict[str, Any]]:
    """A temperature from what was seen out of fold, and the record of it for ``selected``.

    Rows that nobody could know are left out. Where no row is left, or the fit would not lower the log loss, the
    temperature is 1.
    """
    assert result.logits is not None
    logits, index = result.logits[result.known], result.index[result.known]
    temperature = fit_temperature(logits, index) if len(index) else 1.0
    before, after = softmax(logits), softmax(logits / temperature)
    if len(index) and log_losses(after, index).mean() >= log_losses(before, index).mean():
        temperature, after = 1.0, before
    return temperature, {
        "temperature": temperature,
        "ece_before": expected_calibration_error(before, index),
        "ece_after": expected_calibration_error(after, index),
    }
