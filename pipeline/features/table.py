"""Features as an experiment uses them: one row an image, with target, path, split and digest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .digests import Digests
from .rounding import Features


@dataclass(frozen=True)
class FeatureTable:
    """Rows in the order of the sorted paths; unreadable images are absent.

    Args:
        features: float32 (n, d).
        targets: int (n,), index into ``class_names``; -1 where the image has no class folder.
        paths: relative to ``root``.
        splits: int (n,), index into ``SPLITS`` (train, val, test).
        digests: uint8 (n, 16), BLAKE2b-128 of each file's bytes.
        groups: int (n,), equal for images that must stay on one side of any split.
    """

    root: Path
    class_names: tuple[str, ...]
    features: Features
    targets: NDArray[np.int64]
    paths: list[str]
    splits: NDArray[np.int8]
    digests: Digests
    groups: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)
