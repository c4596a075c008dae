"""What a run was made from and with: the digest of the data, the versions of the libraries."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from numpy.typing import NDArray

from ..files import DIGEST_BYTES

PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "scikit-learn",
    "pillow",
    "safetensors",
    "skops",
    "image-transfer-pipeline",
)


def data_digest(digests: NDArray[np.uint8], labels: Sequence[str], splits: Sequence[str]) -> str:
    """BLAKE2b-128 (hex) over the sorted (digest, label, split) of all images: order and paths do not matter.

    Args:
        digests: (n, 16) uint8.
        labels: n class names, "" where there is none.
        splits: n names of splits.
    """
    names = zip(labels, splits, strict=True)
    # A class or a split is named by a folder, and no name of a folder holds a zero byte: the parts cannot run together.
    ends = (f"\0{label}\0{split}\0".encode("utf-8", "surrogateescape") for label, split in names)
    rows = sorted(row.tobytes() + end for row, end in zip(digests, ends, strict=True))
    state = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for row in rows:
        state.update(row)
    return state.hexdigest()


def current_versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a result; read from metadata, nothing is imported."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
