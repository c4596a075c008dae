"""Do images still decode to the pixels that the cached features were computed from?

Each key keeps digests of the pixels of a few probe images, which are in the package, together with the versions of
the decoding libraries that gave them. With other versions the probes are decoded again before anything is added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from ..backbones import Pixels
from ..data import probes
from ..data.decode import BadImage
from ..errors import DriftError
from ..files import digest_bytes, publish_file, seal_json, unseal_json
from .store import cannot_write

DRIFT_FILE = "pixels.json"

Versions = Mapping[str, str]


def pixel_digest(pixels: Pixels) -> str:
    """Hex BLAKE2b-128 of an image's pixels, shape included."""
    return digest_bytes(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).hex()


class PixelRecord:
    """The pixel digests of a key's probes, and the library versions known to reproduce them.

    Keys from before there were probes have ``samples``: digests of the pixels of some of the user's images.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / DRIFT_FILE
        self.probes: dict[str, str] = {}
        self.samples: dict[str, str] = {}
        self.versions: list[dict[str, str]] = []
        # Without a whole record there is nothing to compare, and a new one is begun.
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            content = unseal_json(self._file.read_bytes())
            self.samples, self.versions = dict(content["samples"]), list(content["versions"])
            self.probes = dict(content.get("probes", {}))

    def confirm(
        self,
        versions: Versions,
        pixels_of: Callable[[bytes], Pixels],
        sample_of: Callable[[bytes], bytes | None],
    ) -> None:
        """Make sure that today's libraries give the pixels of this key; begin the record of a new one.

        Args:
            versions: of today's libraries.
            pixels_of: an image's bytes to pixels, as the key's features were computed from.
            sample_of: the bytes of the image with a digest (16 bytes), or None where it is not at hand.

        Raises:
            DriftError: other pixels, or no way to tell.
            CacheError: the cache folder cannot be written.
        """
        known = dict(versions) in self.versions
        if known and self.probes:
            return
        seen = {name: digest for name, data in probes.read_all() if (digest := _digest_of(data, pixels_of))}
        if self.versions and not known:
            self._compare(versions, seen, pixels_of, sample_of)
        self.probes = {**seen, **self.probes}
        self.versions = self.versions if known else [*self.versions, dict(versions)]
        self._write()

    def _compare(
        self,
        versions: Versions,
        seen: Mapping[str, str],
        pixels_of: Callable[[bytes], Pixels],
        sample_of: Callable[[bytes], bytes | None],
    ) -> None:
        # What one side cannot read is in quarantine there and has no feature to differ.
        pairs = [(name, self.probes[name], seen[name]) for name in self.probes if name in seen]
        if not self.probes:
            contents = ((digest, sample_of(bytes.fromhex(digest))) for digest in self.samples)
            pairs = [
                (f"the image with digest {digest}", self.samples[digest], pixel_digest(pixels_of(data)))
                for digest, data in contents
                if data is not None
            ]
        for name, recorded, now in pairs:
            if recorded != now:
                raise self._drift(versions, name, "Images decode to other pixels than those")
        if not pairs:
            raise self._drift(versions, "no image to compare is here", "It is not known that images decode to those")

    def _write(self) -> None:
        content = {"probes": self.probes, "samples": self.samples, "versions": self.versions}
        try:
            publish_file(self._file, seal_json(content))
        except OSError as error:
            raise cannot_write(self._file, error) from error

    def _drift(self, versions: Versions, name: str, what: str) -> DriftError:
        old = self.versions[-1]
        return DriftError(
            f"{what} the cached features were computed from.",
            where=f"{self._file.parent} ({name})",
            why=f"the features were made with {old}, this is {dict(versions)}",
            remedy=f"install those versions again (pip install pillow=={old.get('pillow')}), or set cache.dir to"
            " another folder to start a new cache",
        )


def _digest_of(data: bytes, pixels_of: Callable[[bytes], Pixels]) -> str | None:
    """The pixel digest of an image that these libraries can read."""
    try:
        return pixel_digest(pixels_of(data))
    except BadImage:
        return None
