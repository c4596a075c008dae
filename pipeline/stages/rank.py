"""Which backbone? A real probe of each on the same sample of the training images."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backbones import Backbone
from ..data.images import Images, open_images
from ..data.source import TRAIN
from ..errors import DataError, UsageError
from ..evaluate.intervals import share_interval
from ..features.cache import FeatureCache, Filled
from ..heads import head_device, make_head
from ..params import BackboneParams, HeadParams, Params
from ..runtime.cores import usable_cores
from ..runtime.seeds import make_generator
from .open import fill_together, open_caches

Say = Callable[[str], None]
Rows = NDArray[np.int64]
IMAGES = 1000
TIMED_CALLS = 5


@dataclass(frozen=True)
class Ranked:
    """One backbone ranked; ``accuracy`` is cross-validated over ``n`` images, the probe's strength chosen within each
    fold's train part; ``interval`` is Wilson's at 95 %, by group.

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
    params: Params, names: Sequence[str], say: Say = print, *, size: int = IMAGES, quiet: bool = False
) -> dict[str, Any]:
    """Embed a stratified sample of train with each backbone, through the cache, and cross-validate a probe on it.

    Args:
        names: ``name`` or ``name=weights``, two or more for a comparison; each in all poolings of the params, where
            these name several.
        size: of the sample; every class keeps at least ``head.folds`` of its images where that fits.

    Returns:
        ``backbones`` (best first), ``recommended`` (a label) and ``reason``.

    Raises:
        UsageError: no names. BackboneError, DataError, CacheError: see their messages.
    """
    if not names:
        raise UsageError("There is no backbone to rank.", remedy="name some: pipeline backbones --rank NAME...")
    images = open_images(params.data, params.cache.dir)
    groups = [
        open_caches(_with_backbone(params, label), images, begins=True, quiet=quiet) for label in dict.fromkeys(names)
    ]
    sample = _sample(images, params.head, size)
    caches, filled = dict[str, FeatureCache](), dict[str, Filled]()
    for name, group in zip(dict.fromkeys(names), groups, strict=True):
        done = fill_together(group, sample)
        for cache in group:
            label = f"{name} ({cache.store.spec.pooling})" if len(group) > 1 else name
            caches[label], filled[label] = cache, done
            cache.backbone.release()  # one network at a time is in memory
    rows = np.flatnonzero(np.logical_and.reduce([sample, *(cache.present for cache in caches.values())]))
    say(f"{len(rows):,} training images of {images.root}, the same for each backbone and on the same folds")
    ranked = [_probe(label, cache, filled[label], rows, params.head) for label, cache in caches.items()]
    ranked.sort(key=lambda row: (-row.accuracy, row.milliseconds))
    choice, reason = recommend(ranked)
    return {"backbones": [vars(row) for row in ranked], "recommended": choice.label, "reason": reason}


def _with_backbone(params: Params, label: str) -> Params:
    name, _, weights = label.partition("=")
    own = params.backbone if name == params.backbone.name else BackboneParams(name=name, seed=params.backbone.seed)
    if len(params.backbone.poolings) > 1:
        own = own.model_copy(update={"pooling": params.backbone.pooling})
    backbone = own.model_copy(update={"weights": weights}) if weights else own
    return params.model_copy(update={"backbone": backbone})


def _sample(images: Images, head: HeadParams, size: int) -> NDArray[np.bool_]:
    """Which images (n,) take part: labelled ones of train, in proportion to the classes."""
    if images.samples.splits is None:
        images.read_unknown()  # the split of an image is a hash of its content
    usable = np.flatnonzero((images.targets >= 0) & (images.known | (images.samples.splits is not None)))
    train = usable[images.splits_of(usable) == TRAIN]
    chosen = train[stratified_sample(images.targets[train], size, head.folds, head.seed)]
    mask = np.zeros(len(images), bool)
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


def _probe(label: str, cache: FeatureCache, filled: Filled, rows: Rows, own: HeadParams) -> Ranked:
    table, backbone = cache.table_of(rows), cache.backbone
    if len(table.class_names) < 2:
        raise DataError("Backbones cannot be ranked on this folder.", where=table.root, why="train has one class")
    started = time.perf_counter()
    plain = HeadParams(folds=own.folds, seed=own.seed, standardize=own.standardize, class_weight=own.class_weight)
    device = head_device(backbone.device)
    head = make_head("logistic", plain, class_names=table.class_names, jobs=usable_cores(), device=device)
    # Before it is fitted, so that each fold chooses a strength of its own, on other images than it is judged by.
    right = head.cross_validate(table.features, table.targets, table.groups).right
    return Ranked(
        label=label,
        name=backbone.identity.name,
        weights=backbone.identity.weights,
        n=len(rows),
        accuracy=float(right.mean()),
        interval=share_interval(right, table.groups) or [0.0, 1.0],
        feature_dim=backbone.feature_dim,
        parameters=backbone.parameters or 0,
        milliseconds=1000 * _seconds_an_image(backbone),
        forwarded=len(filled.computed),
        extract_seconds=round(filled.seconds, 3),
        probe_seconds=round(time.perf_counter() - started, 3),
    )


def _seconds_an_image(backbone: Backbone) -> float:
    """Seconds of the forward pass, the median of a few full batches after the first."""
    size = backbone.transform.crop
    batch = [np.zeros((3, size, size), np.uint8)] * backbone.forward.batch_size
    seconds = []
    for _ in range(TIMED_CALLS + 1):
        started = time.perf_counter()
        backbone(batch)
        seconds.append(time.perf_counter() - started)
    backbone.release()
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
