"""Turn whatever Pillow decoded into RGB: scale 16 bits to 8, composite what is transparent, apply the orientation.

Pillow's own ``convert("RGB")`` clips 16-bit values to white, drops alpha and forgets colour keys; this does not.
Colour profiles (ICC) are not applied, as torchvision does not apply them either.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

Colour = tuple[int, int, int]

ORIENTATION_TAG = 0x0112
TIFF_BITS_TAG = 258
TIFF_PHOTOMETRIC_TAG = 262
TIFF_WHITE_IS_ZERO = 0

# Modes that Pillow converts to RGB (or, where transparent, to RGBA) by a rule that knows their range.
CONVERTIBLE = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"})
SIXTEEN_BIT = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
# Where 16 bits are unsigned and fill their range: Pillow shifts the 9 to 15 bits of JPEG 2000 up to 16. Elsewhere
# (FITS, McIDAS) the same mode holds counts whose black and white nobody knows.
SIXTEEN_BIT_FORMATS = frozenset({"PNG", "TIFF", "JPEG2000"})
# Mode I holds 32 bits; these formats use 0 to 65535 of it, whatever range the file itself declares.
WIDE_FORMATS = frozenset({"PNG", "PPM"})

TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnsupportedModeError(Exception):
    """Pixels without a defined range of values, so that nobody knows what is black and what is white."""


def to_rgb(image: Image.Image, *, background: Colour, sample_bits: int | None = None) -> Image.Image:
    """A loaded image as RGB, transparent parts composited on ``background`` in plain sRGB.

    Args:
        sample_bits: the bits of a PNG's samples as stored, for colour keys, which Pillow does not scale.

    Raises:
        UnsupportedModeError: 32-bit integers, floats, and 16 bits of formats that do not define their range.
    """
    if image.mode in SIXTEEN_BIT or (image.mode == "I" and image.format in WIDE_FORMATS):
        image = _eight_bits(image)
    elif image.mode == "La":  # grey premultiplied by alpha, which Pillow converts to nothing
        grey, alpha = image.split()
        image = Image.merge("RGBa", (grey, grey, grey, alpha))
    elif image.mode not in CONVERTIBLE:
        raise UnsupportedModeError(f"mode {image.mode} of {image.format} has no defined range")
    if not image.has_transparency_data:
        return image.convert("RGB")
    if sample_bits is not None and image.mode in ("L", "RGB"):
        image.info["transparency"] = _scaled_key(image.info["transparency"], sample_bits)
    canvas = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or the metadata is damaged.

    Follows `PIL.ImageOps.exif_transpose`. TIFF images come out of Pillow already turned, and without the tag.
    """
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
        return orientation if orientation in TRANSPOSITIONS else 1
    except MemoryError:  # says nothing of the metadata, and an image that is not turned would be cached for good
        raise
    except Exception:  # noqa: BLE001 - parsing hostile metadata raises anything; the pixels are good all the same
        return 1


def oriented(image: Image.Image, orientation: int) -> Image.Image:
    """The image as its camera was held."""
    return image.transpose(TRANSPOSITIONS[orientation]) if orientation != 1 else image


def _eight_bits(image: Image.Image) -> Image.Image:
    """L, or LA where a colour key makes parts transparent, of a 16-bit image: its values divided by 257, rounded."""
    if image.mode in SIXTEEN_BIT and image.format not in SIXTEEN_BIT_FORMATS:
        raise UnsupportedModeError(f"16 bits of {image.format} have no defined range")
    values = np.asarray(image)
    white, inverted = _tiff_range(image) if image.format == "TIFF" else (65535, False)
    scaled = (np.clip(values, 0, white).astype(np.uint32) * 255 + white // 2) // white
    grey = Image.fromarray((255 - scaled if inverted else scaled).astype(np.uint8))
    key = image.info.get("transparency")
    if not isinstance(key, int):
        return grey
    alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, alpha))


def _tiff_range(image: Image.Image) -> tuple[int, bool]:
    """The value of white by the bits a sample has (12 or 16), and whether 0 means white."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(TIFF_BITS_TAG, (16,))[0]
    return (1 << bits) - 1, tags.get(TIFF_PHOTOMETRIC_TAG) == TIFF_WHITE_IS_ZERO


def _scaled_key(key: object, bits: int) -> object:
    """A PNG's colour key, which is in samples as stored, in the 8 bits that Pillow made of them."""
    if isinstance(key, tuple):
        return tuple(_scaled_sample(sample, bits) for sample in key)
    return _scaled_sample(key, bits) if isinstance(key, int) else key


def _scaled_sample(sample: int, bits: int) -> int:
    return sample >> 8 if bits == 16 else sample * 255 // ((1 << bits) - 1)
