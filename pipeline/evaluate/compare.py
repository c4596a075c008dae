"""A table over runs, with marks for the differences that are real."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..artifacts import Predictions, RunMetrics, RunModel, read_metrics, read_model, read_predictions
from ..errors import RunError, UsageError
from .matching import ALPHA, PairTest, match_outcomes, pair_tests
from .text import LOWER_IS_BETTER, TITLES

TEXT_COLUMNS = ("run", "data", "backbone", "head", "split")
SORT_KEYS = (*TEXT_COLUMNS, "n", *TITLES, "seconds", "created")
_SHOWN_NOTES = 6


@dataclass(frozen=True)
class ComparedRun:
    """One row: names, the scored set, metrics with intervals, the seconds of the verb that made the run."""

    path: Path
    model: RunModel
    metrics: RunMetrics
    predictions: Predictions

    def value(self, key: str) -> Any:
        """The value of a column of `SORT_KEYS`."""
        if key in TITLES:
            return self.metrics.metrics.get(key)
        values: dict[str, Any] = {
            "run": self.path.name,
            "data": Path(self.model.data.root).name,
            "backbone": self.model.backbone.name,
            "head": self.model.head.kind,
            "split": self.metrics.split,
            "n": self.metrics.n,
            "seconds": self.model.seconds,
            "created": self.model.created,
        }
        return values[key]


@dataclass(frozen=True)
class Comparison:
    """The runs in the order asked for, the test of every pair, and what a reader must know besides."""

    runs: list[ComparedRun]
    pairs: list[PairTest]
    notes: list[str]

    def better_than(self, index: int) -> list[int]:
        """The places (from 0) of the runs that the run at ``index`` is shown to be better than."""
        return sorted(pair.first + pair.second - index for pair in self.pairs if pair.better == index)

    def as_dict(self) -> dict[str, Any]:
        """The ``--json`` object; runs are referred to by their number, from 1, in ``runs``."""
        return {
            "runs": [self._row(index) for index in range(len(self.runs))],
            "pairs": [_pair(pair) for pair in self.pairs],
            "alpha": ALPHA,
            "notes": self.notes,
        }

    def _row(self, index: int) -> dict[str, Any]:
        run = self.runs[index]
        return {
            "number": index + 1,
            **{key: run.value(key) for key in (*TEXT_COLUMNS, "n")},
            "path": str(run.path),
            "created": run.model.created.isoformat(),
            "metrics": run.metrics.metrics,
            "baseline_accuracy": run.metrics.baseline_accuracy,
            "seconds": run.model.seconds,
            "better_than": [other + 1 for other in self.better_than(index)],
        }


def compare_runs(folders: Sequence[Path], *, sort: str = "accuracy", skip_damaged: bool = False) -> Comparison:
    """Compare runs on the images they share.

    Every pair is tested with McNemar's exact test on the images (by digest) that both were scored on, and Holm's
    correction is over all pairs; a pair without a mark is not shown to differ, which is not shown to be equal.

    Args:
        folders: run folders.
        sort: a key of `SORT_KEYS`, best first (names, oldest: ascending); with ``-`` before it, the other way round.
        skip_damaged: leave out runs that cannot be read and say so in the notes.

    Raises:
        UsageError: no such column.
        RunError: a run cannot be read.
    """
    key = sort.removeprefix("-")
    if key not in SORT_KEYS:
        raise UsageError(f"There is no column {key} to sort by.", remedy=f"choose among {', '.join(SORT_KEYS)}")
    runs, notes = _read(folders, skip_damaged)
    runs = _sorted(runs, key, reverse=sort.startswith("-"))
    pairs = pair_tests(match_outcomes([run.predictions for run in runs]))
    return Comparison(runs, pairs, notes + _set_notes(runs, pairs))


def _read(folders: Sequence[Path], skip_damaged: bool) -> tuple[list[ComparedRun], list[str]]:
    runs, notes = [], []
    for folder in dict.fromkeys(folders):
        try:
            runs.append(_read_run(folder))
        except RunError as error:
            if not skip_damaged:
                raise
            notes.append(f"{folder.name} is left out: {error.what} {error.why or ''}".rstrip())
    return runs, notes


def _read_run(folder: Path) -> ComparedRun:
    metrics, rows = read_metrics(folder), read_predictions(folder, probabilities=False)
    return ComparedRun(folder, read_model(folder), metrics, _of_split(rows, metrics.split))


def _of_split(rows: Predictions, split: str) -> Predictions:
    """Only the rows that the scores are about."""
    keep = [index for index, name in enumerate(rows.splits) if name == split]
    if len(keep) == len(rows):
        return rows
    columns = (rows.paths, rows.splits, rows.labels, rows.predicted)
    paths, splits, labels, predicted = ([column[index] for index in keep] for column in columns)
    digests = rows.digests[np.array(keep, dtype=np.int64)]
    return Predictions(paths, digests, splits, labels, predicted, rows.class_names, None)


def _sorted(runs: list[ComparedRun], key: str, *, reverse: bool) -> list[ComparedRun]:
    known = [run for run in runs if run.value(key) is not None]
    ascending = key in LOWER_IS_BETTER or key in TEXT_COLUMNS or key == "created"
    # Python's sort is stable, also in reverse: equal runs stay in the order in which they were named.
    ordered = sorted(known, key=lambda run: run.value(key), reverse=ascending == reverse)
    return ordered + [run for run in runs if run.value(key) is None]


def _set_notes(runs: Sequence[ComparedRun], pairs: Sequence[PairTest]) -> list[str]:
    notes = []
    for pair in pairs:
        who = f"{pair.first + 1} and {pair.second + 1}"
        if not pair.same_set and pair.n == 0 and pair.labels_disagree == 0:
            notes.append(f"Runs {who} share no images, so they cannot be compared.")
        elif not pair.same_set:
            sizes = f"{runs[pair.first].metrics.n:,} and {runs[pair.second].metrics.n:,}"
            notes.append(f"Runs {who} were scored on different sets ({sizes} images); tested on the {pair.n:,} shared.")
        if pair.labels_disagree:
            notes.append(f"Runs {who} disagree on the label of {pair.labels_disagree:,} shared images; left out.")
    if len(notes) > _SHOWN_NOTES:
        return [*notes[:_SHOWN_NOTES], f"{len(notes) - _SHOWN_NOTES} more such pairs; --json has them all."]
    return notes


def _pair(pair: PairTest) -> dict[str, Any]:
    better = pair.better
    numbers = {"first": pair.first + 1, "second": pair.second + 1, "better": None if better is None else better + 1}
    return {**vars(pair), **numbers}
