"""Look after the feature cache: what it holds, what of it can go, its features as one file. Needs no torch to list."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from ..features.garbage import Garbage, find_garbage, keys_named_by_runs, remove_garbage
from ..features.inventory import KeyEntry, list_keys, size_of, temporaries
from ..files import human_bytes
from ..params import Params

Say = Callable[[str], None]
Confirm = Callable[[str], bool]
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
        "backbone": entry.name.rpartition("-")[0],
        "feature_dim": entry.feature_dim,
        "rows": entry.rows,
        "parts": entry.parts,
        "bytes": entry.size,
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


def export_features(params: Params, file: Path, say: Say) -> dict[str, Any]:
    """Write the features of ``data.root`` with labels, paths, class names and splits to one flat HDF5 file.

    Raises:
        MissingFeaturesError: images without a feature; ``extract`` computes them.
        CacheError: the file cannot be written, or is something else than an earlier export.
    """
    from ..data.scan import SPLITS
    from ..features.export import export_table
    from .load import load_features

    table = load_features(params)
    size = export_table(table, file, SPLITS)
    say(f"{len(table)} features of {table.features.shape[1]} values, {human_bytes(size)}: {file.absolute()}")
    return {
        "file": str(file.absolute()),
        "images": len(table),
        "feature_dim": int(table.features.shape[1]),
        "classes": len(table.class_names),
        "bytes": size,
    }
