"""Look at the data: near-duplicates, doubted labels, outliers, what to label next; a folder beside the runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..artifacts import REPORT_FILE, default_run_name, publishing_run
from ..data.digests import first_occurrences, locate
from ..data.images import open_images
from ..data.source import SPLITS, TEST, TRAIN, VAL
from ..errors import HeadError
from ..features.cache import FeatureCache, FeatureTable
from ..features.inventory import list_keys
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
from ..insight.labels import find_doubts
from ..insight.looks import Looks, icon_of, look_at
from ..insight.neighbours import Neighbours, find_neighbours
from ..insight.outliers import outlier_scores, quality_problems
from ..insight.survey import Judged, Survey
from ..insight.thumbnails import Thumbnails
from ..params import Params
from ..report.survey import SurveyContent, render_survey
from ..runtime.cores import usable_cores
from ..runtime.seeds import make_generator
from .open import open_cache
from .run import Run

Say = Callable[[str], None]
INSIGHTS_FILE, SUMMARY_FILE = "insights.csv", "inspect.json"
OTHER_BACKBONES = 3
FEWEST_FOR_COPIES = 5
LOWEST = 1e-12  # a probability of a head, before its logarithm is taken


def inspect(params: Params, say: Say = print, *, run: Run | None = None, quiet: bool = False) -> dict[str, Any]:
    """Look at the images of the params, or of ``run``, through their cached features, and publish what is found.

    Args:
        run: judge by its head, on the images it was made from.

    Returns:
        the summary of ``--json``: ``images, near_duplicate_groups, leaks, doubted, outliers, insights, report``.

    Raises:
        MissingFeaturesError: run extract first.
        DataError, BackboneError, CacheError, RunError: see their messages.
    """
    cache = open_cache(params, quiet=quiet) if run is None else _cache_of(run, quiet)
    params = params if run is None else run.params
    view = _View(cache, quiet)
    table = view.table
    say(f"{len(table):,} images, {len(view.contents):,} different contents, under {cache.key}")
    survey = _survey(view, params, run, say)
    curator = Curator(table, view.thumbnails, SPLITS)
    content = SurveyContent("", survey, _gallery(survey, curator), curator, _made(cache))
    name = params.runs.name or default_run_name(params.data.root, cache.backbone.identity.name, "inspect")
    summary = _publish(params, name, content)
    for line in _lines(survey):
        say(line)
    say(f"Report: {summary['report']}")
    return summary


def _cache_of(run: Run, quiet: bool) -> FeatureCache:
    return run.cache(open_images(run.params.data, run.params.cache.dir), quiet=quiet)


def _made(cache: FeatureCache) -> str:
    identity = cache.backbone.identity
    return f"Features of {identity.name} ({identity.weights}), made {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."


class _View:
    """The images that are not left out, with what is kept beside their features: neighbours, looks, the bar.

    Attributes:
        positions: (n,) where each row of the table stands among the images.
        contents: rows of the first image with each content; ``content`` (n,) is the place of each image's there.
    """

    def __init__(self, cache: FeatureCache, quiet: bool) -> None:
        self.cache, self._quiet = cache, quiet
        table = cache.table()
        kept = np.ones(len(table), bool) if table.found is None else (table.targets >= 0) | (table.found < 0)
        self.positions = np.flatnonzero(cache.present)[kept]
        self.table = table = cache.table_of(self.positions)
        self.contents = np.flatnonzero(first_occurrences(table.digests))
        self.digests = table.digests[self.contents]
        self.content = locate(self.digests, table.digests)
        self.features = table.features[self.contents]
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


def _survey(view: _View, params: Params, run: Run | None, say: Say) -> Survey:
    table, content = view.table, view.content
    neighbours, looks = view.neighbours(), view.looks()
    pairs = proposed_pairs(neighbours, looks.icons)
    bar = view.bar(neighbours, looks, pairs)
    groups = duplicate_groups(content, *pairs_over(pairs, bar), table.splits, table.targets)
    every = looks.take(content)
    problem = quality_problems(every)
    judged, notes = _judged(view, params, run)
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
        notes=[*view.cache.warnings, *notes],
    )


def _judged(view: _View, params: Params, run: Run | None) -> tuple[Judged | None, list[str]]:
    """What a head says of labels that it has not seen; or why there is none that could."""
    table = view.table
    try:
        rows, logits, words = _unseen_logits(params, table, run)
    except HeadError as error:
        return None, [f"No label was judged: {error.what} {error.why or ''}".rstrip()]
    doubts = find_doubts(logits, table.targets[rows])
    names, agreeing = [], np.zeros(len(rows), np.int64)
    if run is None and len(doubts.doubted):
        for name, other in _other_tables(view):
            other_rows, other_logits, _ = _unseen_logits(params, other, None)
            doubted = other_rows[find_doubts(other_logits, table.targets[other_rows]).doubted]
            agreeing += np.isin(rows, doubted)
            names.append(name)
    return Judged(rows, logits, doubts, words, agreeing, tuple(names)), []


def _unseen_logits(
    params: Params, table: FeatureTable, run: Run | None
) -> tuple[NDArray[np.int64], NDArray[np.float64], str]:
    """Rows with a label, and the logits (m, c) of a head that was fitted without them; train is out of fold.

    Raises:
        HeadError: there is nothing to fit, or nothing that can be held out.
    """
    train = np.flatnonzero(table.labelled(TRAIN))
    others = np.flatnonzero((table.targets >= 0) & ~table.train)
    tuned = run is not None and run.model.verb == "finetune"
    head = _head(params, table)
    parts: list[tuple[NDArray[np.int64], NDArray[np.float64]]] = []
    if not tuned:  # features that were trained on the labels cannot judge them
        X, y, groups = table.features[train], table.targets[train], table.groups[train]
        if run is None:
            head.fit(X, y, groups)
        seen = head.cross_validate(X, y, groups)
        assert seen.logits is not None
        parts.append((train[seen.known], _of_all_classes(seen.logits[seen.known], head, table)))
    if len(others):
        judge = head if run is None else run.head
        if judge.has_probabilities:
            chances = np.log(np.maximum(judge.predict_proba(table.features[others]), LOWEST))
            parts.append((others, _of_all_classes(chances, judge, table)))
    if not parts:
        raise HeadError("The run's head gives no probabilities.", why=run.head.why_no_probabilities if run else None)
    rows, logits = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.argsort(rows, kind="stable")
    how = "trained on train, train itself by cross-validation" if not tuned else "of the run, train left out"
    return rows[order], logits[order], f"Judged by a {(run.head if tuned and run else head).kind} head {how}."


def _head(params: Params, table: FeatureTable) -> Head:
    """The first kind of the params that gives probabilities, else the logistic head."""
    for kind in (*params.head.kinds, "logistic"):
        section = params.head.model_copy(update={"search": {}})
        head = make_head(kind, section, class_names=table.class_names, jobs=usable_cores())
        if head.has_probabilities:
            return head
    raise AssertionError("the logistic head gives probabilities")


def _of_all_classes(logits: NDArray[np.float64], head: Head, table: FeatureTable) -> NDArray[np.float64]:
    every = np.full((len(logits), len(table.class_names)), np.log(LOWEST))
    every[:, head.classes_] = logits
    return every


def _other_tables(view: _View) -> Iterable[tuple[str, FeatureTable]]:
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
            yield spec.backbone, replace(view.table, features=store.read(view.table.digests), views=())


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
    yield f"Near-duplicates: {len(survey.groups)} groups of {images} images, {len(survey.leaks)} across splits"
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
