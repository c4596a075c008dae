"""A decoder that yields other pixels than the cached features were computed from is found out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.backbones import Pixels
from pipeline.data import probes
from pipeline.data.decode import BadImage, Decoder, Reason
from pipeline.errors import DriftError
from pipeline.features.drift import DRIFT_FILE, PixelRecord, pixel_digest
from pipeline.files import digest_bytes, seal_json

OLD, NEW = {"pillow": "11.3"}, {"pillow": "12.0"}
DECODER = Decoder(background=(255, 255, 255), exif=True, max_pixels=10**7)
IMAGE = (Path(probes.__file__).parent / "lossy.webp").read_bytes()

PixelsOf = Callable[[bytes], Pixels]


def decode(data: bytes) -> Pixels:
    return np.asarray(DECODER(data), np.uint8).transpose(2, 0, 1)


def decode_otherwise(name: str) -> PixelsOf:
    """A decoder that changes one pixel of one probe."""
    changed = (Path(probes.__file__).parent / name).read_bytes()

    def decode_changed(data: bytes) -> Pixels:
        pixels = decode(data).copy()
        pixels[0, 0, 0] ^= data == changed
        return pixels

    return decode_changed


def confirm(
    folder: Path, versions: dict[str, str], pixels_of: PixelsOf = decode, image: bytes | None = None
) -> PixelRecord:
    record = PixelRecord(folder)
    record.confirm(versions, pixels_of, lambda _digest: image)
    return PixelRecord(folder)


def begin_before_probes(folder: Path, digest: str) -> None:
    """A record of a program that kept samples of the user's images instead of probes."""
    content = {"samples": {digest_bytes(IMAGE).hex(): digest}, "versions": [OLD]}
    (folder / DRIFT_FILE).write_bytes(seal_json(content))


def test_the_probes_read_and_are_of_every_common_format() -> None:
    formats = {Path(name).suffix for name, _ in probes.read_all()}
    assert formats == {".jpg", ".png", ".webp", ".tif"}
    assert all(decode(data).shape[0] == 3 for _, data in probes.read_all())


def test_draft_decoding_shows_in_a_probe() -> None:
    draft = Decoder(background=(255, 255, 255), exif=True, max_pixels=10**7, draft_size=(232, 232))
    data = dict(probes.read_all())["colour.jpg"]
    assert DECODER(data).size != draft(data).size


def test_a_new_key_records_all_probes(tmp_path: Path) -> None:
    record = confirm(tmp_path, OLD)
    assert set(record.probes) == set(probes.NAMES) and record.versions == [OLD]


def test_the_same_versions_decode_nothing(tmp_path: Path) -> None:
    confirm(tmp_path, OLD)

    def refuse(_data: bytes) -> Pixels:
        raise AssertionError("decoded again")

    confirm(tmp_path, OLD, refuse)


def test_equal_pixels_are_accepted_and_remembered(tmp_path: Path) -> None:
    confirm(tmp_path, OLD)
    assert confirm(tmp_path, NEW).versions == [OLD, NEW]


@pytest.mark.parametrize("name", probes.NAMES)
def test_one_other_pixel_of_one_probe_is_refused(tmp_path: Path, name: str) -> None:
    confirm(tmp_path, OLD)
    with pytest.raises(DriftError, match="other pixels") as caught:
        confirm(tmp_path, NEW, decode_otherwise(name))
    for said in ("11.3", "12.0", str(tmp_path), "cache.dir", "pillow==11.3", name):
        assert said in str(caught.value)
    assert PixelRecord(tmp_path).versions == [OLD], "a refusal must not be remembered as agreement"


def test_a_format_that_only_one_side_reads_says_nothing(tmp_path: Path) -> None:
    def without_webp(data: bytes) -> Pixels:
        if data == IMAGE:
            raise BadImage(Reason.CORRUPT, "no WebP here")
        return decode(data)

    record = confirm(tmp_path, OLD, without_webp)
    assert set(record.probes) == {*probes.NAMES} - {"lossy.webp"}
    assert set(confirm(tmp_path, NEW).probes) == set(probes.NAMES)
    assert confirm(tmp_path, {"pillow": "13"}, without_webp).versions[-1] == {"pillow": "13"}


def test_the_shape_counts_too() -> None:
    assert pixel_digest(np.zeros((3, 2, 4), np.uint8)) != pixel_digest(np.zeros((3, 4, 2), np.uint8))


def test_pixels_count_by_value_not_by_memory_order() -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
    assert pixel_digest(np.asfortranarray(pixels)) == pixel_digest(pixels)


def test_a_key_from_before_probes_gets_them_from_the_versions_it_was_made_with(tmp_path: Path) -> None:
    begin_before_probes(tmp_path, pixel_digest(decode(IMAGE)))
    record = confirm(tmp_path, OLD)
    assert set(record.probes) == set(probes.NAMES) and record.versions == [OLD]


def test_a_key_from_before_probes_is_held_against_the_image_it_recorded(tmp_path: Path) -> None:
    begin_before_probes(tmp_path, pixel_digest(decode(IMAGE)))
    assert confirm(tmp_path, NEW, image=IMAGE).versions == [OLD, NEW]
    begin_before_probes(tmp_path, "00" * 16)
    with pytest.raises(DriftError, match="other pixels"):
        confirm(tmp_path, NEW, image=IMAGE)


def test_a_key_from_before_probes_whose_images_are_gone_is_not_mixed(tmp_path: Path) -> None:
    begin_before_probes(tmp_path, pixel_digest(decode(IMAGE)))
    with pytest.raises(DriftError, match="not known"):
        confirm(tmp_path, NEW)
    assert PixelRecord(tmp_path).versions == [OLD]


@pytest.mark.parametrize("position", [5, 60, 150, -40, -3])
def test_a_damaged_record_is_no_record(tmp_path: Path, position: int) -> None:
    confirm(tmp_path, OLD)
    content = bytearray((tmp_path / DRIFT_FILE).read_bytes())
    content[position] ^= 1
    (tmp_path / DRIFT_FILE).write_bytes(content)
    assert PixelRecord(tmp_path).probes == {}


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b"[" * 100_000])
def test_what_is_no_record_is_no_record(tmp_path: Path, content: bytes) -> None:
    (tmp_path / DRIFT_FILE).write_bytes(content)
    assert PixelRecord(tmp_path).versions == []
