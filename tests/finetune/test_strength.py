"""How strongly images may be changed is asked of the probe."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch import Tensor, nn

from pipeline.files import digest_bytes
from pipeline.finetune import Classifier, LabelledImages, Setup, resolve_augment
from pipeline.params.sections import AugmentParams

from .support import TRANSFORM, tiny_params


class Sides:
    """Squares with a bright stripe on the left (class 0) or on the right (class 1)."""

    def __len__(self) -> int:
        return 40

    def image(self, index: int) -> Image.Image:
        pixels = np.full((16, 16, 3), index, np.uint8)
        pixels[:, slice(0, 1) if index % 2 == 0 else slice(15, 16)] = 255
        return Image.fromarray(pixels)

    def digest(self, index: int) -> bytes:
        return digest_bytes(bytes([index]))


class Brighter(nn.Module):
    """Logits by how bright the left and the right are, or the same for all images."""

    def __init__(self, sees: bool) -> None:
        super().__init__()
        self.sees = sees

    def forward(self, images: Tensor) -> Tensor:
        halves = images.mean((1, 2)).view(len(images), 2, -1).mean(2)
        return halves if self.sees else halves.sum(1, keepdim=True) * halves.new_tensor([1.0, 0.0])


def asked(sees: bool, **augment: object) -> AugmentParams:
    images = LabelledImages(Sides(), np.arange(40) % 2)
    params = tiny_params(augment=AugmentParams(**augment))  # type: ignore[arg-type]
    return resolve_augment(Classifier(Brighter(sees), nn.Sequential()), images, TRANSFORM, params, Setup())


def test_images_are_not_mirrored_where_the_probe_mistakes_them_then() -> None:
    assert asked(True).horizontal_flip == 0.0
    assert asked(False).horizontal_flip == 0.5


def test_crops_are_mild_where_the_probe_does_not_recognise_strong_ones() -> None:
    assert asked(True).crop_scale == (0.6, 1.0)
    assert asked(False).crop_scale == (0.35, 1.0)


def test_what_the_params_say_is_not_asked() -> None:
    given = {"horizontal_flip": 0.3, "crop_scale": (0.2, 0.4)}
    augment = asked(True, **given)
    assert (augment.horizontal_flip, augment.crop_scale) == (0.3, (0.2, 0.4))
