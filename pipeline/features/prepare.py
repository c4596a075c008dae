"""What a decoding thread does with one file: read, digest, decide, decode, crop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from ..backbones import Pixels
from ..data.decode import BadImage
from ..data.images import Images
from .extractor import Clock, Prepared
from .quarantine import BadContent, Quarantine

Decode = Callable[[bytes, bytes], Pixels]
InHand = Callable[[str, bytes], AbstractContextManager[None]]


def _unguarded(_path: str, _digest: bytes) -> AbstractContextManager[None]:
    return nullcontext()


class Preparation:
    """The ``prepare`` of an extraction: each content that has no feature yet is decoded once, whatever its paths.

    Args:
        have: whether a content (its digest) needs no forward pass.
        decode: bytes and digest to uint8 pixels (3, h, w); the digest seeds augmented views.
        in_hand: guards the decoding of a path with a digest, so that a crash can be traced to it.
    """

    def __init__(
        self,
        images: Images,
        have: Callable[[bytes], bool],
        quarantine: Quarantine,
        *,
        decode: Decode,
        in_hand: InHand = _unguarded,
    ) -> None:
        self.images, self.quarantine = images, quarantine
        self._have, self._decode, self._in_hand = have, decode, in_hand
        self._claimed: set[bytes] = set()
        self._lock = threading.Lock()

    def __call__(self, position: int, clock: Clock) -> Prepared:
        """Read the file; decode it unless its content is known, claimed by an equal file, or in quarantine."""
        with clock.step("read"):
            data = self.images.read(position)
        if data is None:
            return Prepared(position, None)
        digest = self.images.digest(position)
        if not self._claim(digest):
            return Prepared(position, digest)
        with clock.step("decode"):
            return Prepared(position, digest, self._pixels(position, digest, data))

    def _claim(self, digest: bytes) -> bool:
        with self._lock:
            if digest in self._claimed or self.quarantine.get(digest) or self._have(digest):
                return False
            self._claimed.add(digest)
            return True

    def _pixels(self, position: int, digest: bytes, data: bytes) -> Pixels | None:
        path = self.images.path(position)
        try:
            with self._in_hand(path, digest):
                return self._decode(data, digest)
        except BadImage as bad:
            self.quarantine.add(digest, BadContent(path, bad.reason.value, bad.detail, bad.reason.remedy))
            return None
