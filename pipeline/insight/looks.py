"""How each image looks, from one decoding that is kept: a tiny picture, its light, its sharpness, its size."""

from __future__ import annotations

import io
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..data.decode import BadImage, Decoder
from ..data.digests import Digests, empty_digests, locate
from ..data.images import Images
from ..files import DIGEST_BYTES, digest_bytes, publish_file
from ..runtime.cores import usable_cores
from ..runtime.progress import ProgressBar

ICON = 20
SIDE = 128  # light and sharpness are measured on a picture whose longer side is at most this
DRAFT = 2 * SIDE

Icons = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Looks:
    """n contents as they look.

    Attributes:
        digests: uint8 (n, 16).
        icons: uint8 (n, 20, 20, 3), the whole image squeezed into a square.
        width, height: (n,) pixels, upright.
        dark, bright: (n,) luminance in 0..1 that 95 % of the pixels stay below, and that 5 % do.
        sharpness: (n,) standard deviation of the Laplacian of the luminance, by that of the luminance.
        colour: (n,) mean spread of red, green and blue, in 0..1; 0 is grey.
    """

    digests: Digests
    icons: Icons
    width: Floats
    height: Floats
    dark: Floats
    bright: Floats
    sharpness: Floats
    colour: Floats

    def __len__(self) -> int:
        return len(self.digests)

    @classmethod
    def none(cls) -> Self:
        """Of no image."""
        return cls(empty_digests(), np.empty((0, ICON, ICON, 3), np.uint8), *(np.empty(0, np.float32),) * 6)

    def take(self, rows: NDArray[np.int64]) -> Self:
        """Only ``rows``, in their order."""
        return replace(self, **{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def save(self, file: Path) -> None:
        """Publish as NumPy arrays behind a digest of themselves.

        Raises:
            OSError: the file cannot be written.
        """
        body = io.BytesIO()
        np.savez(body, **vars(self))
        publish_file(file, digest_bytes(body.getvalue()) + body.getvalue())

    @classmethod
    def load(cls, file: Path) -> Self:
        """What `save` wrote; of no image where there is nothing, or where it is damaged: it only saves time."""
        try:
            data = file.read_bytes()
            if digest_bytes(data[DIGEST_BYTES:]) != data[:DIGEST_BYTES]:
                return cls.none()
            with np.load(io.BytesIO(data[DIGEST_BYTES:])) as arrays:
                return cls(**{field.name: arrays[field.name] for field in fields(cls)})
        except (OSError, KeyError, ValueError, zipfile.BadZipFile):
            return cls.none()


def look_at(images: Images, rows: NDArray[np.int64], decoder: Decoder, known: Looks, *, quiet: bool = True) -> Looks:
    """The looks of the images at ``rows`` (m,), in their order; only those not ``known`` are decoded.

    An image that has gone, or is none, looks like a blank of no size.
    """
    small = replace(decoder, draft_size=(DRAFT, DRAFT))
    wanted = images.digests[rows]
    todo = np.flatnonzero(locate(known.digests, wanted) < 0)

    def look(row: int) -> Looks | None:
        data = images.read(int(rows[row]))
        bar.advance()
        try:
            return None if data is None else look_of(data, small, wanted[row])
        except BadImage:
            return None

    with ProgressBar("looking", len(todo), quiet=quiet) as bar, ThreadPoolExecutor(usable_cores()) as pool:
        found = [each for each in pool.map(look, todo) if each is not None]
    every = _joined([known, *found])
    place = locate(every.digests, wanted)
    blank = replace(Looks.none(), **{name: np.zeros((1, *value.shape[1:]), value.dtype) for name, value in _columns()})
    return replace(_joined([every, blank]).take(np.where(place < 0, len(every), place)), digests=wanted)


def look_of(data: bytes, decoder: Decoder, digest: NDArray[np.uint8]) -> Looks:
    """The looks of one image, as one row.

    Raises:
        BadImage: it cannot be decoded.
    """
    image = decoder(data)
    with Image.open(io.BytesIO(data)) as header:
        size = header.size
    if (size[0] > size[1]) != (image.width > image.height):
        size = size[::-1]
    return Looks(
        digest[None], icon_of(image)[None], *(np.array([value], np.float32) for value in (*size, *_measures(image)))
    )


def icon_of(image: Image.Image) -> Icons:
    """Uint8 (20, 20, 3)."""
    return np.asarray(image.resize((ICON, ICON), Image.Resampling.BOX, reducing_gap=3), np.uint8)


def _measures(image: Image.Image) -> tuple[float, float, float, float]:
    small = image.copy()
    small.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    pixels = np.asarray(small, np.float32) / 255
    light = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    dark, bright = np.quantile(light, (0.95, 0.05))
    inner = light[1:-1, 1:-1]
    bend = light[:-2, 1:-1] + light[2:, 1:-1] + light[1:-1, :-2] + light[1:-1, 2:] - 4 * inner
    spread = light.std()
    sharp = float(bend.std() / spread) if bend.size and spread > 1e-3 else 0.0
    return float(dark), float(bright), sharp, float((pixels.max(axis=2) - pixels.min(axis=2)).mean())


def _columns() -> list[tuple[str, NDArray[np.generic]]]:
    return list(vars(Looks.none()).items())


def _joined(parts: list[Looks]) -> Looks:
    return Looks(**{name: np.concatenate([getattr(part, name) for part in parts]) for name, _ in _columns()})
