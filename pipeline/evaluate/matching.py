"""Bring the predictions of several runs onto the same images, matched by the digest of their bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..artifacts import Predictions
from .significance import holm, mcnemar_exact

ALPHA = 0.05
_ABSENT, _CONTRADICTED = -1, -2


@dataclass(frozen=True)
class PairTest:
    """Two runs on the images they share; ``first`` and ``second`` are their places in the list, from 0.

    Args:
        n: shared images (different contents) whose label is the same in both; the test is on these.
        labels_disagree: shared images left out because the runs do not agree on the label.
        only_first, only_second: images that only this one gets right.
        p: of McNemar's exact test; None where nothing is shared.
        p_adjusted: after Holm over all pairs.
        same_set: both runs were scored on exactly the same images.
    """

    first: int
    second: int
    n: int
    labels_disagree: int
    only_first: int
    only_second: int
    p: float | None
    p_adjusted: float | None
    same_set: bool

    @property
    def better(self) -> int | None:
        """The run shown to be better (`ALPHA`, Holm), or None: not shown to differ."""
        if self.p_adjusted is None or self.p_adjusted >= ALPHA:
            return None
        return self.first if self.only_first > self.only_second else self.second


@dataclass(frozen=True)
class Outcomes:
    """Each run's outcome for each of m different image contents, as arrays (runs, m).

    ``labels`` holds the code of the label, `_ABSENT` or, where a run has the content under two labels,
    `_CONTRADICTED`; ``right`` says whether the prediction is the label.
    """

    labels: NDArray[np.int64]
    right: NDArray[np.bool_]


def match_outcomes(runs: Sequence[Predictions]) -> Outcomes:
    """Outcomes by content. Byte-identical copies within a run count once (they are no independent evidence), with
    the prediction of the first copy in the order of the paths. Rows without a label are left out."""
    digests = np.concatenate([rows.digests for rows in runs]) if runs else np.empty((0, 16), np.uint8)
    contents, flat = np.unique(np.ascontiguousarray(digests).view("V16").ravel(), return_inverse=True)
    names = sorted({label for rows in runs for label in rows.labels})
    codes = {name: code for code, name in enumerate(names)}
    labels = np.full((len(runs), len(contents)), _ABSENT, dtype=np.int64)
    right = np.zeros(labels.shape, dtype=bool)
    start = 0
    for run, rows in enumerate(runs):
        places = flat[start : start + len(rows)].tolist()
        start += len(rows)
        _place(rows, places, codes, labels[run], right[run])
    return Outcomes(labels, right)


def pair_tests(outcomes: Outcomes) -> list[PairTest]:
    """McNemar's exact test for every pair of runs, Holm-corrected over all of them.

    All pairs, not only those with the best: the best is itself picked by these data, so that tests against it alone
    would promise too much.
    """
    count = len(outcomes.labels)
    tests = [_test(outcomes, first, second) for first in range(count) for second in range(first + 1, count)]
    adjusted = iter(holm([test.p for test in tests if test.p is not None]))
    return [test if test.p is None else PairTest(**{**vars(test), "p_adjusted": next(adjusted)}) for test in tests]


def _place(
    rows: Predictions,
    places: list[int],
    codes: dict[str, int],
    labels: NDArray[np.int64],
    right: NDArray[np.bool_],
) -> None:
    for row in sorted(range(len(rows)), key=rows.paths.__getitem__):
        label, place = rows.labels[row], places[row]
        if not label:
            continue
        if labels[place] == _ABSENT:
            labels[place], right[place] = codes[label], rows.predicted[row] == label
        elif labels[place] != codes[label]:
            labels[place] = _CONTRADICTED


def _test(outcomes: Outcomes, first: int, second: int) -> PairTest:
    one, two = outcomes.labels[first], outcomes.labels[second]
    shared = (one != _ABSENT) & (two != _ABSENT)
    agreed = shared & (one == two) & (one != _CONTRADICTED)
    n = int(agreed.sum())
    only_first = int((agreed & outcomes.right[first] & ~outcomes.right[second]).sum())
    only_second = int((agreed & outcomes.right[second] & ~outcomes.right[first]).sum())
    return PairTest(
        first=first,
        second=second,
        n=n,
        labels_disagree=int(shared.sum()) - n,
        only_first=only_first,
        only_second=only_second,
        p=mcnemar_exact(only_first, only_second) if n else None,
        p_adjusted=None,
        same_set=bool(((one == _ABSENT) == (two == _ABSENT)).all()),
    )
