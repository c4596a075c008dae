"""The whole classifier as one module: uint8 images of any size in, label and probabilities out.

What `Transform.pixels` does with Pillow is done here with tensors, so that nothing is left to whoever serves the file.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..backbones import Transform
from ..errors import ExportError
from ..finetune.classifier import make_head_module
from ..heads import Layers

Size = int | torch.SymInt
EXAMPLE = (300, 400, 3)
MODES = {"nearest": "nearest-exact", "bilinear": "bilinear", "bicubic": "bicubic"}


class Preprocess(nn.Module):
    """uint8 images (n, height, width, 3) of any one size to normalised float32 (n, 3, crop, crop).

    Resizing uint8 with antialiasing follows Pillow to one level in a few of a thousand values, on float32 it would
    not. Sizes and offsets are torchvision's, in whole numbers: a graph has no Python to round with.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.resize, self.crop, self.mode = transform.resize, transform.crop, MODES[transform.interpolation]
        self.squash = transform.resize_mode == "squash"
        self.register_buffer("mean", torch.tensor(transform.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(transform.std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2)
        height: Size = x.shape[2]
        width: Size = x.shape[3]
        if self.resize is not None:
            short = torch.sym_min(height, width)
            height, width = self.resize * height // short, self.resize * width // short
            if self.squash:
                height, width = self.resize, self.resize
            antialias = self.mode != "nearest-exact"
            size: Any = (height, width)
            x = nn.functional.interpolate(x, size=size, mode=self.mode, antialias=antialias)
        x = self._cropped(self._cropped(x, 2, height), 3, width)
        return (x.float() / 255 - self.mean) / self.std

    def _cropped(self, x: Tensor, dim: int, size: Size) -> Tensor:
        """The centre of ``dim``, framed in black where it is too short; half pixels are rounded to even."""
        free = size - self.crop
        if self.resize is not None and self.crop <= self.resize:
            return x.index_select(dim, torch.arange(self.crop) + _half(free))
        places = torch.arange(self.crop) + _half(torch.sym_max(free, 0)) + (torch.sym_min(free, 0) + 1) // 2
        inside = (places >= 0) & (places < size)
        shape = [-1 if axis == dim else 1 for axis in range(4)]
        framed: Tensor = x.index_select(dim, places.clamp(0, size - 1)) * inside.to(torch.uint8).view(shape)
        return framed


def _half(free: Size) -> Size:
    return free // 2 + (free % 2) * ((free // 2) % 2)


class ExportedNetwork(nn.Module):
    """An image (height, width, 3), or n of one size, to ``label``, ``probabilities``; without a head to ``features``.

    Args:
        network: normalised images to features (n, d), in ``dtype``.
        head: features to logits, the temperature folded in.
        dtype: what ``network`` takes; all else is float32.
        batch: take images (n, height, width, 3), and give n of everything.
    """

    def __init__(
        self, transform: Transform, network: nn.Module, head: nn.Module | None, *, dtype: torch.dtype, batch: bool
    ) -> None:
        super().__init__()
        self.preprocess, self.network = Preprocess(transform), network
        self.head, self.dtype, self.batch = head, dtype, batch

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        pixels = self.preprocess(images if self.batch else images[None])
        outputs: tuple[Tensor, ...] = (self.network(pixels.to(self.dtype)).float(),)
        if self.head is not None:
            probabilities = self.head(outputs[0]).softmax(1)
            outputs = (probabilities, probabilities.argmax(1))
        return outputs if self.batch else tuple(output[0] for output in outputs)


def head_module(layers: Layers) -> nn.Module:
    """Features (n, d) to logits (n, c), in float32."""
    return make_head_module(layers)


def trace(network: ExportedNetwork) -> ExportedProgram:
    """The network as a graph whose image sizes are free.

    Raises:
        ExportError: torch cannot trace the backbone.
    """
    example = torch.zeros((2, *EXAMPLE) if network.batch else EXAMPLE, dtype=torch.uint8)
    free = range(3 if network.batch else 2)
    try:
        with torch.no_grad():
            return torch.export.export(
                network.eval(), (example,), dynamic_shapes=(dict.fromkeys(free, Dim.DYNAMIC),), strict=False
            )
    except Exception as error:  # tracing fails in as many ways as there are networks
        raise ExportError(
            "The network cannot be traced for export.",
            why=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}",
            remedy="choose another backbone, or serve the run folder itself",
        ) from error
