"""What lies in a cache folder, and what of it can go.

Keys with their parts and specs, and what interrupted processes left behind; keys unused for long and named by no run,
leftovers, damaged files, old indexes and notes can go.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import h5py

from ..data.index import INDEX_FOLDER
from ..errors import CacheError
from ..files import TEMPORARY_PREFIX, digest_file, file_lock, human_bytes, temporary_name
from .parts import DAMAGED_PREFIX, HDF5_ERRORS, DamagedPart, Part, Proofs, check_part, part_names, part_of, set_aside
from .quarantine import FOLDER as QUARANTINE_FOLDER
from .rows import PREFIX as ROWS_PREFIX
from .rows import SUFFIX as ROWS_SUFFIX
from .spec import FeatureSpec
from .store import LOCK_FILE, SPEC_FILE, USED_FILE, read_spec

KEY_FOLDER = re.compile(r"(?P<backbone>.+)-(?P<key>[0-9a-f]{16})", re.DOTALL)
TEMPORARY = re.compile(rf"{re.escape(TEMPORARY_PREFIX)}(?P<pid>\d+)-")
# Publishing takes seconds. What is older than the first limit and has no living process here, or is older than the
# second (the process may run on another machine, or its number may have been given away again), is a leftover.
LEFTOVER_SECONDS = 600.0
ABANDONED_SECONDS = 86_400.0
DAY = 86_400.0
MODEL_FILE = "model.json"


@dataclass(frozen=True)
class KeyEntry:
    """One folder of features as it was found.

    Args:
        spec: None where neither ``spec.json`` nor a part tells it.
        rows: stored features; a content that two processes embedded at once counts twice.
        size: bytes of all files in the folder.
        used: when features were last written or read, seconds since the epoch.
        damaged: names of files that were set aside as damaged, or would have to be.
        problems: what is wrong with the folder, in words.
    """

    folder: Path
    spec: FeatureSpec | None
    parts: int
    rows: int
    feature_dim: int | None
    size: int
    used: float
    damaged: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def name(self) -> str:
        """``<backbone>-<key>``."""
        return self.folder.name

    @property
    def key(self) -> str:
        """The key as the folder's name gives it."""
        return self.name.rpartition("-")[2]


def list_keys(cache_dir: Path) -> list[KeyEntry]:
    """All keys of a cache folder, the last used first; nothing is written or renamed.

    Raises:
        CacheError: the folder cannot be read.
    """
    entries = [look_at(folder) for folder in key_folders(cache_dir)]
    return sorted(entries, key=lambda entry: (-entry.used, entry.name))


def key_folders(cache_dir: Path) -> list[Path]:
    """The folders named ``<backbone>-<key>``, sorted; none where there is no cache yet."""
    return [path for path in _children(cache_dir) if KEY_FOLDER.fullmatch(path.name) and path.is_dir()]


def look_at(folder: Path) -> KeyEntry:
    """One key; parts that were read and found whole before are not read again, and nothing is renamed."""
    parts, unreadable, problems = _open_parts(folder)
    spec = read_spec(folder / SPEC_FILE)
    if spec is None:
        problems.append(f"{SPEC_FILE} is missing or damaged")
        spec = _spec_of(folder, parts)
    files = _children(folder)
    damaged = [path.name for path in files if path.name.startswith(DAMAGED_PREFIX)]
    return KeyEntry(
        folder=folder,
        spec=spec,
        parts=len(parts),
        rows=sum(len(part.digests) for part in parts),
        feature_dim=parts[0].width if parts else None,
        size=sum(size_of(path) for path in files),
        used=last_used(folder),
        damaged=(*damaged, *unreadable),
        problems=(*problems, *(f"{name} was set aside" for name in damaged)),
    )


def _open_parts(folder: Path) -> tuple[list[Part], list[str], list[str]]:
    """Whole parts, the names of the others, and what is wrong with these."""
    parts: list[Part] = []
    unreadable, problems = [], []
    proofs, key = Proofs(folder), folder.name.rpartition("-")[2]
    for name in sorted(part_names(folder)):
        try:
            parts.append(proofs.open(folder / name, key, parts[0].width if parts else None))
        except FileNotFoundError:  # collected meanwhile
            continue
        except (OSError, DamagedPart) as error:
            unreadable.append(name)
            problems.append(f"{name}: {error}")
    proofs.save({part.path.name for part in parts})
    return parts, unreadable, problems


def last_used(folder: Path) -> float:
    """When a key's features were last written or read, seconds since the epoch; 0 where nothing tells."""
    times = [modified(folder / USED_FILE)]
    if not times[0]:
        times = [modified(path) for path in (folder, *_children(folder))]
    return max(times)


@dataclass(frozen=True)
class KeyProof:
    """What reading every byte of a key gave: whole parts, bytes read, and what is wrong, in words."""

    parts: int
    rows: int
    size: int
    problems: tuple[str, ...]


def verify_key(folder: Path) -> KeyProof:
    """Read every byte of a key: parts against the digests in their names, the spec against the folder's name.

    Damaged parts are set aside; their rows are computed again by the next extract. So are copies in row order.
    """
    problems = [] if read_spec(folder / SPEC_FILE) else [f"{folder / SPEC_FILE} is missing or damaged."]
    whole: list[Part] = []
    size, key = 0, folder.name.rpartition("-")[2]
    for name in sorted(part_names(folder)):
        try:
            data = (folder / name).read_bytes()
        except FileNotFoundError:  # collected meanwhile
            continue
        except OSError as error:
            problems.append(f"{folder / name} cannot be read: {error.strerror}.")
            continue
        size += len(data)
        problem = check_part(name, data, key, whole[0].width if whole else None)
        if problem:
            problems.append(set_aside(folder / name, problem))
        else:
            whole.append(part_of(folder / name, data))
    for file in _flat_rows(folder):
        size += size_of(file)
        if digest_file(file).hex() not in file.name:
            problems.append(set_aside(file, "its bytes do not match the digest in its name"))
    return KeyProof(len(whole), sum(len(part.digests) for part in whole), size, tuple(problems))


def leftovers(cache_dir: Path, *, now: float | None = None) -> list[Path]:
    """Temporary files and folders, anywhere in the cache, whose process has ended without renaming them."""
    now = time.time() if now is None else now
    return [path for path in temporaries(cache_dir) if _is_abandoned(path, now)]


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; 0 where it has gone."""
    if path.is_dir() and not path.is_symlink():
        return sum(size_of(child) for child in _children(path))
    with suppress(OSError):
        return path.lstat().st_size
    return 0


def temporaries(folder: Path) -> Iterator[Path]:
    """Temporary files and folders below ``folder``, of living processes too."""
    for path in _children(folder):
        if TEMPORARY.match(path.name):
            yield path
        elif path.is_dir() and not path.is_symlink():
            yield from temporaries(path)


def _is_abandoned(path: Path, now: float) -> bool:
    age = now - modified(path)
    match = TEMPORARY.match(path.name)
    assert match
    return age > ABANDONED_SECONDS or (age > LEFTOVER_SECONDS and not _is_alive(int(match["pid"])))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CacheError(
            "A folder of the feature cache cannot be read.",
            where=folder,
            why=str(error),
            remedy="give permission to read it, or set cache.dir to another folder",
        ) from error


def modified(path: Path) -> float:
    """When a file was last written, seconds since the epoch; 0 where it has gone."""
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0


def _spec_of(folder: Path, parts: list[Part]) -> FeatureSpec | None:
    """The spec that the parts carry, for a folder whose own is lost."""
    for part in parts:
        with suppress(CacheError, RecursionError, *HDF5_ERRORS):
            with h5py.File(part.path, "r") as file:
                spec = FeatureSpec.from_dict(json.loads(file.attrs["spec"]))
            if spec.folder_name == folder.name:
                return spec
    return None


# -- what of it can go -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Garbage:
    """A file or folder that can go: its kind (key, index, quarantine, rows, damaged, leftover), its bytes, and why."""

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
        *_old_rows(cache_dir, days, now),
    ]
    gone = {item.path for item in garbage}
    small = [*_damaged(cache_dir), *_leftovers(cache_dir, now)]
    return [item for item in [*garbage, *small] if item.path.parent not in gone]


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


def _flat_rows(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{ROWS_PREFIX}*{ROWS_SUFFIX}"))


def _old_rows(cache_dir: Path, days: float, now: float) -> Iterator[Garbage]:
    """Copies of features in the order of a data set: made again from the parts when they are needed."""
    for file in (file for folder in key_folders(cache_dir) for file in _flat_rows(folder)):
        idle = (now - modified(file)) / DAY
        if idle >= days:
            yield Garbage(file, "rows", size_of(file), f"features in row order, not used for {idle:.0f} days")


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
