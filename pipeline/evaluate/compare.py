"""Runs side by side: one table, with marks for the differences that are real.

Every pair is tested with McNemar's exact test on the images, matched by the digest of their bytes, that both were
scored on; where images come in groups, whole groups take its coin tosses. Holm's correction is over all pairs. A pair
without a mark is not shown to differ, which is not shown to be equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, Final

import numpy as np
import yaml
from numpy.typing import NDArray
from rich import box
from rich.table import Table
from rich.text import Text

from ..artifacts import (
    METRICS_FILE,
    PARAMS_FILE,
    PREDICTIONS_FILE,
    Predictions,
    RunMetrics,
    RunModel,
    has_default_name,
    read_metrics,
    read_model,
    read_predictions,
    run_id,
)
from ..data.splits import group_ids
from ..errors import RunError, UsageError
from .metrics import METRICS, Metric
from .text import duration, printable

ALPHA: Final = 0.05
_SHOWN_NOTES = 6
_MARK_TITLE = "beats"
_INTERVAL_WIDTH = len("[95.4–100.0]")
_ABSENT, _CONTRADICTED = -1, -2

Right = NDArray[np.bool_]


@dataclass(frozen=True)
class ComparedRun:
    """One row: a run with its predictions for the split that its scores are about."""

    path: Path
    model: RunModel
    metrics: RunMetrics
    predictions: Predictions

    @property
    def id(self) -> str:
        """By which every verb takes it, too."""
        return run_id(self.path)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Its params by dotted key, without where it was made and lies and what it did not use: other heads, stages."""
        try:
            sections = yaml.safe_load((self.path / PARAMS_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        if not isinstance(sections, dict) or "kind" not in (sections.get("head") or {}):
            return {}
        kinds = {name for name, value in sections["head"].items() if isinstance(value, dict)} - {"search"}
        kinds |= set(sections["head"]["kind"]) if isinstance(sections["head"]["kind"], list) else set()
        others = [f"head.{part}{kind}." for kind in kinds - {self.model.head.kind} for part in ("", "search.")]
        left_out = (*others, "runs.", "cache.dir", "head.kind")
        left_out += () if self.model.verb == "finetune" else ("finetune.",)
        places = (".device", ".workers")
        flat = ((key, value) for key, value in _flat(sections, "") if not key.startswith(left_out) and value != {})
        return {key: value for key, value in flat if not key.endswith(places)}

    def value(self, column: str) -> Any:
        """The value of a column of `sort_columns`."""
        return self.metrics.metrics.get(column) if column in METRICS else (NAMES | NUMBERS)[column](self)


Column = Callable[[ComparedRun], Any]
NAMES: Final[dict[str, Column]] = {
    "run": lambda run: run.path.name,
    "data": lambda run: Path(run.model.data.root).name,
    "backbone": lambda run: run.model.backbone.name,
    "head": lambda run: run.model.head.kind,
    "split": lambda run: run.metrics.split,
}
NUMBERS: Final[dict[str, Column]] = {
    "n": lambda run: run.metrics.n,
    "seconds": lambda run: run.model.seconds,
    "created": lambda run: run.model.created,
}


def sort_columns() -> tuple[str, ...]:
    """What a comparison can be sorted by."""
    return (*NAMES, "n", *METRICS, "seconds", "created")


@dataclass(frozen=True)
class PairTest:
    """Two runs on the images they share; ``first`` and ``second`` are their places in the list, from 0.

    Args:
        n: shared images (different contents) whose label is the same in both; the test is on these.
        groups: how many of them are independent: one of each group.
        labels_disagree: shared images left out because the runs do not agree on the label.
        only_first, only_second: images that only this one gets right.
        p: of McNemar's exact test; None where nothing is shared.
        p_adjusted: after Holm over all pairs.
        same_set: both runs were scored on exactly the same images.
    """

    first: int
    second: int
    n: int
    groups: int
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

    def as_dict(self) -> dict[str, Any]:
        """For JSON, where runs are numbered from 1."""
        better = None if self.better is None else self.better + 1
        return {**vars(self), "first": self.first + 1, "second": self.second + 1, "better": better}

    def notes(self, runs: Sequence[ComparedRun]) -> list[str]:
        """What a reader must know of the images that were compared."""
        who, notes = f"{self.first + 1} and {self.second + 1}", []
        if not self.same_set and self.n == 0 and self.labels_disagree == 0:
            notes.append(f"Runs {who} share no images, so they cannot be compared.")
        elif not self.same_set:
            sizes = f"{runs[self.first].metrics.n:,} and {runs[self.second].metrics.n:,}"
            notes.append(f"Runs {who} were scored on different sets ({sizes} images); tested on the {self.n:,} shared.")
        if self.labels_disagree:
            notes.append(f"Runs {who} disagree on the label of {self.labels_disagree:,} shared images; left out.")
        return notes


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
            "pairs": [pair.as_dict() for pair in self.pairs],
            "alpha": ALPHA,
            "notes": self.notes,
        }

    def _row(self, index: int) -> dict[str, Any]:
        run = self.runs[index]
        return {
            "number": index + 1,
            **{column: run.value(column) for column in (*NAMES, "n")},
            "id": run.id,
            "path": str(run.path),
            "created": run.model.created.isoformat(),
            "metrics": run.metrics.metrics,
            "baseline_accuracy": run.metrics.baseline_accuracy,
            "seconds": run.model.seconds,
            "better_than": [other + 1 for other in self.better_than(index)],
        }


def compare_runs(folders: Sequence[Path], *, sort: str = "accuracy", skip_damaged: bool = False) -> Comparison:
    """Compare runs on the images they share.

    Args:
        folders: run folders.
        sort: one of `sort_columns`, best first (names, oldest: ascending); with ``-`` before it, the other way round.
        skip_damaged: leave out runs that cannot be read and say so in the notes.

    Raises:
        UsageError: no such column.
        RunError: a run cannot be read.
    """
    column = sort.removeprefix("-")
    if column not in sort_columns():
        raise UsageError(f"There is no column {column} to sort by.", remedy=f"choose among {', '.join(sort_columns())}")
    runs, notes = [], []
    for folder in dict.fromkeys(folders):
        try:
            metrics = read_metrics(folder)
            rows = read_predictions(folder, probabilities=False).of_split(metrics.split)
            if metrics.groups is not None and len(rows) != metrics.n:
                why = f"it has {len(rows)} images of {metrics.split}, and {METRICS_FILE} has {metrics.n}"
                raise RunError(f"{PREDICTIONS_FILE} is damaged.", where=folder, why=why, remedy="make the run again")
            runs.append(ComparedRun(folder, read_model(folder), metrics, rows))
        except RunError as error:
            if not skip_damaged:
                raise
            notes.append(f"{folder.name} is left out: {error.what} {error.why or ''}".rstrip())
    runs = _sorted(runs, column, reverse=sort.startswith("-"))
    pairs = pair_tests([run.predictions for run in runs], [run.metrics.groups for run in runs])
    apart = [pair for pair in pairs if not pair.n and not pair.labels_disagree]
    said = [note for pair in pairs if len(apart) == 1 or pair not in apart for note in pair.notes(runs)]
    if len(apart) > 1:
        said.append(f"{len(apart)} pairs of runs share no images, so they cannot be compared.")
    if len(said) > _SHOWN_NOTES:
        said[_SHOWN_NOTES:] = [f"{len(said) - _SHOWN_NOTES} more such pairs; --json has them all."]
    return Comparison(runs, pairs, notes + said)


def _sorted(runs: list[ComparedRun], column: str, *, reverse: bool) -> list[ComparedRun]:
    known = [run for run in runs if run.value(column) is not None]
    lower_first = METRICS[column].lower_is_better if column in METRICS else column != "n"
    # Python's sort is stable, also in reverse: equal runs stay in the order in which they were named.
    ordered = sorted(known, key=lambda run: run.value(column), reverse=lower_first == reverse)
    return ordered + [run for run in runs if run.value(column) is None]


# -- the test -------------------------------------------------------------------------------------------------------


def mcnemar_exact(first: Right, second: Right, groups: NDArray[np.int64] | None = None) -> float:
    """Two-sided p-value of McNemar's exact test of which images (n,) two classifiers get right.

    Under the null hypothesis each image that exactly one of them gets right is the toss of a fair coin; the others
    say nothing. Images of one of ``groups`` (n,) are no independent tosses: there the coin decides for a whole group
    which classifier is which (the sign-flip test, whose special case McNemar's is).
    Source: Q. McNemar, Psychometrika 12 (1947); the exact form is the binomial sign test. Sign flips: R. A. Fisher,
    The Design of Experiments (1935).
    """
    difference = np.subtract(first, second, dtype=np.int64)
    tosses = difference if groups is None else np.bincount(np.unique(groups, return_inverse=True)[1], difference)
    sizes, counts = np.unique(np.abs(tosses[tosses != 0]).astype(np.int64), return_counts=True)
    if sizes.tolist() in ([], [1]):
        return _sign_test(int((tosses > 0).sum()), int((tosses < 0).sum()))
    # The sum of independent +-size has the characteristic function prod cos(size t)^count: back by a Fourier transform.
    length = 2 * int(sizes @ counts) + 1
    angles = 2 * np.pi * np.arange(length) / length
    factors = [np.cos(size * angles) ** count for size, count in zip(sizes, counts, strict=True)]
    chances = np.fft.fft(np.prod(factors, axis=0))
    extreme = np.abs((np.arange(length) + length // 2) % length - length // 2) >= abs(int(tosses.sum()))
    return float(np.clip(chances.real[extreme].sum() / length, 0, 1))


def _sign_test(only_first: int, only_second: int) -> float:
    n, smaller = only_first + only_second, min(only_first, only_second)
    # Logarithms, because 2**-n underflows from 1075 on; fsum keeps the many small terms.
    constant = math.lgamma(n + 1) - n * math.log(2)
    terms = (math.exp(constant - math.lgamma(k + 1) - math.lgamma(n - k + 1)) for k in range(smaller + 1))
    return min(1.0, 2 * math.fsum(terms))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: comparing them with alpha bounds the chance of any false claim.

    Source: S. Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return adjusted.tolist()


def pair_tests(runs: Sequence[Predictions], groups: Sequence[list[int] | None] = ()) -> list[PairTest]:
    """McNemar's exact test for every pair of runs, Holm-corrected over all of them.

    All pairs, not only those with the best: the best is itself picked by these data, so that tests against it alone
    would promise too much.

    Args:
        groups: for each run the group of each row, None where each stands alone; none at all likewise.
    """
    labels, right, units = _by_content(runs, groups)
    tests = [_test(labels, right, units, first, second) for first, second in combinations(range(len(runs)), 2)]
    adjusted = iter(holm([test.p for test in tests if test.p is not None]))
    return [test if test.p is None else replace(test, p_adjusted=next(adjusted)) for test in tests]


def _by_content(
    runs: Sequence[Predictions], groups: Sequence[list[int] | None]
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.int64]]:
    """What each run has for each of m different image contents, as two arrays (runs, m), and the group of each (m,).

    The first holds the code of the label, `_ABSENT` or, where a run has the content under two labels,
    `_CONTRADICTED`; the second whether the prediction is the label. Byte-identical copies within a run count once
    (they are no independent evidence), with the prediction of the first copy in the order of the paths. Rows without
    a label are left out. What is one group in any run is one group.
    """
    digests = np.concatenate([rows.digests for rows in runs]) if runs else np.empty((0, 16), np.uint8)
    words = np.ascontiguousarray(digests).view("V16").ravel()
    _, first, flat = np.unique(words, return_index=True, return_inverse=True)
    codes = {name: code for code, name in enumerate(sorted({label for rows in runs for label in rows.labels}))}
    labels = np.full((len(runs), len(first)), _ABSENT, dtype=np.int64)
    right = np.zeros(labels.shape, dtype=bool)
    starts = np.cumsum([0, *(len(rows) for rows in runs)])
    for run, rows in enumerate(runs):
        places = flat[starts[run] : starts[run + 1]]
        for row in sorted(range(len(rows)), key=rows.paths.__getitem__):
            label, place = rows.labels[row], places[row]
            if label and labels[run, place] == _ABSENT:
                labels[run, place], right[run, place] = codes[label], rows.predicted[row] == label
            elif label and labels[run, place] != codes[label]:
                labels[run, place] = _CONTRADICTED
    if not any(groups):
        return labels, right, np.arange(len(first))
    given = zip(runs, groups, strict=True)
    names = [f"{run} {name}" for run, (rows, own) in enumerate(given) for name in own or range(-len(rows), 0)]
    return labels, right, group_ids(digests, names)[first]


def _test(
    labels: NDArray[np.int64], right: NDArray[np.bool_], units: NDArray[np.int64], first: int, second: int
) -> PairTest:
    one, two = labels[first], labels[second]
    shared = (one != _ABSENT) & (two != _ABSENT)
    agreed = shared & (one == two) & (one != _CONTRADICTED)
    ours, theirs, n = right[first, agreed], right[second, agreed], int(agreed.sum())
    return PairTest(
        first=first,
        second=second,
        n=n,
        groups=len(np.unique(units[agreed])),
        labels_disagree=int(shared.sum()) - n,
        only_first=int((ours & ~theirs).sum()),
        only_second=int((theirs & ~ours).sum()),
        p=mcnemar_exact(ours, theirs, units[agreed]) if n else None,
        p_adjusted=None,
        same_set=bool(((one == _ABSENT) == (two == _ABSENT)).all()),
    )


# -- for people -----------------------------------------------------------------------------------------------------


def comparison_table(comparison: Comparison) -> Table:
    """A rich table; a column of names that says the same for all runs goes into the title."""
    values = {column: {run.value(column) for run in comparison.runs} for column in NAMES}
    shared = [column for column in NAMES if len(values[column]) == 1 < len(comparison.runs)]
    title = ", ".join(f"{column} {printable(values[column].pop())}" for column in shared)
    table = Table(title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD, leading=1)
    headings, *rows = _grid(comparison, [column for column in NAMES if column not in shared], between="\n")
    for heading in headings:
        # Where the terminal is narrow, the names fold and the numbers stay whole.
        is_text = heading in (*NAMES, _MARK_TITLE)
        width = None if is_text or heading in ("#", "n", "time") else _INTERVAL_WIDTH
        table.add_column(heading, overflow="fold", justify="left" if is_text else "right", min_width=width)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def comparison_groups(comparison: Comparison, metric: str, width: int | None) -> list[tuple[str, Table]]:
    """A title and a table of one line a run for each data set and split; reruns that came out the same share a line.

    Args:
        metric: the one that is shown, of `METRICS`; the best of each table is marked by it.
        width: columns that the terminal has; names that do not fit are cut. None: as wide as it needs.
    """
    groups: dict[tuple[str, str, int], list[int]] = {}
    for place, run in enumerate(comparison.runs):
        key = (run.model.data.digest, run.metrics.split, run.metrics.n)
        groups.setdefault(key, []).append(place)
    return [_group(comparison, places, METRICS[metric], metric, width) for places in groups.values()]


def _group(
    comparison: Comparison, places: list[int], metric: Metric, name: str, width: int | None
) -> tuple[str, Table]:
    lines = _joined(comparison, places)
    runs = [comparison.runs[place] for place in lines]
    known = [value for run in runs if (value := run.value(name)) is not None]
    best = (min if metric.lower_is_better else max)(known, default=None)
    shared = [column for column in ("backbone", "head") if len({run.value(column) for run in runs}) == 1]
    title = [f"{runs[0].value('data')} ({runs[0].metrics.split}, n = {runs[0].metrics.n:,})"]
    title += [f"{column} {runs[0].value(column)}" for column in shared] if len(runs) > 1 else []
    names = [column for column in ("backbone", "head") if column not in shared or len(runs) == 1]
    differing = _differing(runs)
    extra = ["settings"] if any(differing) else []
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold")
    for heading in ("#", "", metric.heading, "id", "run", *names, *extra, _MARK_TITLE):
        table.add_column(heading, no_wrap=True, overflow="ellipsis")
    for place, run, settings in zip(lines, runs, differing, strict=True):
        interval = metric.show_interval(run.metrics.metrics.get(f"{name}_ci95"), between="–")
        shown = metric.show(run.value(name)) + (f" [{interval}]" if interval else "")
        reruns = f" ×{len(lines[place])}" if len(lines[place]) > 1 else ""
        mark = "*" if best is not None and run.value(name) == best else ""
        marks = ", ".join(str(other + 1) for other in comparison.better_than(place) if other in lines)
        cells = [str(place + 1), mark, shown, run.id, f"{_when_or_name(run)}{reruns}", *map(run.value, names)]
        cells += [*([settings] if extra else []), marks]
        table.add_row(*(Text(printable(str(cell))) for cell in cells), style="bold" if mark else None)
    if width is not None:
        _cut(table, width, range(4, len(table.columns) - 1))
    return printable(", ".join(title)), table


def _joined(comparison: Comparison, places: list[int]) -> dict[int, list[int]]:
    """The first of each of the runs at ``places`` that are reruns of one another, with the places of all of them."""
    found: dict[str, list[int]] = {}
    for place in places:
        run = comparison.runs[place]
        own = "" if _when_or_name(run) != run.path.name else run.path.name  # a name was given for a reason
        same = (own, run.model.verb, run.model.backbone, run.model.transform, run.model.head.kind)
        found.setdefault(repr((*same, run.metrics.metrics, run.settings)), []).append(place)
    return {same[0]: same for same in found.values()}


def _differing(runs: Sequence[ComparedRun]) -> list[str]:
    """For each run the settings in which others of its verb, backbone and head differ from it, as ``key=value``.

    What a run of an earlier version lacks tells nothing. Beside probes a fine-tuned one says so.
    """
    texts, verbs = [], {run.model.verb for run in runs}
    found: dict[tuple[Any, ...], set[str]] = {}
    for run in runs:
        for key, value in run.settings.items():
            found.setdefault((*_kind(run), key), set()).add(repr(value))
    for run in runs:
        told = ["fine-tuned"] if len(verbs) > 1 and run.model.verb == "finetune" else []
        told += [
            f"{key.rpartition('.')[2]}={value}"
            for key, value in run.settings.items()
            if len(found[(*_kind(run), key)]) > 1
        ]
        texts.append(", ".join(dict.fromkeys(told)))
    return texts


def _kind(run: ComparedRun) -> tuple[Any, ...]:
    return run.model.verb, run.value("backbone"), run.value("head")


def _flat(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _when_or_name(run: ComparedRun) -> str:
    """The run's name, or when it was made where that is all that its name tells besides data, backbone and head."""
    return run.model.created.astimezone().strftime("%d %b %H:%M") if has_default_name(run.path.name) else run.path.name


def _cut(table: Table, width: int, flexible: range) -> None:
    """Give the columns of names what the numbers leave of the ``width``, the longest giving up first."""
    sizes = [max(len(str(cell)) for cell in (column.header, *column.cells)) for column in table.columns]
    room = width - sum(size + 1 for place, size in enumerate(sizes) if place not in flexible) - len(flexible)
    limits = {place: sizes[place] for place in flexible}
    while sum(limits.values()) > max(room, 6 * len(flexible)):
        limits[max(limits, key=lambda place: limits[place])] -= 1
    for place, limit in limits.items():
        table.columns[place].max_width = limit


def comparison_markdown(comparison: Comparison) -> str:
    """The same as a Markdown table followed by the notes."""
    headings, *rows = _grid(comparison, list(NAMES), between=" ")
    rule = [":--" if heading in (*NAMES, _MARK_TITLE) else "--:" for heading in headings]
    table = [f"| {' | '.join(row)} |" for row in (headings, rule, *([_markdown(cell) for cell in row] for row in rows))]
    return "\n".join([*table, "", *(f"- {_markdown(note)}" for note in comparison_notes(comparison))]) + "\n"


def comparison_notes(comparison: Comparison) -> list[str]:
    """What the marks mean, and what else a reader must know."""
    tested = sum(pair.p is not None for pair in comparison.pairs)
    notes = [printable(note) for note in comparison.notes]
    if not tested:
        return notes
    grouped = any(pair.groups < pair.n for pair in comparison.pairs)
    pairs = "1 pair" if tested == 1 else f"all {tested} pairs"
    return [
        f"`{_MARK_TITLE}`: McNemar's exact test on the same images, Holm-corrected over {pairs}, "
        f"at {100 * ALPHA:.0f} %. No mark means: not shown to differ.",
        "Brackets are 95 % intervals of each score alone; the test goes image by image and sees smaller differences.",
        *(["Images of one group (patient, video) count together, in the test and in the intervals."] * grouped),
        *notes,
    ]


def _grid(comparison: Comparison, names: Sequence[str], between: str) -> list[list[str]]:
    """The headings and a row a run, with the metrics that at least one run has and ``between`` value and interval."""
    shown = {name: METRICS[name] for name in METRICS if any(run.value(name) is not None for run in comparison.runs)}
    grid = [["#", _MARK_TITLE, *names, "n", *(metric.heading for metric in shown.values()), "time"]]
    for index, run in enumerate(comparison.runs):
        marks = ", ".join(str(other + 1) for other in comparison.better_than(index))
        cells = [str(index + 1), marks, *(printable(str(run.value(column))) for column in names), f"{run.metrics.n:,}"]
        for name, metric in shown.items():
            text = metric.show_interval(run.metrics.metrics.get(f"{name}_ci95"), between="–")
            cells.append(metric.show(run.value(name)) + (f"{between}[{text}]" if text else ""))
        grid.append([*cells, duration(run.model.seconds)])
    return grid


def _markdown(text: str) -> str:
    for special in "\\|<>*":
        text = text.replace(special, f"\\{special}")
    return text
