"""The feature cache on disk: one folder a spec, immutable HDF5 parts, rows found by content digest.

A part is built in memory, written with plain I/O under a temporary name, synced and renamed to a name that
carries the digest of its bytes. So it is whole or it is not there, any number of processes may publish side by
side, and damage is found before libhdf5 sees it. Knows no torch.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ..data.digests import Digests, DigestTable, empty_digests, first_occurrences
from ..errors import CacheError, MissingFeaturesError
from ..files import (
    TEMPORARY_PREFIX,
    digest_bytes,
    digest_file,
    file_lock,
    publish_file,
    publish_written,
    reserve,
    temporary_name,
)
from .merge import merge_parts, parts_to_merge
from .parts import (
    HDF5_ERRORS,
    PART_ROWS,
    DamagedPart,
    Part,
    Proofs,
    build_part,
    part_name,
    part_names,
    set_aside,
)
from .rounding import Features, survives_float16
from .rows import PREFIX as ROWS_PREFIX
from .rows import SUFFIX as ROWS_SUFFIX
from .rows import Rows
from .spec import FeatureSpec

SPEC_FILE = "spec.json"
USED_FILE = "used"
LOCK_FILE, ROWS_LOCK = ".lock", ".rows-lock"
READ_AGAIN = 3


class FeatureStore:
    """The features of one spec inside the cache folder ``cache_dir``.

    Opening is cheap and makes nothing; `writing` makes the folder. What a damaged file cost is in ``warnings``.
    """

    def __init__(self, cache_dir: Path, spec: FeatureSpec, feature_dim: int) -> None:
        self.cache_dir, self.spec, self.feature_dim = cache_dir, spec, feature_dim
        self.folder = cache_dir / spec.folder_name
        self.warnings: list[str] = []
        self._parts: dict[str, Part] = {}
        self._sorted: DigestTable | None = None
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
                locked = held.enter_context(file_lock(self.cache_dir / LOCK_FILE, shared=True))
                if not locked:
                    self.warnings.append(
                        f"The file system of {self.cache_dir} has no locks: run no `cache gc` while others write here."
                    )
            except OSError as error:
                raise cannot_write(self.cache_dir, error) from error
            self._write_spec()
            self.touch()
            self.refresh()
            yield
            if locked:  # else a reader could still need what is merged
                self._merge_small_parts()

    def _write_spec(self) -> None:
        self._check_spec()
        if not (self.folder / SPEC_FILE).exists():
            text = json.dumps(self.spec.as_dict(), indent=2, sort_keys=True) + "\n"
            _publish(self.folder / SPEC_FILE, text.encode())

    def touch(self) -> None:
        """Remember that these features were used today, and put back a lost spec.

        A cache that is only readable stays as it is.
        """
        if self.folder.is_dir():
            with suppress(OSError, CacheError):
                (self.folder / USED_FILE).touch()
                self._write_spec()

    def _check_spec(self) -> None:
        """The folder's own spec must be ours; a damaged one is set aside, since the folder's name carries the key."""
        file = self.folder / SPEC_FILE
        if os.path.lexists(file) and read_spec(file) is None:
            self.warnings.append(set_aside(file, "this spec is damaged; extract writes it again"))

    def refresh(self) -> None:
        """See what other processes have published or removed since; damaged parts are set aside and named."""
        names, proofs = self._names(), Proofs(self.folder)
        for _ in range(READ_AGAIN):
            opened = {name: self._parts.get(name) or self._open_part(self.folder / name, proofs) for name in names}
            # Parts that were merged meanwhile may have been listed neither before nor after.
            if names == (names := self._names()):
                break
        parts = {name: part for name, part in opened.items() if part}
        if parts.keys() != self._parts.keys():
            self._parts, self._sorted = parts, None
        proofs.save(set(self._parts))

    def _names(self) -> list[str]:
        try:
            return sorted(part_names(self.folder))
        except OSError as error:
            raise CacheError(
                "A folder of the feature cache cannot be read.",
                where=self.folder,
                why=str(error),
                remedy="give permission to read it, or set cache.dir to another folder",
            ) from error

    def _open_part(self, path: Path, proofs: Proofs) -> Part | None:
        try:
            return proofs.open(path, self.spec.key, self.feature_dim)
        except FileNotFoundError:  # another process removed it or set it aside
            return None
        except OSError as error:
            self.warnings.append(f"{path} is passed over: it cannot be read ({error.strerror}).")
        except DamagedPart as damage:
            self.warnings.append(set_aside(path, f"{damage}; its rows are computed again by the next extract"))
        return None

    @property
    def parts(self) -> list[Part]:
        """All whole parts, those published since the last look behind the others."""
        return list(self._parts.values())

    @property
    def _table(self) -> DigestTable:
        """All rows' digests, sorted when they are first looked for."""
        if self._sorted is None:
            self._sorted = DigestTable(np.concatenate([empty_digests(), *(part.digests for part in self.parts)]))
        return self._sorted

    @property
    def digests(self) -> Digests:
        """The digests (n, 16) of all rows, part after part; a content may occur twice after concurrent writers."""
        return self._table.digests

    def contains(self, digests: Digests) -> np.ndarray:
        """Which of (n, 16) have a feature, bool (n,)."""
        return self._table.locate(digests) >= 0

    def read(self, digests: Digests) -> Features:
        """The features (n, d), float32, of the contents ``digests`` (n, 16), row by row.

        Raises:
            MissingFeaturesError: some have none; ``positions`` holds which.
        """
        for _ in range(READ_AGAIN):
            with suppress(FileNotFoundError):
                return self._read(digests)
            self.refresh()  # a part was merged into another
        return self._read(digests)

    def _read(self, digests: Digests) -> Features:
        features = np.empty((len(digests), self.feature_dim), np.float32)
        for part, mine, rows in self._places(digests):
            features[mine] = self._rows(part, rows)
        return features

    def _places(self, digests: Digests) -> list[tuple[Part, NDArray[np.int64], NDArray[np.int64]]]:
        """Each part that holds some of the contents: which of ``digests`` these are, and in which rows of the part."""
        row = self._table.locate(digests)
        if (row < 0).any():
            missing = np.flatnonzero(row < 0)
            raise MissingFeaturesError(f"{len(missing)} of {len(digests)} images have no feature.", where=self.folder)
        ends = np.cumsum([len(part.digests) for part in self.parts])
        owner = np.searchsorted(ends, row, side="right")
        order = np.argsort(owner, kind="stable")
        parts, runs = self.parts, zip(*_runs(owner[order], order), strict=True)
        return [(parts[i], mine, row[mine] - (ends[i] - len(parts[i].digests))) for i, mine in runs]

    def flat(self, digests: Digests) -> Rows:
        """As `read`, without holding all in memory: a file in the order of ``digests``, made when there is none.

        Float16 unless one of the rows is stored in float32.

        Raises:
            MissingFeaturesError: some have none.
            CacheError: the file cannot be written.
        """
        name = f"{ROWS_PREFIX}{digest_bytes(digests.tobytes()).hex()[:16]}-"
        if made := self._made_flat(name, len(digests)):
            return made
        try:
            for _ in range(READ_AGAIN):
                with suppress(FileNotFoundError):
                    return self._make_flat(name, digests)
                self.refresh()  # a part was merged into another
            return self._make_flat(name, digests)
        except OSError as error:
            raise cannot_write(self.folder, error) from error

    def _made_flat(self, name: str, count: int) -> Rows | None:
        for file in self.folder.glob(f"{name}*{ROWS_SUFFIX}"):
            with suppress(OSError, ValueError):
                rows = Rows(file)
                if rows.shape == (count, self.feature_dim):
                    os.utime(file)
                    return rows
        return None

    def _make_flat(self, name: str, digests: Digests) -> Rows:
        places = self._places(digests)
        dtype = np.result_type(np.float16, *(np.dtype(part.dtype) for part, *_ in places))
        with file_lock(self.folder / ROWS_LOCK, shared=False) as held:
            if held:  # by whoever makes such a file: what lies there unfinished is of processes that were killed
                for left in self.folder.glob(f"{TEMPORARY_PREFIX}*-{ROWS_PREFIX}*"):
                    left.unlink(missing_ok=True)
                if made := self._made_flat(name, len(digests)):
                    return made
            temporary = temporary_name(self.folder / f"{name}{ROWS_SUFFIX}")
            try:
                np.lib.format.open_memmap(temporary, "w+", dtype, (len(digests), self.feature_dim)).flush()
                reserve(temporary)
                for part, mine, rows in places:
                    # A map for each part: what was written need not stay in memory.
                    np.load(temporary, mmap_mode="r+")[mine] = self._rows(part, rows)
                file = self.folder / f"{name}{digest_file(temporary).hex()}{ROWS_SUFFIX}"
                publish_written(temporary, file)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        return Rows(file)

    def _rows(self, part: Part, rows: NDArray[np.int64]) -> np.ndarray:
        try:
            return part.read(rows)
        except FileNotFoundError:
            raise
        except HDF5_ERRORS as error:
            if not part.path.exists():  # it went while libhdf5 opened it
                raise FileNotFoundError(part.path) from error
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
        if path.name not in self._parts:
            self._parts[path.name] = Part(path, digests, self.feature_dim, features.dtype.name)
            self._sorted = None if self._sorted is None else self._sorted.extended(digests)
        return path

    def _merge_small_parts(self) -> None:
        """Keep the key quick to open. It only saves time: what cannot be merged now stays as it is."""
        self.refresh()
        for parts in list(parts_to_merge(self.parts)):
            with suppress(OSError):
                merge_parts(parts, self.spec)
        self.refresh()


def read_spec(file: Path) -> FeatureSpec | None:
    """The spec in ``spec.json``, or None where it is damaged or does not give the key in the folder's name."""
    try:
        spec = FeatureSpec.from_dict(json.loads(file.read_bytes()))
        return spec if file.parent.name == spec.folder_name else None
    except (OSError, ValueError, TypeError, CacheError, RecursionError):
        return None


def _publish(path: Path, data: bytes) -> None:
    try:
        publish_file(path, data)
    except OSError as error:
        raise cannot_write(path, error) from error


def _runs(owner: NDArray[np.int64], order: NDArray[np.int64]) -> tuple[list[int], list[NDArray[np.int64]]]:
    """Sorted owners and, of each, the positions that are its."""
    owners, starts = np.unique(owner, return_index=True)
    return owners.tolist(), np.split(order, starts[1:]) if len(owners) else []


def cannot_write(path: Path, error: OSError) -> CacheError:
    return CacheError(
        "The feature cache cannot be written.",
        where=path,
        why=str(error),
        remedy="free space or give write permission, or set cache.dir to another folder; what was published is kept",
    )


class PartWriter:
    """A sink that publishes at least every ``part_seconds`` or 4096 rows, and what is left when it closes.

    ``published`` counts durable rows. An error while publishing is raised by the next call, or on closing.
    """

    def __init__(
        self,
        publish: Callable[[Features, Digests], list[Path]],
        part_seconds: float,
        *,
        after: Callable[[], None] | None = None,
    ) -> None:
        self._publish, self._part_seconds, self._after = publish, part_seconds, after
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None
        self._features: list[Features] = []
        self._digests: list[Digests] = []
        self._oldest = 0.0
        self.published = 0
        self.seconds = 0.0

    def __call__(self, features: Features, digests: Digests) -> None:
        """Take rows (n, d) and digests (n, 16)."""
        if not self._features:
            self._oldest = time.monotonic()
        self._features.append(features)
        self._digests.append(digests)
        full = sum(map(len, self._features)) >= PART_ROWS
        if full or time.monotonic() - self._oldest >= self._part_seconds:
            self.flush()

    def flush(self) -> None:
        """Begin to publish what has come so far; waits for the part before, so at most one is in memory twice."""
        self._wait()
        if self._features:
            rows = np.concatenate(self._features), np.concatenate(self._digests)
            self._features, self._digests = [], []
            self._pending = self._pool.submit(self._write, *rows)

    def _write(self, features: Features, digests: Digests) -> None:
        started = time.perf_counter()
        self._publish(features, digests)
        self.published += len(features)
        if self._after:
            self._after()
        self.seconds += time.perf_counter() - started

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Publish the rest, also when the block failed: what was computed is kept."""
        try:
            self.flush()
            self._wait()
        finally:
            self._pool.shutdown()
