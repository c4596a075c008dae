"""The feature cache on disk: one folder a spec, immutable HDF5 parts, rows found by content digest.

A part is built in memory, written with plain I/O under a temporary name, synced and renamed to a name that
carries the digest of its bytes. So it is whole or it is not there, any number of processes may publish side by
side, and damage is found before libhdf5 sees it. Knows no torch.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ..errors import CacheError, MissingFeaturesError
from ..files import canonical_json, digest_bytes, file_lock, publish_file
from .digests import Digests, empty_digests, first_occurrences, locate
from .rounding import Features, survives_float16
from .spec import FeatureSpec

SPEC_FILE = "spec.json"
VERIFIED_FILE = "verified.json"
USED_FILE = "used"
LOCK_FILE = ".lock"
PART_PREFIX, PART_SUFFIX = "part-", ".h5"
DAMAGED_PREFIX = "damaged-"
# Times this close to now may hide a later change within the file system's clock tick.
SAFE_NS = 2_000_000_000
# So many rows are published at the latest; more parts cost little, and a kill loses less.
PART_ROWS = 4096

Stat = tuple[int, int, int, int]


@dataclass(frozen=True)
class Part:
    """One immutable file of rows; ``digests`` (n, 16) say whose features they are."""

    path: Path
    digests: Digests

    def read(self, rows: slice | np.ndarray = slice(None)) -> Features:
        """Features (n, d) in float32, in the part's own order."""
        with h5py.File(self.path, "r") as file:
            return np.asarray(file["features"][rows], np.float32)


class FeatureStore:
    """The features of one spec inside the cache folder ``cache_dir``.

    Opening is cheap and makes nothing; `writing` makes the folder. What a damaged file cost is in ``warnings``.
    """

    def __init__(self, cache_dir: Path, spec: FeatureSpec, feature_dim: int) -> None:
        self.cache_dir, self.spec, self.feature_dim = cache_dir, spec, feature_dim
        self.folder = cache_dir / spec.folder_name
        self.warnings: list[str] = []
        self._parts: dict[str, Part] = {}
        self._check_spec()
        self.refresh()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lock that writers share and the garbage collector waits for; make the folder and its spec.

        Raises:
            CacheError: the cache folder cannot be written.
        """
        with ExitStack() as held:
            try:
                held.enter_context(file_lock(self.cache_dir / LOCK_FILE, shared=True))
            except OSError as error:
                raise cannot_write(self.cache_dir, error) from error
            self._write_spec()
            self.refresh()
            yield

    def _write_spec(self) -> None:
        self._check_spec()
        if not (self.folder / SPEC_FILE).exists():
            text = json.dumps(self.spec.as_dict(), indent=2, sort_keys=True) + "\n"
            _publish(self.folder / SPEC_FILE, text.encode())
        self.touch()

    def touch(self) -> None:
        """Remember that these features were used today; a cache that is only readable stays as it is."""
        if self.folder.is_dir():
            with suppress(OSError):
                (self.folder / USED_FILE).touch()

    def _check_spec(self) -> None:
        """The folder's own spec must be ours; a damaged one is set aside, since the folder's name carries the key."""
        file = self.folder / SPEC_FILE
        if os.path.lexists(file) and read_spec(file) is None:
            self.warnings.append(set_aside(file, "this spec is damaged; extract writes it again"))

    def refresh(self) -> None:
        """See what other processes have published or removed since; damaged parts are set aside and named."""
        try:
            names = sorted(part_names(self.folder))
        except OSError as error:
            raise CacheError(
                "A folder of the feature cache cannot be read.",
                where=self.folder,
                why=str(error),
                remedy="give permission to read it, or set cache.dir to another folder",
            ) from error
        verified = _read_verified(self.folder)
        changed = False
        parts: dict[str, Part] = {}
        for name in names:
            part = self._parts.get(name)
            if part is None:
                part, newly = self._open_part(self.folder / name, verified)
                changed |= newly
            if part is not None:
                parts[name] = part
        self._parts = parts
        if changed:
            self._remember(verified)

    def _open_part(self, path: Path, verified: dict[str, Stat]) -> tuple[Part | None, bool]:
        """The part, and whether its bytes had to be read to prove it whole."""
        try:
            stat = _stat(path)
            if verified.get(path.name) == stat:
                with suppress(OSError, KeyError, RuntimeError, ValueError), h5py.File(path, "r") as file:
                    return Part(path, np.asarray(file["digest"], np.uint8)), False
            before = time.time_ns()
            data = path.read_bytes()
            unchanged = _stat(path) == stat
        except FileNotFoundError:  # another process removed it or set it aside
            return None, False
        except OSError as error:
            self.warnings.append(f"{path} is passed over: it cannot be read ({error.strerror}).")
            return None, False
        problem = check_part(path.name, data, self.spec.key, self.feature_dim)
        if problem:
            self.warnings.append(set_aside(path, f"{problem}; its rows are computed again by the next extract"))
            return None, False
        with h5py.File(io.BytesIO(data), "r") as file:
            part = Part(path, np.asarray(file["digest"], np.uint8))
        is_safe = unchanged and max(stat[1], stat[2]) < before - SAFE_NS
        if is_safe:
            verified[path.name] = stat
        return part, is_safe

    def _remember(self, verified: dict[str, Stat]) -> None:
        known = {name: stat for name, stat in verified.items() if name in self._parts}
        with suppress(OSError):
            publish_file(self.folder / VERIFIED_FILE, _seal(known))

    @property
    def parts(self) -> list[Part]:
        """All whole parts, by name."""
        return [self._parts[name] for name in sorted(self._parts)]

    @property
    def digests(self) -> Digests:
        """The digests (n, 16) of all rows, part after part; a content may occur twice after concurrent writers."""
        return np.concatenate([empty_digests(), *(part.digests for part in self.parts)])

    def contains(self, digests: Digests) -> np.ndarray:
        """Which of (n, 16) have a feature, bool (n,)."""
        return locate(self.digests, digests) >= 0

    def read(self, digests: Digests) -> Features:
        """The features (n, d), float32, of the contents ``digests`` (n, 16), row by row.

        Raises:
            MissingFeaturesError: some have none; ``positions`` holds which.
        """
        row = locate(self.digests, digests)
        if (row < 0).any():
            missing = np.flatnonzero(row < 0)
            raise MissingFeaturesError(f"{len(missing)} of {len(digests)} images have no feature.", where=self.folder)
        features = np.empty((len(digests), self.feature_dim), np.float32)
        start = 0
        for part in self.parts:
            mine = (row >= start) & (row < start + len(part.digests))
            if mine.any():
                features[mine] = self._rows(part)[row[mine] - start]
            start += len(part.digests)
        return features

    def _rows(self, part: Part) -> Features:
        try:
            return part.read()
        except (OSError, KeyError, RuntimeError, ValueError) as error:
            raise CacheError(
                "A part of the feature cache can no longer be read.",
                where=part.path,
                why=str(error),
                remedy="run extract again: what is missing is computed again",
            ) from error

    def publish(self, features: Features, digests: Digests) -> list[Path]:
        """Make rows durable: features (n, d) float32 and digests (n, 16), each content once.

        Rows that do not survive the storage dtype go to a float32 part of their own, so that how a row is stored
        depends on the row alone.

        Returns:
            the parts written.

        Raises:
            CacheError: the disk is full or the folder cannot be written; what was published before stays.
        """
        once = first_occurrences(digests)
        features, digests = features[once], digests[once]
        narrow = survives_float16(features) if self.spec.dtype == "float16" else np.zeros(len(features), bool)
        written = []
        for rows, dtype in ((narrow, "float16"), (~narrow, "float32")):
            if rows.any():
                written.append(self._publish_part(features[rows].astype(dtype), digests[rows]))
        return written

    def _publish_part(self, features: np.ndarray, digests: Digests) -> Path:
        data = build_part(features, digests, self.spec)
        path = self.folder / part_name(data)
        _publish(path, data)
        self._parts[path.name] = Part(path, digests)
        return path


def build_part(features: np.ndarray, digests: Digests, spec: FeatureSpec) -> bytes:
    """The bytes of a part: features (n, d), digest (n, 16), and attributes that make it readable alone."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.create_dataset("features", data=features)
        file.create_dataset("digest", data=digests)
        file.attrs["key"] = spec.key
        file.attrs["spec"] = canonical_json(spec.as_dict())
        if features.dtype.name != spec.dtype:
            file.attrs["widened"] = f"these rows do not survive {spec.dtype}"
    return buffer.getvalue()


def part_name(data: bytes) -> str:
    """The name of a part carries the digest of its bytes."""
    return f"{PART_PREFIX}{digest_bytes(data).hex()}{PART_SUFFIX}"


def check_part(name: str, data: bytes, key: str, feature_dim: int) -> str | None:
    """What is wrong with a part's bytes, or None. libhdf5 only ever opens bytes whose digest is right."""
    if part_name(data) != name:
        return "its bytes do not match the digest in its name"
    try:
        with h5py.File(io.BytesIO(data), "r") as file:
            features, digest = file["features"], file["digest"]
            if file.attrs.get("key") != key:
                return f"it belongs to the key {file.attrs.get('key')}"
            shapes_fit = features.shape == (len(digest), feature_dim) and digest.shape == (len(digest), 16)
            if not shapes_fit or digest.dtype != np.uint8 or features.dtype not in (np.float16, np.float32):
                return f"it holds features {features.shape} and digest {digest.shape}"
    except (OSError, KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        return f"it is not a part ({error})"
    return None


def set_aside(path: Path, why: str) -> str:
    """Rename a damaged file so that nobody takes it for whole; what to tell the user."""
    target = path.with_name(DAMAGED_PREFIX + path.name)
    try:
        os.rename(path, target)
    except OSError:
        return f"{path} is ignored: {why}."
    return f"{path} was set aside as {target.name}: {why}."


def read_spec(file: Path) -> FeatureSpec | None:
    """The spec in ``spec.json``, or None where it is damaged or does not give the key in the folder's name."""
    try:
        spec = FeatureSpec.from_dict(json.loads(file.read_bytes()))
        return spec if file.parent.name == spec.folder_name else None
    except (OSError, ValueError, TypeError, CacheError, RecursionError):
        return None


def part_names(folder: Path) -> Iterator[str]:
    """The names of all parts in a key's folder, whole or not; none where there is no folder.

    Raises:
        OSError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(PART_PREFIX) and entry.name.endswith(PART_SUFFIX):
                    yield entry.name
    except FileNotFoundError:
        return


def _stat(path: Path) -> Stat:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _seal(value: Any) -> bytes:
    """JSON behind the digest of itself, so that a flipped bit shows."""
    body = canonical_json(value).encode()
    return digest_bytes(body).hex().encode() + b"\n" + body


def _read_verified(folder: Path) -> dict[str, Stat]:
    """The parts proven whole, by name and stat; nothing where the note is missing or damaged: they are proven again."""
    try:
        seal, _, body = (folder / VERIFIED_FILE).read_bytes().partition(b"\n")
    except OSError:
        return {}
    if seal != digest_bytes(body).hex().encode():
        return {}
    try:
        return {name: (stat[0], stat[1], stat[2], stat[3]) for name, stat in json.loads(body).items()}
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return {}


def _publish(path: Path, data: bytes) -> None:
    try:
        publish_file(path, data)
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> CacheError:
    return CacheError(
        "The feature cache cannot be written.",
        where=path,
        why=str(error),
        remedy="free space or give write permission, or set cache.dir to another folder; what was published is kept",
    )
