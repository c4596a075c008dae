"""Images: where they come from, what is known of each, and how one is read. Knows no torch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..files import digest_bytes
from ..params import DataParams
from ..runtime.cores import usable_cores
from ..runtime.progress import ProgressBar
from .digests import Digests
from .folder import FolderSource
from .given import Given, GivenSource
from .index import DigestIndex, index_file
from .source import Samples, Source
from .splits import assign_splits, group_ids, groups_of

Rows = NDArray[np.int64]
# Images that threads are given to read at a time.
READ_AHEAD = 1024

# The kinds of places that ``data.root`` may name: the first that says yes to the params opens it.
SOURCES: list[tuple[Callable[[DataParams], bool], Callable[[DataParams], Source]]] = [
    (lambda _data: True, FolderSource.from_params),
]


class Images:
    """The images of one source, from the listing to the splits.

    Attributes:
        digests: uint8 (n, 16), BLAKE2b-128 of each image's bytes; rows mean nothing where ``known`` (n,) is false.
        failures: position -> why the image could not be read in this process.
        warnings: what the user should be told of the source and of what is remembered of it.
    """

    def __init__(self, source: Source, data: DataParams, cache_dir: Path) -> None:
        self.source, self.data = source, data
        self.samples = source.list_samples()
        self.index_file = None if source.name is None else index_file(cache_dir, source.name)
        index = DigestIndex.load(self.index_file) if self.index_file else DigestIndex()
        self.digests, self.known = index.lookup(self.paths, self.samples.stamps)
        self.failures: dict[int, str] = {}
        self.warnings = [*self.samples.warnings, *([index.warning] if index.warning else [])]
        self._stamps = self.samples.stamps.copy()
        self._read_ns = np.zeros(len(self), np.int64)

    def __len__(self) -> int:
        return len(self.samples.paths)

    @property
    def root(self) -> Path:
        """What the paths are relative to."""
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

    @cached_property
    def _used_targets(self) -> NDArray[np.int32]:
        return np.unique(self.targets[self.targets >= 0])

    # -- contents ---------------------------------------------------------------------------------------------------

    def path(self, position: int) -> str:
        """The whole path of an image, for people."""
        return str(self.root / self.paths[position])

    def position_of(self, path: str) -> int | None:
        """The position of the image whose whole path this is, if it is among these."""
        prefix = os.path.join(self.root, "") if self.root != Path() else ""
        with suppress(ValueError):
            return self.paths.index(path.removeprefix(prefix))
        return None

    def digest(self, position: int) -> bytes:
        """The 16 bytes that name a known image's content."""
        return bytes(self.digests[position])

    def read(self, position: int) -> bytes | None:
        """An image's bytes, its digest and stamp noted; None where it cannot be read, the reason noted."""
        started = time.time_ns()
        try:
            data, stamp = self.source.read(self.paths[position])
        except OSError as error:
            self.failures[position] = f"{type(error).__name__}: {error.strerror or error}"
            self.known[position] = False
            return None
        self._stamps[position], self._read_ns[position] = stamp, started
        self.digests[position] = np.frombuffer(digest_bytes(data), np.uint8)
        self.known[position] = True
        return data

    def is_unchanged(self, position: int) -> bool:
        """Whether an image has the stamp under which it was listed."""
        return bool((self._stamps[position] == self.samples.stamps[position]).all())

    def read_unknown(self, *, quiet: bool = False) -> None:
        """Read the images whose content is not known, to learn their digests."""
        unknown = np.flatnonzero(~self.known).tolist()
        if not unknown:
            return
        with ThreadPoolExecutor(usable_cores()) as pool, ProgressBar("reading", len(unknown), quiet=quiet) as bar:
            for start in range(0, len(unknown), READ_AHEAD):
                block = unknown[start : start + READ_AHEAD]
                for _ in pool.map(lambda position: self.read(position) and None, block):
                    bar.advance()
        self.remember()

    def learn(self, digests: Digests, known: NDArray[np.bool_], failures: dict[int, str]) -> None:
        """Take over what another process has read: digests (n, 16) where ``known`` (n,), and its failures."""
        self.digests[known] = digests[known]
        self.known |= known
        self.failures |= failures

    def remember(self) -> None:
        """Keep the digests learned since the listing, beside what other processes have kept meanwhile.

        An index only saves time, so that one which cannot be written is worth a warning, not an end.
        """
        if self.index_file is None:
            return
        try:
            index = DigestIndex.load(self.index_file)
            index.updated(self.paths, self._stamps, self.digests, self.known, read_ns=self._read_ns).save(
                self.index_file
            )
        except OSError as error:
            self.warnings.append(
                f"The next run reads every image again: {self.index_file} cannot be written ({error})."
            )

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
        return groups_of([self.paths[row] for row in rows], self.data.group_pattern)


def open_images(data: DataParams, cache_dir: Path) -> Images:
    """List ``data.root`` and look its images up in the index.

    Raises:
        DataError: see its message.
    """
    opener = next(opens for takes, opens in SOURCES if takes(data))
    return Images(opener(data), data, cache_dir)


def open_given(given: Given | Iterable[Given], data: DataParams, cache_dir: Path) -> Images:
    """Images given one by one, unlabelled: paths of files and folders, bytes, arrays, PIL images.

    Raises:
        TypeError: something is no image and no path.
        DataError: a path does not exist, or there is no image.
    """
    return Images(GivenSource(given, data.extensions), data, cache_dir)


__all__ = ["SOURCES", "Given", "Images", "Samples", "Source", "open_given", "open_images"]
