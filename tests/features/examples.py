"""Specs, digests and feature rows for the tests of this folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.digests import Digests
from pipeline.features.rounding import Features
from pipeline.features.spec import FeatureSpec
from pipeline.features.store import FeatureStore

DIM = 6
SPEC = FeatureSpec(
    backbone="resnet18",
    weights_digest="ab" * 16,
    layer=None,
    pooling="default",
    transform={"resize": 256, "crop": 224, "mean": [0.485, 0.456, 0.406], "exif": True},
    decoder="pillow-rgb-1",
    precision="float32",
    dtype="float16",
)


def spec_with(**changes: Any) -> FeatureSpec:
    """The example spec with some fields changed."""
    return replace(SPEC, **changes)


def make_digests(count: int, *, seed: int = 0) -> Digests:
    """``count`` digests (n, 16); equal seeds give equal ones, a longer list begins with the shorter."""
    return np.stack(
        [np.random.default_rng((seed, row)).integers(0, 256, 16).astype(np.uint8) for row in range(count)]
        or [np.empty(16, np.uint8)]
    )[:count]


def features_of(digests: Digests, dim: int = DIM) -> Features:
    """Features (n, dim) that each digest alone determines, exact in float16, so that a misplaced row shows."""
    seeds = digests.astype(np.float32)
    return np.stack([seeds[:, column] * 4 + column for column in range(dim)], axis=1)


def make_store(cache: Path, **changes: Any) -> FeatureStore:
    """A store of the example spec under ``cache``."""
    return FeatureStore(cache, spec_with(**changes), DIM)


def fill(store: FeatureStore, digests: Digests) -> list[Path]:
    """Publish the rows of ``digests``; the parts written."""
    with store.writing():
        return store.publish(features_of(digests, store.feature_dim), digests)
