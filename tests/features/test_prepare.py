"""Each content is decoded once, whatever its paths; a file that fails is noted and never replaced."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.backbones import Pixels
from pipeline.data.decode import decode_image
from pipeline.data.images import Images, open_images
from pipeline.features.extractor import Clock
from pipeline.features.prepare import Preparation
from pipeline.features.quarantine import Quarantine
from pipeline.files import digest_bytes
from pipeline.params import DataParams

Crop = Callable[[Image.Image, bytes], Pixels]


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write(root: Path, contents: dict[str, bytes]) -> None:
    for name, data in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def images_in(root: Path) -> Images:
    return open_images(DataParams(root=root, extensions=[".png"]), root.parent / "cache")


class Counter:
    """Crops an image and remembers which contents it has seen."""

    def __init__(self) -> None:
        self.digests: list[bytes] = []

    def __call__(self, image: Image.Image, digest: bytes) -> Pixels:
        self.digests.append(digest)
        return np.asarray(image, np.uint8).transpose(2, 0, 1)


def make_preparation(
    root: Path, crop: Crop, *, have: set[bytes] | None = None, cache: Path | None = None
) -> Preparation:
    decode = partial(decode_image, background=(255, 255, 255), exif=True, max_pixels=10**6)
    quarantine = Quarantine(cache or root.parent / "cache", "rule")
    return Preparation(
        images_in(root),
        (have or set()).__contains__,
        quarantine,
        decode=lambda data, digest: crop(decode(data), digest),
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Eight files of three contents in two classes."""
    folder = tmp_path / "images"
    write(folder, {f"{'ab'[row % 2]}/{row}.png": png(row % 3) for row in range(8)})
    return folder


def test_a_content_is_decoded_once_whatever_its_paths(root: Path) -> None:
    crop = Counter()
    preparation = make_preparation(root, crop)
    contents = [preparation(position, Clock()) for position in range(8)]
    assert sorted(crop.digests) == sorted(digest_bytes(png(shade)) for shade in range(3))
    for position, content in enumerate(contents):
        data = Path(preparation.images.path(position)).read_bytes()
        assert content.position == position and content.digest == digest_bytes(data)
    forwarded = [content for content in contents if content.pixels is not None]
    assert [int(content.pixels[0, 0, 0]) for content in forwarded if content.pixels is not None] == [
        [png(shade) for shade in range(3)].index(Path(preparation.images.path(content.position)).read_bytes())
        for content in forwarded
    ]


def test_a_content_is_decoded_once_by_many_threads(tmp_path: Path) -> None:
    root = tmp_path / "images"
    write(root, {f"a/{row}.png": png(row % 5) for row in range(100)})
    crop = Counter()
    preparation = make_preparation(root, crop)
    with ThreadPoolExecutor(8) as pool:
        contents = list(pool.map(lambda position: preparation(position, Clock()), range(100)))
    assert len(crop.digests) == 5 == sum(content.pixels is not None for content in contents)
    assert preparation.images.known.all()


def test_what_is_cached_is_not_decoded(root: Path) -> None:
    crop = Counter()
    preparation = make_preparation(root, crop, have={digest_bytes(png(0)), digest_bytes(png(2))})
    for position in range(8):
        preparation(position, Clock())
    assert crop.digests == [digest_bytes(png(1))]


def test_a_bad_image_is_quarantined_once_and_not_tried_again(root: Path, tmp_path: Path) -> None:
    half = png(9)[:40]
    write(root, {"a/bad.png": half, "b/bad too.png": half})
    first = make_preparation(root, Counter(), cache=tmp_path / "cache")
    contents = [first(position, Clock()) for position in range(10)]
    assert first.quarantine.digests == [digest_bytes(half)]
    bad = first.quarantine.get(digest_bytes(half))
    assert bad and bad.path.endswith("bad.png") and bad.reason == "truncated" and bad.remedy
    assert sum(content.digest == digest_bytes(half) and content.pixels is None for content in contents) == 2

    crop = Counter()
    again = make_preparation(root, crop, cache=tmp_path / "cache")
    for position in range(10):
        again(position, Clock())
    assert len(crop.digests) == 3


def test_a_bad_image_that_was_mended_is_tried_again(root: Path, tmp_path: Path) -> None:
    write(root, {"a/0.png": png(9)[:40]})
    first = make_preparation(root, Counter(), cache=tmp_path / "cache")
    assert first(0, Clock()).pixels is None
    write(root, {"a/0.png": png(9)})
    assert make_preparation(root, Counter(), cache=tmp_path / "cache")(0, Clock()).pixels is not None


def test_a_file_that_cannot_be_read_is_noted_and_has_no_digest(root: Path) -> None:
    preparation = make_preparation(root, Counter())
    os.unlink(preparation.images.path(3))
    preparation.images.known[3] = True  # as an index would remember it
    content = preparation(3, Clock())
    assert content.digest is None and content.pixels is None
    assert preparation.images.failures[3].startswith("FileNotFoundError")
    assert not preparation.images.known[3] and preparation.quarantine.digests == []


def test_a_file_that_changed_since_the_scan_counts_as_what_it_is_now(root: Path) -> None:
    crop = Counter()
    preparation = make_preparation(root, crop)
    Path(preparation.images.path(0)).write_bytes(png(77))
    assert preparation(0, Clock()).digest == digest_bytes(png(77))
    assert crop.digests == [digest_bytes(png(77))]
    assert not preparation.images.is_unchanged(0)


def test_decoding_is_guarded_by_path_and_digest(root: Path) -> None:
    guarded: list[tuple[str, bytes, str]] = []

    @contextmanager
    def in_hand(path: str, digest: bytes) -> Iterator[None]:
        guarded.append((Path(path).name, digest, "begin"))
        yield
        guarded.append((Path(path).name, digest, "end"))

    crop = Counter()
    decode = partial(decode_image, background=(255, 255, 255), exif=True, max_pixels=10**6)
    quarantine = Quarantine(root.parent / "cache", "rule")
    preparation = Preparation(
        images_in(root),
        set().__contains__,
        quarantine,
        decode=lambda data, digest: crop(decode(data), digest),
        in_hand=in_hand,
    )
    preparation(0, Clock())
    digest = digest_bytes(Path(preparation.images.path(0)).read_bytes())
    assert guarded == [("0.png", digest, "begin"), ("0.png", digest, "end")]


def test_reading_and_decoding_are_on_the_clock(root: Path) -> None:
    clock = Clock()
    make_preparation(root, Counter())(0, clock)
    assert clock.busy["read"] > 0 and clock.busy["decode"] > 0 and clock.busy["forward"] == 0
