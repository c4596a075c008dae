"""A place where images lie, behind one small protocol: list the samples, read the bytes of one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..params import Place

SPLITS = ("train", "val", "test")
TRAIN, VAL, TEST = range(len(SPLITS))
UNLABELLED = -1

Stamp = NDArray[np.int64]


@dataclass(frozen=True)
class Samples:
    """What a source lists, in an order that does not depend on where it lies.

    Attributes:
        root: what the paths are relative to; a URL as text.
        class_names: sorted; empty when nothing is labelled.
        paths: n names, of which each stands for one image; bytes that are no UTF-8 are surrogate-escaped.
        targets: int32 (n,), index into ``class_names``, -1 where there is no label.
        splits: int8 (n,), index into `SPLITS`; None where the source says nothing about splits.
        stamps: int64 (n, 4), equal as long as the bytes are: for files size, mtime_ns, ctime_ns and inode;
            for whatever else the second and third are times of change, too, and 0 where the others are enough.
        ignored: lower-case extension (``""`` for none) -> count of files that were left out for it.
        groups: n names of what a split must not tear apart, "" for none; None where the source says nothing.
        reads_at_once: how many reads at a time pay off; 0: as many as there are cores.
    """

    root: Place
    class_names: tuple[str, ...]
    paths: list[str]
    targets: NDArray[np.int32]
    splits: NDArray[np.int8] | None
    stamps: NDArray[np.int64]
    ignored: dict[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    groups: list[str] | None = None
    reads_at_once: int = 0


class Source(Protocol):
    """One place of one kind. A further kind is one such class and its line in `images.SOURCES`."""

    @property
    def name(self) -> bytes | None:
        """By which the cache remembers the digests of what lies there; None for what is gone with the process."""
        ...

    def list_samples(self) -> Samples:
        """What lies there; no image is opened.

        Raises:
            DataError: there is nothing to list, it cannot be read, or it contradicts itself.
        """
        ...

    def read(self, path: str) -> tuple[bytes, Stamp]:
        """The bytes of the sample at ``path`` and, int64 (4,), its stamp when they were read.

        Raises:
            OSError: it has gone, cannot be read, or changed while it was.
        """
        ...
