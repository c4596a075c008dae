"""The survey of a table: every finding, from the neighbours, the looks and probabilities of a head that did not see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..data.source import TRAIN
from ..evaluate.intervals import share_interval
from ..features.cache import FeatureTable
from .duplicates import Bar, DuplicateGroup, near_leaks
from .findings import Finding
from .labels import Doubts, accuracy_range
from .looks import Looks
from .outliers import FAR

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Judged:
    """What a head that has not seen the labels of these images says of them.

    Attributes:
        rows: (m,) of the table: labelled, those of train out of fold.
        logits: (m, c), whose softmax are the probabilities of the table's classes.
        doubts: of the labels, in the order of ``rows``.
        agreeing: (m,) on how many of ``backbones`` other backbones the label is in doubt, too.
        head: what judged, in words.
    """

    rows: Ints
    logits: Floats
    doubts: Doubts
    head: str
    agreeing: Ints
    backbones: tuple[str, ...] = ()

    @property
    def predicted(self) -> Ints:
        """The most probable class (m,)."""
        return np.asarray(self.logits.argmax(axis=1))

    @property
    def probabilities(self) -> Floats:
        """(m, c)."""
        shifted = np.exp(self.logits - self.logits.max(axis=1, keepdims=True))
        return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


@dataclass(frozen=True)
class Share:
    """A share of ``n`` images that are right, with its 95 % interval; None where there are none."""

    name: str
    n: int
    accuracy: float | None
    interval: list[float] | None


@dataclass(frozen=True)
class Survey:
    """All that was found about a table of n images.

    Attributes:
        groups: near-duplicates, byte-identical ones included; worst first.
        outlier: (n,) scores; `outliers.FAR` and more is one.
        quality, problems: (n,) how bad, above 1 where something is wrong, and what.
    """

    table: FeatureTable
    groups: list[DuplicateGroup]
    bar: Bar
    looks: Looks
    outlier: Floats
    quality: Floats
    problems: list[str]
    judged: Judged | None = None
    reported: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def leaks(self) -> list[DuplicateGroup]:
        """The groups that lie across splits."""
        return [group for group in self.groups if group.leaks]

    @property
    def disputed(self) -> list[int]:
        """Rows that look like another that is labelled otherwise: of each such group some label is wrong."""
        return sorted({row for group in self.groups if group.disputed for row in group.rows})

    @property
    def doubted(self) -> Ints:
        """Rows whose label is in doubt: more likely wrong than right, worst first, then those `disputed`."""
        first = [] if self.judged is None else self.judged.rows[self.judged.doubts.doubted].tolist()
        return np.array([*first, *(row for row in self.disputed if row not in set(first))], np.int64)

    @property
    def outliers(self) -> Ints:
        """Rows, the farthest first."""
        order = np.argsort(-self.outlier, kind="stable")
        return np.asarray(order[self.outlier[order] >= FAR])

    @property
    def poor(self) -> Ints:
        """Rows that are hard to see, the worst first."""
        order = np.argsort(-self.quality, kind="stable")
        return np.asarray(order[self.quality[order] > 1])

    def findings(self) -> Iterator[Finding]:
        """Every finding; an image may have several."""
        for group in self.groups:
            score = min(group.score, 99.0)
            for row in group.rows:
                yield Finding(row, "leak" if group.leaks else "near-duplicate", score, self._twin(group, row))
        yield from self._label_findings()
        for row in self.outliers.tolist():
            yield Finding(row, "outlier", self.outlier[row])
        for row in self.poor.tolist():
            yield Finding(row, "quality", self.quality[row], self.problems[row])

    def _label_findings(self) -> Iterator[Finding]:
        names, doubtful = self.table.class_names, set()
        if self.judged is not None:
            for place in self.judged.doubts.doubted.tolist():
                row = int(self.judged.rows[place])
                doubtful.add(row)
                suggestion = names[self.judged.doubts.suggestion[place]]
                yield Finding(row, "label", self.judged.doubts.wrong[place], suggestion)
        for group in self.groups:
            for row in group.rows if group.disputed else ():
                others = sorted(group.classes - {int(self.table.targets[row])})
                if row not in doubtful:
                    yield Finding(row, "label", 0.5, names[others[0]])

    def _twin(self, group: DuplicateGroup, row: int) -> str:
        """The path of the image that ``row`` repeats: one of train, and of another class, where it can be."""
        others = [other for other in group.rows if other != row]
        split, target = self.table.splits, self.table.targets
        best = min(others, key=lambda other: (split[other] != TRAIN, target[other] == target[row], other))
        return self.table.paths[best]

    def errors_among(self, rows: Ints) -> Share | None:
        """The share of mistakes among those of ``rows`` that were judged."""
        if self.judged is None:
            return None
        wrong = self.judged.predicted != self.table.targets[self.judged.rows]
        chosen = np.isin(self.judged.rows, rows)
        return _share("mistakes", wrong[chosen], self.table.groups[self.judged.rows[chosen]])

    def scores(self) -> list[Share]:
        """The accuracy on the reported split: of all, without copies of train, and should doubted labels be wrong."""
        if self.judged is None or self.reported is None:
            return []
        rows = self.judged.rows
        mine = self.table.splits[rows] == self.reported
        right = (self.judged.predicted == self.table.targets[rows])[mine]
        rows = rows[mine]
        train = {digest.tobytes() for digest in self.table.digests[self.table.train]}
        same = np.array([self.table.digests[row].tobytes() in train for row in rows], bool)
        near = same | np.isin(rows, list(near_leaks(self.groups, self.table.splits, self.reported, TRAIN)))
        groups = self.table.groups[rows]
        shares = [_share("all images", right, groups)]
        if same.any():
            shares.append(_share("without byte-identical leaks", right[~same], groups[~same]))
        if near.any():
            shares.append(_share("without near-identical leaks", right[~near], groups[~near]))
        return shares

    def score_range(self) -> tuple[float, float] | None:
        """Between which the accuracy on the reported split lies, should doubted labels be wrong."""
        if self.judged is None or self.reported is None:
            return None
        mine = self.table.splits[self.judged.rows] == self.reported
        right = self.judged.predicted == self.table.targets[self.judged.rows]
        return accuracy_range(right[mine], np.isin(self.judged.rows, self.doubted)[mine])


def _share(name: str, hits: Bools, groups: Ints) -> Share:
    n = len(hits)
    return Share(name, n, float(hits.mean()) if n else None, share_interval(hits, groups))
