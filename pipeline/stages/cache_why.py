"""Why are there no features for these params? Name the field that made the miss, or the images that are new."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import CacheError
from ..features.digests import Digests, first_occurrences, locate, stack_digests
from ..features.inventory import KeyEntry, list_keys
from ..features.spec import FeatureSpec, differences
from ..features.store import FeatureStore
from ..files import canonical_json
from ..params import Params
from .load import digest_unknown
from .sources import Source, open_folder, open_quarantine, open_store, resolve_origin

Say = Callable[[str], None]
NEAREST = 3
EXAMPLES = 5


def explain_cache(params: Params, say: Say) -> dict[str, Any]:
    """How many images of ``data.root`` have a feature under the key of these params, and why the others have none.

    Raises:
        DataError, BackboneError, CacheError: see their messages.
    """
    origin = resolve_origin(params)
    store = open_store(params, origin)
    source = open_folder(params.data, params.cache)
    digest_unknown(source)
    has, bad, unread = _divide(source, store, open_quarantine(params, origin.transform).digests)
    new = np.flatnonzero(~has & ~bad & ~unread)
    say(_standing(store.spec, len(has), has=int(has.sum()), bad=int(bad.sum()), unread=int(unread.sum())))
    new_paths = [source.tree.paths[row] for row in new.tolist()]
    nearest = _nearest(params, store.spec, source.books.digests[new]) if len(new) else []
    for line in _lines(new_paths, nearest, is_begun=bool(len(store.digests))):
        say(line)
    return {
        "key": store.spec.key,
        "cache": str(store.folder.absolute()),
        "images": len(has),
        "with_feature": int(has.sum()),
        "quarantined": int(bad.sum()),
        "unread": int(unread.sum()),
        "new": len(new),
        "new_paths": new_paths[:EXAMPLES],
        "nearest": nearest,
    }


def _divide(source: Source, store: FeatureStore, quarantined: list[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which files have a feature, are in quarantine, could not be read: three bool (n,)."""
    books = source.books
    has = books.known & store.contains(books.digests)
    bad = books.known & ~has & (locate(stack_digests(quarantined), books.digests) >= 0)
    return has, bad, ~books.known


def _standing(spec: FeatureSpec, images: int, *, has: int, bad: int, unread: int) -> str:
    more = "".join(
        f", {count} {word}" for count, word in ((bad, "unreadable"), (unread, "not to be read now")) if count
    )
    return f"{spec.folder_name}: {has} of {images} images have a feature{more}"


def _nearest(params: Params, spec: FeatureSpec, digests: Digests) -> list[dict[str, Any]]:
    """The other keys whose specs differ in the fewest fields, those with more of these contents first among equals."""
    found = []
    for entry in list_keys(params.cache.dir):
        if entry.spec is None or entry.key == spec.key:
            continue
        fields = differences(entry.spec, spec)
        found.append((len(fields), -_held(entry, params, digests), entry, fields))
    found.sort(key=lambda item: item[:2])
    return [
        {
            "folder": entry.name,
            "holds": -minus_held,
            "rows": entry.rows,
            "differences": [{"field": name, "cached": old, "wanted": new} for name, old, new in fields],
        }
        for _, minus_held, entry, fields in found[:NEAREST]
    ]


def _held(entry: KeyEntry, params: Params, digests: Digests) -> int:
    """How many different contents of ``digests`` (n, 16) another key holds."""
    if entry.spec is None or entry.feature_dim is None:
        return 0
    try:
        store = FeatureStore(params.cache.dir, entry.spec, entry.feature_dim)
    except CacheError:
        return 0
    return int((store.contains(digests) & first_occurrences(digests)).sum())


def _lines(new_paths: list[str], nearest: list[dict[str, Any]], *, is_begun: bool) -> list[str]:
    if not new_paths:
        return []
    lines = []
    if is_begun:
        examples = ", ".join(map(repr, new_paths[:EXAMPLES]))
        lines.append(f"New under this key: {len(new_paths)}: {examples}{' ...' if len(new_paths) > EXAMPLES else ''}")
    for near in nearest:
        fields = ", ".join(
            f"{each['field']} {_short(each['cached'])} -> {_short(each['wanted'])}" for each in near["differences"]
        )
        lines.append(f"{near['folder']} holds {near['holds']} of them, under another key: {fields}")
    if not nearest:
        lines.append("No other key is in this cache.")
    lines.append("`pipeline extract` with the same params computes them.")
    return lines


def _short(value: object) -> str:
    text = value if isinstance(value, str) else canonical_json(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
