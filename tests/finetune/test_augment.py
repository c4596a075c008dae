"""Augmentation: drawn from (seed, epoch, digest) alone, within its limits, equal to torchvision's operations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from pipeline.finetune.augment import (
    TRIVIAL_LEVELS,
    TRIVIAL_OPERATIONS,
    Augment,
    crop_box,
    erase_box,
    mix_images,
    trivial_augment,
)
from pipeline.params.sections import AugmentParams

EVERYTHING = AugmentParams(
    rotation=20, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1, trivial_augment=True, erasing=0.5
)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    random = np.random.default_rng(0)
    small = Image.fromarray(random.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    return small.resize((60, 45), Image.Resampling.BICUBIC)


def make(params: AugmentParams, size: int = 32) -> Augment:
    return Augment(params, size=size, interpolation="bilinear", fill=(0.5, 0.5, 0.5))


def test_pixels_depend_on_seed_epoch_and_digest_alone(image: Image.Image) -> None:
    def draw(seed: int, epoch: int, digest: bytes) -> bytes:
        np.random.seed(np.random.randint(1000))  # another global state each time
        return make(EVERYTHING).pixels(image, seed=seed, epoch=epoch, digest=digest).tobytes()

    first = draw(0, 1, b"a")
    assert draw(0, 1, b"a") == first
    assert len({first, draw(1, 1, b"a"), draw(0, 2, b"a"), draw(0, 1, b"b")}) == 4


@pytest.mark.parametrize("crop", [None, 20])
def test_size(image: Image.Image, crop: int | None) -> None:
    pixels = make(EVERYTHING.model_copy(update={"crop": crop})).pixels(image, seed=0, epoch=1, digest=b"")
    assert pixels.shape == (crop or 32, crop or 32, 3) and pixels.dtype == np.uint8


def test_crops_keep_their_share_and_stay_inside() -> None:
    random = np.random.default_rng(0)
    boxes = [crop_box(random, 400, 500, (0.3, 0.8)) for _ in range(300)]
    shares = [height * width / 200_000 for _, _, height, width in boxes]
    assert 0.29 < min(shares) < 0.35 and 0.7 < max(shares) < 0.81
    assert all(0 <= top <= 400 - height and 0 <= left <= 500 - width for top, left, height, width in boxes)
    ratios = [width / height for _, _, height, width in boxes]
    assert 0.74 < min(ratios) < max(ratios) < 1.35


def test_a_strip_is_cropped_in_the_middle() -> None:
    assert crop_box(np.random.default_rng(0), 10, 1000, (0.9, 1.0)) == (0, 493, 10, 13)


def test_nothing_but_the_crop_by_default_when_all_is_off(image: Image.Image) -> None:
    square = image.resize((32, 32))
    still = make(AugmentParams(crop_scale=(1.0, 1.0), horizontal_flip=0.0))
    changed = [still.pixels(square, seed=0, epoch=epoch, digest=b"") for epoch in range(20)]
    flipped = make(AugmentParams(crop_scale=(1.0, 1.0), horizontal_flip=1.0))
    for epoch, pixels in enumerate(changed):
        mirrored = flipped.pixels(square, seed=0, epoch=epoch, digest=b"")
        np.testing.assert_array_equal(mirrored[:, ::-1], pixels)


def test_erased_areas_hold_the_mean(image: Image.Image) -> None:
    plain = make(AugmentParams(erasing=0.0)).pixels(image, seed=3, epoch=1, digest=b"x")
    erased = make(AugmentParams(erasing=1.0)).pixels(image, seed=3, epoch=1, digest=b"x")
    different = (plain != erased).any(axis=2)
    assert 0.01 < different.mean() < 0.4
    assert (erased[different] == 128).all()
    top, left, height, width = erase_box(np.random.default_rng(0), 32, 32)
    assert height and width and top + height <= 32 and left + width <= 32


@pytest.mark.parametrize("operation", TRIVIAL_OPERATIONS)
@pytest.mark.parametrize("level", [0, 11, TRIVIAL_LEVELS - 1])
def test_trivial_augment_operations_are_those_of_torchvision(image: Image.Image, operation: str, level: int) -> None:
    reference = v2.TrivialAugmentWide()
    space = getattr(reference, "_AUGMENTATION_SPACE", None)
    apply = getattr(reference, "_apply_image_or_video_transform", None)
    if space is None or apply is None:
        pytest.skip("this torchvision keeps its operations elsewhere")
    identity = "".join(part.capitalize() for part in operation.split("_"))
    magnitudes, signed = space[identity]
    values = magnitudes(TRIVIAL_LEVELS, image.height, image.width)
    magnitude = 0.0 if values is None else float(values[level]) * (-1 if signed else 1)
    expected = apply(image, identity, magnitude, interpolation=reference.interpolation, fill=reference._fill)
    got = trivial_augment(image, operation, level, -1.0, fill=None)
    difference = np.abs(np.asarray(got, dtype=int) - np.asarray(expected, dtype=int))
    assert difference.max() <= 1  # torchvision's magnitudes are float32


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_mixing_is_drawn_from_its_place(mixup: float, cutmix: float) -> None:
    images = torch.randn(5, 3, 8, 8)
    first = mix_images(images, mixup=mixup, cutmix=cutmix, place=(0, 1, 2))
    torch.manual_seed(99)
    again = mix_images(images, mixup=mixup, cutmix=cutmix, place=(0, 1, 2))
    assert first and again
    assert torch.equal(first.images, again.images) and first.share == again.share
    others = [mix_images(images, mixup=mixup, cutmix=cutmix, place=(0, 1, batch)) for batch in range(9)]
    assert len({mix.share for mix in others if mix}) > 5
    assert mix_images(images, mixup=0.0, cutmix=0.0, place=(0, 1, 2)) is None


def test_cutmix_share_is_the_area_that_stayed() -> None:
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16)
    mix = mix_images(images, mixup=0.0, cutmix=1.0, place=(3, 1, 0))
    assert mix is not None
    for own, partner, mixed in zip(range(4), mix.partners.tolist(), mix.images, strict=True):
        if own != partner:
            assert (mixed == own).float().mean().item() == pytest.approx(mix.share)
            assert (mixed == partner).float().mean().item() == pytest.approx(1 - mix.share)
