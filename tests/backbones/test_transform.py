"""The pixels are torchvision's own, and what params or files say about them is checked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import get_weight
from torchvision.transforms import functional as F

from pipeline.backbones.torchvision import preset_transform
from pipeline.backbones.transform import Transform, adjust_transform
from pipeline.data.decode import BadImage, Reason
from pipeline.errors import BackboneError, WeightsError
from pipeline.params import TransformParams

PRESETS = (
    "ResNet18_Weights.IMAGENET1K_V1",
    "ResNet50_Weights.IMAGENET1K_V2",
    "EfficientNet_B0_Weights.IMAGENET1K_V1",  # bicubic
    "EfficientNet_B3_Weights.IMAGENET1K_V1",  # bicubic, 300 pixels
    "ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1",
    "Inception_V3_Weights.IMAGENET1K_V1",
    "EfficientNet_V2_S_Weights.IMAGENET1K_V1",
)


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def reference_pixels(weights: str, image: Image.Image) -> np.ndarray:
    """The uint8 pixels in the middle of torchvision's preset."""
    preset = get_weight(weights).transforms()
    resized = F.resize(image, preset.resize_size, interpolation=preset.interpolation, antialias=preset.antialias)
    return F.pil_to_tensor(F.center_crop(resized, preset.crop_size)).numpy()


@pytest.mark.parametrize("weights", PRESETS)
@pytest.mark.parametrize("size", [(490, 390), (390, 491), (100, 80), (37, 640), (1, 1)])
def test_pixels_are_those_of_the_weights_own_transform(weights: str, size: tuple[int, int]) -> None:
    image = random_image(*size)
    transform = preset_transform(get_weight(weights))
    pixels = transform.pixels(image)
    assert pixels.dtype == np.uint8 and pixels.shape == (3, transform.crop, transform.crop)
    assert np.array_equal(pixels, reference_pixels(weights, image))
    normalised = transform.normalise(torch.from_numpy(pixels.copy())[None])
    assert torch.equal(normalised[0], get_weight(weights).transforms()(image))


@pytest.mark.parametrize("size", [(490, 390), (37, 640), (1, 100_000)])
def test_squash_makes_both_sides_the_size(size: tuple[int, int]) -> None:
    transform = Transform(resize=40, crop=36, interpolation="bicubic", resize_mode="squash")
    resized = F.resize(
        image := random_image(*size), [40, 40], interpolation=F.InterpolationMode.BICUBIC, antialias=True
    )
    assert np.array_equal(transform.pixels(image), F.pil_to_tensor(F.center_crop(resized, [36])).numpy())


def test_the_usual_resize_mode_is_not_written() -> None:
    assert "resize_mode" not in Transform().as_dict()
    squash = Transform(resize_mode="squash")
    assert Transform.from_dict(squash.as_dict()) == squash
    assert adjust_transform(Transform(), TransformParams(resize_mode="squash")) == squash
    with pytest.raises(WeightsError):
        Transform.from_dict({"resize_mode": "longest"})


def test_pixels_of_real_photographs(shared) -> None:
    paths = sorted((shared / "data").glob("hymenoptera_data/val/*/*.jpg"))[::40]
    assert paths
    for path in paths:
        image = Image.open(path).convert("RGB")
        for weights in ("ResNet50_Weights.IMAGENET1K_V2", "EfficientNet_B0_Weights.IMAGENET1K_V1"):
            transform = preset_transform(get_weight(weights))
            assert np.array_equal(transform.pixels(image), reference_pixels(weights, image))


def test_without_resize_the_image_is_only_cropped_or_framed() -> None:
    image = random_image(40, 30)
    pixels = Transform(resize=None, crop=32).pixels(image)
    assert np.array_equal(pixels[:, 1:31], np.asarray(image)[:, 4:36].transpose(2, 0, 1))
    assert not pixels[:, 0].any() and not pixels[:, 31].any()


def test_a_strip_that_would_grow_beyond_memory_is_a_bad_image() -> None:
    with pytest.raises(BadImage) as caught:
        Transform().pixels(Image.new("RGB", (1, 60_000 * 60)))
    assert caught.value.reason == Reason.TOO_MANY_PIXELS


def test_normalise_computes_in_float32_before_rounding() -> None:
    batch = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wide, narrow = Transform().normalise(batch), Transform().normalise(batch, torch.bfloat16)
    assert narrow.dtype == torch.bfloat16 and torch.equal(narrow, wide.to(torch.bfloat16))


def test_params_replace_single_values_of_the_preset() -> None:
    preset = Transform(resize=232, crop=224)
    assert adjust_transform(preset, TransformParams()) == preset
    changed = adjust_transform(preset, TransformParams(resize=300, interpolation="bicubic", exif=False))
    assert changed == Transform(resize=300, crop=224, interpolation="bicubic", exif=False)
    assert adjust_transform(preset, TransformParams(crop=160)).resize == 232
    assert adjust_transform(preset, TransformParams(resize=64, crop=96)).crop == 96  # asked for: framed in black


@pytest.mark.parametrize(("params", "suggestion"), [({"crop": 448}, "464"), ({"resize": 116}, "112")])
def test_a_crop_beyond_the_resize_is_refused_with_a_fitting_value(params: dict[str, int], suggestion: str) -> None:
    with pytest.raises(BackboneError) as caught:
        adjust_transform(Transform(resize=232, crop=224), TransformParams(**params))
    assert suggestion in str(caught.value.remedy)


def test_a_transform_survives_json() -> None:
    transform = Transform(resize=None, crop=64, mean=(0.1, 0.2, 0.3), background=(0, 1, 2), exif=False)
    assert Transform.from_dict(transform.as_dict()) == transform


@pytest.mark.parametrize(
    "values",
    [
        {"crop": 0},
        {"crop": "224"},
        {"crop": 10**9},
        {"crop": True},
        {"crop": None},
        {"resize": -1},
        {"std": [0.2, 0.0, 0.2]},
        {"mean": [0.5, 0.5]},
        {"mean": [float("nan")] * 3},
        {"interpolation": "lanczos7"},
        {"interpolation": ["bilinear"]},
        {"background": [0, 0, 256]},
        {"exif": 1},
        {"size": 224},
        ["crop"],
        None,
    ],
)
def test_impossible_stored_values_are_refused(values: object) -> None:
    with pytest.raises(WeightsError) as caught:
        Transform.from_dict(values, where="file.safetensors")  # type: ignore[arg-type]
    assert caught.value.where == "file.safetensors" and caught.value.why
