"""Do images still decode to the pixels that the cached features were computed from?

Each key keeps digests of the decoded pixels of a few images together with the versions of the decoding libraries.
When a version differs, those images are decoded again before anything is added to the key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from ..backbones import Pixels
from ..errors import DriftError
from ..files import digest_bytes, publish_file, seal_json, unseal_json
from .store import cannot_write

DRIFT_FILE = "pixels.json"
SAMPLES = 4

Versions = Mapping[str, str]


def pixel_digest(pixels: Pixels) -> str:
    """Hex BLAKE2b-128 of an image's pixels, shape included."""
    return digest_bytes(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).hex()


class PixelRecord:
    """The pixel digests of a few images of a key, and the library versions known to reproduce them."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / DRIFT_FILE
        self.samples: dict[str, str] = {}
        self._versions: list[dict[str, str]] = []
        # Without a whole record there is nothing to compare; the next extraction begins a new one.
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            content = unseal_json(self._file.read_bytes())
            self.samples, self._versions = dict(content["samples"]), list(content["versions"])

    def needs_check(self, versions: Versions) -> bool:
        """Whether these library versions have not been compared yet."""
        return bool(self.samples) and dict(versions) not in self._versions

    def check(self, versions: Versions, pixels_of: Callable[[bytes], Pixels | None]) -> int:
        """Decode the recorded images again and compare; remember the versions when all agree.

        Args:
            pixels_of: pixels of the content with a digest (16 bytes), or None where it is not at hand.

        Returns:
            how many images could be compared; 0 leaves the question open.

        Raises:
            DriftError: an image now decodes to other pixels.
            CacheError: the cache folder cannot be written.
        """
        compared = 0
        for digest, recorded in self.samples.items():
            pixels = pixels_of(bytes.fromhex(digest))
            if pixels is None:
                continue
            compared += 1
            if pixel_digest(pixels) != recorded:
                raise _drift(self._file, self._versions, versions, digest)
        if compared:
            self._write(self.samples, [*self._versions, dict(versions)])
        return compared

    def record(self, versions: Versions, samples: Mapping[bytes, str]) -> None:
        """Keep the pixel digests of the first images of a new key.

        Raises:
            CacheError: the cache folder cannot be written.
        """
        if not self.samples and samples:
            self._write({digest.hex(): pixels for digest, pixels in samples.items()}, [dict(versions)])

    def _write(self, samples: dict[str, str], versions: list[dict[str, str]]) -> None:
        self.samples, self._versions = samples, versions
        try:
            publish_file(self._file, seal_json({"samples": samples, "versions": versions}))
        except OSError as error:
            raise cannot_write(self._file, error) from error


def _drift(file: Path, old: list[dict[str, str]], new: Versions, digest: str) -> DriftError:
    return DriftError(
        "Images decode to other pixels than those the cached features were computed from.",
        where=f"{file.parent} (image with digest {digest})",
        why=f"the features were made with {old[-1]}, this is {dict(new)}",
        remedy="install those versions again, or set cache.dir to another folder to start a new cache",
    )
