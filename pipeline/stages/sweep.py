"""Several experiments on the same images: each is made once, and the best is named by what is not reported."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from ..artifacts import (
    PARAMS_FILE,
    RunMetrics,
    RunModel,
    current_versions,
    default_run_name,
    list_runs,
    read_metrics,
    read_model,
)
from ..data.images import Images, open_images
from ..errors import ParamsError, RunError
from ..features.cache import FeatureCache, FeatureTable
from ..heads import Score, make_head
from ..params import Params, load_params
from .open import features_in_memory, fill_together, open_caches, with_pooling
from .train_head import judges, train_on

Say = Callable[[str], None]
Opened = list[tuple[FeatureCache, FeatureTable]]
PROGRAM = "image-transfer-pipeline"
NAMED = ("backbone.name", "head.kind")  # these are in the name of a run anyway


@dataclass(frozen=True)
class Candidate:
    """One experiment: what is set in it as ``key.path: value``, and the params that come of it."""

    settings: Mapping[str, Any]
    params: Params

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.settings.items())

    @property
    def run_name(self) -> str:
        """A name that tells it from the others."""
        data, backbone, head, name = self.params.data, self.params.backbone, self.params.head, self.params.runs.name
        words = [f"{key.rpartition('.')[2]}_{value}" for key, value in self.settings.items() if key not in NAMED]
        if name:
            words = [f"{key.rpartition('.')[2]}_{value}" for key, value in self.settings.items()]
        start = name or default_run_name(data.root, backbone.name, "+".join(head.kinds))
        return "-".join([start, *(re.sub(r"[^A-Za-z0-9.]+", "_", word).strip("_.")[:40] for word in words)])


@dataclass(frozen=True)
class Finished:
    """A candidate's run; ``made`` is False where it was there already."""

    candidate: Candidate
    path: Path
    metrics: RunMetrics
    made: bool

    def score(self, judge: str) -> Score:
        """How the chosen head did by cross-validation (``cv``) or on ``val``."""
        row = next(row for row in self.metrics.leaderboard if row["selected"])
        return Score(row[f"{judge}_accuracy"], row[f"{judge}_log_loss"], row.get(f"{judge}_weighted_accuracy"))


def sweep(candidates: Sequence[Candidate], say: Say = print, *, quiet: bool = False) -> dict[str, Any]:
    """Extract and train a head for every candidate, all of the same images; name the best.

    What is there already for the same data, params (but those of ``runs``), features and version of the program is
    taken as it is. Candidates of the same features read them once. The best is named by cross-validation on train, or
    by val where a test split is reported; the reported split names nothing.

    Args:
        candidates: of one ``data`` section and one ``cache.dir``.
        say: takes the lines meant for the user.
        quiet: no progress bar.

    Returns:
        ``runs`` (``settings, run, made, accuracy, log_loss`` by the judge, best first), ``winner`` (its run),
        ``judge`` (cv or val), ``split`` (what is reported).

    Raises:
        PipelineError: of the first candidate that fails; what was finished before stays, and is not made again.
    """
    params = candidates[0].params
    images = open_images(params.data, params.cache.dir)
    for candidate in candidates:  # so that a mistake in the last one is found before the first is paid for
        for kind in candidate.params.head.kinds:
            make_head(kind, candidate.params.head, class_names=images.class_names)
        open_caches(candidate.params, images)
    finished: list[Finished] = []
    for _, group in groupby(sorted(candidates, key=_features_of), _features_of):
        finished += _experiments(list(group), images, say, quiet)
    return _summary(finished, say)


def _features_of(candidate: Candidate) -> str:
    """Equal for candidates that have the same features."""
    sections = (candidate.params.backbone, candidate.params.transform, candidate.params.extract)
    return repr([section.model_dump() for section in sections])


def _experiments(group: Sequence[Candidate], images: Images, say: Say, quiet: bool) -> Iterator[Finished]:
    """The runs of candidates that have the same features."""
    caches = open_caches(group[0].params, images, begins=True, quiet=quiet)
    filled = [fill_together(caches)]
    train = caches[0].of_train
    filled += [fill_together(views, train) for views in zip(*(cache.views() for cache in caches), strict=True)]
    for cache in caches:
        cache.backbone.release()  # one network at a time is in memory
    if computed := sum(len(each.computed) for each in filled):
        say(f"{caches[0].store.spec.folder_name}: {computed} features computed")
    most = features_in_memory(group[0].params.head)
    opened = [(cache, cache.table(most)) for cache in caches]
    found = _runs_on(opened, group[0].params)
    for candidate in group:
        yield _run_of(candidate, opened, found) or _make(candidate, opened, say)


def _make(candidate: Candidate, opened: Opened, say: Say) -> Finished:
    runs = candidate.params.runs.model_copy(update={"name": candidate.run_name})
    params = candidate.params.model_copy(update={"runs": runs})
    say(f"Training: {candidate}")
    summary = train_on(opened, params, lambda _line: None, judged=True, started=time.perf_counter())
    return Finished(candidate, Path(summary["run"]), read_metrics(Path(summary["run"])), True)


# -- what is there already -------------------------------------------------------------------------------------------


def _runs_on(opened: Opened, params: Params) -> list[tuple[Path, RunModel, Params]]:
    """The runs of stage two that this program made of these features and labels, newest first."""
    keys, digest, version = {cache.key for cache, _ in opened}, opened[0][1].data_digest, current_versions()[PROGRAM]
    runs = []
    for entry in list_runs(params.runs.dir):
        with suppress(RunError, ParamsError):  # a damaged run is made anew
            model = read_model(entry.path)
            same = model.verb == "train-head" and model.data.digest == digest and model.feature_key in keys
            if same and model.versions.get(PROGRAM) == version:
                runs.append((entry.path.absolute(), model, load_params(entry.path / PARAMS_FILE)))
    return runs


def _run_of(candidate: Candidate, opened: Opened, runs: list[tuple[Path, RunModel, Params]]) -> Finished | None:
    params, pooled = candidate.params, len(opened) > 1
    if "prompts" in params.head.kinds:  # whose texts may be others now
        return None
    judge = "val" if judges(opened[0][1], opened[0][1].reported_split()) else "cv"
    for path, model, made in runs:
        wanted = with_pooling(params, model.backbone.pooling) if pooled else params
        if made.model_copy(update={"runs": params.runs}) != wanted:
            continue
        with suppress(RunError):
            metrics = read_metrics(path)
            rows = metrics.leaderboard
            poolings = {row["kind"].rpartition(" on ")[2] for row in rows} if pooled else set(params.backbone.poolings)
            judged = any(row.get("selected") and row.get(f"{judge}_accuracy") is not None for row in rows)
            if judged and poolings == set(params.backbone.poolings):
                return Finished(candidate, path, metrics, False)
    return None


# -- the best --------------------------------------------------------------------------------------------------------


def _summary(finished: Sequence[Finished], say: Say) -> dict[str, Any]:
    rows = [row for each in finished for row in each.metrics.leaderboard if row["selected"]]
    judge = "val" if all(row["val_accuracy"] is not None for row in rows) else "cv"
    plain = len({repr(each.candidate.params.head.class_weight) for each in finished}) > 1

    def rank(each: Finished) -> tuple[float, float]:
        score = each.score(judge)
        return (Score(score.accuracy, score.log_loss) if plain else score).rank

    ranked = sorted(finished, key=rank)
    words = "on val" if judge == "val" else "by cross-validation on train"
    say(f"Scores {words}, by which the best is chosen (the best of many is a little too good):")
    for each in ranked:
        there = "" if each.made else "  (there already)"
        say(f"  {100 * each.score(judge).accuracy:5.1f} %  {each.candidate}  {each.path.name}{there}")
    best, split = ranked[0], ranked[0].metrics.split
    say(f"Best {words}: {best.candidate}; reported on {split}, which chose nothing, below.")
    return {
        "runs": [
            {
                "settings": dict(each.candidate.settings),
                "run": str(each.path),
                "made": each.made,
                "accuracy": each.score(judge).accuracy,
                "log_loss": each.score(judge).log_loss,
            }
            for each in ranked
        ],
        "winner": str(best.path),
        "judge": judge,
        "split": split,
    }
