"""Random changes of training images: torchvision's v2 operations with parameters that we draw ourselves, and mixing.

torchvision draws from the process's random state, which threads share and workers copy. Here every draw derives
from (seed, epoch, digest): an image is changed the same way whatever thread, process or batch it falls into. Images
are mixed within a batch, as (seed, epoch, batch) draws it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ..params.sections import AugmentParams
from ..runtime.device import to_device
from ..runtime.seeds import make_generator

RATIO = (3 / 4, 4 / 3)  # aspect ratios of random crops
CROP_SCALE, FLIP = (0.35, 1.0), 0.5  # what `auto` is where no probe is asked
ERASE_SCALE = (0.02, 0.33)
ERASE_RATIO = (0.3, 3.3)
ATTEMPTS = 10
TRIVIAL_LEVELS = 31
TRIVIAL_OPERATIONS = (
    "identity",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "auto_contrast",
    "equalize",
)
Box = tuple[int, int, int, int]


class Augment:
    """Draws and applies the changes of one image.

    Args:
        params: what may change and how much.
        size: side of the result in pixels; ``params.crop`` overrides it.
        interpolation: nearest, bilinear or bicubic, as in the backbone's transform.
        fill: RGB in 0..1 of erased and uncovered areas, the mean that normalisation maps to zero.
    """

    def __init__(self, params: AugmentParams, *, size: int, interpolation: str, fill: Sequence[float]) -> None:
        self.params, self.size = params, params.crop or size
        self.crop_scale = CROP_SCALE if params.crop_scale == "auto" else params.crop_scale
        self.flip = FLIP if params.horizontal_flip == "auto" else params.horizontal_flip
        self.interpolation = InterpolationMode(interpolation)
        self.fill = [round(255 * value) for value in fill]

    def pixels(self, image: Image.Image, *, seed: int, epoch: int, digest: bytes) -> NDArray[np.uint8]:
        """Augmented pixels of an RGB image, uint8 (size, size, 3)."""
        random = make_generator(seed, "augment", epoch, digest)
        top, left, height, width = crop_box(random, image.height, image.width, self.crop_scale)
        image = F.resized_crop(image, top, left, height, width, [self.size, self.size], self.interpolation, True)
        pixels = np.array(self._recolour(self._turn(image, random), random))
        if random.random() < self.flip:
            pixels = pixels[:, ::-1]
        if random.random() < self.params.erasing:
            top, left, height, width = erase_box(random, self.size, self.size)
            pixels[top : top + height, left : left + width] = self.fill
        return pixels

    def _turn(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        if self.params.trivial_augment:
            operation = TRIVIAL_OPERATIONS[random.integers(len(TRIVIAL_OPERATIONS))]
            level, sign = int(random.integers(TRIVIAL_LEVELS)), float(random.choice((-1.0, 1.0)))
            image = trivial_augment(image, operation, level, sign, fill=self.fill)
        if self.params.rotation:
            angle = float(random.uniform(-self.params.rotation, self.params.rotation))
            image = F.rotate(image, angle, InterpolationMode.BILINEAR, fill=self.fill)
        return image

    def _recolour(self, image: Image.Image, random: np.random.Generator) -> Image.Image:
        """ColorJitter: the four adjustments in a random order."""
        limits = (self.params.brightness, self.params.contrast, self.params.saturation, self.params.hue)
        if not any(limits):
            return image
        adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
        for kind in random.permutation(4):
            limit = limits[kind]
            if limit and kind == 3:
                image = F.adjust_hue(image, float(random.uniform(-limit, limit)))
            elif limit:
                image = adjust[kind](image, float(random.uniform(max(0.0, 1 - limit), 1 + limit)))
        return image


def crop_box(random: np.random.Generator, height: int, width: int, scale: tuple[float, float]) -> Box:
    """(top, left, height, width) as RandomResizedCrop draws it: a share of the area within ``scale``, else centred."""
    for _ in range(ATTEMPTS):
        area = height * width * random.uniform(*scale)
        ratio = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < high <= height:
            return int(random.integers(height - high + 1)), int(random.integers(width - wide + 1)), high, wide
    ratio = min(max(width / height, RATIO[0]), RATIO[1])
    wide, high = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (height - high) // 2, (width - wide) // 2, high, wide


def erase_box(random: np.random.Generator, height: int, width: int) -> Box:
    """(top, left, height, width) as RandomErasing draws it; empty when no drawn box fits."""
    for _ in range(ATTEMPTS):
        area = height * width * random.uniform(*ERASE_SCALE)
        ratio = math.exp(random.uniform(math.log(ERASE_RATIO[0]), math.log(ERASE_RATIO[1])))
        high, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if high < height and wide < width:
            return int(random.integers(height - high + 1)), int(random.integers(width - wide + 1)), high, wide
    return 0, 0, 0, 0


def trivial_augment(
    image: Image.Image, operation: str, level: int, sign: float, *, fill: Sequence[int] | None
) -> Image.Image:
    """One operation of TrivialAugmentWide (Müller and Hutter 2021) at ``level`` of 0..30, the ranges of torchvision."""
    share = level / (TRIVIAL_LEVELS - 1)
    signed = sign * 0.99 * share
    changed: Image.Image
    match operation:
        case "identity":
            changed = image
        case "shear_x":
            changed = _affine(image, shear=[math.degrees(math.atan(signed)), 0.0], fill=fill)
        case "shear_y":
            changed = _affine(image, shear=[0.0, math.degrees(math.atan(signed))], fill=fill)
        case "translate_x":
            changed = _affine(image, translate=[int(sign * 32 * share), 0], fill=fill)
        case "translate_y":
            changed = _affine(image, translate=[0, int(sign * 32 * share)], fill=fill)
        case "rotate":
            changed = F.rotate(image, sign * 135 * share, fill=fill)
        case "brightness":
            changed = F.adjust_brightness(image, 1 + signed)
        case "color":
            changed = F.adjust_saturation(image, 1 + signed)
        case "contrast":
            changed = F.adjust_contrast(image, 1 + signed)
        case "sharpness":
            changed = F.adjust_sharpness(image, 1 + signed)
        case "posterize":
            changed = F.posterize(image, 8 - round(6 * share))
        case "solarize":
            changed = F.solarize(image, 255 * (1 - share))
        case "auto_contrast":
            changed = F.autocontrast(image)
        case "equalize":
            changed = F.equalize(image)
        case _:
            raise ValueError(f"unknown operation {operation!r}")
    return changed


def _affine(
    image: Image.Image,
    *,
    translate: list[int] | None = None,
    shear: list[float] | None = None,
    fill: Sequence[int] | None,
) -> Image.Image:
    moved: Image.Image = F.affine(
        image,
        angle=0.0,
        translate=translate or [0, 0],
        scale=1.0,
        shear=shear or [0.0, 0.0],
        interpolation=InterpolationMode.NEAREST,
        fill=fill,
        center=[0, 0] if shear else None,
    )
    return moved


# -- mixing ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mix:
    """Images and, per image, a second target that counts ``1 - share``."""

    images: Tensor
    partners: Tensor
    share: float


def mix_images(
    images: Tensor, *, mixup: float, cutmix: float, place: tuple[int, int, int], rank: int = 0
) -> Mix | None:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) of a normalised batch (n, 3, h, w).

    Each image is mixed with another one of the batch; None where neither is asked for.
    ``mixup`` and ``cutmix`` are the concentrations of their Beta distributions; with both, a coin decides. ``place``
    is (seed, epoch, batch). The share is that of all processes, so that their losses add up; partners are found
    within one process's batch.
    """
    if not mixup and not cutmix:
        return None
    random = make_generator("mix", *place)
    cut = bool(cutmix) and (not mixup or random.random() < 0.5)
    share = float(random.beta(cutmix, cutmix) if cut else random.beta(mixup, mixup))
    box = _mix_box(random, images.shape[-2], images.shape[-1], share)
    order = make_generator("partners", *place, rank).permutation(len(images))
    partners = to_device(order, images.device)
    if not cut:
        return Mix(torch.lerp(images[partners], images, share), partners, share)
    top, bottom, left, right = box
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[partners, :, top:bottom, left:right]
    kept = 1 - (bottom - top) * (right - left) / (images.shape[-2] * images.shape[-1])
    return Mix(mixed, partners, kept)


def _mix_box(random: np.random.Generator, height: int, width: int, share: float) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of a box of area ``1 - share`` around a random centre, clipped to the image."""
    side = math.sqrt(1 - share)
    high, wide = int(height * side), int(width * side)
    centre_y, centre_x = int(random.integers(height)), int(random.integers(width))
    top, left = max(centre_y - high // 2, 0), max(centre_x - wide // 2, 0)
    return top, min(centre_y + (high + 1) // 2, height), left, min(centre_x + (wide + 1) // 2, width)
