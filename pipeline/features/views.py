"""Views: an image as the transform shows it, or a random crop and flip that seed, number and content determine."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..data.framing import RESAMPLING, Frame, Framing
from ..runtime.seeds import make_generator
from .spec import PLAIN_VIEW

RULE = "crop-flip-1"
SCALE, RATIO, TRIES = (0.35, 1.0), (3 / 4, 4 / 3), 10


@dataclass(frozen=True)
class View:
    """What of an image the backbone is shown: number 0 what its framing says, others a random part of it."""

    number: int = 0
    seed: int = 0

    @property
    def name(self) -> str:
        """How a feature spec names it."""
        return f"{RULE}/{self.seed}/{self.number}" if self.number else PLAIN_VIEW

    def pixels(self, image: Image.Image, digest: bytes, framing: Framing) -> NDArray[np.uint8]:
        """Pixels (3, crop, crop) of an RGB image; those of a random part are mirrored every other time.

        Seed, number and the image's content determine the part. It is drawn as in torchvision's RandomResizedCrop
        (Szegedy et al. 2015), with 35 to 100 % of the area.
        """
        if not self.number:
            return framing.pixels(image)
        frame = self.frame(image.size, digest, framing)
        part = image.resize(frame.size, RESAMPLING[framing.interpolation], box=frame.box)
        if frame.mirrored:
            part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(part, np.uint8).transpose(2, 0, 1)

    def frame(self, size: tuple[int, int], digest: bytes, framing: Framing) -> Frame:
        """What becomes of an image of this width and height.

        Raises:
            BadImage: the resized image would have too many pixels.
        """
        if not self.number:
            return framing.frame(size)
        generator = make_generator(RULE, self.seed, self.number, digest)
        box = _random_box(size, generator)
        return Frame(box, (framing.crop, framing.crop), (0, 0), mirrored=generator.random() < 0.5)


PLAIN = View()


def _random_box(size: tuple[int, int], generator: np.random.Generator) -> tuple[int, int, int, int]:
    width, height = size
    for _ in range(TRIES):
        area = width * height * generator.uniform(*SCALE)
        ratio = math.exp(generator.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1))
            return left, top, left + w, top + h
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side
