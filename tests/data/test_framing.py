"""Pixels are those of torchvision's resize and crop, for every shape of image."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from pipeline.data.framing import RESAMPLING, Framing

SIDE = st.integers(1, 40)


@settings(max_examples=300, deadline=None)
@given(SIDE, SIDE, st.none() | SIDE, SIDE, st.sampled_from(sorted(RESAMPLING)), st.booleans())
def test_pixels_are_those_of_torchvision(
    width: int, height: int, resize: int | None, crop: int, interpolation: str, squash: bool
) -> None:
    noise = np.random.default_rng(width * 41 + height).integers(0, 256, (height, width, 3)).astype(np.uint8)
    image = expected = Image.fromarray(noise)
    if resize is not None:
        size = [resize] * (2 if squash else 1)
        expected = F.resize(image, size, interpolation=InterpolationMode(interpolation), antialias=True)
    expected = F.center_crop(expected, [crop])
    pixels = Framing(resize, crop, interpolation, squash=squash).pixels(image)
    assert np.array_equal(pixels, np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("interpolation", sorted(RESAMPLING))
def test_an_ordinary_photograph(interpolation: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (375, 501, 3)).astype(np.uint8))
    expected = F.center_crop(F.resize(image, [256], InterpolationMode(interpolation), antialias=True), [224])
    pixels = Framing(256, 224, interpolation).pixels(image)
    assert np.array_equal(pixels, np.asarray(expected).transpose(2, 0, 1))
    assert pixels.transpose(1, 2, 0).flags.c_contiguous
