"""What the exported graph does before the backbone is what Pillow and torchvision do, for any size of image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pipeline.backbones import Transform
from pipeline.export.network import ExportedNetwork, trace

SIZES = [(20, 20), (33, 33), (34, 100), (35, 36), (31, 30), (120, 47), (7, 300), (64, 64), (65, 130), (57, 58), (1, 3)]


def picture(height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    noise = np.random.default_rng(height * 1000 + width).integers(0, 256, (6, 7, 3), np.uint8)
    return np.array(Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR))


@pytest.mark.parametrize(
    "transform",
    [
        Transform(resize=33, crop=32),
        Transform(resize=64, crop=57, interpolation="bicubic"),
        Transform(resize=None, crop=33),
        Transform(resize=40, crop=60),
        Transform(resize=33, crop=32, resize_mode="squash"),
    ],
    ids=["smaller crop", "bicubic", "no resize", "larger crop", "squash"],
)
def test_pixels_are_those_of_the_transform(transform: Transform) -> None:
    network = ExportedNetwork(transform, nn.Flatten(), None, dtype=torch.float32, batch=False)
    traced = trace(network).module()
    differing = 0
    for size in SIZES:
        image = picture(*size)
        wanted = transform.pixels(Image.fromarray(image)).astype(int)
        (features,) = traced(torch.from_numpy(image))
        scaled = features.view(wanted.shape) * network.preprocess.std + network.preprocess.mean
        found = (scaled * 255).round().int().numpy()
        assert np.abs(found - wanted).max() <= 2, size
        differing += int((found != wanted).sum())
    assert differing <= 0.02 * len(SIZES) * 3 * transform.crop**2


def test_nearest_takes_the_pixels_that_pillow_takes() -> None:
    transform = Transform(resize=32, crop=32, interpolation="nearest")
    traced = trace(ExportedNetwork(transform, nn.Flatten(), None, dtype=torch.float32, batch=True)).module()
    images = np.stack([picture(64, 80), picture(80, 64).transpose(1, 0, 2)])
    (features,) = traced(torch.from_numpy(images))
    wanted = torch.from_numpy(np.stack([transform.pixels(Image.fromarray(image)) for image in images]))
    torch.testing.assert_close(features.view(wanted.shape), transform.normalise(wanted))


def test_a_network_that_cannot_be_traced_is_an_error_with_its_reason() -> None:
    class Fickle(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1) if float(x.sum()) > 0 else -x.flatten(1)

    network = ExportedNetwork(Transform(crop=32), Fickle(), None, dtype=torch.float32, batch=False)
    with pytest.raises(Exception, match="cannot be traced") as caught:
        trace(network)
    assert caught.value.why  # type: ignore[attr-defined]
