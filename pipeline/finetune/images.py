"""Labelled images for training: read at random, decoded once where they fit into memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

CACHE_LIMIT = 4 << 30  # bytes that `auto` never exceeds
MEMORY_SHARE = 0.25  # of the memory that is free when training starts


class ImageSource(Protocol):
    """Images by position. `image` is called from several threads at once."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image:
        """The decoded image, mode RGB."""
        ...

    def digest(self, index: int) -> bytes:
        """The content's digest; augmentation is seeded with it."""
        ...


class PixelTransform(Protocol):
    """What training needs of `backbones.Transform`."""

    @property
    def crop(self) -> int: ...

    @property
    def interpolation(self) -> str: ...

    @property
    def mean(self) -> Sequence[float]: ...

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """The evaluation pixels, uint8 (3, crop, crop)."""
        ...

    def normalise(self, batch: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 (n, 3, h, w) to the normalised floats the backbone takes."""
        ...


@dataclass(frozen=True)
class LabelledImages:
    """``source`` with one target (int64, an index of a class) per image."""

    source: ImageSource
    targets: NDArray[np.int64]

    def __post_init__(self) -> None:
        if len(self.source) != len(self.targets):
            raise ValueError(f"{len(self.source)} images but {len(self.targets)} targets")

    def __len__(self) -> int:
        return len(self.targets)


class CachedImages:
    """Keeps decoded images as uint8 arrays until ``budget`` bytes are full; the rest is decoded anew each time.

    Small images cost more to decode than to augment, and a training run decodes each of them in every epoch.
    """

    def __init__(self, source: ImageSource, budget: int) -> None:
        self._source, self._left = source, budget
        self._kept: dict[int, NDArray[np.uint8]] = {}

    def __len__(self) -> int:
        return len(self._source)

    def digest(self, index: int) -> bytes:
        return self._source.digest(index)

    def image(self, index: int) -> Image.Image:
        kept = self._kept.get(index)
        if kept is not None:
            return Image.fromarray(kept)
        image = self._source.image(index)
        size = image.width * image.height * 3
        if size <= self._left:  # a race of two threads overshoots the budget by an image at most
            self._left -= size
            self._kept[index] = np.asarray(image)
        return image

    @property
    def kept(self) -> int:
        """How many images are held decoded."""
        return len(self._kept)


def available_memory() -> int:
    """Bytes free for this process: what the kernel calls available, else a quarter of the physical memory."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux; the estimate below serves
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def cache_budget(megabytes: int | Literal["auto"]) -> int:
    """Bytes for `CachedImages`; ``auto`` is a quarter of the free memory, 4 GiB at most, shared by local processes."""
    if megabytes != "auto":
        return megabytes * 10**6
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(int(available_memory() * MEMORY_SHARE), CACHE_LIMIT) // processes
