"""The immutable HDF5 files that a key is made of: build one, prove one whole, open one. Knows no torch.

The name of a part carries the digest of its bytes, so a damaged one is found before libhdf5 opens it. Having read
a part in full is remembered by its stat, so that opening a key again does not read it all.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from ..data.digests import Digests
from ..files import canonical_json, digest_bytes, publish_file, seal_json, unseal_json
from .spec import FeatureSpec

VERIFIED_FILE = "verified.json"
PART_PREFIX, PART_SUFFIX = "part-", ".h5"
DAMAGED_PREFIX = "damaged-"
# Times this close to now may hide a later change within the file system's clock tick.
SAFE_NS = 2_000_000_000
# So many rows are published at the latest; more parts cost little, and a kill loses less.
PART_ROWS = 4096
# Where no more than one row in so many is wanted, the others are not read.
FEW = 16
HDF5_ERRORS = (OSError, KeyError, AttributeError, TypeError, ValueError, RuntimeError, OverflowError)

Stat = tuple[int, int, int, int]


class DamagedPart(Exception):
    """The file is not a whole part of this key; the text says why."""


@dataclass(frozen=True)
class Part:
    """One immutable file of rows; ``digests`` (n, 16) say whose features, ``width`` values of ``dtype``, they are."""

    path: Path
    digests: Digests
    width: int
    dtype: str

    def read(self, rows: NDArray[np.int64] | None = None) -> np.ndarray:
        """Features (m, d) of ``rows`` (m,), or all in the part's own order, of the type in which they are stored."""
        with h5py.File(self.path, "r") as file:
            features = file["features"]
            if rows is None or len(rows) * FEW > len(self.digests):
                return np.asarray(features[:] if rows is None else features[:][rows])
            chosen, place = np.unique(rows, return_inverse=True)
            return np.asarray(features[chosen][place])

    @property
    def size(self) -> int:
        """Bytes of the rows."""
        return len(self.digests) * self.width * np.dtype(self.dtype).itemsize + self.digests.nbytes


class Proofs:
    """Which parts of a key's folder have been read and found whole, by name and stat.

    A note that is missing or damaged proves nothing, and the parts are read again.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._proven = _read_note(folder / VERIFIED_FILE)
        self._changed = False

    def open(self, path: Path, key: str, feature_dim: int | None) -> Part:
        """A part, read in full and checked unless that was done before.

        Args:
            feature_dim: width it must have; None takes any.

        Raises:
            DamagedPart: it is not a whole part of the key.
            OSError: it has gone, or cannot be read.
        """
        stat = _stat(path)
        if self._proven.get(path.name) == stat:
            with suppress(*HDF5_ERRORS), h5py.File(path, "r") as file:
                return _part(path, file)
        before = time.time_ns()
        data = path.read_bytes()
        unchanged = _stat(path) == stat
        problem = check_part(path.name, data, key, feature_dim)
        if problem:
            raise DamagedPart(problem)
        if unchanged and max(stat[1], stat[2]) < before - SAFE_NS:
            self._proven[path.name] = stat
            self._changed = True
        return part_of(path, data)

    def save(self, names: set[str]) -> None:
        """Remember the proofs of these parts for the next time, if there are new ones and the folder is writable."""
        if self._changed:
            known = {name: stat for name, stat in self._proven.items() if name in names}
            with suppress(OSError):
                publish_file(self._folder / VERIFIED_FILE, seal_json(known))


def build_part(features: np.ndarray, digests: Digests, spec: FeatureSpec) -> bytes:
    """The bytes of a part: features (n, d), digest (n, 16), and attributes that make it readable alone."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.create_dataset("features", data=features)
        file.create_dataset("digest", data=digests)
        # Texts of fixed length: on damaged ones of variable length libhdf5 can search for ever.
        file.attrs["key"] = np.bytes_(spec.key)
        file.attrs["spec"] = np.bytes_(canonical_json(spec.as_dict()))
        if features.dtype.name != spec.dtype:
            file.attrs["widened"] = np.bytes_(f"these rows do not survive {spec.dtype}")
    return buffer.getvalue()


def part_name(data: bytes) -> str:
    """The name of a part carries the digest of its bytes."""
    return f"{PART_PREFIX}{digest_bytes(data).hex()}{PART_SUFFIX}"


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


def check_part(name: str, data: bytes, key: str, feature_dim: int | None) -> str | None:
    """What is wrong with a part's bytes, or None. libhdf5 only ever opens bytes whose digest is right.

    Args:
        feature_dim: the width it must have; None takes any.
    """
    if part_name(data) != name:
        return "its bytes do not match the digest in its name"
    try:
        with h5py.File(io.BytesIO(data), "r") as file:
            told = _fixed_text(file, "key")
            if told != key:
                return f"it belongs to the key {told}"
            features, digest = file["features"], file["digest"]
            if not (_is_plain(features) and _is_plain(digest)):
                return "its datasets are not simply stored in it"
            shapes_fit = features.ndim == 2 and digest.shape == (len(features), 16)
            is_wide_enough = shapes_fit and feature_dim in (None, features.shape[1])
            if not is_wide_enough or digest.dtype != np.uint8 or features.dtype not in (np.float16, np.float32):
                return f"it holds features {features.shape} and digest {digest.shape}"
    except HDF5_ERRORS as error:
        return f"it is not a part ({error})"
    return None


def _fixed_text(file: h5py.File, name: str) -> str | None:
    """An attribute that is a text of fixed length, or None where it is anything else."""
    if name not in file.attrs or file.attrs.get_id(name).dtype.kind != "S":
        return None
    return bytes(file.attrs[name]).decode("ascii", "replace")


def _is_plain(dataset: Any) -> bool:
    """Whether the values lie in this very file, as many bytes as they take in memory."""
    if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external or dataset.chunks:
        return False
    return bool(dataset.id.get_storage_size() == dataset.size * dataset.dtype.itemsize)


def stored_rows(data: bytes) -> np.ndarray:
    """The features (n, d) of a part's bytes, found whole by `check_part`, as they are stored."""
    with h5py.File(io.BytesIO(data), "r") as file:
        return np.asarray(file["features"][:])


def part_of(path: Path, data: bytes) -> Part:
    """The part whose bytes, found whole by `check_part`, are ``data``."""
    with h5py.File(io.BytesIO(data), "r") as file:
        return _part(path, file)


def set_aside(path: Path, why: str) -> str:
    """Rename a damaged file so that nobody takes it for whole; what to tell the user."""
    target = path.with_name(DAMAGED_PREFIX + path.name)
    try:
        os.rename(path, target)
    except OSError:
        return f"{path} is ignored: {why}."
    return f"{path} was set aside as {target.name}: {why}."


def _part(path: Path, file: h5py.File) -> Part:
    features = file["features"]
    return Part(path, np.asarray(file["digest"], np.uint8), int(features.shape[1]), features.dtype.name)


def _stat(path: Path) -> Stat:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def _read_note(file: Path) -> dict[str, Stat]:
    try:
        note = unseal_json(file.read_bytes())
        return {name: (stat[0], stat[1], stat[2], stat[3]) for name, stat in note.items()}
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return {}
