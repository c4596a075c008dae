"""A decoder that yields other pixels than the cached features were computed from is found out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.backbones import Pixels
from pipeline.errors import DriftError
from pipeline.features.drift import DRIFT_FILE, PixelRecord, pixel_digest
from pipeline.files import digest_bytes

OLD, NEW = {"pillow": "11.3"}, {"pillow": "12.0"}
PIXELS = {digest_bytes(bytes([row])): np.full((3, 4, 4), row, np.uint8) for row in range(3)}


def begin(folder: Path) -> PixelRecord:
    """A record made with the old versions."""
    record = PixelRecord(folder)
    record.record(OLD, {digest: pixel_digest(pixels) for digest, pixels in PIXELS.items()})
    return record


def decode(digest: bytes) -> Pixels | None:
    return PIXELS.get(digest)


def decode_with(change: int) -> Callable[[bytes], Pixels | None]:
    """A decoder whose last image differs by ``change`` in one pixel."""
    last = list(PIXELS)[-1]

    def decode(digest: bytes) -> Pixels | None:
        pixels = PIXELS[digest].copy()
        pixels[0, 0, 0] += change if digest == last else 0
        return pixels

    return decode


def test_the_same_versions_need_no_check(tmp_path: Path) -> None:
    begin(tmp_path)
    assert not PixelRecord(tmp_path).needs_check(OLD)
    assert PixelRecord(tmp_path).needs_check(NEW)


def test_equal_pixels_are_accepted_and_remembered(tmp_path: Path) -> None:
    begin(tmp_path)
    assert PixelRecord(tmp_path).check(NEW, decode) == 3
    again = PixelRecord(tmp_path)
    assert not again.needs_check(NEW) and not again.needs_check(OLD)


def test_one_other_pixel_is_refused(tmp_path: Path) -> None:
    begin(tmp_path)
    with pytest.raises(DriftError, match="other pixels") as caught:
        PixelRecord(tmp_path).check(NEW, decode_with(1))
    for said in ("11.3", "12.0", str(tmp_path), "cache.dir", list(PIXELS)[-1].hex()):
        assert said in str(caught.value)
    assert PixelRecord(tmp_path).needs_check(NEW), "a refusal must not be remembered as agreement"


def test_the_shape_counts_too() -> None:
    assert pixel_digest(np.zeros((3, 2, 4), np.uint8)) != pixel_digest(np.zeros((3, 4, 2), np.uint8))


def test_pixels_count_by_value_not_by_memory_order() -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
    assert pixel_digest(np.asfortranarray(pixels)) == pixel_digest(pixels)


def test_images_that_are_gone_leave_the_question_open(tmp_path: Path) -> None:
    begin(tmp_path)
    assert PixelRecord(tmp_path).check(NEW, lambda _digest: None) == 0
    assert PixelRecord(tmp_path).needs_check(NEW)


def test_the_images_that_are_left_decide(tmp_path: Path) -> None:
    begin(tmp_path)
    first, *_ = PIXELS
    assert PixelRecord(tmp_path).check(NEW, lambda digest: PIXELS[digest] if digest == first else None) == 1
    assert not PixelRecord(tmp_path).needs_check(NEW)


def test_the_first_record_of_a_key_stays(tmp_path: Path) -> None:
    begin(tmp_path)
    PixelRecord(tmp_path).record(NEW, {digest_bytes(b"later"): "00" * 16})
    again = PixelRecord(tmp_path)
    assert set(again.samples) == {digest.hex() for digest in PIXELS} and again.needs_check(NEW)


def test_a_key_without_a_record_needs_no_check_and_records_nothing_of_nothing(tmp_path: Path) -> None:
    record = PixelRecord(tmp_path)
    record.record(OLD, {})
    assert not record.needs_check(NEW) and not (tmp_path / DRIFT_FILE).exists()


@pytest.mark.parametrize("position", [5, 60, 150, -40, -3])
def test_a_damaged_record_is_no_record(tmp_path: Path, position: int) -> None:
    begin(tmp_path)
    content = bytearray((tmp_path / DRIFT_FILE).read_bytes())
    content[position] ^= 1
    (tmp_path / DRIFT_FILE).write_bytes(content)
    assert PixelRecord(tmp_path).samples == {}


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b"[" * 100_000])
def test_what_is_no_record_is_no_record(tmp_path: Path, content: bytes) -> None:
    (tmp_path / DRIFT_FILE).write_bytes(content)
    assert not PixelRecord(tmp_path).needs_check(NEW)
