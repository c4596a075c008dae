"""Read the header of a JPEG: is it one that every decoder turns into the same kind of RGB? Needs no decoder."""

from __future__ import annotations

from PIL import Image

from .pixels import ORIENTATION_TAG

# Markers of ITU-T T.81: baseline and progressive frames, what begins the pixels, and what stands alone.
FRAMES, SCAN, ALONE = (0xC0, 0xC2), 0xDA, (0x01, *range(0xD0, 0xD9))
NO_OTHER_FRAME = frozenset({*range(0xC0, 0xD0)} - {*FRAMES, 0xC4, 0xC8, 0xCC})
EXIF, ADOBE = 0xE1, 0xEE
END, TAIL_BYTES = b"\xff\xd9", 64
RGB_NAMES = (ord("R"), ord("G"), ord("B"))


def plain_size(data: bytes, *, exif: bool) -> tuple[int, int] | None:
    """Width and height of a whole JPEG in grey or YCbCr with 8 bits, that is not to be turned; None for all else.

    Args:
        exif: whether an orientation tag counts.
    """
    if not data.startswith(b"\xff\xd8") or END not in data[-TAIL_BYTES:]:
        return None
    place, size = 2, None
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == SCAN:
            return size
        if marker == 0xFF or marker in ALONE:
            place += 1 if marker == 0xFF else 2
            continue
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4])
        segment = data[place + 4 : end]
        if marker in FRAMES:
            size = _size_of(segment)
        if marker in NO_OTHER_FRAME or (marker in FRAMES and size is None):
            return None
        if (exif and marker == EXIF and _may_turn(segment)) or (marker == ADOBE and _is_rgb(segment)):
            return None
        place = end
    return None


def _size_of(frame: bytes) -> tuple[int, int] | None:
    if len(frame) < 6 or frame[0] != 8 or frame[5] not in (1, 3) or tuple(frame[6::3]) == RGB_NAMES:
        return None
    height, width = int.from_bytes(frame[1:3]), int.from_bytes(frame[3:5])
    return (width, height) if width and height else None


def _is_rgb(segment: bytes) -> bool:
    """Whether Adobe's segment says that three components are RGB."""
    return segment.startswith(b"Adobe") and segment[11:12] == b"\0"


def _may_turn(segment: bytes) -> bool:
    if not segment.startswith(b"Exif"):
        return b"Orientation" in segment  # XMP
    try:
        tags = Image.Exif()
        tags.load(segment)
        return bool(tags.get(ORIENTATION_TAG, 1) != 1)
    except Exception:  # noqa: BLE001 - parsing hostile metadata raises anything; whoever is asked then knows what to do
        return True
