"""What of a cache can go: features unused for long and named by no run, leftovers, damaged files, old indexes."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..data.index import INDEX_FOLDER
from ..errors import CacheError
from ..files import file_lock, human_bytes, temporary_name
from .inventory import key_folders, last_used, leftovers, modified, size_of
from .parts import DAMAGED_PREFIX
from .quarantine import FOLDER as QUARANTINE_FOLDER
from .store import LOCK_FILE

DAY = 86_400.0
MODEL_FILE = "model.json"


@dataclass(frozen=True)
class Garbage:
    """A file or folder that can go: its kind (key, index, quarantine, damaged, leftover), its bytes, and why."""

    path: Path
    kind: str
    size: int
    why: str

    def __str__(self) -> str:
        return f"{self.path}  {human_bytes(self.size)}  {self.why}"


def find_garbage(
    cache_dir: Path, *, days: float, named_keys: Collection[str], now: float | None = None
) -> list[Garbage]:
    """What can go. Nothing is changed.

    Args:
        days: keys, indexes and notes used since so many days stay.
        named_keys: keys that runs were made from; they stay.

    Raises:
        CacheError: the cache folder cannot be read.
    """
    now = time.time() if now is None else now
    garbage = [
        *_unused_keys(cache_dir, days, named_keys, now),
        *_old_indexes(cache_dir, days, now),
        *_old_notes(cache_dir, days, now),
    ]
    gone = {item.path for item in garbage}
    small = [*_damaged(cache_dir), *_leftovers(cache_dir, now)]
    return [*garbage, *(item for item in small if item.path.parent not in gone)]


def remove_garbage(
    cache_dir: Path, proposed: list[Garbage], *, days: float, named_keys: Collection[str]
) -> list[Garbage]:
    """Remove what was proposed and still can go, alone in the cache; what was removed.

    Raises:
        CacheError: somebody is writing, or the cache folder cannot be changed.
    """
    try:
        with file_lock(cache_dir / LOCK_FILE, shared=False, blocking=False) as held:
            if not held:
                raise CacheError(
                    "The cache cannot be cleaned up by this command.",
                    where=cache_dir,
                    why="its file system has no locks, so that nobody can tell whether someone is writing",
                    remedy="make sure that nothing runs on it, and remove the proposed files yourself",
                )
            wanted = {item.path for item in proposed}
            still = find_garbage(cache_dir, days=days, named_keys=named_keys)
            removed = [item for item in still if item.path in wanted]
            for item in removed:
                _remove(item.path)
            return removed
    except BlockingIOError as error:
        raise CacheError(
            "The cache is in use: someone is writing.",
            where=cache_dir,
            why="a running extract or predict holds the lock that writers share",
            remedy="wait until it has ended and try again; nothing was removed",
        ) from error
    except OSError as error:
        raise CacheError(
            "The cache cannot be cleaned up.",
            where=error.filename or cache_dir,
            why=str(error),
            remedy="give write permission, or let its owner run this",
        ) from error


def keys_named_by_runs(runs_dir: Path) -> tuple[set[str], list[str]]:
    """The feature keys that finished runs were made from, and warnings about runs that do not tell."""
    keys, warnings = set(), []
    for file in sorted(runs_dir.glob(f"*/{MODEL_FILE}")):
        try:
            model = json.loads(file.read_bytes())
            named = [model.get("feature_key"), *model.get("feature_keys", [])] if isinstance(model, dict) else []
        except (OSError, ValueError, TypeError, RecursionError) as error:
            warnings.append(f"{file} cannot be read ({error}); the features it was made from may be proposed.")
            continue
        keys |= {key for key in named if isinstance(key, str)}
    return keys, warnings


def _unused_keys(cache_dir: Path, days: float, named: Collection[str], now: float) -> Iterator[Garbage]:
    for folder in key_folders(cache_dir):
        idle = (now - last_used(folder)) / DAY
        if idle >= days and not {folder.name, folder.name.rpartition("-")[2]} & set(named):
            why = f"not used for {idle:.0f} days, named by no run"
            yield Garbage(folder, "key", size_of(folder), why)


def _old_indexes(cache_dir: Path, days: float, now: float) -> Iterator[Garbage]:
    for file in sorted((cache_dir / INDEX_FOLDER).glob("*.idx")):
        idle = (now - max(modified(file), _accessed(file))) / DAY
        if idle >= days:
            yield Garbage(file, "index", size_of(file), f"index of a folder not scanned for {idle:.0f} days")


def _old_notes(cache_dir: Path, days: float, now: float) -> Iterator[Garbage]:
    """Notes of unreadable images: without them an image is tried once more."""
    for folder in sorted((cache_dir / QUARANTINE_FOLDER).glob("*/")):
        idle = (now - max(modified(path) for path in (folder, *folder.iterdir()))) / DAY
        if idle >= days:
            yield Garbage(folder, "quarantine", size_of(folder), f"notes of unreadable images, {idle:.0f} days old")


def _damaged(cache_dir: Path) -> Iterator[Garbage]:
    for folder in key_folders(cache_dir):
        for path in sorted(folder.glob(f"{DAMAGED_PREFIX}*")):
            yield Garbage(path, "damaged", size_of(path), "was set aside as damaged")


def _leftovers(cache_dir: Path, now: float) -> Iterator[Garbage]:
    for path in leftovers(cache_dir, now=now):
        yield Garbage(path, "leftover", size_of(path), "left behind by a process that ended early")


def _accessed(path: Path) -> float:
    """When a file was last read, where the file system keeps that; an index that only is read is still of use."""
    with suppress(OSError):
        return path.stat().st_atime
    return 0.0


def _remove(path: Path) -> None:
    """Remove a file, or a folder in one step as far as readers can see."""
    if path.is_dir() and not path.is_symlink():
        doomed = temporary_name(path)
        os.rename(path, doomed)
        shutil.rmtree(doomed)
    else:
        path.unlink(missing_ok=True)
