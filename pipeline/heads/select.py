"""Train several kinds of head and choose one; simple baselines are shown beside it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import HeadError
from ..features.rows import take_rows
from ..params import HeadParams
from ..runtime.seeds import make_generator
from .base import Head, Selection
from .common import Features, Ints, class_positions, few_threads, log_losses, standardisation
from .crossval import Fold, Score, stratified_group_folds
from .kinds import make_head
from .logistic import LogisticHead

if TYPE_CHECKING:
    from torch import Tensor

    Blocks = Iterator[tuple[Tensor, Tensor]]
    Baseline = Callable[[Tensor, Blocks, int], Tensor]

NEIGHBOURS = 5
KNN_QUERIES = 4_000
KNN_REFERENCES = 20_000
BLOCK = 2048

HeldOut = tuple[Features, Ints]
Answers = tuple[Ints, Ints]
UNKNOWN = Score(0.0)


@dataclass(frozen=True)
class Entry:
    """One kind on the leaderboard. ``baseline`` kinds are shown only and keep no head; one other is ``chosen``.

    ``cv`` and ``val`` are its scores by cross-validation on train and on val, where there are such; ``held_out`` is
    the one on a part of train, of a head that has neither and was watched with one while it was trained.
    """

    kind: str
    head: Head | None
    seconds: float
    cv: Score | None = None
    val: Score | None = None
    held_out: Score | None = None
    baseline: bool = False
    chosen: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON."""
        row: dict[str, Any] = {"kind": self.kind, "chosen": self.chosen, "baseline": self.baseline}
        for name, score in (("cv", self.cv), ("val", self.val)):
            row |= score.named(name) if score else {f"{name}_accuracy": None, f"{name}_log_loss": None}
        row |= self.held_out.named("held_out") if self.held_out else {}
        return {**row, "seconds": round(self.seconds, 3)}


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
    """Fit every kind of ``params.kinds`` to ``X, y, groups`` as `Head.fit` takes them, and choose the most accurate, by
    log loss among equals.

    Judged out of fold on train, all kinds on the same folds; or on ``held_out``, features and targets of val, to be
    given only where a test split is left to report on. With ``params.class_weight`` rows count as their class does:
    with "balanced" it is the balanced accuracy that chooses. A single kind is cross-validated only where its own
    fitting does so anyway, or where ``several`` choices will be compared by `choose_among`.

    Raises:
        HeadError: a kind that does not exist or cannot be fitted, or data that cannot be cross-validated.
    """
    kinds, on_val = params.kinds, held_out is not None
    if params.logistic.choose_by == "val_accuracy" and kinds == ("logistic",):
        return _chosen_on_val(params, X, y, class_names, held_out, device)
    heads = [make_head(kind, params, class_names=class_names, jobs=jobs, device=device) for kind in kinds]
    judged = (several or len(kinds) > 1) and not on_val
    entries = [_entry(head, X, y, groups, held_out, judged=judged) for head in heads]
    entries.sort(key=lambda entry: _rank(entry, on_val))
    entries[0] = replace(entries[0], chosen=True)
    head = entries[0].head
    assert head is not None
    entries += _baselines(head, X, y, groups, held_out)
    selections = head.selections
    if len(kinds) > 1:
        selections += (_selection("the kind of head", params, on_val),)
    return Choice(head, tuple(entries), selections)


def _chosen_on_val(
    params: HeadParams, X: Features, y: Ints, class_names: Sequence[str], held_out: HeldOut | None, device: str
) -> Choice:
    """The logistic head whose strength val has chosen, fitted to train and val."""
    if held_out is None:
        raise HeadError(
            "There is no val to choose the strength on.",
            where="head.logistic.choose_by",
            why="val_accuracy needs the splits train, val and test, of which test is reported",
            remedy="set data.test_fraction, or head.logistic.choose_by=log_loss",
        )
    head, started = LogisticHead("logistic", params, class_names=class_names, device=device), time.perf_counter()
    head.fit_with_val(X, y, *held_out)
    val = Score(head.selected["val_accuracy"])
    entry = Entry(head.kind, head, time.perf_counter() - started, val=val, chosen=True)
    plain = HeadParams(folds=params.folds, seed=params.seed)
    shown = _baselines(make_head("logistic", plain, class_names=class_names), X, y, None, held_out)
    return Choice(head, (entry, *shown), head.selections)


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


def _rank(entry: Entry, on_val: bool) -> tuple[float, ...]:
    return ((entry.val if on_val else entry.cv) or UNKNOWN).rank


def _selection(what: str, params: HeadParams, on_val: bool) -> Selection:
    return Selection(what, _how(params, on_val), "val" if on_val else "train")


def _how(params: HeadParams, on_val: bool) -> str:
    folds = f"{params.folds}-fold cross-validation"
    if params.class_weight is None:
        return "by accuracy" if on_val else f"by {folds}"
    word = "balanced" if params.class_weight == "balanced" else "weighted"
    return f"by {word} accuracy" + ("" if on_val else f" in {folds}")


def _entry(head: Head, X: Features, y: Ints, groups: Ints | None, held_out: HeldOut | None, *, judged: bool) -> Entry:
    started = time.perf_counter()
    head.fit(X, y, groups)
    seconds = time.perf_counter() - started
    seen = head.cross_validate(X, y, groups) if judged else head.out_of_fold
    cv = None if seen is None else head.score(head.classes_[seen.index], seen.right, seen.log_loss)
    val = _score(head, *held_out) if held_out else None
    return Entry(head.kind, head, seconds, cv, val, head.held_score if cv is None and val is None else None)


def _score(head: Head, X: Features, y: Ints) -> Score:
    """On other rows; a class that train does not have counts as a probability of 0."""
    right = head.predict(X) == y
    if not head.has_probabilities:
        return head.score(y, right)
    padded = np.concatenate([head.predict_proba(X), np.zeros((len(y), 1))], axis=1)
    place = np.minimum(np.searchsorted(head.classes_, y), len(head.classes_) - 1)
    own = np.where(head.classes_[place] == y, place, -1)
    return head.score(y, right, float(log_losses(padded, own).mean()))


def _baselines(head: Head, X: Features, y: Ints, groups: Ints | None, held_out: HeldOut | None) -> Iterator[Entry]:
    """Nearest centroid and nearest neighbours, on plain images, where they are not among the kinds asked for."""
    plain = X if X.ndim == 2 else X[0]
    classes, index = class_positions(y)
    folds = stratified_group_folds(index, groups, head.params.folds, head.params.seed)
    other, y_other = held_out or (plain[:0], y[:0])
    for kind in BASELINES:
        if kind not in head.params.kinds:
            started = time.perf_counter()
            with few_threads(plain):
                (rows, cv), (picked, val) = baseline_answers(kind, plain, index, folds, other, head.params.seed)
            seconds, y_val = time.perf_counter() - started, y_other[picked]
            on_train = head.score(y[rows], cv == index[rows]) if len(rows) else None
            on_val = head.score(y_val, classes[val] == y_val) if len(picked) else None
            yield Entry(kind, None, seconds, on_train, on_val, baseline=True)


# -- baselines ------------------------------------------------------------------------------------------------------


def nearest_centroid(queries: Tensor, blocks: Blocks, classes: int) -> Tensor:
    """The class (m,) of the nearest class mean; classes without rows are never the answer."""
    import torch

    counts, sums = torch.zeros(classes), torch.zeros(classes, queries.shape[1])
    for rows, target in blocks:
        counts += torch.bincount(target, minlength=classes)
        sums.index_add_(0, target, rows)
    distances = _distances(queries, sums / counts.clamp_min(1)[:, None])
    return distances.masked_fill(counts == 0, torch.inf).argmin(1)


def nearest_neighbours(queries: Tensor, blocks: Blocks, classes: int) -> Tensor:
    """The commonest class (m,) among the five nearest rows, and of several the first: as the head of kind knn."""
    import torch

    distances, targets = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long)
    for rows, target in blocks:
        distances = torch.cat([distances, _distances(queries, rows)], dim=1)
        targets = torch.cat([targets, target.expand(len(queries), -1)], dim=1)
        distances, near = distances.topk(min(NEIGHBOURS, distances.shape[1]), dim=1, largest=False)
        targets = targets.gather(1, near)
    ballot = torch.zeros(len(queries), classes).scatter_add_(1, targets, torch.ones_like(distances))
    return ballot.argmax(1)


BASELINES: dict[str, Baseline] = {"nearest_centroid": nearest_centroid, "knn": nearest_neighbours}


def baseline_answers(
    kind: str, X: Features, index: Ints, folds: list[Fold], other: Features, seed: int
) -> tuple[Answers, Answers]:
    """What ``nearest_centroid`` or ``knn`` says of the rows that folds hold out, and of ``other`` rows (m, d).

    Features are standardised as the rows they are held against ask for; of very many rows a part is taken, and asked.

    Args:
        index: class positions (n,).

    Returns:
        twice the rows that were asked, and the class positions that were answered.
    """
    import torch

    generator = make_generator("baseline", seed)

    def answers(train: Ints, queries: Features) -> Ints:
        train = _part(train, KNN_REFERENCES, generator)
        near = take_rows(X, train)
        mean, scale = standardisation(near, True)

        def scaled(rows: Features) -> Tensor:
            return torch.from_numpy(((rows - mean) / scale).astype(np.float32))

        starts = range(0, len(train), BLOCK)
        blocks = ((scaled(near[start : start + BLOCK]), target[train[start : start + BLOCK]]) for start in starts)
        return BASELINES[kind](scaled(queries), blocks, int(index.max()) + 1).numpy()

    target = torch.from_numpy(index)
    asked, found = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for train, test in folds:
        asked.append(_part(test, KNN_QUERIES // len(folds), generator))
        found.append(answers(train, X[asked[-1]]))
    picked = _part(np.arange(len(other)), KNN_QUERIES, generator)
    on_other = answers(np.arange(len(X)), other[picked]) if len(picked) else picked
    return (np.concatenate(asked), np.concatenate(found)), (picked, on_other)


def _distances(left: Tensor, right: Tensor) -> Tensor:
    """Squared Euclidean distances (m, n), up to what is the same for every column."""
    return right.square().sum(1) - 2 * left @ right.T


def _part(positions: Ints, limit: int, generator: np.random.Generator) -> Ints:
    """At most ``limit`` of the positions, by chance."""
    return positions if len(positions) <= limit else np.sort(generator.choice(positions, limit, replace=False))
