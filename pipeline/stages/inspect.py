"""Look at the data: near-duplicates, doubted labels, outliers, what to label next; a folder beside the runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..artifacts import REPORT_FILE, default_run_name, publishing_run
from ..data.digests import first_occurrences, locate
from ..data.images import Images, open_given, open_images
from ..data.source import SPLITS, TEST, VAL
from ..errors import HeadError
from ..features.cache import FeatureCache, FeatureTable
from ..features.inventory import list_keys
from ..features.rows import Rows, take_rows
from ..features.spec import PLAIN_VIEW
from ..features.store import FeatureStore
from ..files import publish_file
from ..heads import Head, make_head
from ..insight.duplicates import (
    SAMPLE,
    Bar,
    Copies,
    Pairs,
    calibrate,
    copies_of,
    duplicate_groups,
    pairs_over,
    proposed_pairs,
)
from ..insight.findings import insights_csv
from ..insight.gallery import Curator, Gallery
from ..insight.labelling import Next, label_next, next_csv
from ..insight.labels import find_doubts, with_neighbours
from ..insight.looks import Looks, icon_of, look_at
from ..insight.neighbours import Neighbours, find_neighbours
from ..insight.outliers import outlier_scores, quality_problems
from ..insight.survey import Judged, Survey
from ..insight.thumbnails import Thumbnails
from ..params import Params
from ..report.survey import SurveyContent, render_survey
from ..runtime.cores import usable_cores
from ..runtime.seeds import make_generator
from .open import features_in_memory, open_cache
from .run import Run

Say = Callable[[str], None]
Opened = Callable[[Images], FeatureCache]
INSIGHTS_FILE, SUMMARY_FILE, NEXT_FILE = "insights.csv", "inspect.json", "next.csv"
COUNT = 20
OTHER_BACKBONES = 3
FEWEST_FOR_COPIES = 5
LOWEST = 1e-12  # a probability of a head, before its logarithm is taken


def inspect(
    params: Params,
    say: Say = print,
    *,
    run: Run | None = None,
    unlabelled: str | None = None,
    count: int = COUNT,
    quiet: bool = False,
) -> dict[str, Any]:
    """Look at the images of the params, or of ``run``, through their cached features, and publish what is found.

    Args:
        run: judge by its head, on the images it was made from.
        unlabelled: a folder of images of which to say which ``count`` are to be labelled next; embedded first.

    Returns:
        the summary of ``--json``: ``images, near_duplicate_groups, leaks, doubted, outliers, insights, report``, and
        ``next`` where a folder was given.

    Raises:
        MissingFeaturesError: run extract first.
        DataError, BackboneError, CacheError, RunError: see their messages.
    """
    opened = partial(open_cache, params, quiet=quiet) if run is None else partial(run.cache, quiet=quiet)
    params = params if run is None else _params_of(run)
    cache = opened(open_images(params.data, params.cache.dir))
    view = View(cache, quiet, features_in_memory(params.head))
    table = view.table
    say(f"{len(table):,} images, {len(view.contents):,} different contents, under {cache.key}")
    judge = _judge(params, table, run)
    survey = survey_of(view, params, judge)
    curator = Curator(table, view.thumbnails, SPLITS)
    content = SurveyContent("", survey, _gallery(survey, curator), curator, _made(cache))
    if unlabelled is not None:
        content = replace(content, next=_label_next(view, judge, opened, unlabelled, count))
    name = params.runs.name or default_run_name(params.data.root, cache.backbone.identity.name, "inspect")
    summary = _publish(params, name, content)
    for line in _lines(survey):
        say(line)
    if content.next is not None:
        say(f"To label next: {summary['next']}")
    say(f"Report: {summary['report']}")
    return summary


def _params_of(run: Run) -> Params:
    """The run's, to publish beside it, under another name."""
    runs = run.params.runs.model_copy(update={"dir": run.folder.parent, "name": None})
    return run.params.model_copy(update={"runs": runs})


def _made(cache: FeatureCache) -> str:
    identity = cache.backbone.identity
    return f"Features of {identity.name} ({identity.weights}), made {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."


class View:
    """The images that are not left out, with what is kept beside their features: neighbours, looks, the bar.

    Attributes:
        positions: (n,) where each row of the table stands among the images.
        contents: rows of the first image with each content; ``content`` (n,) is the place of each image's there.
    """

    def __init__(self, cache: FeatureCache, quiet: bool, memory: int) -> None:
        self.cache, self.memory, self._quiet = cache, memory, quiet
        table = cache.table(memory)
        kept = np.ones(len(table), bool) if table.found is None else (table.targets >= 0) | (table.found < 0)
        self.positions = np.flatnonzero(cache.present)[kept]
        self.table = table = table if kept.all() else table.take(kept)
        self.contents = np.flatnonzero(first_occurrences(table.digests))
        self.digests = table.digests[self.contents]
        self.content = locate(self.digests, table.digests)
        self.features = take_rows(table.features, self.contents)
        decoder, folder = cache.backbone.decoder, cache.store.cache_dir
        self.thumbnails = Thumbnails(cache.images, self.positions, decoder, folder)

    def _file(self, what: str, folder: Path | None = None) -> Path:
        """Where ``what`` of this source is kept: beside the features, which it is made from."""
        index = self.cache.images.index_file
        return (folder or self.cache.store.folder) / f"{what}-{index.stem if index else self.table.data_digest[:16]}"

    def _keep(self, file: Path, save: Callable[[Path], None]) -> None:
        """What is kept only saves time, so that a cache which cannot be written is worth a warning."""
        try:
            save(file)
        except OSError as error:
            self.cache.images.warnings.append(f"The next inspection takes longer: {file} cannot be written ({error}).")

    def neighbours(self) -> Neighbours:
        """Of the distinct contents."""
        file = self._file("neighbours")
        known = Neighbours.load(file)
        found = find_neighbours(
            self.digests, self.features, known=known, device=self.cache.backbone.device, quiet=self._quiet
        )
        if known is None or not np.array_equal(known.digests, found.digests):
            self._keep(file, found.save)
        return found

    def looks(self) -> Looks:
        """Of the distinct contents."""
        file = self._file("looks", self.cache.store.cache_dir / "looks")
        known = Looks.load(file)
        rows = self.positions[self.contents]
        found = look_at(self.cache.images, rows, self.cache.backbone.decoder, known, quiet=self._quiet)
        if not np.array_equal(known.digests, found.digests):
            self._keep(file, found.save)
        return found

    def bar(self, neighbours: Neighbours, looks: Looks, pairs: Pairs) -> Bar:
        """The bar of near-duplicates, from at most 200 copies that go through the backbone once."""
        file = self._file("copies").with_suffix(".json")
        try:
            return Bar.from_json(file.read_text())
        except (OSError, ValueError, TypeError, KeyError):
            pass  # never made, or damaged: it is made
        if len(self.contents) < FEWEST_FOR_COPIES:
            return Bar((0.5, 0.5), np.inf, {}, 0)
        bar = calibrate(self._copies(), self.features, neighbours.mean, looks.icons, pairs)
        self._keep(file, lambda path: publish_file(path, bar.as_json().encode()))
        return bar

    def _copies(self) -> Copies:
        backbone, images = self.cache.backbone, self.cache.images
        generator = make_generator("copies")
        chosen = generator.permutation(len(self.contents))[:SAMPLE]
        source, kinds, icons, pixels = [], [], [], []
        for row in np.sort(chosen).tolist():
            data = images.read(int(self.positions[self.contents[row]]))
            if data is None:
                continue
            for kind, copy in copies_of(backbone.decoder(data), generator).items():
                source.append(row)
                kinds.append(kind)
                icons.append(icon_of(copy))
                pixels.append(backbone.pixels(copy))
        return Copies(np.array(source), kinds, backbone(pixels), np.stack(icons))


# -- the survey -----------------------------------------------------------------------------------------------------


def survey_of(view: View, params: Params, judge: _Judge | None = None) -> Survey:
    """All that is found; without a ``judge`` nothing of labels."""
    table, content = view.table, view.content
    neighbours, looks = view.neighbours(), view.looks()
    pairs = proposed_pairs(neighbours, looks.icons)
    bar = view.bar(neighbours, looks, pairs)
    groups = duplicate_groups(content, *pairs_over(pairs, bar), table.splits, table.targets)
    every = looks.take(content)
    problem = quality_problems(every)
    judged = None if judge is None else _judged(view, judge, neighbours, params)
    notes = [*view.cache.warnings, *([judge.why_not] if judge and judge.why_not else [])]
    return Survey(
        table=table,
        groups=groups,
        bar=bar,
        looks=every,
        outlier=outlier_scores(table.features, table.targets, every),
        quality=problem[0],
        problems=problem[1],
        judged=judged,
        reported=next((split for split in (TEST, VAL) if table.labelled(split).any()), None),
        notes=notes,
    )


@dataclass(frozen=True)
class _Judge:
    """A head, and what it says of labels that it has not seen; or ``why_not``, where no head can say anything.

    Attributes:
        rows: (m,) of the table; logits: (m, c) of its classes.
        words: how it judges.
    """

    rows: NDArray[np.int64]
    logits: NDArray[np.float64]
    head: Head | None = None
    words: str = ""
    why_not: str = ""


def _judge(params: Params, table: FeatureTable, run: Run | None) -> _Judge:
    """The head of the run, or one fitted to train, and its logits: of train out of fold, of the rest as it predicts."""
    try:
        return _fitted_judge(params, table) if run is None else _judge_of_run(params, table, run)
    except HeadError as error:
        why = f"No label was judged: {error.what} {error.why or ''}".rstrip()
        return _Judge(np.empty(0, np.int64), np.empty((0, len(table.class_names))), why_not=why)


def _fitted_judge(params: Params, table: FeatureTable) -> _Judge:
    head = _head(params, table)
    head.fit(take_rows(table.features, table.train), table.targets[table.train], table.groups[table.train])
    rows, logits = _joined(_out_of_fold(head, table), _of_the_rest(head, table))
    return _Judge(rows, logits, head, f"Judged by a {head.kind} head trained on train, train itself out of fold.")


def _judge_of_run(params: Params, table: FeatureTable, run: Run) -> _Judge:
    """Features that were fine-tuned on the labels of train cannot judge them: there the rest alone is judged."""
    if not run.head.has_probabilities:
        raise HeadError("The run's head gives no probabilities.", why=run.head.why_no_probabilities)
    rest = _of_the_rest(run.head, table)
    if run.model.verb == "finetune":
        words = f"Judged by the {run.head.kind} head of {run.folder.name}; train, which it was tuned on, is not."
        return _Judge(*rest, run.head, words)
    rows, logits = _joined(_out_of_fold(_head(params, table), table), rest)
    words = f"Judged by the {run.head.kind} head of {run.folder.name}, train out of fold."
    return _Judge(rows, logits, run.head, words)


Logits = tuple[NDArray[np.int64], NDArray[np.float64]]


def _out_of_fold(head: Head, table: FeatureTable) -> Logits:
    train = np.flatnonzero(table.train)
    seen = head.cross_validate(take_rows(table.features, train), table.targets[train], table.groups[train])
    assert seen.logits is not None
    return train[seen.known], _of_all_classes(seen.logits[seen.known], head, table)


def _of_the_rest(head: Head, table: FeatureTable) -> Logits:
    rest = np.flatnonzero((table.targets >= 0) & ~table.train)
    if not len(rest):
        return rest, np.empty((0, len(table.class_names)))
    chances = head.predict_proba(take_rows(table.features, rest))
    return rest, _of_all_classes(np.log(np.maximum(chances, LOWEST)), head, table)


def _joined(*parts: Logits) -> Logits:
    rows, logits = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.argsort(rows, kind="stable")
    return rows[order], logits[order]


def _judged(view: View, judge: _Judge, neighbours: Neighbours, params: Params) -> Judged | None:
    """The doubts, and on how many of the other backbones in the cache they are shared."""
    if not len(judge.rows):
        return None
    targets = view.table.targets
    near = neighbours.index[view.content[judge.rows]]
    doubts = find_doubts(with_neighbours(judge.logits, near, targets[view.contents]), targets[judge.rows])
    names, agreeing = [], np.zeros(len(judge.rows), np.int64)
    for name, table in _other_tables(view) if len(doubts.doubted) else ():
        other = _judge(params, table, None)
        doubted = other.rows[find_doubts(other.logits, targets[other.rows]).doubted]
        agreeing += np.isin(judge.rows, doubted)
        names.append(name)
    return Judged(judge.rows, judge.logits, doubts, judge.words, agreeing, tuple(names))


def _head(params: Params, table: FeatureTable) -> Head:
    """The first kind of the params that gives probabilities and bears so many rows, else the logistic head."""
    for kind in (*params.head.kinds, "logistic"):
        section = params.head.model_copy(update={"search": {}})
        head = make_head(kind, section, class_names=table.class_names, jobs=usable_cores())
        if head.has_probabilities and (head.by_blocks or not isinstance(table.features, Rows)):
            return head
    raise AssertionError("the logistic head gives probabilities")


def _of_all_classes(logits: NDArray[np.float64], head: Head, table: FeatureTable) -> NDArray[np.float64]:
    every = np.full((len(logits), len(table.class_names)), np.log(LOWEST))
    every[:, head.classes_] = logits
    return every


def _other_tables(view: View) -> Iterable[tuple[str, FeatureTable]]:
    """The same images under other backbones, as far as their features are all in the cache; the last used first."""
    own = view.cache.store.spec
    seen = {(own.backbone, own.weights_digest)}
    for entry in list_keys(view.cache.store.cache_dir):
        spec = entry.spec
        if len(seen) > OTHER_BACKBONES:
            return
        if spec is None or spec.view != PLAIN_VIEW or entry.feature_dim is None:
            continue
        if (spec.backbone, spec.weights_digest) in seen:
            continue
        store = FeatureStore(view.cache.store.cache_dir, spec, entry.feature_dim)
        if store.contains(view.digests).all():
            seen.add((spec.backbone, spec.weights_digest))
            large = isinstance(view.table.features, Rows)
            features: Any = (store.flat if large else store.read)(view.table.digests)
            yield spec.backbone, replace(view.table, features=features, views=())


# -- what to label next ---------------------------------------------------------------------------------------------


def _label_next(view: View, judge: _Judge, opened: Opened, folder: str, count: int) -> Next:
    """Of the images in ``folder``, embedded as the others were, those to label; what has a label already is none."""
    plain = view.cache.images.data.model_copy(update={"group_pattern": None, "corrections": None})
    images = open_given([folder], plain, view.cache.store.cache_dir)
    cache = opened(images)
    cache.fill()
    positions = np.flatnonzero(cache.present)
    labelled = view.table.digests[view.table.targets >= 0]
    new = first_occurrences(images.digests[positions]) & (locate(labelled, images.digests[positions]) < 0)
    positions = positions[new]
    table = cache.table_of(positions, view.memory)
    chances = None
    if judge.head is not None and len(table):
        chances = np.zeros((len(table), len(view.table.class_names)))
        chances[:, judge.head.classes_] = judge.head.predict_proba(table.features)
    picks = label_next(table.features, chances, view.table.class_names, count)
    thumbnails = Thumbnails(images, positions, cache.backbone.decoder, view.cache.store.cache_dir)
    paths = [images.path(int(positions[pick.row])) for pick in picks]
    return Next(picks, paths, Curator(table, thumbnails, SPLITS))


# -- what is published ----------------------------------------------------------------------------------------------


def _gallery(survey: Survey, curator: Curator) -> Gallery:
    judged = survey.judged
    gallery, wrong = Gallery(), np.empty(0, np.int64)
    if judged is not None:
        gallery = curator.mistakes(judged.rows, judged.predicted, judged.probabilities)
        wrong = judged.rows[judged.predicted != survey.table.targets[judged.rows]]
    classes = curator.classes(survey.outlier)
    return replace(gallery, classes=classes, map=curator.map(wrong, method="t-SNE", pictures=True))


def _publish(params: Params, name: str, content: SurveyContent) -> dict[str, Any]:
    survey = content.survey
    with publishing_run(params.runs.dir, name) as (folder, path):
        (folder / INSIGHTS_FILE).write_bytes(insights_csv(survey.table, survey.findings()))
        summary = {**_summary(survey), "insights": str(path / INSIGHTS_FILE), "report": str(path / REPORT_FILE)}
        if content.next is not None:
            (folder / NEXT_FILE).write_bytes(next_csv(content.next))
            summary["next"] = str(path / NEXT_FILE)
        (folder / SUMMARY_FILE).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        report = render_survey(replace(content, name=path.name))
        (folder / REPORT_FILE).write_text(report, encoding="utf-8")
    return summary


def _summary(survey: Survey) -> dict[str, Any]:
    judged = survey.judged
    bounds = survey.score_range()
    return {
        "images": len(survey.table),
        "near_duplicate_groups": len(survey.groups),
        "leaks": len(survey.leaks),
        "doubted": len(survey.doubted),
        "outliers": len(survey.outliers),
        "quality": len(survey.poor),
        "missed_copies": survey.bar.missed,
        "false_alarms": survey.bar.false_alarms,
        "likely_wrong": None if judged is None else float(judged.doubts.wrong.sum()),
        "accuracy": [vars(share) for share in survey.scores()],
        "accuracy_range": None if bounds is None else list(bounds),
        "warnings": survey.notes,
    }


def _lines(survey: Survey) -> Iterable[str]:
    bar, judged = survey.bar, survey.judged
    images = sum(len(group.rows) for group in survey.groups)
    groups = "1 group" if len(survey.groups) == 1 else f"{len(survey.groups)} groups"
    yield f"Near-duplicates: {groups} of {images} images, {len(survey.leaks)} across splits"
    if bar.copies:
        yield (
            f"  of {bar.copies} copies made for a test {100 * bar.miss_rate:.1f} % are missed; "
            f"at most {100 * bar.false_alarms:.1f} % of the images are paired in error"
        )
    doubted = 0 if judged is None else len(judged.doubts.doubted)
    wrong = 0.0 if judged is None else judged.doubts.expected_among_first(doubted)
    yield f"Labels in doubt: {doubted}, of which about {wrong:.0f} are wrong; {len(survey.disputed)} contradict a copy"
    yield f"Outliers: {len(survey.outliers)}; hard to see: {len(survey.poor)}"
    yield from survey.notes
