"""Look after the feature cache: what it holds, whether it is sound, why features are missing, what of it can go, its
features as one file, rows that come from elsewhere. Needs no torch to list."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from ..data.digests import Digests, first_occurrences
from ..errors import CacheError, DataError, PipelineError, VerifyError
from ..features.inventory import (
    Garbage,
    KeyEntry,
    find_garbage,
    flat_rows,
    key_folders,
    keys_named_by_runs,
    list_keys,
    remove_garbage,
    size_of,
    temporaries,
    verify_key,
)
from ..features.sealed import read_sealed
from ..features.spec import FeatureSpec, differences
from ..features.store import FeatureStore
from ..files import canonical_json, human_bytes
from ..params import Params

Say = Callable[[str], None]
Confirm = Callable[[str], bool]
BYTES_ONLY = "made with other params, so only their bytes could be verified"
NEAREST = 3
EXAMPLES = 5
# What a listing shows of a spec; the folder's spec.json has it all.
LISTED = ("backbone", "weights_digest", "layer", "pooling", "precision", "dtype", "view", "decoder", "transform")


def list_cache(params: Params) -> dict[str, Any]:
    """All keys of ``cache.dir``, the last used first, and temporary files.

    Raises:
        CacheError: the folder cannot be read.
    """
    root = params.cache.dir
    keys = [_key_summary(entry) for entry in list_keys(root)]
    files = [{"path": str(path), "bytes": size_of(path)} for path in temporaries(root)]
    return {
        "cache": str(root.absolute()),
        "keys": keys,
        "temporary": files,
        "bytes": sum(each["bytes"] for each in [*keys, *files]),
    }


def _key_summary(entry: KeyEntry) -> dict[str, Any]:
    spec = entry.spec.as_dict() if entry.spec else {}
    return {
        "folder": str(entry.folder.absolute()),
        "key": entry.key,
        **{name: spec.get(name) for name in LISTED},
        "backbone": spec.get("backbone", entry.name.rpartition("-")[0]),
        "feature_dim": entry.feature_dim,
        "rows": entry.rows,
        "parts": entry.parts,
        "bytes": entry.size,
        "row_order": [{"path": str(file.absolute()), "bytes": size_of(file)} for file in flat_rows(entry.folder)],
        "used": datetime.fromtimestamp(entry.used).astimezone().isoformat(timespec="seconds"),
        "damaged": list(entry.damaged),
        "problems": list(entry.problems),
    }


def collect_garbage(params: Params, say: Say, confirm: Confirm, *, days: float) -> dict[str, Any]:
    """Propose what can go from ``cache.dir``, and remove it when told so.

    Args:
        confirm: is asked once, with the question; its answer decides.
        days: keys used since so many days stay.

    Raises:
        CacheError: somebody is writing, or the folder cannot be read or changed.
    """
    root = params.cache.dir
    named, warnings = keys_named_by_runs(params.runs.dir)
    proposed = find_garbage(root, days=days, named_keys=named)
    for line in [*warnings, *map(str, proposed)]:
        say(line)
    size = sum(item.size for item in proposed)
    removed: list[Garbage] = []
    if not proposed:
        say(f"Nothing to remove from {root.absolute()}.")
    elif confirm(
        f"Remove these {len(proposed)}, {human_bytes(size)}? Runs outside {params.runs.dir} are not looked at."
    ):
        removed = remove_garbage(root, proposed, days=days, named_keys=named)
        say(f"{len(removed)} removed, {human_bytes(sum(item.size for item in removed))} freed.")
    return {
        "cache": str(root.absolute()),
        "proposed": [_garbage_summary(item) for item in proposed],
        "proposed_bytes": size,
        "removed": [str(item.path) for item in removed],
        "freed_bytes": sum(item.size for item in removed),
        "warnings": warnings,
    }


def _garbage_summary(item: Garbage) -> dict[str, Any]:
    return {"path": str(item.path), "kind": item.kind, "bytes": item.size, "why": item.why}


def verify_cache(params: Params, say: Say, *, sample: int = 8, seed: int = 0) -> dict[str, Any]:
    """Verify all keys of ``cache.dir`` by their bytes, and the key of these params by computing features again too.

    Damaged parts are set aside and named; nothing is removed.

    Args:
        sample: how many features are computed again from the images of ``data.root``.
        seed: of the choice of these images.

    Raises:
        VerifyError: something is wrong; it carries the report.
    """
    keys: dict[str, dict[str, Any]] = {}
    for folder in key_folders(params.cache.dir):
        proof = verify_key(folder)
        keys[folder.name] = {
            "folder": str(folder.absolute()),
            "parts": proof.parts,
            "rows": proof.rows,
            "bytes": proof.size,
            "problems": list(proof.problems),
            "recomputed": None,
            "note": BYTES_ONLY,
        }
        found = f", problems: {len(proof.problems)}" if proof.problems else ""
        say(f"{folder.name}: {human_bytes(proof.size)} read, {proof.rows} rows in {proof.parts} whole part(s){found}")
    if sample and keys:
        _recompute(params, keys, say, sample=sample, seed=seed)
    problems = [problem for key in keys.values() for problem in key["problems"]]
    report = {"cache": str(params.cache.dir.absolute()), "keys": list(keys.values()), "problems": problems}
    if problems:
        raise _verify_error(report)
    say(f"{len(keys)} key(s) verified, nothing is wrong.")
    return report


def _recompute(params: Params, keys: dict[str, dict[str, Any]], say: Say, *, sample: int, seed: int) -> None:
    """Add to the keys of these params what computing a few of their features again gave."""
    from .open import open_cache

    checked = 0
    try:
        plain = open_cache(params)
        for cache in (plain, *plain.views()):
            entry = keys.get(cache.store.spec.folder_name)
            if entry is None:
                continue
            found = cache.verify(sample=sample, seed=seed)
            entry["recomputed"], entry["note"] = found.summary(), found.note
            entry["problems"] += found.problems
            say(f"{cache.store.spec.folder_name}: {found.note}")
            checked += 1
    except PipelineError as error:
        say(f"Not every feature that was chosen could be computed again. {error}")
    if checked < len(keys):
        say(f"{len(keys) - checked} of {len(keys)} key(s): {BYTES_ONLY}.")


def _verify_error(report: dict[str, Any]) -> VerifyError:
    problems = report["problems"]
    return VerifyError(
        f"The feature cache has {len(problems)} {'problem' if len(problems) == 1 else 'problems'}.",
        where=report["cache"],
        why="\n    " + "\n    ".join(problems),
        remedy="run extract again: it computes what was set aside; where features come out differently, software or"
        " hardware is at fault: move that folder away",
        report=report,
    )


def explain_cache(params: Params, say: Say) -> dict[str, Any]:
    """How many images of ``data.root`` have a feature under the key of these params, and why the others have none.

    Raises:
        DataError, BackboneError, CacheError: see their messages.
    """
    from .open import open_cache

    cache = open_cache(params)
    images, spec = cache.images, cache.store.spec
    images.read_unknown()
    present, unread = cache.present, ~images.known
    bad = cache.quarantined & ~present
    new = np.flatnonzero(~present & ~bad & ~unread)
    say(_standing(spec, len(images), present=int(present.sum()), bad=int(bad.sum()), unread=int(unread.sum())))
    new_paths = [images.paths[row] for row in new.tolist()]
    nearest = _nearest(params.cache.dir, spec, images.digests[new]) if len(new) else []
    for line in _lines(new_paths, nearest, is_begun=bool(len(cache.store.digests))):
        say(line)
    return {
        "key": cache.key,
        "cache": str(cache.store.folder.absolute()),
        "images": len(images),
        "with_feature": int(present.sum()),
        "quarantined": int(bad.sum()),
        "unread": int(unread.sum()),
        "new": len(new),
        "new_paths": new_paths[:EXAMPLES],
        "nearest": nearest,
    }


def _standing(spec: FeatureSpec, images: int, *, present: int, bad: int, unread: int) -> str:
    more = "".join(
        f", {count} {word}" for count, word in ((bad, "unreadable"), (unread, "not to be read now")) if count
    )
    return f"{spec.folder_name}: {present} of {images} images have a feature{more}"


def _nearest(cache_dir: Path, spec: FeatureSpec, digests: Digests) -> list[dict[str, Any]]:
    """The other keys whose specs differ in the fewest fields, those with more of these contents first among equals."""
    found = []
    for entry in list_keys(cache_dir):
        if entry.spec is None or entry.key == spec.key:
            continue
        fields = differences(entry.spec, spec)
        found.append((len(fields), -_held(entry, cache_dir, digests), entry, fields))
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


def _held(entry: KeyEntry, cache_dir: Path, digests: Digests) -> int:
    """How many different contents of ``digests`` (n, 16) another key holds."""
    if entry.spec is None or entry.feature_dim is None:
        return 0
    try:
        store = FeatureStore(cache_dir, entry.spec, entry.feature_dim)
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
    fewest = min((len(near["differences"]) for near in nearest), default=0)
    for near in nearest:
        if len(near["differences"]) > fewest:
            continue  # what made the miss is told by the nearest
        fields = ", ".join(
            f"{each['field']} {_short(each['cached'])} -> {_short(each['wanted'])}"
            for each in _causes(near["differences"])
        )
        lines.append(f"{near['folder']} holds {near['holds']} of them, under another key: {fields}")
    if not nearest:
        lines.append("No other key is in this cache.")
    lines.append("`pipeline extract` with the same params computes them.")
    return lines


# What follows another backbone or layer by itself: its tensors, and what `auto` and presets say of it.
FOLLOWING = {
    "backbone": ("weights_digest", "precision", "code", "transform."),
    "layer": ("weights_digest", "precision"),
    "weights_digest": ("precision",),
}


def _causes(fields: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the differing fields that are not the mere consequence of another one."""
    names = {each["field"] for each in fields}
    following = tuple(part for cause, parts in FOLLOWING.items() if cause in names for part in parts)
    return [each for each in fields if not each["field"].startswith(following)] if following else fields


def _short(value: object) -> str:
    text = value if isinstance(value, str) else canonical_json(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def export_features(params: Params, file: Path, say: Say) -> dict[str, Any]:
    """Write the features of ``data.root`` with labels, paths, class names and splits to one flat HDF5 file.

    Raises:
        MissingFeaturesError: images without a feature; ``extract`` computes them.
        CacheError: the file cannot be written, or is something else than an earlier export.
    """
    from ..features.export import export_table
    from .open import load_features

    table = load_features(params)
    size = export_table(table, file)
    say(f"{len(table)} features of {table.features.shape[1]} values, {human_bytes(size)}: {file.absolute()}")
    return {
        "file": str(file.absolute()),
        "images": len(table),
        "feature_dim": int(table.features.shape[1]),
        "classes": len(table.class_names),
        "bytes": size,
    }


def import_features(params: Params, files: Sequence[Path], say: Say) -> dict[str, Any]:
    """Take rows that an `Embedder` gave elsewhere into ``cache.dir``; ``rows = imported + present + unreadable``.

    All are held against their checksums before the first is written, so that of damaged files nothing is taken.

    Args:
        files: Parquet, or folders of it.

    Raises:
        CacheError: a row is damaged, belongs to a key that neither lies here nor follows from these params, or cannot
            be written.
        DataError: a file is no Parquet, there is none, or pyarrow is not installed.
    """
    found = [each for file in files for each in (sorted(file.rglob("*.parquet")) if file.is_dir() else [file])]
    if not found:
        raise DataError("There is no Parquet file.", where=", ".join(map(str, files)), remedy="check the path")
    widths: dict[tuple[str, int], None] = {}
    counts = dict.fromkeys(("rows", "imported", "present", "unreadable"), 0)
    for file in found:
        for rows in read_sealed(file):
            counts["unreadable"] += rows.unreadable
            counts["rows"] += rows.unreadable + len(rows.keys)
            widths |= dict.fromkeys((key, rows.features.shape[1]) for key in set(rows.keys.tolist()))
    stores = {key: _store_of(params, key, width) for key, width in widths}
    with ExitStack() as writing:
        for store in stores.values():
            writing.enter_context(store.writing())
        for file in found:
            for rows in read_sealed(file):
                for key, store in stores.items():
                    new = (rows.keys == key) & ~store.contains(rows.digests) & first_occurrences(rows.digests)
                    if new.any():
                        store.publish(rows.features[new], rows.digests[new])
                        counts["imported"] += int(new.sum())
    counts["present"] = counts["rows"] - counts["imported"] - counts["unreadable"]
    say("{rows} rows = {imported} imported + {present} there already + {unreadable} unreadable".format(**counts))
    return {"cache": str(params.cache.dir.absolute()), "files": len(found), "keys": sorted(stores), **counts}


def _store_of(params: Params, key: str, width: int) -> FeatureStore:
    """The features of a key that lies in ``cache.dir``, or is that of these params."""
    for entry in list_keys(params.cache.dir):
        if entry.key == key and entry.spec and entry.feature_dim == width:
            return FeatureStore(params.cache.dir, entry.spec, width)
    from ..data.images import open_batch
    from .open import open_cache

    store = open_cache(params, open_batch([], [], params.data, params.cache.dir), begins=True).store
    if (store.spec.key, store.feature_dim) == (key, width):
        return store
    raise CacheError(
        f"Features of the key {key} ({width} values) are not imported; nothing of these files is.",
        where=params.cache.dir.absolute(),
        why=f"what determines them is not known here; these params give {store.spec.folder_name}"
        f" ({store.feature_dim} values)",
        remedy="give the params that the job had, extract.precision too",
    )
