"""Images to try everything with, without a download: scikit-learn's handwritten digits as an image folder."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..files import publish_file, publishing_folder

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PIXELS = 32
SPLIT_SHARES = (("train", 0.6), ("val", 0.8), ("test", 1.0))  # each with the share of its class where it ends


def write_demo_data(folder: Path) -> int:
    """Write 1797 handwritten digits as ``folder/{train,val,test}/{zero..nine}/NNNN.png`` (greyscale, 32 x 32).

    Files that are there already are left alone, so a second call writes nothing and a half-written folder is
    completed. A fresh folder appears at once, whole. The bytes are the same on every machine.

    Each class is cut in the order of the data set, which goes writer by writer: most of the writers of val and
    test wrote nothing in train. Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits (UCI, 1998).

    Returns:
        How many files were written now.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    if folder.exists():
        return _write_missing(folder, write=publish_file)
    with publishing_folder(folder, durable=False) as temporary:
        return _write_missing(temporary, write=_write)


def _write_missing(folder: Path, *, write: Callable[[Path, bytes], None]) -> int:
    written = 0
    for name, pixels in _digits():
        file = folder / name
        if not (file.exists() and file.stat().st_size):  # a power cut may have left an empty one
            write(file, _png(pixels))
            written += 1
    return written


def _write(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


def _digits() -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Relative path and pixels, uint8 (8, 8), of each digit."""
    from sklearn.datasets import load_digits  # takes a second, which only this command should pay

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    for target, name in enumerate(DIGIT_NAMES):
        rows = np.flatnonzero(digits.target == target)
        for position, row in enumerate(rows):
            split = next(split for split, end in SPLIT_SHARES if position < end * len(rows))
            yield f"{split}/{name}/{row:04d}.png", images[row]


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """The PNG of ``pixels``, enlarged; uncompressed, because compressors differ between builds of Pillow."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()
