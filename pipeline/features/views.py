"""Augmented views: a random crop and flip of an image, determined by seed, view and content."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from ..backbones.transform import Transform
from ..runtime.seeds import make_generator
from .extractor import Pixels

RULE = "crop-flip-1"
SCALE, RATIO, TRIES = (0.35, 1.0), (3 / 4, 4 / 3), 10
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def view_name(number: int, seed: int) -> str:
    """How the spec names the ``number``-th view (from 1) of a seed."""
    return f"{RULE}/{seed}/{number}"


def view_pixels(image: Image.Image, digest: bytes, *, transform: Transform, seed: int, view: int) -> Pixels:
    """Pixels (3, crop, crop) of a random part of an RGB image, resized, and mirrored every other time.

    The box is drawn as in torchvision's RandomResizedCrop (Szegedy et al. 2015), with 35 to 100 % of the area.
    """
    generator = make_generator(RULE, seed, view, digest)
    box = _random_box(image.size, generator)
    part = image.resize((transform.crop, transform.crop), RESAMPLING[transform.interpolation], box=box)
    if generator.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.ascontiguousarray(np.asarray(part, np.uint8).transpose(2, 0, 1))


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
