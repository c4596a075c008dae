"""Decode the bytes of an image to RGB, or say from a closed list why that cannot be done."""

from __future__ import annotations

import io
import logging
import math
import threading
import warnings
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

from PIL import Image, ImageFile, UnidentifiedImageError, features

from .pixels import Colour, UnsupportedModeError, orientation_of, oriented, to_rgb

logger = logging.getLogger(__name__)

# The rule by which bytes become pixels, part of what a cached feature is determined by: raise the number whenever
# an image that decoded before comes out with other pixels. Pillow's version is no part of it; drift is checked.
DECODER = "pillow-rgb-1"
DRAFT_DECODER = f"{DECODER}-draft"
# Plain JPEGs decoded and resized by torchvision on the device, all else as by `DECODER`.
TORCHVISION_DECODER = "torchvision-jpeg-1"

LFS_HEAD = b"version https://git-lfs.github.com/spec/"
# What starts like one of these is a damaged image rather than none.
SIGNATURES = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "WEBP": (b"RIFF",),
    "BMP": (b"BM",),
    "JPEG2000": (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),
}
# What intact files of the format end with, padding aside.
ENDINGS = {"JPEG": b"\xff\xd9", "PNG": b"IEND", "GIF": b";"}
TAIL_BYTES = 1024
CUT_WORDS = ("truncated", "end of file", "not enough image data", "reached eof", "cannot read image data")
# libwebp's one answer to damage and to a lack of memory.
WEBP_PIXELS = 16383 * 16383  # no WebP has more
WEBP_REFUSED = "could not create decoder object"
UNSUPPORTED_WORDS = ("unknown pixel mode", "unsupported")
# Formats that Pillow hands to other programs or libraries, if they happen to be there: PostScript is a program to
# be run, the others are containers. What comes out would not be determined by the bytes.
REFUSED_FORMATS = frozenset({"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"})
VERSIONED = ("libjpeg_turbo", "webp", "avif", "jpg_2000", "libtiff", "littlecms2", "zlib", "zlib_ng")

# Modes whose samples alone say what an image shows.
PLAIN_MODES = frozenset({"1", "L", "LA", "RGB", "RGBA", "I;16", "I", "F"})

# Pillow warns about odd metadata and large images; neither is the user's to act on, and what matters is an error here.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Reason(StrEnum):
    """Why an image is quarantined."""

    EMPTY = "empty"
    TRUNCATED = "truncated"
    NOT_AN_IMAGE = "not an image"
    LFS_POINTER = "git-LFS pointer"
    TOO_MANY_PIXELS = "too many pixels"
    UNSUPPORTED_MODE = "unsupported mode"
    CORRUPT = "corrupt"
    KILLS_DECODER = "kills the decoder"

    @property
    def remedy(self) -> str:
        """What the user can do about it."""
        return REMEDIES[self]


REMEDIES = {
    Reason.EMPTY: "copy or download the file again, or delete it",
    Reason.TRUNCATED: "copy or download the file again; its end is missing",
    Reason.NOT_AN_IMAGE: "delete the file, or move it out of the data folder",
    Reason.LFS_POINTER: "run `git lfs pull` in its repository to fetch the image itself",
    Reason.TOO_MANY_PIXELS: "scale the image down, or raise data.max_pixels if it is to be trusted",
    Reason.UNSUPPORTED_MODE: "save it as 8-bit or 16-bit PNG, with black and white where you want them",
    Reason.CORRUPT: "open and save it in an image program, copy it again, or delete it",
    Reason.KILLS_DECODER: "delete it: it crashes, hangs or exhausts the decoder",
}


class BadImage(Exception):
    """The content cannot be decoded, today or tomorrow."""

    def __init__(self, reason: Reason, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


def decode_image(
    data: bytes,
    *,
    background: Colour,
    exif: bool,
    max_pixels: int,
    draft_size: tuple[int, int] | None = None,
) -> Image.Image:
    """The first frame of an image as RGB. Safe to call from many threads.

    An ordinary RGB image has the pixels of ``Image.open(file).convert("RGB")``.

    Args:
        background: what transparent parts are composited on, 0 to 255.
        exif: turn the image as its EXIF orientation says. (Pillow itself turns TIFF images, always.)
        max_pixels: the limit on width x height, held against the header before anything is decoded.
        draft_size: let JPEG decode at a half, a quarter or an eighth, keeping at least this width and height
            of the (turned) image; other pixels, so another rule than `DECODER` alone.

    Raises:
        BadImage: the content cannot be decoded; with a reason.
        MemoryError: the machine has too little memory at the moment.
    """
    if not data:
        raise BadImage(Reason.EMPTY, "the file has no content")
    if data.startswith(LFS_HEAD):
        raise BadImage(Reason.LFS_POINTER, "the file names an image that git LFS has not fetched")
    _allow_pixels(max_pixels)
    try:
        return _decode(data, background, exif, max_pixels, draft_size)
    except (BadImage, MemoryError):
        raise
    except UnsupportedModeError as error:
        raise BadImage(Reason.UNSUPPORTED_MODE, str(error)) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(Reason.TOO_MANY_PIXELS, f"more than {max_pixels} pixels") from error
    except Exception as error:
        # Damaged content makes Pillow's plugins raise nearly anything: OSError, ValueError, SyntaxError, TypeError,
        # KeyError, struct.error, zlib.error, ... There is no list of them, and one bad image must not end a run.
        raise _verdict(data, error) from error


class PixelBytes(bytes):
    """An image that has no file: its mode, shape and samples behind a mark, so that its digest names its pixels.

    Only what a program makes by `of` counts as one, never the content of a file.
    """

    @classmethod
    def of(cls, image: Image.Image) -> PixelBytes:
        """The pixels of an image as they are; those of palettes and other colour spaces as Pillow converts them.

        Raises:
            OSError: the image was opened from a file that cannot be decoded.
        """
        plain = image if image.mode in PLAIN_MODES else image.convert("RGBA" if "P" in image.mode else "RGB")
        head = f"pixels\0{plain.mode}\0{plain.height} {plain.width}\0".encode()
        return cls(head + plain.tobytes())

    def image(self) -> Image.Image:
        """The image that this was made of."""
        _, mode, shape, data = self.split(b"\0", 3)
        height, width = map(int, shape.split())
        image = Image.frombytes(mode.decode(), (width, height), data)
        image.format = "PNG"  # whose 16 bits fill their range, as Pillow's do
        return image


@dataclass(frozen=True)
class Decoder:
    """`decode_image` with its settings, which can be told to another process."""

    background: Colour
    exif: bool
    max_pixels: int
    draft_size: tuple[int, int] | None = None

    def __call__(self, data: bytes) -> Image.Image:
        """As `decode_image`."""
        return decode_image(data, **vars(self))

    @property
    def rule(self) -> str:
        """The name of the rule by which bytes become pixels, as the specs of features have it."""
        return DECODER if self.draft_size is None else DRAFT_DECODER


class PlainJpegsElsewhere(Decoder):
    """The decoder for what `TORCHVISION_DECODER` leaves to Pillow; that rule's name is its own."""

    @property
    def rule(self) -> str:
        """As in `Decoder`."""
        return TORCHVISION_DECODER


def _allow_pixels(max_pixels: int) -> None:
    """Raise Pillow's own limit, which errs at twice `Image.MAX_IMAGE_PIXELS`, where it is below ``max_pixels``.

    The global is only ever raised, and only for a user who asks for it, so threads cannot undo each other's.
    """
    with _pixels_lock:
        if Image.MAX_IMAGE_PIXELS is not None and max_pixels > 2 * Image.MAX_IMAGE_PIXELS:
            Image.MAX_IMAGE_PIXELS = -(-max_pixels // 2)


_pixels_lock = threading.Lock()


@cache
def _formats() -> tuple[str, ...]:
    """All formats but the refused, in Pillow's order: one that does not depend on what was opened before."""
    Image.init()
    return tuple(name for name in Image.ID if name not in REFUSED_FORMATS)


def _decode(
    data: bytes, background: Colour, exif: bool, max_pixels: int, draft_size: tuple[int, int] | None
) -> Image.Image:
    if isinstance(data, PixelBytes):
        return to_rgb(data.image(), background=background)
    with Image.open(io.BytesIO(data), formats=_formats()) as image:
        _check_size(image, max_pixels)
        if draft_size is not None and image.format in ("JPEG", "MPO"):
            turned = exif and orientation_of(image) >= 5
            image.draft(None, draft_size[::-1] if turned else draft_size)
        _load(image)
        _check_size(image, max_pixels)  # some formats tell their true size only now
        orientation = orientation_of(image) if exif else 1
        # The depth of the samples is the first byte after width and height in IHDR, a PNG's first chunk.
        sample_bits = data[24] if image.format == "PNG" and len(data) > 24 else None
        return oriented(to_rgb(image, background=background, sample_bits=sample_bits), orientation)


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise BadImage(Reason.TOO_MANY_PIXELS, f"{width} x {height} pixels, more than data.max_pixels {max_pixels}")
    if width < 1 or height < 1:
        raise BadImage(Reason.CORRUPT, f"{width} x {height} pixels")


def _load(image: ImageFile.ImageFile) -> None:
    """Decode the pixels; the metadata of a TIFF, which Pillow parses once it has them, is not held against them."""
    if image.format == "TIFF":
        finish = image.load_end

        def finish_if_possible() -> None:
            try:
                finish()
            except MemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - as in `orientation_of`: hostile metadata raises anything
                logger.debug("metadata of a TIFF left unread: %s", error)

        image.load_end = finish_if_possible  # type: ignore[method-assign]
    image.load()


def _verdict(data: bytes, error: Exception) -> BadImage:
    """Which reason an exception of Pillow's amounts to.

    Raises:
        MemoryError: there is too little memory to tell.
    """
    name = next((name for name, heads in SIGNATURES.items() if data.startswith(heads)), None)
    detail = f"{type(error).__name__}: {error}"
    if isinstance(error, UnidentifiedImageError):
        if name is None:
            return BadImage(Reason.NOT_AN_IMAGE, "no decoder of Pillow recognises the content")
        detail = _complaint(name, data)
    if WEBP_REFUSED in detail:
        _require_memory(8 * min(math.prod(_webp_size(data)), WEBP_PIXELS))  # two canvases of four bytes a pixel
    if any(word in detail.lower() for word in UNSUPPORTED_WORDS):
        return BadImage(Reason.UNSUPPORTED_MODE, detail)
    cut = isinstance(error, EOFError) or any(word in detail.lower() for word in CUT_WORDS)
    return BadImage(Reason.TRUNCATED if cut or _lacks_ending(name, data) else Reason.CORRUPT, detail)


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height in the header of a WebP (developers.google.com/speed/webp/docs/riff_container); 0 where cut."""
    kind, head = data[12:16], data[20:30]
    if len(head) < 10:
        return 0, 0
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(head[6:8], "little") & 0x3FFF, int.from_bytes(head[8:10], "little") & 0x3FFF


def _require_memory(size: int) -> None:
    """Raise MemoryError where so many bytes cannot be had now."""
    bytearray(size)


def _complaint(name: str, data: bytes) -> str:
    """What the decoder of a format has against content of its own signature; `Image.open` keeps it to itself."""
    try:
        Image.OPEN[name][0](io.BytesIO(data), "")
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - the very exception that is asked for
        return f"{type(error).__name__}: {error}"
    return f"damaged {name}"


def _lacks_ending(name: str | None, data: bytes) -> bool:
    if name == "WEBP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    return name in ENDINGS and ENDINGS[name] not in data[-TAIL_BYTES:]


def decoder_versions() -> dict[str, str]:
    """Versions of Pillow and of the libraries it decodes with; another version may give other pixels."""
    versions = {"pillow": features.version("pil") or "unknown"}
    for name in VERSIONED:
        version = features.version(name)
        if version:
            versions[name] = str(version)
    return versions
