"""Stage two: a head on cached features, its score, and a run folder that predicts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..artifacts import (
    CurvePoint,
    ParameterCounts,
    Predictions,
    RunMetrics,
    RunSummary,
    check_run_name,
    default_run_name,
)
from ..backbones import Backbone
from ..data.images import Images
from ..data.source import SPLITS, TEST, VAL
from ..errors import DataError, HeadError
from ..evaluate import Provenance, metric_lines, score
from ..evaluate.advice import curve_sentence
from ..evaluate.chosen import choice_words, tried_sentence
from ..features.cache import FeatureCache, FeatureTable
from ..features.rows import Rows, take_rows
from ..files import human_bytes
from ..heads import (
    Choice,
    Entry,
    Score,
    choose_among,
    choose_head,
    curve_band,
    head_device,
    learning_curve,
    make_head,
    stratified_sample,
)
from ..params import HeadParams, Params
from ..runtime.cores import usable_cores
from ..runtime.memory import memory_budget
from ..runtime.progress import ProgressBar
from .extract import extracted
from .open import features_in_memory, open_caches, with_pooling
from .prompts import with_texts
from .run import make_gallery, publish_run, run_model

if TYPE_CHECKING:
    import torch

Features = NDArray[np.float32]
Ints = NDArray[np.int64]
Say = Callable[[str], None]
# As much as a classifier of scikit-learn, or a torch head, holds of them: themselves, and scaled.
COPIES_OF_OTHERS = 3


def train_head(
    params: Params, say: Say = print, *, curve: bool = False, extracts: bool = False, quiet: bool = False
) -> RunSummary:
    """Fit the head of ``params.head`` on train, score it on test (on val where there is no test), publish a run.

    Args:
        say: takes the lines meant for the user.
        curve: also fit on growing parts of train, to see whether more labels would help.
        extracts: embed first what the cache does not hold yet, as `extract` does.
        quiet: no progress bar.

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
    check = partial(_check, params.head)
    if extracts:
        caches, _ = extracted(params, say, quiet=quiet, check=check)
    else:
        caches = open_caches(params)
        check(caches[0].images)
    most = features_in_memory(params.head)
    opened = [(cache, cache.table(most)) for cache in caches]
    return train_on(opened, params, say, curve=curve, started=started, quiet=quiet)


def train_on(
    opened: Sequence[tuple[FeatureCache, FeatureTable]],
    params: Params,
    say: Say,
    *,
    curve: bool = False,
    judged: bool = False,
    started: float,
    quiet: bool = True,
) -> RunSummary:
    """As `train_head`, on features that are there: a cache and its table for each pooling of the params.

    Args:
        judged: cross-validate a single kind of head too, so that the run can be compared with others before it is
            reported.
        started: when the work for this run began, by `time.perf_counter`.
        quiet: do not show that it goes on.
    """
    caches = {cache.backbone.identity.pooling: cache for cache, _ in opened}
    tables = dict(zip(caches, (table for _, table in opened), strict=True))
    table = next(iter(tables.values()))
    reported = table.reported_split()
    for each in tables.values():
        say(_data_line(each))
    learnt = _learnt_from(params.head, table)
    for line in _memory_lines(params.head, table, learnt):
        say(line)
    backbone = caches[params.backbone.poolings[0]].backbone
    section = with_texts(params, backbone, table.class_names)
    several = judged or len(caches) > 1
    choose = partial(_choose, section, learnt=learnt, reported=reported, several=several, backbone=backbone)
    with ProgressBar(f"training {' and '.join(params.head.kinds)}", quiet=quiet):
        choices = {pooling: choose(each) for pooling, each in tables.items()}
    pooling, choice = choose_among(choices, params.head, on_val=judges(table, reported))
    cache, table, params = caches[pooling], tables[pooling], with_pooling(params, pooling)
    head = choice.head
    if learnt.sum() < table.train.sum():
        head.selected["sample"] = {"images": int(learnt.sum()), "of": int(table.train.sum())}
    with ProgressBar("training on growing parts of train", quiet=quiet or not curve):
        points = _learning_curve(section, table, learnt, head.kind, reported, backbone.device) if curve else []
    with ProgressBar("scoring", quiet=quiet):
        metrics, predictions = _score(table, learnt, choice, reported, points, cache.warnings)
    model = run_model(cache, table, head)
    model = model.model_copy(update={"seconds": time.perf_counter() - started})
    name = params.runs.name or default_run_name(params.data.root, cache.backbone.identity.name, head.kind)
    with ProgressBar("publishing the run and its report", quiet=quiet):
        pictures = make_gallery(cache, table, SPLITS[reported], predictions)
        path = publish_run(
            params, name, head=head, model=model, metrics=metrics, predictions=predictions, gallery=pictures
        )
    for line in [_parameter_line(model.parameters), *_leaderboard_lines(choice), *metric_lines(metrics)]:
        say(line)
    for line in _curve_lines(points):
        say(line)
    say(f"Run: {path} (report.html shows the scores)")
    return metrics.summary(str(path))


def _check(params: HeadParams, images: Images) -> None:
    """Refuse, before anything is paid for, images without two classes and heads that cannot be configured so."""
    if len(images.class_names) < 2:
        raise DataError(
            "A head cannot be trained on these images.",
            where=images.root,
            why=f"there is {len(images.class_names) or 'no'} class folder, and a classifier needs two",
            remedy="give each class a folder, or set data.root to a table of labels (.csv)",
        )
    for kind in params.kinds:
        make_head(kind, params, class_names=images.class_names)


def _data_line(table: FeatureTable) -> str:
    counts = [f"{int((table.splits == number).sum()):,} {name}" for number, name in enumerate(SPLITS)]
    size = f"{len(table.class_names)} classes, {table.features.shape[1]} features"
    return f"{len(table):,} images ({', '.join(counts)}), {size}"


def _learnt_from(head: HeadParams, table: FeatureTable) -> NDArray[np.bool_]:
    """Which rows (n,) heads learn from: train, or the stratified sample of it that ``head.sample`` asks for."""
    train = np.flatnonzero(table.train)
    learnt = np.zeros(len(table), bool)
    if len(train):
        count = len(train) if head.sample is None else head.sample
        learnt[train[stratified_sample(table.targets[train], table.groups[train], count, head.seed)]] = True
    return learnt


def _training_rows(head: HeadParams, table: FeatureTable, learnt: NDArray[np.bool_]) -> tuple[Features, Ints, Ints]:
    """As `FeatureTable.training_rows`, of the rows ``learnt`` from; in memory where they have become few enough."""
    features, targets, groups = table.training_rows()
    rows = learnt[table.train]
    if rows.all():
        return features, targets, groups
    features = take_rows(features, rows)
    if isinstance(features, Rows) and features.nbytes <= features_in_memory(head):
        features = features[:]
    return features, targets[rows], groups[rows]


def _jobs(head: HeadParams, features: Features) -> int:
    """How many folds are fitted at once: each holds its own rows, twice, and all together no more than the budget.

    Where that is not enough for one, nothing but heads that read blocks is left.
    """
    fit = (memory_budget(head.memory_mb) // max(features.nbytes, 1) - 1) // 2
    return usable_cores() if fit < 1 else min(usable_cores(), fit)


def _memory_lines(head: HeadParams, table: FeatureTable, learnt: NDArray[np.bool_]) -> Iterator[str]:
    """What a sample, and features that are larger than the budget, mean for each kind.

    Raises:
        HeadError: a kind needs all of them in memory, and more than there is.
    """
    count, of = int(learnt.sum()), int(table.train.sum())
    if count < of:
        yield f"Heads learn from {count:,} of the {of:,} images of train, a stratified sample: head.sample"
    features: Any = table.features
    if not isinstance(features, Rows):
        return
    memory = memory_budget(head.memory_mb)
    yield f"Features are read from {features.file.name}, block by block: head.memory_mb allows {human_bytes(memory)}"
    row = COPIES_OF_OTHERS * 4 * features.shape[1]
    need = count * row
    for kind in head.kinds:
        if make_head(kind, head, class_names=table.class_names).by_blocks:
            continue
        if need > memory:
            raise HeadError(
                f"{kind} holds all features that it learns from in memory: at least {human_bytes(need)}.",
                where="head.memory_mb",
                why=f"it allows {human_bytes(memory)}",
                remedy=f"set head.sample={max(memory // row, 1)} to learn from a stratified sample of train; or choose "
                "head.kind=logistic, which reads them by blocks; or set head.memory_mb if there is more",
            )
        yield f"{kind} holds all of them in memory: at least {human_bytes(need)}"


def _parameter_line(counts: ParameterCounts) -> str:
    """``Trainable: 2,562 / 2,226,434 (0.1 %)``."""
    if counts.trainable is None or counts.total is None:
        return "Trainable: this kind of head has no parameters to count"
    share = 100 * counts.trainable / counts.total
    return f"Trainable: {counts.trainable:,} / {counts.total:,} ({share:.1f} %)"


def judges(table: FeatureTable, reported: int) -> bool:
    """Whether val chooses: where a test split is left to report on."""
    return reported == TEST and bool(table.labelled(VAL).any())


def _choose(
    params: HeadParams,
    table: FeatureTable,
    *,
    learnt: NDArray[np.bool_],
    reported: int,
    several: bool,
    backbone: Backbone,
) -> Choice:
    """Fit the kinds of the params on train; the best is chosen on train, or on val where a test split exists."""
    val = table.labelled(VAL)
    features, targets, groups = _training_rows(params, table, learnt)
    return choose_head(
        params,
        features,
        targets,
        groups,
        class_names=table.class_names,
        jobs=_jobs(params, features),
        several=several,
        device=head_device(backbone.device),
        held_out=(take_rows(table.features, val), table.targets[val]) if judges(table, reported) else None,
    )


def _learning_curve(
    params: HeadParams,
    table: FeatureTable,
    learnt: NDArray[np.bool_],
    kind: str,
    reported: int,
    device: torch.device,
) -> list[CurvePoint]:
    """The points of heads fitted to growing parts of train, on the reported split."""
    rows, learning = table.labelled(reported), _training_rows(params, table, learnt)
    jobs, on = _jobs(params, learning[0]), head_device(device)
    fits = learning_curve(
        lambda: make_head(kind, params, class_names=table.class_names, jobs=jobs, device=on),
        *learning,
        take_rows(table.features, rows),
        table.targets[rows],
        seed=params.seed,
    )
    return [CurvePoint.model_validate({**row, "images": round(row["images"])}) for row in curve_band(fits)]


def _score(
    table: FeatureTable,
    learnt: NDArray[np.bool_],
    choice: Choice,
    reported: int,
    curve: list[CurvePoint],
    warnings: list[str],
) -> tuple[RunMetrics, Predictions]:
    head = choice.head
    with_val = head.kind == "logistic" and head.params.logistic.choose_by == "val_accuracy"
    rows, splits = (learnt | table.labelled(VAL), "train and val") if with_val else (learnt, "train")
    sampled = head.selected.get("sample")
    provenance = Provenance(
        fitted=f"the {head.kind} head",
        train_digests=table.digests[rows],
        train_counts=table.class_counts(rows),
        fitted_on=f"{splits} (a stratified sample of the {sampled['of']:,} of train)" if sampled else splits,
        selections=choice.selections,
        selected=head.selected,
        leaderboard=[
            {**entry.as_dict(), "settings": _settings(entry), "selected": entry.chosen} for entry in choice.entries
        ],
        history=head.history,
        curve=curve,
        warnings=[*warnings, *head.warnings],
    )
    return score(head, table, table.labelled(reported), provenance, split=SPLITS[reported])


def _leaderboard_lines(choice: Choice) -> list[str]:
    """One line a kind with what was chosen for it, and the values of a search; baselines were only shown beside it."""
    lines = [f"Heads{', by the scores that chose (the best is a little too good)' if choice.selections else ''}:"]
    width = max(18, *(len(entry.kind) + 2 for entry in choice.entries))
    for entry in choice.entries:
        named = (("cross-validated", entry.cv), ("val", entry.val), ("held out of train", entry.held_out))
        scores = [(name, score) for name, score in named if score]
        shown = ", ".join(f"{name} {_accuracies(score)}" for name, score in scores)
        mark = "chosen" if entry.chosen else "baseline" if entry.baseline else ""
        shown = shown or "alone, so not cross-validated"
        line = f"  {entry.kind:<{width}}{mark:<10}{shown}  {entry.seconds:.1f} s"
        lines.append(f"{line}  {_settings(entry)}".rstrip())
    sentence = tried_sentence(choice.head.kind, choice.head.selected)
    return [*lines, sentence] if sentence else lines


def _settings(entry: Entry) -> str:
    return "" if entry.head is None else choice_words(entry.head.selected)


def _accuracies(score: Score) -> str:
    """``accuracy 97.1 %``, and the weighted one where it is what chose."""
    weighted = score.weighted_accuracy
    shown = "" if weighted is None else f" (weighted {100 * weighted:.1f} %)"
    return f"accuracy {100 * score.accuracy:.1f} %{shown}"


def _curve_lines(points: list[CurvePoint]) -> list[str]:
    """The learning curve as lines: images, mean accuracy, lowest to highest of the draws of so many images."""
    lines = []
    for point in points:
        mean, low, high = 100 * point.accuracy, 100 * point.low, 100 * point.high
        band = "all of train" if point.low == point.high else f"{low:.1f} to {high:.1f}"
        lines.append(f"  {point.images:>8,} images: {mean:.1f} % ({band})")
    if not lines:
        return []
    title = "Learning curve: accuracy with so many images of train, the mean of three draws (the lowest to the highest)"
    return [title, *lines, *filter(None, [curve_sentence(points)])]
