"""Images become the right pixels, or a reason from the closed list; nothing else ever comes out."""

from __future__ import annotations

import csv
import io
import os
import random
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image, ImageOps

from pipeline.data.decode import (
    BadImage,
    Reason,
    decode_image,
    decoder_versions,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # pytest undoes the filter that decode.py sets
WHITE = (255, 255, 255)
MAX_PIXELS = 178_956_970

# The verdict on each awkward file that is no good; every other one must decode.
QUARANTINED = {
    "image-rs_tests__bad__bmp__Bad_height.bmp": Reason.TOO_MANY_PIXELS,
    "image-rs_tests__bad__bmp__Bad_shortfile.bmp": Reason.TRUNCATED,
    "image-rs_tests__images__bmp__images__lenient__pal8oversizepal.bmp": Reason.CORRUPT,
    "image-rs_tests__images__bmp__images__pal4rlecut.bmp": Reason.TRUNCATED,
    "image-rs_tests__images__bmp__images__rgb24rle24.bmp": Reason.UNSUPPORTED_MODE,
    "image-rs_tests__images__tiff__testsuite__rgb32f_bw.tiff": Reason.UNSUPPORTED_MODE,
    "image-rs_tests__regression__jpg__oss-fuzz-36829.jpeg": Reason.TRUNCATED,
    "lfs_pointer__airplane__airplane00.tif": Reason.LFS_POINTER,
    "lfs_pointer__airplane__airplane01.tif": Reason.LFS_POINTER,
    "lfs_pointer__airplane__airplane02.tif": Reason.LFS_POINTER,
    "lfs_pointer__daisy__10172379554_b296050f82_n.jpg": Reason.LFS_POINTER,
    "pillow__00r0_gray_l.jp2": Reason.CORRUPT,
    "pillow__10ct_32bit_128.tiff": Reason.UNSUPPORTED_MODE,
    "pillow__16_bit_binary_pgm.tiff": Reason.UNSUPPORTED_MODE,
    "pillow__16bit.s.tif": Reason.UNSUPPORTED_MODE,
    "pillow__apng__chunk_no_fctl.png": Reason.CORRUPT,
    "pillow__apng__syntax_num_frames_zero.png": Reason.CORRUPT,
    "pillow__balloon_eciRGBv2_aware.jp2": Reason.CORRUPT,
    "pillow__bmp__b__shortfile.bmp": Reason.TRUNCATED,
    "pillow__bmp__q__pal8os2v2-16.bmp": Reason.UNSUPPORTED_MODE,
    "pillow__broken_data_stream.png": Reason.TRUNCATED,
    "pillow__crash-2020-10-test.tif": Reason.CORRUPT,
    "pillow__crash-338516dbd2f0e83caddb8ce256c22db3bd6dc40f.tif": Reason.CORRUPT,
    "pillow__crash-4fb027452e6988530aa5dabee76eecacb3b79f8a.j2k": Reason.CORRUPT,
    "pillow__crash-63b1dffefc8c075ddc606c0a2f5fdc15ece78863.tif": Reason.CORRUPT,
    "pillow__crash-ccca68ff40171fdae983d924e127a721cab2bd50.j2k": Reason.CORRUPT,
    "pillow__crash-d2c93af851d3ab9a19e34503626368b2ecde9c03.j2k": Reason.CORRUPT,
    "pillow__crash-f46f5b2f43c370fe65706c11449f567ecc345e74.tif": Reason.CORRUPT,
    "pillow__decompression_bomb.gif": Reason.TOO_MANY_PIXELS,
    "pillow__libtiff_segfault.tif": Reason.CORRUPT,
    "pillow__png_decompression_dos.png": Reason.CORRUPT,
    "pillow__seek_too_large.tif": Reason.CORRUPT,
    "pillow__truncated_end_chunk.png": Reason.TRUNCATED,
    "pillow__truncated_image.png": Reason.TRUNCATED,
    "pillow__truncated_jpeg.jpg": Reason.TRUNCATED,
    "pillow__ultrahdr.jpg": Reason.TRUNCATED,
    "pillow__unknown_compression_method.png": Reason.CORRUPT,
}
# Modes whose plain conversion to RGB is right, so that ours must equal it.
if int(PIL.__version__.partition(".")[0]) < 13:  # it draws the rest of a cut BMP, and reads less of two odd TIFFs
    del QUARANTINED["image-rs_tests__images__bmp__images__pal4rlecut.bmp"]
    for odd in ("broken", "bt709"):
        QUARANTINED[f"image-rs_tests__images__tiff__testsuite__ycbcr_lzw_{odd}.tif"] = Reason.TRUNCATED

PLAIN_MODES = {"1", "L", "RGB", "CMYK", "YCbCr", "LAB"}


def decode(data: bytes, **options: Any) -> Image.Image:
    arguments: dict[str, Any] = {"background": WHITE, "exif": True, "max_pixels": MAX_PIXELS, **options}
    return decode_image(data, **arguments)


def reason_of(data: bytes, **options: Any) -> Reason:
    with pytest.raises(BadImage) as caught:
        decode(data, **options)
    assert caught.value.detail and caught.value.reason.remedy
    return caught.value.reason


def outcome_of(data: bytes, **options: Any) -> str:
    """The mode of the picture, or the reason why there is none."""
    try:
        return decode(data, **options).mode
    except BadImage as bad:
        return bad.reason


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def gradient(width: int = 20, height: int = 12) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 10, y * 20, (x + y) * 5], axis=-1).astype(np.uint8))


def pixels(data: bytes, **options: Any) -> list[Any]:
    rgb: list[Any] = np.asarray(decode(data, **options)).tolist()
    return rgb


def png(depth: int, colour: int, row: bytes, width: int, key: bytes) -> bytes:
    """A PNG of one row with a colour key, of a bit depth that Pillow does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))
    chunks = header + chunk(b"tRNS", key) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def awkward_rows() -> list[str]:
    folder = Path(os.environ.get("PIPELINE_SHARED", Path(__file__).parents[3] / "shared")) / "data/awkward_images"
    table = folder / "expected.csv"
    if not table.is_file():
        return ["none of them"]
    with open(table, newline="") as file:
        return [row["file"] for row in csv.DictReader(file)]


@pytest.mark.parametrize("name", awkward_rows())
def test_awkward_image(shared: Path, name: str) -> None:
    data = (shared / "data/awkward_images" / name).read_bytes()
    if name in QUARANTINED:
        assert reason_of(data) is QUARANTINED[name]
        return
    image = decode(data)
    assert image.mode == "RGB"
    with Image.open(io.BytesIO(data)) as plain:
        expected = ImageOps.exif_transpose(plain)
        assert image.size == expected.size
        if expected.mode in PLAIN_MODES and not expected.has_transparency_data:
            assert image.tobytes() == expected.convert("RGB").tobytes()
        if expected.mode.startswith("I") and "transparency" not in expected.info:
            # 16 bits keep their shades: a plain conversion would clip them to white.
            assert np.abs(np.asarray(image)[..., 0] - np.asarray(expected) / 257).max() < 1


def test_real_jpegs_have_the_pixels_of_torchvision(shared: Path) -> None:
    for path in sorted((shared / "data/hymenoptera_data/val/ants").glob("*.jpg"))[:12]:
        with Image.open(path) as plain:
            assert plain.getexif().get(0x0112, 1) == 1
            assert decode(path.read_bytes()).tobytes() == plain.convert("RGB").tobytes()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.EMPTY),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", Reason.LFS_POINTER),
        (b"<html>not found</html>", Reason.NOT_AN_IMAGE),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", Reason.NOT_AN_IMAGE),
        (encoded(gradient(200, 200), "JPEG")[:1500], Reason.TRUNCATED),
        (encoded(gradient(200, 200), "JPEG")[:30], Reason.TRUNCATED),
        (encoded(gradient(200, 200), "PNG")[:150], Reason.TRUNCATED),
        (encoded(gradient(200, 200), "WEBP")[:100], Reason.TRUNCATED),
        (encoded(gradient(200, 200), "GIF")[:2000], Reason.TRUNCATED),
        (encoded(Image.new("F", (4, 4)), "TIFF"), Reason.UNSUPPORTED_MODE),
        (encoded(Image.new("I", (4, 4)), "TIFF"), Reason.UNSUPPORTED_MODE),
    ],
)
def test_reasons(data: bytes, reason: Reason) -> None:
    assert reason_of(data) is reason


def test_every_reason_has_a_remedy() -> None:
    assert all(reason.remedy for reason in Reason)
    assert "git lfs pull" in Reason.LFS_POINTER.remedy


def test_the_pixel_limit_is_held_against_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(gradient(20, 12), "PNG")
    assert decode(data, max_pixels=240).size == (20, 12)
    loaded = []
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load_prepare", lambda _: loaded.append(1))
    assert reason_of(data, max_pixels=239) is Reason.TOO_MANY_PIXELS
    assert not loaded


def test_the_limit_may_exceed_pillows_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert reason_of(encoded(gradient(20, 12), "PNG"), max_pixels=150) is Reason.TOO_MANY_PIXELS
    assert Image.MAX_IMAGE_PIXELS == 100
    assert decode(encoded(gradient(20, 12), "PNG"), max_pixels=1001).size == (20, 12)


def test_alpha_is_composited_on_the_background() -> None:
    rgba = Image.new("RGBA", (2, 1))
    rgba.putpixel((0, 0), (200, 100, 0, 255))
    rgba.putpixel((1, 0), (200, 100, 0, 51))
    data = encoded(rgba, "PNG")
    assert pixels(data) == [[[200, 100, 0], [244, 224, 204]]]
    assert pixels(data, background=(0, 0, 0)) == [[[200, 100, 0], [40, 20, 0]]]
    grey = Image.new("LA", (1, 1), (100, 0))
    assert pixels(encoded(grey, "PNG"), background=(1, 2, 3)) == [[[1, 2, 3]]]


def test_palette_with_transparency() -> None:
    palette = Image.new("P", (3, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.putdata([0, 1, 2])
    assert pixels(encoded(palette, "PNG")) == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    one = encoded(palette, "PNG", transparency=1)
    assert pixels(one, background=(1, 2, 3)) == [[[10, 20, 30], [1, 2, 3], [70, 80, 90]]]
    several = encoded(palette, "PNG", transparency=b"\x00\xff\x00")
    assert pixels(several, background=(1, 2, 3)) == [[[1, 2, 3], [40, 50, 60], [1, 2, 3]]]


@pytest.mark.parametrize(
    ("depth", "colour", "row", "key", "first"),
    [
        (1, 0, b"\x40", ">H1", 0),
        (2, 0, b"\x40", ">H0", 85),
        (4, 0, b"\x31", ">H1", 51),
        (8, 0, b"\x33\x07", ">H7", 51),
        (16, 0, b"\x33\x33\x12\x34", ">H4660", 51),
        (8, 2, b"\x33\x33\x33\x07\x08\x09", ">HHH7,8,9", 51),
        (16, 2, b"\x33\x33" * 3 + b"\x12\x34" * 3, ">HHH4660,4660,4660", 51),
    ],
)
def test_colour_keys_of_every_depth(depth: int, colour: int, row: bytes, key: str, first: int) -> None:
    form = key.rstrip("0123456789,")
    values = map(int, key[len(form) :].split(","))
    data = png(depth, colour, row, 2, struct.pack(form, *values))
    assert pixels(data, background=(1, 2, 3)) == [[[first] * 3, [1, 2, 3]]]


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_divided_by_257(form: str) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    data = encoded(Image.fromarray(values), form)
    assert [value[0] for value in pixels(data)[0]] == [0, 0, 1, 1, 128, 255]


def test_pgm_with_a_maximum_of_its_own() -> None:
    assert pixels(b"P5 2 1 1023\n" + struct.pack(">2H", 1023, 0)) == [[[255] * 3, [0] * 3]]


def tiff(bits: int, photometric: int, strip: bytes, width: int) -> bytes:
    """A little-endian grey TIFF of one row."""
    entries = [(256, 3, width), (257, 3, 1), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8)]
    entries += [(277, 3, 1), (278, 3, 1), (279, 4, len(strip))]
    table = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + struct.pack("<H", len(entries)) + table + b"\0" * 4


def test_tiff_of_twelve_bits_and_white_is_zero() -> None:
    assert pixels(tiff(12, 1, b"\xff\xf0\x00", 2)) == [[[255] * 3, [0] * 3]]
    assert pixels(tiff(16, 0, b"\xff\xff\x00\x00", 2)) == [[[0] * 3, [255] * 3]]


def test_premultiplied_grey() -> None:
    from pipeline.data.pixels import to_rgb

    grey = Image.merge("La", (Image.new("L", (1, 1), 50), Image.new("L", (1, 1), 128)))
    assert np.abs(np.asarray(to_rgb(grey, background=(0, 0, 0))).astype(int) - 50).max() <= 1


def test_cmyk_and_lab(shared: Path) -> None:
    assert pixels(encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF")) == [[[255, 0, 0]]]
    folder = shared / "data/awkward_images"
    red, green, blue = pixels((folder / "pillow__lab-red.tif").read_bytes())[5][5]
    assert red > 200 and green < 60 and blue > 100  # a* far up alone is a magenta red


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(gradient(), form, exif=exif)
    with Image.open(io.BytesIO(data)) as plain:
        expected = ImageOps.exif_transpose(plain).convert("RGB")
    assert decode(data).tobytes() == expected.tobytes() and decode(data).size == expected.size
    if form != "TIFF":
        assert decode(data, exif=False).size == (20, 12)


def test_damaged_exif_does_not_matter() -> None:
    good = encoded(gradient(), "JPEG", quality=95)
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01"):
        segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
        assert decode(good[:2] + segment + good[2:]).tobytes() == decode(good).tobytes()
    # A TIFF whose EXIF folder lies outside of the file.
    data = tiff(8, 1, b"\x07\x08", 2)
    count = struct.unpack("<H", data[10:12])[0]
    table = data[12 : 12 + 12 * count] + struct.pack("<HHII", 34665, 4, 1, 0x7FFFFFF0)
    assert pixels(data[:10] + struct.pack("<H", count + 1) + table + b"\0" * 4) == [[[7] * 3, [8] * 3]]


def test_first_frame_of_animations() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    for form in ("GIF", "PNG", "TIFF"):
        assert pixels(encoded(frames[0], form, save_all=True, append_images=frames[1:]))[0][0] == [255, 0, 0]


def test_draft_keeps_enough_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(gradient(800, 400), "JPEG", exif=exif)
    assert decode(data).size == (400, 800)
    assert decode(data, draft_size=(150, 100)).size == (200, 400)
    assert decode(data, draft_size=(50, 100)).size == (50, 100)
    assert decode(data, draft_size=(51, 100)).size == (100, 200)
    assert decode(encoded(gradient(80, 40), "PNG"), draft_size=(5, 5)).size == (80, 40)


def test_memory_errors_are_not_the_images_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(MemoryError):
        decode(encoded(gradient(), "JPEG"))


@pytest.mark.parametrize(
    ("place", "form", "errors"),
    [
        ("PIL.Image.Image.getexif", "JPEG", [MemoryError()]),
        ("PIL.TiffImagePlugin.TiffImageFile.load_end", "TIFF", [MemoryError()]),
        ("PIL.PngImagePlugin.PngImageFile._open", "PNG", [SyntaxError("damaged"), MemoryError()]),
    ],
    ids=["orientation", "metadata", "complaint"],
)
def test_nor_are_they_taken_for_damaged_metadata(
    place: str, form: str, errors: list[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, following = encoded(gradient(), form), iter(errors)

    def fail(*_: object) -> None:
        raise next(following)

    monkeypatch.setattr(place, fail)
    with pytest.raises(MemoryError):
        decode(data)


def test_threads_agree_with_one_thread(shared: Path) -> None:
    names = [name for name in awkward_rows() if name not in QUARANTINED][:60]
    contents = [(shared / "data/awkward_images" / name).read_bytes() for name in names]
    alone = [decode(data).tobytes() for data in contents]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda data: decode(data).tobytes(), contents)) == alone


def test_mutations_end_in_a_picture_or_a_reason(shared: Path) -> None:
    rng = random.Random(0)
    sources = [path.read_bytes() for path in sorted((shared / "data/awkward_images").glob("*.*"))]
    sources = [data for data in sources if len(data) < 20_000]
    for _ in range(300):
        data = bytearray(rng.choice(sources))
        for _ in range(rng.randrange(12)):
            data[rng.randrange(min(len(data), rng.choice((64, 20_000))))] = rng.randrange(256)
        cut = bytes(data[: rng.choice((None, rng.randrange(len(data) + 1)))]) + rng.choice((b"", rng.choice(sources)))
        assert outcome_of(cut, max_pixels=4_000_000) in {"RGB", *Reason}


def test_decoder_versions_name_the_libraries() -> None:
    versions = decoder_versions()
    assert {"pillow", "libjpeg_turbo"} <= set(versions) and all(isinstance(v, str) for v in versions.values())


@pytest.mark.parametrize("options", [{"quality": 80}, {"lossless": True}, {"quality": 80, "exif": b"Exif\0\0x"}])
def test_a_webp_without_memory_for_it_is_not_condemned(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """libwebp says the same of damage as of a lack of memory."""
    buffer = io.BytesIO()
    Image.new("RGB", (70, 50), (9, 90, 200)).save(buffer, "WEBP", **options)
    asked: list[int] = []

    def refuse(*_arguments: Any, **_named: Any) -> None:
        raise OSError("could not create decoder object")

    def no_memory(size: int) -> None:
        asked.append(size)
        raise MemoryError

    monkeypatch.setattr("PIL.WebPImagePlugin.WebPImageFile._open", refuse)
    assert outcome_of(buffer.getvalue()) == Reason.CORRUPT
    monkeypatch.setattr("pipeline.data.decode._require_memory", no_memory)
    with pytest.raises(MemoryError):
        outcome_of(buffer.getvalue())
    assert asked == [8 * 70 * 50]
