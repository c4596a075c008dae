"""Images of the common formats, made from seeded noise, by whose pixels a change of the decoding libraries shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

NAMES = ("colour.jpg", "grey_progressive.jpg", "transparent.png", "palette.png", "lossy.webp", "lzw.tif")


def read_all() -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each; as large as draft decoding needs to show."""
    folder = Path(__file__).parent
    yield from ((name, (folder / name).read_bytes()) for name in NAMES)
