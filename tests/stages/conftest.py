"""A tiny image folder and params that embed it in a second or two on a CPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.params import Params, load_params
from pipeline.stages.extract import extract

FAST = (
    "backbone.name=mobilenet_v3_small",
    "backbone.weights=random",
    "transform.resize=32",
    "transform.crop=32",
    "extract.batch_size=4",
    "extract.device=cpu",
)


def write_image(path: Path, seed: int, size: tuple[int, int] = (40, 36)) -> None:
    """A smooth random picture; equal seeds give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path, quality=95)


def write_images(folder: Path) -> Path:
    """Two classes, eight train and four val images each, in the split layout."""
    for number in range(24):
        split, label = "val" if number % 3 == 0 else "train", ("cat", "dog")[number % 2]
        write_image(folder / split / label / f"{number:02}.jpg", number)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The images of `write_images`, free to be changed."""
    return write_images(tmp_path / "images")


@pytest.fixture
def make_params(tmp_path: Path, root: Path) -> Callable[..., Params]:
    """Params over ``root`` with a cache and runs of the test's own; arguments are further overrides."""
    file = tmp_path / "params.yaml"
    file.write_text("")

    def make(*overrides: str) -> Params:
        places = (f"data.root={root}", f"cache.dir={tmp_path / 'cache'}", f"runs.dir={tmp_path / 'runs'}")
        return load_params(file, (*FAST, *places, *overrides))

    return make


@pytest.fixture
def run_extract(make_params: Callable[..., Params]) -> Callable[..., dict[str, Any]]:
    """Extract with overrides, quietly; gives the summary."""

    def run(*overrides: str) -> dict[str, Any]:
        return extract(make_params(*overrides), lambda _line: None, quiet=True)

    return run


@pytest.fixture
def hymenoptera(shared: Path, tmp_path: Path) -> Path:
    """A few real images of each class and split, free to be changed."""
    folder = tmp_path / "hymenoptera"
    for split in ("train", "val"):
        for label in ("ants", "bees"):
            source = shared / "data" / "hymenoptera_data" / split / label
            (folder / split / label).mkdir(parents=True)
            for image in sorted(source.glob("*.jpg"))[:6]:
                shutil.copy(image, folder / split / label)
    return folder
