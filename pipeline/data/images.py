"""Images: where they come from, what is known of each, and how one is read. Knows no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..files import digest_bytes
from ..params import DataParams, Place
from ..runtime.cores import usable_cores
from ..runtime.progress import ProgressBar
from .archive import ArchiveSource
from .corrections import Corrections, read_corrections
from .digests import Digests
from .folder import FolderSource, require_folder
from .given import BatchSource, Given, GivenSource
from .index import MOST_BLOCKS, DigestIndex, index_file
from .objects import ObjectSource
from .parquet import open_parquet
from .source import Samples, Source, Stamp
from .splits import assign_splits, group_ids, groups_of
from .stores import join
from .table import TableSource

Rows = NDArray[np.int64]
# Images that threads are given to read at a time.
READ_AHEAD = 1024
FEW_READS = 4  # are not worth finding out how many cores there are

# The kinds of places that ``data.root`` may name: the first that opens it, rather than answer None, has it. Each is
# given the folder of the cache, too, for what it remembers of the place.
SOURCES: list[Callable[[DataParams, Path], Source | None]] = [
    TableSource.at,
    ArchiveSource.at,
    open_parquet,
    ObjectSource.at,
    FolderSource.at,
]


class Images:
    """The images of one source, from the listing to the splits.

    Attributes:
        digests: uint8 (n, 16), BLAKE2b-128 of each image's bytes; rows mean nothing where ``known`` (n,) is false.
        failures: position -> why the image could not be read in this process.
        warnings: what the user should be told of the source and of what is remembered of it.
        corrections: of labels, where the user has some; splits are drawn without them.
    """

    def __init__(self, source: Source, data: DataParams, cache_dir: Path) -> None:
        self.source, self.data = source, data
        self.samples = source.list_samples()
        self.index_file = None if source.name is None else index_file(cache_dir, source.name)
        index = DigestIndex.load(self.index_file) if self.index_file else DigestIndex()
        self.digests, self.known = index.lookup(self.paths, self.samples.stamps)
        self._remembered, self._index = self.known.copy(), (index.first, len(index) - index.first, index.blocks)
        self.failures: dict[int, str] = {}
        self.warnings = [*self.samples.warnings, *([index.warning] if index.warning else [])]
        self._stamps = self.samples.stamps.copy()
        self._read_ns = np.zeros(len(self), np.int64)
        self._ahead: _ReadAhead | None = None
        self.corrections: Corrections | None = None

    def __len__(self) -> int:
        return len(self.samples.paths)

    @property
    def root(self) -> Place:
        """What the paths are relative to; a URL as text."""
        return self.samples.root

    @property
    def paths(self) -> list[str]:
        """n paths relative to the root."""
        return self.samples.paths

    @property
    def targets(self) -> NDArray[np.int32]:
        """Int32 (n,), index into ``samples.class_names``, -1 where there is no label."""
        return self.samples.targets

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The classes that hold an image: an empty class folder is no class to learn."""
        return tuple(self.samples.class_names[target] for target in self._used_targets)

    def class_indices(self, rows: Rows) -> Rows:
        """For each row the index (n,) into ``class_names``, -1 where there is no label."""
        targets = self.targets[rows]
        return np.where(targets >= 0, np.searchsorted(self._used_targets, targets), -1)

    def corrected_indices(self, rows: Rows) -> Rows:
        """As `class_indices` with the corrections, -1 also for an image that they leave out; digests must be known.

        Raises:
            DataError: they correct an image in two ways.
        """
        targets = self.class_indices(rows)
        if self.corrections is None:
            return targets
        paths = [self.paths[row] for row in rows]
        targets, unmatched = self.corrections.apply(paths, self.digests[rows], targets, self.class_names)
        warning = f"{unmatched} of {len(self.corrections.rows)} corrections match no image."
        if unmatched and warning not in self.warnings:
            self.warnings.append(warning)
        return targets

    @cached_property
    def _used_targets(self) -> NDArray[np.int32]:
        return np.unique(self.targets[self.targets >= 0])

    # -- contents ---------------------------------------------------------------------------------------------------

    def path(self, position: int) -> str:
        """The whole path of an image, for people."""
        return join(self.root, self.paths[position])

    def position_of(self, path: str) -> int | None:
        """The position of the image whose whole path this is, if it is among these."""
        prefix = join(self.root, "")
        with suppress(ValueError):
            return self.paths.index(path.removeprefix(prefix))
        return None

    def digest(self, position: int) -> bytes:
        """The 16 bytes that name a known image's content."""
        return bytes(self.digests[position])

    def read(self, position: int) -> bytes | None:
        """An image's bytes, its digest and stamp noted; None where it cannot be read, the reason noted."""
        try:
            data, stamp, started = self._ahead.take(position) if self._ahead else self._fetch(position)
        except OSError as error:
            self.failures[position] = f"{type(error).__name__}: {error.strerror or error}"
            self.known[position] = False
            return None
        digest = np.frombuffer(digest_bytes(data), np.uint8)
        self._remembered[position] &= bool(
            (self._stamps[position] == stamp).all() and (self.digests[position] == digest).all()
        )
        self._stamps[position], self._read_ns[position], self.digests[position] = stamp, started, digest
        self.known[position] = True
        return data

    def _fetch(self, position: int) -> tuple[bytes, Stamp, int]:
        """Bytes, stamp, and when reading them began (ns)."""
        started = time.time_ns()
        return *self.source.read(self.paths[position]), started

    @property
    def _reads_at_once(self) -> int:
        return max(usable_cores(), self.samples.reads_at_once)

    @contextmanager
    def reading_ahead(self, positions: Iterable[int]) -> Iterator[None]:
        """While the block runs, have the images at ``positions`` read before `read` asks for them in this order.

        Only where the place rewards more reads at a time than there are cores to decode what comes.
        """
        if not self.samples.reads_at_once:
            yield
            return
        with ThreadPoolExecutor(self._reads_at_once, thread_name_prefix="read") as pool:
            self._ahead = _ReadAhead(pool, self._fetch, positions, 2 * self._reads_at_once)
            try:
                yield
            finally:
                self._ahead = None
                pool.shutdown(wait=True, cancel_futures=True)

    def is_unchanged(self, position: int) -> bool:
        """Whether an image has the stamp under which it was listed."""
        return bool((self._stamps[position] == self.samples.stamps[position]).all())

    def read_unknown(self, *, quiet: bool = False) -> None:
        """Read the images whose content is not known, to learn their digests."""
        unknown = np.flatnonzero(~self.known).tolist()
        if not unknown:
            return
        threads = len(unknown) if len(unknown) <= FEW_READS else self._reads_at_once
        with ThreadPoolExecutor(threads) as pool, ProgressBar("reading", len(unknown), quiet=quiet) as bar:
            for start in range(0, len(unknown), READ_AHEAD):
                block = unknown[start : start + READ_AHEAD]
                for _ in pool.map(lambda position: self.read(position) and None, block):
                    bar.advance()
        self.remember()

    @property
    def read_here(self) -> Rows:
        """The positions of the images that this process has read."""
        return np.flatnonzero(self.known & (self._read_ns > 0))

    def learn(self, positions: Rows, digests: Digests, failures: dict[int, str]) -> None:
        """Take over what another process has read: ``positions`` (m,) with digests (m, 16), and its failures."""
        self.digests[positions] = digests
        self.known[positions] = True
        self.failures |= failures

    def remember(self) -> None:
        """Keep the digests that this process has learned since it did so last, beside what others keep.

        An index only saves time, so that one which cannot be written is worth a warning, not an end.
        """
        new = self.read_here
        new = new[~self._remembered[new]]
        if self.index_file is None or not len(new):
            return
        try:
            self._append(self.index_file, new)
        except OSError as error:
            self.warnings.append(
                f"The next run reads every image again: {self.index_file} cannot be written ({error})."
            )

    def _append(self, file: Path, new: Rows) -> None:
        """Add the rows ``new`` to the index; make one block of it where it has doubled, or is of very many."""
        self._remembered[new] = True
        learnt = DigestIndex().updated(
            [self.paths[row] for row in new.tolist()],
            self._stamps[new],
            self.digests[new],
            self.known[new],
            read_ns=self._read_ns[new],
        )
        if not len(learnt):
            return
        learnt.append(file)
        first, more, blocks = self._index
        first, more, blocks = first or len(learnt), more + len(learnt) if first else 0, blocks + 1
        if (more > first or blocks > MOST_BLOCKS) and DigestIndex.compact(file, self.paths, self._stamps):
            first, more, blocks = first + more, 0, 1
        self._index = (first, more, blocks)

    # -- splits and groups ------------------------------------------------------------------------------------------

    def splits_of(self, rows: Rows) -> NDArray[np.int8]:
        """The split of each image at ``rows``, index into `SPLITS`: the source's own, or by a hash of its content."""
        if self.samples.splits is not None:
            return self.samples.splits[rows]
        return assign_splits(
            self.digests[rows],
            self.targets[rows],
            self._group_names(rows),
            val_fraction=self.data.val_fraction,
            test_fraction=self.data.test_fraction,
            seed=self.data.seed,
        )

    def groups_of(self, rows: Rows) -> Rows:
        """A number (n,) for each row, equal for images that must stay on one side of any split."""
        return group_ids(self.digests[rows], self._group_names(rows))

    def _group_names(self, rows: Rows) -> list[str] | None:
        groups = self.samples.groups
        if groups is not None and self.data.group_pattern is None:
            return [groups[row] for row in rows]
        return groups_of([self.paths[row] for row in rows], self.data.group_pattern)


class _ReadAhead:
    """Reads that threads do before they are asked for, ``window`` of them at most, so that memory stays bounded."""

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        fetch: Callable[[int], tuple[bytes, Stamp, int]],
        positions: Iterable[int],
        window: int,
    ) -> None:
        self._pool, self._fetch, self._coming, self._lock = pool, fetch, iter(positions), Lock()
        self._begun: dict[int, Future[tuple[bytes, Stamp, int]]] = {}
        self._begin(window)

    def _begin(self, count: int) -> None:
        for position in islice(self._coming, count):
            self._begun[position] = self._pool.submit(self._fetch, position)

    def take(self, position: int) -> tuple[bytes, Stamp, int]:
        """What reading gave; read now where it was not to be read ahead."""
        with self._lock:
            begun = self._begun.pop(position, None)
            if begun:
                self._begin(1)
        return begun.result() if begun else self._fetch(position)


def open_images(data: DataParams, cache_dir: Path) -> Images:
    """List ``data.root`` and look its images up in the index.

    Raises:
        DataError: see its message.
    """
    images = Images(_open_source(data, cache_dir), data, cache_dir)
    if data.corrections is not None:
        images.corrections = read_corrections(data.corrections)
        images.corrections.check(images.class_names)
    return images


def require_place(data: DataParams, cache_dir: Path) -> None:
    """Refuse a ``data.root`` that is not there; nothing is listed yet.

    Raises:
        DataError: see its message.
    """
    source = _open_source(data, cache_dir)
    if isinstance(source, FolderSource):
        require_folder(Path(data.root))


def _open_source(data: DataParams, cache_dir: Path) -> Source:
    return next(source for opens in SOURCES if (source := opens(data, cache_dir)) is not None)


def open_given(given: Given | Iterable[Given], data: DataParams, cache_dir: Path) -> Images:
    """Images given one by one, unlabelled: paths of files and folders, and whatever ``data.root`` may name; bytes,
    arrays, PIL images.

    Raises:
        TypeError: something is no image and no path.
        DataError: a path does not exist, or there is no image.
    """

    def open_place(place: str) -> Source:
        plain = {"root": place, "images": None, "layout": "flat"}
        return _open_source(DataParams.model_validate(data.model_dump() | plain), cache_dir)

    return Images(GivenSource(given, data.extensions, open_place), data, cache_dir)


def open_batch(contents: Sequence[Any], paths: Sequence[Any], data: DataParams, cache_dir: Path) -> Images:
    """The rows of a table as images, as `BatchSource` takes them; relative paths are relative to ``data.root``."""
    return Images(BatchSource(contents, paths, data.root), data, cache_dir)


__all__ = [
    "SOURCES",
    "Given",
    "Images",
    "Samples",
    "Source",
    "open_batch",
    "open_given",
    "open_images",
    "require_place",
]
