"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019), drawn from (seed, epoch, batch)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..runtime.seeds import make_generator


@dataclass(frozen=True)
class Mix:
    """Images and, per image, a second target that counts ``1 - share``."""

    images: Tensor
    partners: Tensor
    share: float


def mix_images(
    images: Tensor, *, mixup: float, cutmix: float, place: tuple[int, int, int], rank: int = 0
) -> Mix | None:
    """Mix each image of a normalised batch (n, 3, h, w) with another one of it; None where neither is asked for.

    ``mixup`` and ``cutmix`` are the concentrations of their Beta distributions; with both, a coin decides. ``place``
    is (seed, epoch, batch). The share is that of all processes, so that their losses add up; partners are found
    within one process's batch.
    """
    if not mixup and not cutmix:
        return None
    random = make_generator("mix", *place)
    cut = bool(cutmix) and (not mixup or random.random() < 0.5)
    share = float(random.beta(cutmix, cutmix) if cut else random.beta(mixup, mixup))
    box = _box(random, images.shape[-2], images.shape[-1], share)
    order = make_generator("partners", *place, rank).permutation(len(images))
    partners = torch.from_numpy(order).to(images.device)
    if not cut:
        return Mix(torch.lerp(images[partners], images, share), partners, share)
    top, bottom, left, right = box
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[partners, :, top:bottom, left:right]
    kept = 1 - (bottom - top) * (right - left) / (images.shape[-2] * images.shape[-1])
    return Mix(mixed, partners, kept)


def _box(random: np.random.Generator, height: int, width: int, share: float) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of a box of area ``1 - share`` around a random centre, clipped to the image."""
    side = math.sqrt(1 - share)
    high, wide = int(height * side), int(width * side)
    centre_y, centre_x = int(random.integers(height)), int(random.integers(width))
    top, left = max(centre_y - high // 2, 0), max(centre_x - wide // 2, 0)
    return top, min(centre_y + (high + 1) // 2, height), left, min(centre_x + (wide + 1) // 2, width)
