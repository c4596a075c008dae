"""How strongly images may be changed: what the probe still takes for the same."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import nn

from ..params import FinetuneParams
from ..params.sections import AugmentParams
from .augment import CROP_SCALE, FLIP, Augment
from .images import LabelledImages, PixelTransform
from .selection import SelectionSet
from .step import Setup

MILD_CROP_SCALE = (0.6, 1.0)
MOST_IMAGES = 400
BORNE = 0.1  # share of the images that strong crops may cost
DEVIATIONS = 2.6


@dataclass(frozen=True)
class _Answers:
    """Which images the probe classifies rightly as they are, and when they are changed."""

    plain: np.ndarray
    changed: np.ndarray

    @property
    def net_loss(self) -> int:
        return int(self.plain.sum()) - int(self.changed.sum())

    @property
    def differs(self) -> bool:
        """Whether changed images are classified worse beyond chance (a sign test)."""
        return self.net_loss > DEVIATIONS * math.sqrt(int((self.plain != self.changed).sum()))


def resolve_augment(
    classifier: nn.Module, images: LabelledImages, transform: PixelTransform, params: FinetuneParams, setup: Setup
) -> AugmentParams:
    """``params.augment`` with nothing ``auto``.

    Args:
        classifier: the probe, in evaluation mode afterwards.
        images: what the probe was not fitted to.
    """
    augment = params.augment
    if "auto" not in (augment.crop_scale, augment.horizontal_flip):
        return augment
    rows = np.linspace(0, len(images) - 1, min(len(images), MOST_IMAGES)).astype(np.int64)
    some = images.take(rows)
    plain = SelectionSet(some, transform, params, setup)
    right = plain.logits(classifier).argmax(axis=1) == some.targets
    if augment.horizontal_flip == "auto":
        mirrored = _Answers(right, plain.logits(classifier, mirror=True).argmax(axis=1) == some.targets)
        augment = augment.model_copy(update={"horizontal_flip": 0.0 if mirrored.differs else FLIP})
    if augment.crop_scale == "auto":
        still = augment.model_copy(update={"crop_scale": CROP_SCALE, "horizontal_flip": 0.0})
        change = Augment(still, size=transform.crop, interpolation=transform.interpolation, fill=transform.mean)
        seen = SelectionSet(some, transform, params, setup, augment=change).logits(classifier)
        cropped = _Answers(right, seen.argmax(axis=1) == some.targets)
        mild = cropped.net_loss > BORNE * len(some)
        augment = augment.model_copy(update={"crop_scale": MILD_CROP_SCALE if mild else CROP_SCALE})
    return augment
