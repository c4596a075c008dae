"""Which JPEGs may be decoded elsewhere than by Pillow: those of which every decoder makes the same kind of RGB."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from pipeline.data.jpeg import plain_size
from pipeline.data.pixels import ORIENTATION_TAG

PIXELS = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), np.uint8))


def saved(image: Image.Image = PIXELS, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    return saved(exif=exif)


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize(
    "data",
    [
        saved(),
        saved(progressive=True),
        saved(PIXELS.convert("L")),
        saved(subsampling=0, comment=b"a" * 300),
        turned(1),
        saved(icc_profile=b"profile" * 20_000),
        saved() + b"\0\0",
        saved()[:2] + b"\xff" + saved()[2:],
    ],
    ids=["baseline", "progressive", "grey", "comment", "upright", "profile", "padded", "fill bytes"],
)
def test_plain_jpegs_are_known_by_their_header(data: bytes) -> None:
    assert plain_size(data, exif=True) == Image.open(io.BytesIO(data)).size == (50, 30)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8",
        saved(kind="PNG"),
        saved(PIXELS.convert("CMYK")),
        saved(keep_rgb=True),
        turned(6),
        saved(xmp=XMP),
        saved()[:-200],
        saved().replace(b"\xff\xc0", b"\xff\xc1"),
        saved().replace(b"\xff\xc0", b"\xff\xc9"),
    ],
    ids=["empty", "head", "png", "cmyk", "rgb", "turned", "turned by XMP", "cut", "extended", "arithmetic"],
)
def test_all_others_are_left_to_pillow(data: bytes) -> None:
    assert plain_size(data, exif=True) is None


def test_an_orientation_counts_where_it_is_to_be_followed() -> None:
    assert plain_size(turned(6), exif=False) == plain_size(saved(xmp=XMP), exif=False) == (50, 30)


@pytest.mark.parametrize(
    "harm", [lambda data, at: data[:at] + b"\xff\xd9", lambda data, at: data[:at] + b"x" + data[at + 1 :]]
)
def test_damage_raises_nothing(harm: Callable[[bytes, int], bytes]) -> None:
    data = turned(6)
    for at in range(0, 300):
        plain_size(harm(data, at), exif=True)
