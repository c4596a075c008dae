"""Stage one: every image under ``data.root`` gets its feature into the cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypedDict

import numpy as np

from ..data.images import Images
from ..data.source import SPLITS
from ..errors import BadImagesError
from ..features.cache import FeatureCache, Filled
from ..features.extractor import Clock
from ..features.quarantine import BadContent
from ..files import human_bytes
from ..params import ExtractParams, Params
from ..runtime.distributed import World, world_from_environment
from .open import fill_together, open_caches

Say = Callable[[str], None]
EXAMPLES = 5
CLASSES = 8  # shown by name
ADVICE = {
    "read": "Reading files takes longest: a faster or local disk would help.",
    "decode": "Decoding takes longest: more cores (extract.workers), or smaller image files, would help.",
    "forward": "The backbone takes longest: a GPU, a smaller backbone or a reduced precision would help.",
    "write": "Writing parts takes longest: a faster disk for cache.dir would help.",
}


class ExtractSummary(TypedDict):
    """What `extract` gives, also as ``--json``; images = embedded + reused + duplicates + quarantined."""

    key: str
    feature_dim: int
    images: int
    embedded: int
    reused: int
    duplicates: int
    quarantined: int
    failed: int
    forwarded: int
    images_per_second: float
    seconds: float
    busy_seconds: dict[str, float]
    waited_seconds: dict[str, float]
    bound_by: str | None
    cache: str
    poolings: list[dict[str, Any]]
    views: list[dict[str, Any]]


def extract(
    params: Params,
    say: Say = print,
    *,
    retry: bool = False,
    quiet: bool = False,
    check: Callable[[Images], None] = lambda _images: None,
) -> ExtractSummary:
    """Embed every image of ``data.root`` that the cache does not hold yet.

    Args:
        say: takes the lines meant for the user.
        retry: try images again that are known to be unreadable.
        quiet: no progress bar.
        check: refuses, by raising, images that are not worth the work for what is to be done with them.

    Returns:
        the summary of ``--json``: key, feature_dim, the ledger, the rate, what bounds it, the cache folder.

    Raises:
        DataError, BackboneError, CacheError: see their messages.
        BadImagesError: ``data.on_bad_image`` is ``raise`` and images are unreadable; good features are kept.
        Interrupted: Ctrl-C; everything finished is kept.
    """
    return extracted(params, say, retry=retry, quiet=quiet, check=check)[1]


def extracted(
    params: Params,
    say: Say,
    *,
    retry: bool = False,
    quiet: bool = False,
    check: Callable[[Images], None] = lambda _images: None,
) -> tuple[list[FeatureCache], ExtractSummary]:
    """As `extract`; also the caches that it filled, one for each pooling, for what comes next in the same process."""
    world = _world(params.extract)
    caches = open_caches(params, begins=True, world=world, quiet=quiet or not world.is_main)
    cache = caches[0]
    check(cache.images)
    if retry:
        cache.images.read_unknown()
        cache.quarantine.release(cache.images.digests)
    for line in _plan(caches):
        say(line)
    filled = fill_together(caches)
    if params.extract.views:
        say(f"{cache.of_train.sum():,} training images in {params.extract.views} views, each under a key of its own")
    summary = _summary(caches, filled, _fill_views(caches))
    bad = _bad_images(cache)
    notes = [f"Weights: {note}." for note in cache.backbone.notes]
    for line in [*notes, *cache.store.warnings, *_report(cache, summary, bad)]:
        say(line)
    if params.data.on_bad_image == "raise" and (bad or cache.images.failures):
        raise _bad_images_error(cache, bad)
    return caches, summary


def _world(extract: ExtractParams) -> World:
    if extract.shard is None:
        return world_from_environment()
    index, count = map(int, extract.shard.split("/"))
    return World(rank=index, size=count)


def _fill_views(caches: Sequence[FeatureCache]) -> list[tuple[FeatureCache, Filled]]:
    """Embed the augmented views of the training images, each under a key of its own; those of the first pooling."""
    train = caches[0].of_train
    return [(views[0], fill_together(views, train)) for views in zip(*(cache.views() for cache in caches), strict=True)]


def _plan(caches: Sequence[FeatureCache]) -> Iterator[str]:
    cache = caches[0]
    images, backbone, missing = cache.images, cache.backbone, cache.missing(beside=caches[1:])
    yield from images.warnings
    if ignored := sorted(images.samples.ignored.items()):
        counts = ", ".join(f"{count} {extension or '(no extension)'}" for extension, count in ignored)
        yield f"Ignored files: {counts}."
    if backbone.choice and backbone.choice.new:
        yield f"Precision auto: {backbone.choice}"
    yield f"{len(images)} images in {len(images.samples.class_names)} classes under {images.root}"
    yield from _class_lines(images)
    new = int((~images.known[missing]).sum())
    stores = [each.store for each in caches]
    size = len(missing) * sum(store.feature_dim * (2 if store.spec.dtype == "float16" else 4) + 16 for store in stores)
    for each in caches[:-1]:
        yield f"{each.store.spec.folder_name} ({each.store.spec.pooling}): {_cached(each)}"
    named = f" ({stores[-1].spec.pooling})" if len(stores) > 1 else ""
    unread = f" ({new:,} not read before; those known under another name cost nothing)" if new else ""
    yield f"{stores[-1].spec.folder_name}{named}: {_cached(caches[-1])}; to do: {len(missing):,}{unread}"
    if len(missing):  # only then has anybody asked torch which device there is
        yield f"At most {human_bytes(size)} to write, on {backbone.device} in {backbone.precision}"


def _cached(cache: FeatureCache) -> str:
    return f"{int(cache.present.sum()):,} of these images cached"


def _class_lines(images: Images) -> Iterator[str]:
    """Which classes there are and how many images each has, a line a split where the source has splits."""
    samples = images.samples
    for number, split in enumerate(SPLITS):
        among = images.targets if samples.splits is None else images.targets[samples.splits == number]
        counts = np.bincount(among[among >= 0], minlength=len(samples.class_names)).tolist()
        named = sorted(zip(counts, samples.class_names, strict=True), key=lambda pair: (-pair[0], pair[1]))
        parts = [f"{name} {count:,}" for count, name in named[:CLASSES]]
        if len(named) > CLASSES:
            least, most = named[-1][0], named[CLASSES][0]
            size = f"of {least:,} to {most:,}" if least < most else f"of {most:,} each"
            parts.append(f"and {len(named) - CLASSES} more {size}")
        if without := int((among < 0).sum()):
            parts.append(f"{without:,} without a label")
        if len(among):
            yield f"  {split + ': ' if samples.splits is not None else ''}{', '.join(parts)}"
        if samples.splits is None:
            break
    if not images.class_names:
        yield "Warning: no image has a label; to train on them, give each class a folder, or a table as data.root."
    elif len(images.class_names) == 1:
        yield "Warning: there is one class only, and a classifier needs two."


def _summary(caches: Sequence[FeatureCache], plain: Filled, views: list[tuple[FeatureCache, Filled]]) -> ExtractSummary:
    """The ledger is that of the plain view; rate, seconds and what bounds them are those of all views together."""
    cache = caches[0]
    every = [plain, *(filled for _, filled in views)]
    clock, seconds = Clock(), sum(filled.seconds for filled in every)
    for filled in every:
        clock.add(filled.clock)
    forwarded = sum(len(filled.computed) for filled in every)
    ledger = cache.ledger(plain)
    return {
        "key": cache.key,
        "feature_dim": cache.store.feature_dim,
        "images": ledger["images"],
        "embedded": ledger["embedded"],
        "reused": ledger["reused"],
        "duplicates": ledger["duplicates"],
        "quarantined": ledger["quarantined"],
        "failed": ledger["failed"],
        "forwarded": forwarded,
        "images_per_second": round(forwarded / seconds, 2) if seconds else 0.0,
        "seconds": round(seconds, 3),
        "busy_seconds": {name: round(value, 3) for name, value in clock.busy.items()},
        "waited_seconds": {name: round(value, 3) for name, value in clock.waited.items()},
        "bound_by": clock.bound_by(shared_cores=cache.backbone.device.type == "cpu") if forwarded else None,
        "cache": str(cache.store.folder.resolve()),
        "poolings": [{"pooling": each.store.spec.pooling, "key": each.key} for each in caches],
        "views": [
            {"view": view.view.name, "key": view.key, "forwarded": len(filled.computed)} for view, filled in views
        ],
    }


def _bad_images(cache: FeatureCache) -> list[tuple[str, BadContent]]:
    """Path and reason, for each quarantined image."""
    images, quarantine = cache.images, cache.quarantine
    contents = ((row, quarantine.get(images.digest(row))) for row in np.flatnonzero(cache.quarantined).tolist())
    return [(images.paths[row], content) for row, content in contents if content]


def _report(cache: FeatureCache, summary: ExtractSummary, bad: list[tuple[str, BadContent]]) -> Iterator[str]:
    yield (
        "{images} images = {embedded} embedded + {reused} reused + {duplicates} duplicates"
        " + {quarantined} quarantined; {forwarded} forwarded".format(**summary)
    )
    if summary["forwarded"]:
        yield f"{summary['images_per_second']:.1f} images/s. {ADVICE[summary['bound_by'] or 'forward']}"
    yield from _bad_lines(cache, bad, limit=EXAMPLES)
    yield f"Features: {summary['cache']}"


def _bad_lines(cache: FeatureCache, bad: list[tuple[str, BadContent]], *, limit: int | None) -> Iterator[str]:
    by_reason = Counter((content.reason, content.remedy) for _, content in bad)
    for (reason, remedy), count in by_reason.most_common():
        yield f"Unreadable, {reason}: {count} ({remedy})"
        paths = [path for path, content in bad if content.reason == reason]
        yield from (f"  {path!r}" for path in paths[:limit])
        if limit is not None and count > limit:
            yield f"  and {count - limit} more"
    if failures := cache.images.failures:
        yield f"Not read, tried again in the next run: {len(failures)}"
        for position, why in list(failures.items())[:limit]:
            yield f"  {cache.images.paths[position]!r}: {why}"


def _bad_images_error(cache: FeatureCache, bad: list[tuple[str, BadContent]]) -> BadImagesError:
    lines = list(_bad_lines(cache, bad, limit=None))
    return BadImagesError(
        f"{len(bad) + len(cache.images.failures)} images cannot be used.",
        where=cache.images.root,
        why="\n    " + "\n    ".join(lines),
        remedy="mend or remove them, or set data.on_bad_image=skip; the features of the others are in the cache",
    )
