"""Content digests remembered by path and stat: an unchanged tree costs a ``stat`` per file, not a read.

The file is blocks of columns, each behind a digest of its own: what is learnt is put behind what is there, by any
number of processes, and now and then one of them makes one block of all in the order of the tree. Where that has not
changed, looking it up is a comparison of two byte strings and of two arrays; else paths are matched one by one.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..files import DIGEST_BYTES, digest_bytes, lock_file, publish_file
from .digests import Digests, empty_digests

INDEX_FOLDER = "index"
MAGIC = b"pipeline digests 1\n"
COUNTS = struct.Struct("<QQ")  # entries, bytes of the joined paths
STAT_COLUMNS = 4
HEAD = len(MAGIC) + DIGEST_BYTES
MOST_BLOCKS = 64
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
        first: entries of the first of ``blocks``. Of two entries of one path the later is the truer.
    """

    joined: bytes = b""
    stats: Stats = field(default_factory=_no_stats)
    digests: Digests = field(default_factory=empty_digests)
    warning: str | None = None
    first: int = 0
    blocks: int = 0

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
        blocks = [cls._of(body) for body in _whole_blocks(data)]
        if data and not blocks:
            return cls(warning=f"The index {file} is damaged or of another version; every image is read again.")
        if len(blocks) <= 1:
            return blocks[0] if blocks else cls()
        return cls(
            b"\0".join(block.joined for block in blocks if len(block)),
            np.concatenate([block.stats for block in blocks]),
            np.concatenate([block.digests for block in blocks]),
            first=len(blocks[0]),
            blocks=len(blocks),
        )

    @classmethod
    def _of(cls, body: memoryview) -> DigestIndex:
        count, width = COUNTS.unpack_from(body)
        stats_end = COUNTS.size + count * STAT_COLUMNS * 8
        digests_end = stats_end + count * DIGEST_BYTES
        return cls(
            bytes(body[digests_end : digests_end + width]),
            np.frombuffer(body[COUNTS.size : stats_end], "<i8").astype(np.int64, copy=False).reshape(-1, STAT_COLUMNS),
            np.frombuffer(body[stats_end:digests_end], np.uint8).reshape(-1, DIGEST_BYTES),
            first=count,
            blocks=1,
        )

    def _block(self) -> bytes:
        columns = self.stats.astype("<i8", copy=False).tobytes() + np.ascontiguousarray(self.digests).tobytes()
        body = COUNTS.pack(len(self), len(self.joined)) + columns + self.joined
        return MAGIC + digest_bytes(body) + body

    def save(self, file: Path) -> None:
        """Publish these entries alone, atomically.

        Raises:
            OSError: the folder cannot be written.
        """
        publish_file(file, self._block())

    def append(self, file: Path) -> None:
        """Put these entries behind those in the file, whoever else does so; what is cut short there is passed over.

        Raises:
            OSError: the file cannot be written.
        """
        file.parent.mkdir(parents=True, exist_ok=True)
        rest = memoryview(self._block())
        while rest:
            descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                lock_file(descriptor, shared=True, blocking=True)
                while rest and os.fstat(descriptor).st_nlink:  # else it was made anew while we waited
                    rest = rest[os.write(descriptor, rest) :]
            finally:
                os.close(descriptor)

    @classmethod
    def compact(cls, file: Path, paths: list[str], stats: Stats) -> bool:
        """Make one block of what the file still holds of a tree, alone with it; whether that could be done.

        Raises:
            OSError: the folder cannot be written.
        """
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not lock_file(descriptor, shared=False, blocking=False) or not os.fstat(descriptor).st_nlink:
                return False
            nothing = np.zeros((len(paths), DIGEST_BYTES), np.uint8)
            cls.load(file).updated(paths, stats, nothing, np.zeros(len(paths), bool), read_ns=0).save(file)
            return True
        except BlockingIOError:  # somebody appends to it: another time
            return False
        finally:
            os.close(descriptor)

    def lookup(self, paths: list[str], stats: Stats) -> tuple[Digests, NDArray[np.bool_]]:
        """The digests of the files that are as they were.

        Returns:
            uint8 (n, 16), zeros where unknown, and bool (n,), known.
        """
        if _join(paths) == self.joined and len(paths) == len(self):
            known = _equal_rows(self.stats, stats)
            return np.where(known[:, None], self.digests, np.uint8(0)), known
        rows = _last_rows(_split(self.joined), paths)
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
        return DigestIndex(_join(names), stats[keep], merged[keep], first=int(keep.sum()), blocks=1)


def _whole_blocks(data: bytes) -> Iterator[memoryview]:
    """The bodies of all blocks that are whole, in their order."""
    place, view = 0, memoryview(data)
    while place >= 0:
        body = view[place + HEAD :]
        if data.startswith(MAGIC, place) and len(body) >= COUNTS.size:
            count, width = COUNTS.unpack_from(body)
            body = body[: COUNTS.size + count * (STAT_COLUMNS * 8 + DIGEST_BYTES) + width]
            if data[place + len(MAGIC) : place + HEAD] == digest_bytes(body):
                yield body
                place += HEAD + len(body) - 1
        place = data.find(MAGIC, place + 1)


def _last_rows(held: list[str], paths: list[str]) -> NDArray[np.int64]:
    """The last place (n,) in ``held`` of each path, -1 for none: as a dict would tell, at a third of its time.

    Where hashes of 64 bits collide a path is not found, and its file is read again.
    """
    if not held:
        return np.full(len(paths), -1, np.int64)
    hashes = [np.fromiter(map(hash, names), np.int64, len(names)) for names in (held, paths)]
    order, asked = (np.argsort(values, kind="stable") for values in hashes)
    rows = np.empty(len(paths), np.int64)
    rows[asked] = order[np.searchsorted(hashes[0][order], hashes[1][asked], side="right") - 1]
    same = np.array(held, object)[rows] == np.array(paths, object)
    return np.where(same, rows, -1)


def _equal_rows(left: Stats, right: Stats) -> NDArray[np.bool_]:
    equal: NDArray[np.bool_] = (left == right).all(axis=1)
    return equal


def _join(paths: list[str]) -> bytes:
    return "\0".join(paths).encode("utf-8", "surrogateescape")


def _split(joined: bytes) -> list[str]:
    return joined.decode("utf-8", "surrogateescape").split("\0") if joined else []
