"""Small seeded features with classes that overlap, and one torch thread."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_features(
    n: int = 150, d: int = 24, classes: int = 3, *, spread: float = 1.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """float16-origin features (n, d) of very different scales, and targets (n,) with every class present."""
    rng = np.random.default_rng(seed)
    y = np.r_[np.arange(classes), rng.integers(0, classes, n - classes)].astype(np.int64)
    centres = rng.normal(size=(classes, d)) * spread
    mixing = rng.normal(size=(d, d)) / np.sqrt(d)
    X = (rng.normal(size=(n, d)) + centres[y]) @ mixing * np.geomspace(0.01, 10, d) + 1.0
    return X.astype(np.float16).astype(np.float32), y
