"""Small pictures of images, made once and kept by digest."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..data.decode import BadImage, Decoder
from ..data.images import Images
from ..files import temporary_name
from ..runtime.cores import usable_cores

FOLDER = "thumbnails"
SIDE = 120  # pixels of the longer side
QUALITY = 72
JPEG_HEAD = b"\xff\xd8\xff"


class Thumbnails:
    """JPEGs of the images of a table, none of them larger than a few kB.

    Args:
        positions: (n,) where each row of the table stands in ``images``.
    """

    def __init__(self, images: Images, positions: NDArray[np.int64], decoder: Decoder, cache_dir: Path) -> None:
        self._images, self._positions = images, positions
        self._decode = replace(decoder, draft_size=(2 * SIDE, 2 * SIDE))
        self._folder = cache_dir / FOLDER
        self._made: dict[int, bytes | None] = {}

    def make(self, rows: Iterable[int]) -> None:
        """Have those of ``rows`` at hand, on all cores."""
        todo = sorted({int(row) for row in rows} - set(self._made))
        with ThreadPoolExecutor(usable_cores()) as pool:
            self._made |= dict(zip(todo, pool.map(self._jpeg, todo), strict=True))

    def jpeg(self, row: int) -> bytes | None:
        """A picture, or None where the image has gone or cannot be shown."""
        self.make([row])
        return self._made[int(row)]

    def uri(self, row: int) -> str | None:
        """The picture as a ``data:`` address."""
        data = self.jpeg(row)
        return None if data is None else f"data:image/jpeg;base64,{base64.b64encode(data).decode('ascii')}"

    def atlas(self, rows: list[int], side: int) -> bytes:
        """One JPEG with a square picture of ``side`` pixels for each of ``rows``, 40 in a line; grey where none is."""
        self.make(rows)
        sheet = Image.new("RGB", (40 * side, max(-(-len(rows) // 40), 1) * side), (128, 128, 128))
        for place, row in enumerate(rows):
            if (data := self._made[row]) is not None:
                with Image.open(io.BytesIO(data)) as image:
                    image.thumbnail((side, side), Image.Resampling.BOX)
                    left = side * (place % 40) + (side - image.width) // 2
                    sheet.paste(image, (left, side * (place // 40) + (side - image.height) // 2))
        return _encoded(sheet, 60)

    def _jpeg(self, row: int) -> bytes | None:
        position = int(self._positions[row])
        digest = self._images.digest(position).hex()
        file = self._folder / digest[:2] / f"{digest}.jpg"
        with suppress(OSError):
            kept = file.read_bytes()
            if kept.startswith(JPEG_HEAD):
                return kept
        return self._make(position, digest, file)

    def _make(self, position: int, digest: str, file: Path) -> bytes | None:
        data = self._images.read(position)
        if data is None or self._images.digest(position).hex() != digest:
            return None
        try:
            image = self._decode(data)
        except BadImage:
            return None
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        made = _encoded(image, QUALITY)
        with suppress(OSError):  # it is made again the next time
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = temporary_name(file)
            temporary.write_bytes(made)
            os.replace(temporary, file)
        return made


def _encoded(image: Image.Image, quality: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality, optimize=True)
    return stream.getvalue()
