"""What a decoding thread does with one file: read, digest, decide, decode, crop. Keeps the books of a scan."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.decode import BadImage, read_bytes
from ..data.scan import ImageTree
from ..files import digest_bytes
from .digests import Digests
from .extractor import Clock, Content, Pixels
from .quarantine import BadContent, Quarantine

Decode = Callable[[bytes], Image.Image]
Crop = Callable[[Image.Image, bytes], Pixels]
InHand = Callable[[str, bytes], AbstractContextManager[None]]


def _unguarded(_path: str, _digest: bytes) -> AbstractContextManager[None]:
    return nullcontext()


class Books:
    """What a scan knows of each file: its content digest, when it was read, and why it could not be."""

    def __init__(self, tree: ImageTree, digests: Digests, known: np.ndarray) -> None:
        self.tree = tree
        self.digests, self.known = digests.copy(), known.copy()
        self.stats = tree.stats.copy()
        self.read_ns = np.zeros(len(tree.paths), np.int64)
        self.failures: dict[int, str] = {}

    def path(self, position: int) -> Path:
        """The absolute path of a file."""
        return self.tree.root / self.tree.paths[position]

    def read(self, position: int) -> bytes | None:
        """A file's bytes, its digest and stat noted; None where the file cannot be read, the reason noted."""
        started = time.time_ns()
        try:
            data, stat = read_bytes(self.path(position))
        except OSError as error:
            self.failures[position] = f"{type(error).__name__}: {error.strerror or error}"
            self.known[position] = False
            return None
        self.stats[position], self.read_ns[position] = stat, started
        self.digests[position] = np.frombuffer(digest_bytes(data), np.uint8)
        self.known[position] = True
        return data

    def learn(self, digests: Digests, known: np.ndarray) -> None:
        """Take over what other processes have read: digests (n, 16) where ``known`` (n,)."""
        self.digests[known] = digests[known]
        self.known |= known

    def digest(self, position: int) -> bytes:
        """The 16 bytes that name a read file's content."""
        return bytes(self.digests[position])


class Preparation:
    """The ``prepare`` of an extraction: each content that has no feature yet is decoded once, whatever its paths.

    Args:
        have: contents that need no forward pass.
        crop: image and digest to uint8 pixels (3, h, w); the digest seeds augmented views.
        in_hand: guards the decoding of a path with a digest, so that a crash can be traced to it.
    """

    def __init__(
        self,
        books: Books,
        have: set[bytes],
        quarantine: Quarantine,
        *,
        decode: Decode,
        crop: Crop,
        in_hand: InHand = _unguarded,
    ) -> None:
        self.books, self.quarantine = books, quarantine
        self._claimed, self._decode, self._crop, self._in_hand = have, decode, crop, in_hand
        self._lock = threading.Lock()
        self.newly_bad: dict[bytes, BadContent] = {}

    def __call__(self, position: int, clock: Clock) -> Content:
        """Read the file; decode it unless its content is known, claimed by an equal file, or in quarantine."""
        with clock.step("read"):
            data = self.books.read(position)
        if data is None:
            return Content(position, None)
        digest = self.books.digest(position)
        if not self._claim(digest):
            return Content(position, digest)
        with clock.step("decode"):
            return Content(position, digest, self._pixels(position, digest, data))

    def _claim(self, digest: bytes) -> bool:
        with self._lock:
            if digest in self._claimed or self.quarantine.get(digest):
                return False
            self._claimed.add(digest)
            return True

    def _pixels(self, position: int, digest: bytes, data: bytes) -> Pixels | None:
        path = str(self.books.path(position))
        try:
            with self._in_hand(path, digest):
                return self._crop(self._decode(data), digest)
        except BadImage as bad:
            content = BadContent(path, bad.reason.value, bad.detail, bad.reason.remedy)
            with self._lock:
                self.quarantine.add(digest, content)
                self.newly_bad[digest] = content
            return None
