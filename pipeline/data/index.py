"""Content digests remembered by path and stat: an unchanged tree costs a ``stat`` per file, not a read.

The file is one block of columns behind a digest of its own. Where the tree has not changed, looking it up is a
comparison of two byte strings and of two arrays; only where files came or went are paths matched one by one.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..files import DIGEST_BYTES, digest_bytes, publish_file
from .digests import Digests, empty_digests

INDEX_FOLDER = "index"
MAGIC = b"pipeline digests 1\n"
COUNTS = struct.Struct("<QQ")  # entries, bytes of the joined paths
STAT_COLUMNS = 4
# A file written within this time of being read may change again without another mtime: clocks of file systems
# tick coarsely (2 s on FAT, up to 10 ms on Linux), and those of servers are not quite ours.
SAFE_NS = 2_000_000_000

Stats = NDArray[np.int64]


def _no_stats() -> Stats:
    return np.empty((0, STAT_COLUMNS), np.int64)


def index_file(cache_dir: Path, name: bytes) -> Path:
    """Where the cache remembers the contents of the images of the source called ``name``."""
    return cache_dir / INDEX_FOLDER / f"{digest_bytes(name).hex()[:16]}.idx"


@dataclass(frozen=True)
class DigestIndex:
    """What one tree's files were when their digests were taken.

    Attributes:
        joined: the paths relative to the tree's root, in UTF-8 (surrogate-escaped), separated by NUL bytes.
        stats: int64 (n, 4), size, mtime_ns, ctime_ns, inode.
        digests: uint8 (n, 16), BLAKE2b-128 of the contents.
        warning: why `load` came back empty-handed, if the file was there.
    """

    joined: bytes = b""
    stats: Stats = field(default_factory=_no_stats)
    digests: Digests = field(default_factory=empty_digests)
    warning: str | None = None

    def __len__(self) -> int:
        return len(self.stats)

    @classmethod
    def load(cls, file: Path) -> DigestIndex:
        """The index that `save` wrote; an empty one, with a warning, where the file is damaged or something else.

        An index only saves time: without it every file is read again, and nothing is lost. So nothing is raised.
        """
        try:
            data = file.read_bytes()
        except FileNotFoundError:
            return cls()
        except OSError as error:
            return cls(warning=f"The index {file} cannot be read ({error.strerror}); every image is read again.")
        head = len(MAGIC) + DIGEST_BYTES
        body = memoryview(data)[head:]
        if not data.startswith(MAGIC) or data[len(MAGIC) : head] != digest_bytes(body) or len(body) < COUNTS.size:
            return cls(warning=f"The index {file} is damaged or of another version; every image is read again.")
        count, width = COUNTS.unpack_from(body)
        stats_end = COUNTS.size + count * STAT_COLUMNS * 8
        digests_end = stats_end + count * DIGEST_BYTES
        return cls(
            bytes(body[digests_end : digests_end + width]),
            np.frombuffer(body[COUNTS.size : stats_end], "<i8").astype(np.int64, copy=False).reshape(-1, STAT_COLUMNS),
            np.frombuffer(body[stats_end:digests_end], np.uint8).reshape(-1, DIGEST_BYTES),
        )

    def save(self, file: Path) -> None:
        """Publish the index atomically; of two writers the later wins, which costs at most a second reading.

        Raises:
            OSError: the folder cannot be written.
        """
        columns = self.stats.astype("<i8", copy=False).tobytes() + np.ascontiguousarray(self.digests).tobytes()
        body = COUNTS.pack(len(self), len(self.joined)) + columns + self.joined
        publish_file(file, MAGIC + digest_bytes(body) + body)

    def lookup(self, paths: list[str], stats: Stats) -> tuple[Digests, NDArray[np.bool_]]:
        """The digests of the files that are as they were.

        Returns:
            uint8 (n, 16), zeros where unknown, and bool (n,), known.
        """
        if _join(paths) == self.joined and len(paths) == len(self):
            known = _equal_rows(self.stats, stats)
            return np.where(known[:, None], self.digests, np.uint8(0)), known
        row_of = dict(zip(_split(self.joined), range(len(self)), strict=True))
        rows = np.fromiter((row_of.get(path, -1) for path in paths), np.int64, len(paths))
        known = rows >= 0
        digests = np.zeros((len(paths), DIGEST_BYTES), np.uint8)
        known[known] = _equal_rows(self.stats[rows[known]], stats[known])
        digests[known] = self.digests[rows[known]]
        return digests, known

    def updated(
        self,
        paths: list[str],
        stats: Stats,
        digests: Digests,
        known: NDArray[np.bool_],
        *,
        read_ns: int | NDArray[np.int64],
    ) -> DigestIndex:
        """The index of the tree as it is now: what this one still holds of it, and the rows that are ``known``.

        Args:
            stats: int64 (n, 4); of a file that was read, as they were when it was read.
            digests: uint8 (n, 16), of the rows that are ``known``.
            read_ns: the time, or (n,) times, when reading began. Files changed less than two seconds before
                that are left out: they could change once more and look the same.
        """
        held, trusted = self.lookup(paths, stats)
        settled = np.maximum(stats[:, 1], stats[:, 2]) <= np.asarray(read_ns, np.int64) - SAFE_NS
        added = known & settled
        keep = added | trusted
        # Where both know a file, the digest just taken is the truer one.
        merged = np.where(added[:, None], digests, held)
        names = paths if keep.all() else [path for path, kept in zip(paths, keep.tolist(), strict=True) if kept]
        return DigestIndex(_join(names), stats[keep], merged[keep])


def _equal_rows(left: Stats, right: Stats) -> NDArray[np.bool_]:
    equal: NDArray[np.bool_] = (left == right).all(axis=1)
    return equal


def _join(paths: list[str]) -> bytes:
    return "\0".join(paths).encode("utf-8", "surrogateescape")


def _split(joined: bytes) -> list[str]:
    return joined.decode("utf-8", "surrogateescape").split("\0") if joined else []
