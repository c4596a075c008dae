"""What lies in a cache folder: its keys with their parts and specs, and what interrupted processes left behind."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import h5py

from ..errors import CacheError
from ..files import TEMPORARY_PREFIX
from .parts import DAMAGED_PREFIX, HDF5_ERRORS, DamagedPart, Part, Proofs, check_part, part_names, part_of, set_aside
from .spec import FeatureSpec
from .store import SPEC_FILE, USED_FILE, read_spec

KEY_FOLDER = re.compile(r"(?P<backbone>.+)-(?P<key>[0-9a-f]{16})", re.DOTALL)
TEMPORARY = re.compile(rf"{re.escape(TEMPORARY_PREFIX)}(?P<pid>\d+)-")
# Publishing takes seconds. What is older than the first limit and has no living process here, or is older than the
# second (the process may run on another machine, or its number may have been given away again), is a leftover.
LEFTOVER_SECONDS = 600.0
ABANDONED_SECONDS = 86_400.0


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

    Damaged parts are set aside; their rows are computed again by the next extract.
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
