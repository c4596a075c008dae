"""Resize and crop an RGB image to the pixels that a network takes, by Pillow alone: needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .decode import BadImage, Reason

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
# A resize keeps the aspect ratio, so a strip of 1 x 100 000 pixels would become 256 x 25 600 000.
MAX_RESIZED_PIXELS = 178_956_970


@dataclass(frozen=True)
class Frame:
    """What becomes of an image: its ``box`` (left, top, right, bottom; None: all of it) resized to ``size`` (width,
    height), of which a square from ``corner`` (left, top) on is the pixels, ``mirrored`` or not.
    """

    box: tuple[int, int, int, int] | None
    size: tuple[int, int]
    corner: tuple[int, int]
    mirrored: bool = False


@dataclass(frozen=True)
class Framing:
    """Resize the shorter side to ``resize`` pixels (``None``: not at all), crop ``crop`` x ``crop`` from the centre.

    To the pixel what torchvision's `resize` and `center_crop` make of a Pillow image. With ``squash`` both sides become
    ``resize``, whatever the image's shape.
    """

    resize: int | None
    crop: int
    interpolation: str
    squash: bool = False

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """The pixels (3, crop, crop) of an RGB image; black where it is smaller than the crop.

        Their memory is in the order of the image: height, width, channel. They cannot be written to.

        Raises:
            BadImage: the resized image would have too many pixels.
        """
        frame = self.frame(image.size)
        if frame.size != image.size:
            image = image.resize(frame.size, RESAMPLING[self.interpolation])
        left, top = frame.corner
        image = image.crop((left, top, left + self.crop, top + self.crop))
        return np.asarray(image, dtype=np.uint8).transpose(2, 0, 1)

    def frame(self, size: tuple[int, int]) -> Frame:
        """What becomes of an image of this width and height.

        Raises:
            BadImage: as `pixels`.
        """
        self.check_size(size)
        width, height = self._resized(size)
        return Frame(None, (width, height), (self._margin(width), self._margin(height)))

    def check_size(self, size: tuple[int, int]) -> None:
        """Refuse a strip that would be resized to more pixels than any image is allowed.

        Raises:
            BadImage: the resized image would have too many pixels.
        """
        if self.resize is None or self.squash:
            return
        short, long = sorted(size)
        pixels = self.resize * (self.resize * long // max(short, 1))
        if pixels > MAX_RESIZED_PIXELS:
            raise BadImage(
                Reason.TOO_MANY_PIXELS,
                f"{size[0]} x {size[1]} pixels, resized to a shorter side of {self.resize}, are {pixels}",
            )

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        if self.resize is None:
            return size
        width, height = size
        if self.squash:
            return self.resize, self.resize
        long = int(self.resize * max(width, height) / min(width, height))
        return (self.resize, long) if width <= height else (long, self.resize)

    def _margin(self, side: int) -> int:
        """What the crop leaves out before it, negative where it reaches beyond the image."""
        return round((side - self.crop) / 2) if side >= self.crop else -((self.crop - side) // 2)
