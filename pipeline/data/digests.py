"""Content digests: find rows by them, and the digest of a whole data set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..files import DIGEST_BYTES, digest_bytes

Digests = NDArray[np.uint8]


def empty_digests() -> Digests:
    """No digests, shape (0, 16)."""
    return np.empty((0, DIGEST_BYTES), np.uint8)


def stack_digests(digests: list[bytes]) -> Digests:
    """A list of 16-byte digests as an array (n, 16)."""
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES)


class DigestTable:
    """Digests (n, 16), sorted once to be found any number of times."""

    def __init__(self, digests: Digests) -> None:
        self.digests = digests
        words = _words(digests)
        # By the first half alone: rows that agree in it stay in their order, and `locate` walks over them.
        self._order = np.argsort(np.ascontiguousarray(words[:, 0]), kind="stable")
        self._sorted = words[self._order]

    def __len__(self) -> int:
        return len(self.digests)

    def extended(self, digests: Digests) -> DigestTable:
        """The table with more rows behind its own, at the price of a copy."""
        more, larger = DigestTable(digests), DigestTable(empty_digests())
        place = np.searchsorted(self._sorted[:, 0], more._sorted[:, 0], side="right")
        larger.digests = np.concatenate([self.digests, digests])
        larger._order = np.insert(self._order, place, more._order + len(self))
        larger._sorted = np.insert(self._sorted, place, more._sorted, axis=0)
        return larger

    def locate(self, query: Digests) -> NDArray[np.int64]:
        """The row that equals each row of ``query`` (m, 16), the first of equals; -1 for none."""
        found = np.full(len(query), -1, np.int64)
        # In their order, so that the search goes through memory once instead of jumping about in it.
        open_ = np.argsort(np.ascontiguousarray(_words(query)[:, 0]))
        wanted = _words(query)[open_]
        position = np.searchsorted(self._sorted[:, 0], wanted[:, 0])
        # A second turn happens only where the first 64 bits agree and the rest does not.
        while len(open_):
            inside = position < len(self)
            open_, wanted, position = open_[inside], wanted[inside], position[inside]
            candidates = self._sorted[position]
            equal = (candidates == wanted).all(axis=1)
            found[open_[equal]] = self._order[position[equal]]
            collides = ~equal & (candidates[:, 0] == wanted[:, 0])
            open_, wanted, position = open_[collides], wanted[collides], position[collides] + 1
        return found


def locate(table: Digests, query: Digests) -> NDArray[np.int64]:
    """The row of ``table`` (n, 16) that equals each row of ``query`` (m, 16), the first of equals; -1 for none."""
    return DigestTable(table).locate(query)


def first_occurrences(digests: Digests) -> NDArray[np.bool_]:
    """Which rows of (n, 16) hold a digest that no earlier row holds."""
    return np.equal(locate(digests, digests), np.arange(len(digests)))


def _words(digests: Digests) -> NDArray[np.uint64]:
    return np.ascontiguousarray(digests).view(np.uint64)


def data_digest(digests: Digests, labels: Sequence[str], splits: Sequence[str]) -> str:
    """BLAKE2b-128 (hex) over the sorted (digest, label, split) of all images: order and paths do not matter.

    Args:
        digests: (n, 16) uint8.
        labels: n class names, "" where there is none.
        splits: n names of splits.
    """
    # A class or a split is named by a folder, and no name of a folder holds a zero byte: the parts cannot run together.
    names = zip(labels, splits, strict=True)
    ends = (f"\0{label}\0{split}\0".encode("utf-8", "surrogateescape") for label, split in names)
    rows = sorted(row.tobytes() + end for row, end in zip(digests, ends, strict=True))
    return digest_bytes(b"".join(rows)).hex()
