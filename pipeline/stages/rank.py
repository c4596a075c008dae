"""Which backbone? A real probe of each on the same sample of the training images."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backbones import make_module
from ..errors import DataError, UsageError
from ..evaluate import wilson
from ..features.digests import locate, stack_digests
from ..heads import make_head
from ..params import BackboneParams, HeadParams, Params
from ..runtime.device import usable_cores
from ..runtime.seeds import make_generator
from .embedding import Embedding
from .load import TRAIN, build_table, digest_unknown, split_rows
from .sources import (
    Origin,
    Source,
    build_forward,
    open_folder,
    open_quarantine,
    open_store,
    plain_view,
    resolve_origin,
    worker_count,
)

Say = Callable[[str], None]
Rows = NDArray[np.int64]
IMAGES = 1000
TIMED_CALLS = 5


@dataclass(frozen=True)
class Candidate:
    """One backbone to rank: the params that name it, and what they resolve to."""

    label: str
    params: Params
    origin: Origin


@dataclass(frozen=True)
class Ranked:
    """One backbone ranked; ``accuracy`` is cross-validated over ``n`` images, ``interval`` is Wilson's at 95 %.

    ``milliseconds`` an image of the forward pass alone, measured now whatever the cache holds; ``extract_seconds``
    cover the ``forwarded`` images that the cache did not have.
    """

    label: str
    name: str
    weights: str
    n: int
    accuracy: float
    interval: list[float]
    feature_dim: int
    parameters: int
    milliseconds: float
    forwarded: int
    extract_seconds: float
    probe_seconds: float


def rank_backbones(
    params: Params, names: Sequence[str], say: Say = print, *, images: int = IMAGES, quiet: bool = False
) -> dict[str, Any]:
    """Embed a stratified sample of train with each backbone, through the cache, and cross-validate a probe on it.

    Args:
        names: ``name`` or ``name=weights``, two or more for a comparison.
        images: the size of the sample; every class keeps at least ``head.folds`` of its images where that fits.

    Returns:
        ``backbones`` (best first), ``recommended`` (a label) and ``reason``.

    Raises:
        UsageError: no names. BackboneError, DataError, CacheError: see their messages.
    """
    candidates = [_candidate(params, label) for label in dict.fromkeys(names)]
    if not candidates:
        raise UsageError("There is no backbone to rank.", remedy="name some: pipeline backbones --rank NAME...")
    source = open_folder(params.data, params.cache)
    mask = _sample(source, params, images)
    embedded = [_embed(candidate, source, mask, quiet=quiet) for candidate in candidates]
    rows = np.flatnonzero(np.logical_and.reduce([has for has, _, _ in embedded]))
    say(f"{len(rows):,} training images of {source.tree.root}, the same for each backbone")
    ranked = [
        _probe(candidate, source, rows, forwarded, seconds)
        for candidate, (_, forwarded, seconds) in zip(candidates, embedded, strict=True)
    ]
    ranked.sort(key=lambda row: (-row.accuracy, row.milliseconds))
    choice, reason = recommend(ranked)
    return {"backbones": [vars(row) for row in ranked], "recommended": choice.label, "reason": reason}


def _candidate(params: Params, label: str) -> Candidate:
    name, _, weights = label.partition("=")
    own = params.backbone if name == params.backbone.name else BackboneParams(name=name, seed=params.backbone.seed)
    backbone = own.model_copy(update={"weights": weights}) if weights else own
    changed = params.model_copy(update={"backbone": backbone})
    return Candidate(label, changed, resolve_origin(changed))


def _sample(source: Source, params: Params, images: int) -> NDArray[np.bool_]:
    """Which files (n,) take part: labelled images of train, in proportion to the classes."""
    tree = source.tree
    if tree.splits is None:
        digest_unknown(source)  # the split of an image is a hash of its content
    everything = np.flatnonzero((tree.targets >= 0) & (source.books.known | (tree.splits is not None)))
    train = everything[split_rows(source, everything, params.data) == TRAIN]
    chosen = train[stratified_sample(tree.targets[train], images, params.head.folds, params.head.seed)]
    mask = np.zeros(len(tree.paths), bool)
    mask[chosen] = True
    return mask


def stratified_sample(targets: NDArray[np.integer[Any]], size: int, least: int, seed: int) -> Rows:
    """Ascending positions of ``size`` rows: ``least`` of each class first, the others in proportion to the classes."""
    order = make_generator("rank", seed).permutation(len(targets))
    place = np.empty(len(targets))
    share = np.empty(len(targets))
    for target in np.unique(targets):
        rows = order[targets[order] == target]
        place[rows] = np.arange(len(rows))
        share[rows] = (place[rows] + 0.5) / len(rows)
    first = place < least
    return np.sort(np.lexsort((np.where(first, place, share), ~first))[:size])


def _embed(
    candidate: Candidate, source: Source, mask: NDArray[np.bool_], *, quiet: bool
) -> tuple[NDArray[np.bool_], int, float]:
    """Bring the sample into the backbone's cache: which files have a feature (n,), how many were new, seconds."""
    params, origin = candidate.params, candidate.origin
    embedding = Embedding(
        source=source,
        store=open_store(params, origin),
        quarantine=open_quarantine(params, origin.transform),
        transformation=plain_view(origin.transform, params.data, params.extract),
        make_forward=lambda: build_forward(params, origin),
        workers=worker_count(params.extract),
        part_seconds=params.extract.part_seconds,
        quiet=quiet,
    )
    outcome = embedding.run(embedding.find_todo(among=mask))
    embedding.store.refresh()
    embedding.store.touch()
    has = mask & source.books.known & embedding.store.contains(source.books.digests)
    bad = locate(stack_digests(embedding.quarantine.digests), source.books.digests) >= 0
    return has & ~bad, len(outcome.computed), outcome.seconds


def _probe(candidate: Candidate, source: Source, rows: Rows, forwarded: int, seconds: float) -> Ranked:
    params, origin = candidate.params, candidate.origin
    table = build_table(source, open_store(params, origin), rows, params.data)
    if len(table.class_names) < 2:
        raise DataError("Backbones cannot be ranked on this folder.", where=table.root, why="train has one class")
    started = time.perf_counter()
    own = params.head
    plain = HeadParams(folds=own.folds, seed=own.seed, standardize=own.standardize, class_weight=own.class_weight)
    head = make_head("logistic", plain, class_names=table.class_names, jobs=usable_cores())
    predicted = head.cross_validate(table.features, table.targets, table.groups).predicted
    correct = int((predicted == table.targets).sum())
    return Ranked(
        label=candidate.label,
        name=origin.identity.name,
        weights=origin.identity.weights,
        n=len(rows),
        accuracy=correct / len(rows),
        interval=wilson(correct, len(rows)) or [0.0, 1.0],
        feature_dim=origin.feature_dim,
        parameters=_parameters(origin),
        milliseconds=1000 * _seconds_an_image(params, origin),
        forwarded=forwarded,
        extract_seconds=round(seconds, 3),
        probe_seconds=round(time.perf_counter() - started, 3),
    )


def _parameters(origin: Origin) -> int:
    network, _ = make_module(origin.identity.name, layer=origin.identity.layer, pooling=origin.identity.pooling)
    return sum(parameter.numel() for parameter in network.parameters())


def _seconds_an_image(params: Params, origin: Origin) -> float:
    """Seconds of the forward pass, the median of a few full batches after the first."""
    forward = build_forward(params, origin)
    size = origin.transform.crop
    batch = [np.zeros((3, size, size), np.uint8)] * forward.batch_size
    seconds = []
    for _ in range(TIMED_CALLS + 1):
        started = time.perf_counter()
        forward(batch)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:]) / len(batch)


def recommend(ranked: Sequence[Ranked]) -> tuple[Ranked, str]:
    """The fastest of those whose interval overlaps that of the best, and the sentence that says so."""
    best = max(ranked, key=lambda row: row.accuracy)
    level = [row for row in ranked if row.interval[1] >= best.interval[0]]
    choice = min(level, key=lambda row: (row.milliseconds, row.parameters))
    scores = f"{_percent(choice)} against {_percent(best)}"
    if len(level) == 1:
        return best, f"{best.label}: its interval lies above all others."
    if choice is best:
        return best, f"{best.label}: the most accurate, and the fastest of the {len(level)} that come near it."
    return choice, (
        f"{choice.label}: the fastest of the {len(level)} whose intervals overlap that of the best, {best.label} "
        f"({scores}). The difference is not shown to be real; more images (--images) may show one."
    )


def _percent(row: Ranked) -> str:
    low, high = (100 * bound for bound in row.interval)
    return f"{100 * row.accuracy:.1f} % [{low:.1f}, {high:.1f}]"
