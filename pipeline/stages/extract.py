"""Stage one: every image under ``data.root`` gets its feature into the cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BadImagesError
from ..features.ledger import Outcome, count_images
from ..features.quarantine import BadContent
from ..features.views import view_name
from ..files import human_bytes
from ..params import Params
from ..runtime.distributed import World, world_from_environment
from .embedding import Embedding
from .gather import gather_outcomes
from .load import TRAIN, split_rows
from .sources import (
    Origin,
    augmented_view,
    build_forward,
    open_folder,
    open_quarantine,
    open_store,
    plain_view,
    resolve_origin,
    worker_count,
)

Say = Callable[[str], None]
EXAMPLES = 5
ADVICE = {
    "read": "Reading files takes longest: a faster or local disk would help.",
    "decode": "Decoding takes longest: more cores (extract.workers), or smaller image files, would help.",
    "forward": "The backbone takes longest: a GPU, a smaller backbone or a reduced precision would help.",
    "write": "Writing parts takes longest: a faster disk for cache.dir would help.",
}


def extract(params: Params, say: Say = print, *, quiet: bool = False) -> dict[str, Any]:
    """Embed every image of ``data.root`` that the cache does not hold yet.

    Args:
        say: takes the lines meant for the user.
        quiet: no progress bar.

    Returns:
        the summary of ``--json``: key, feature_dim, the ledger, the rate, what bounds it, the cache folder.

    Raises:
        DataError, BackboneError, CacheError: see their messages.
        BadImagesError: ``data.on_bad_image`` is ``raise`` and images are unreadable; good features are kept.
        Interrupted: Ctrl-C; everything finished is kept.
    """
    world = _world(params)
    embedding, origin = _open(params, world, quiet=quiet)
    todo = embedding.find_todo(world)
    for line in _plan(embedding, todo, origin):
        say(line)
    outcome = gather_outcomes(embedding.run(todo), world)
    embedding.store.refresh()
    embedding.store.touch()
    summary = _summary(outcome, embedding, origin)
    summary["views"] = _extract_views(params, embedding, origin, outcome, world)
    summary["forwarded"] += sum(view["forwarded"] for view in summary["views"])
    bad = _bad_images(outcome, embedding)
    for line in [*embedding.store.warnings, *_report(summary, bad, outcome, embedding)]:
        say(line)
    if params.data.on_bad_image == "raise" and (bad or outcome.failures):
        raise _bad_images_error(bad, outcome, embedding)
    return summary


def _world(params: Params) -> World:
    if params.extract.shard is None:
        return world_from_environment()
    index, count = map(int, params.extract.shard.split("/"))
    return World(rank=index, size=count)


def _open(params: Params, world: World, *, quiet: bool) -> tuple[Embedding, Origin]:
    source = open_folder(params.data, params.cache)
    origin = resolve_origin(params)
    embedding = Embedding(
        source=source,
        store=open_store(params, origin),
        quarantine=open_quarantine(params, origin.transform),
        transformation=plain_view(origin.transform, params.data, params.extract),
        make_forward=lambda: build_forward(params, origin),
        workers=worker_count(params.extract, world),
        part_seconds=params.extract.part_seconds,
        quiet=quiet or not world.is_main,
    )
    return embedding, origin


def _extract_views(
    params: Params, plain: Embedding, origin: Origin, outcome: Outcome, world: World
) -> list[dict[str, Any]]:
    """Embed the augmented views of the training images, each under a key of its own."""
    plain.source.books.learn(outcome.digests, outcome.known)
    rows = np.flatnonzero(outcome.known & plain.store.contains(outcome.digests))
    train = np.zeros(len(outcome.known), bool)
    train[rows[split_rows(plain.source, rows, params.data) == TRAIN]] = True
    done = []
    for number in range(1, params.extract.views + 1):
        view = replace(
            plain,
            store=open_store(params, origin, view_name(number, params.extract.views_seed)),
            transformation=augmented_view(origin.transform, params.data, params.extract, number),
        )
        merged = gather_outcomes(view.run(view.find_todo(world, train)), world)
        view.store.touch()
        done.append({"view": view.store.spec.view, "key": view.store.spec.key, "forwarded": len(merged.computed)})
    return done


def _plan(embedding: Embedding, todo: NDArray[np.int64], origin: Origin) -> Iterator[str]:
    tree, books, store = embedding.source.tree, embedding.source.books, embedding.store
    yield from embedding.source.warnings
    if tree.ignored:
        counts = ", ".join(
            f"{count} {extension or '(no extension)'}" for extension, count in sorted(tree.ignored.items())
        )
        yield f"Ignored files: {counts}."
    if origin.verdict:
        yield f"Precision auto: {origin.verdict}"
    yield f"{len(tree.paths)} images in {len(tree.class_names)} classes under {tree.root}"
    new = int((~books.known[todo]).sum())
    size = len(todo) * (store.feature_dim * (2 if store.spec.dtype == "float16" else 4) + 16)
    yield (
        f"{store.spec.folder_name}: {len(store.digests)} features cached; to do: {len(todo)} images"
        f" ({new} not read before), at most {human_bytes(size)} to write, on {origin.device} in {origin.precision}"
    )


def _summary(outcome: Outcome, embedding: Embedding, origin: Origin) -> dict[str, Any]:
    counts = count_images(outcome, embedding.quarantine.digests)
    clock = outcome.clock
    rate = counts["forwarded"] / outcome.seconds if outcome.seconds else 0.0
    bound_by = clock.bound_by(shared_cores=origin.device.type == "cpu") if counts["forwarded"] else None
    return {
        "key": embedding.store.spec.key,
        "feature_dim": embedding.store.feature_dim,
        **counts,
        "images_per_second": round(rate, 2),
        "seconds": round(outcome.seconds, 3),
        "busy_seconds": {name: round(seconds, 3) for name, seconds in clock.busy.items()},
        "waited_seconds": {name: round(seconds, 3) for name, seconds in clock.waited.items()},
        "bound_by": bound_by,
        "cache": str(embedding.store.folder.resolve()),
    }


def _bad_images(outcome: Outcome, embedding: Embedding) -> list[tuple[str, BadContent]]:
    """Path in this scan and reason, for each quarantined image."""
    bad = []
    for position in np.flatnonzero(outcome.known):
        content = embedding.quarantine.get(outcome.digests[position].tobytes())
        if content:
            bad.append((embedding.source.tree.paths[position], content))
    return bad


def _report(
    summary: dict[str, Any], bad: list[tuple[str, BadContent]], outcome: Outcome, embedding: Embedding
) -> Iterator[str]:
    yield (
        "{images} images = {embedded} embedded + {reused} reused + {duplicates} duplicates"
        " + {quarantined} quarantined; {forwarded} forwarded".format(**summary)
    )
    if summary["forwarded"]:
        yield f"{summary['images_per_second']:.1f} images/s. {ADVICE[summary['bound_by']]}"
    yield from _bad_lines(bad, outcome, embedding, limit=EXAMPLES)
    yield f"Features: {summary['cache']}"


def _bad_lines(
    bad: list[tuple[str, BadContent]], outcome: Outcome, embedding: Embedding, *, limit: int | None
) -> Iterator[str]:
    by_reason = Counter((content.reason, content.remedy) for _, content in bad)
    for (reason, remedy), count in by_reason.most_common():
        yield f"Unreadable, {reason}: {count} ({remedy})"
        paths = [path for path, content in bad if content.reason == reason]
        yield from (f"  {path!r}" for path in paths[:limit])
        if limit is not None and count > limit:
            yield f"  and {count - limit} more"
    if outcome.failures:
        yield f"Not read, tried again in the next run: {len(outcome.failures)}"
        for position, why in list(outcome.failures.items())[:limit]:
            yield f"  {embedding.source.tree.paths[position]!r}: {why}"


def _bad_images_error(bad: list[tuple[str, BadContent]], outcome: Outcome, embedding: Embedding) -> BadImagesError:
    lines = list(_bad_lines(bad, outcome, embedding, limit=None))
    return BadImagesError(
        f"{len(bad) + len(outcome.failures)} images cannot be used.",
        where=embedding.source.tree.root,
        why="\n    " + "\n    ".join(lines),
        remedy="mend or remove them, or set data.on_bad_image=skip; the features of the others are in the cache",
    )
