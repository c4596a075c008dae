"""Images given one by one, unlabelled, for prediction: paths of files and folders, bytes, arrays, PIL images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..files import digest_bytes
from .decode import PixelBytes
from .folder import no_images
from .source import UNLABELLED, Samples, Stamp
from .walk import Extensions, Walker, join_listings, read_file, shown, stamp_of, unreadable

Given = str | os.PathLike[str] | bytes | NDArray[np.uint8] | Image.Image


class GivenSource:
    """What was given, in its order, within a folder in that of the names; what is named twice is taken once.

    A file that is named itself is taken whatever its extension, hidden or not. What has no path is called ``image N``
    by its place among what was given.

    Raises:
        TypeError: something is no image and no path.
    """

    def __init__(self, given: Given | Iterable[Given], extensions: Extensions) -> None:
        self._extensions = extensions
        self._names: list[str] = []
        self._contents: dict[str, tuple[bytes, Stamp]] = {}
        for place, item in enumerate(_items(given)):
            is_path = isinstance(item, str | os.PathLike)
            self._names.append(os.path.abspath(item) if is_path else f"image {place}")
            if not is_path:
                self._contents[self._names[-1]] = _content(item)
        names = sorted(os.fsencode(os.path.realpath(path)) for path in self._names)
        # What one reads to predict it once is not worth a note for ever; a folder may come again.
        has_folder = not self._contents and any(os.path.isdir(name) for name in self._names)
        self.name = b"\0".join(names) if has_folder else None

    def list_samples(self) -> Samples:
        """All images, those below a folder in its place.

        Raises:
            DataError: a path that does not exist or cannot be read, or no image at all.
        """
        walker = Walker(Path("/"), self._extensions)
        found: dict[str, Stamp] = {}
        for name in self._names:
            files = [(name, self._contents[name][1])] if name in self._contents else _files_at(walker, name)
            for path, stamp in files:
                found.setdefault(path, stamp)
        samples = Samples(
            root=Path(),
            class_names=(),
            paths=list(found),
            targets=np.full(len(found), UNLABELLED, np.int32),
            splits=None,
            stamps=np.array(list(found.values()), np.int64).reshape(len(found), 4),
            ignored=dict(walker.ignored),
            warnings=tuple(walker.warnings),
        )
        if not found:
            raise no_images(samples, where=", ".join(map(shown, self._names)))
        return samples

    def read(self, path: str) -> tuple[bytes, Stamp]:
        """As `read_file`; what was given without a path is at hand."""
        return self._contents.get(path) or read_file(path)


def _items(given: Any) -> Iterator[Any]:
    """The single item, or those of a list of them; a string is a path and never a list of letters."""
    if isinstance(given, str | os.PathLike | bytes | bytearray | memoryview | np.ndarray | Image.Image):
        yield given
    elif isinstance(given, Iterable):
        yield from given
    else:
        raise _not_an_image(given)


def _content(item: Any) -> tuple[bytes, Stamp]:
    """The bytes, and a stamp that is theirs alone: nothing else tells two images of one name apart."""
    data = _bytes_of(item)
    return data, np.frombuffer(digest_bytes(data) + bytes(16), np.int64)


def _bytes_of(item: Any) -> bytes:
    if isinstance(item, bytes | bytearray | memoryview):
        return bytes(item)
    if isinstance(item, Image.Image):
        return PixelBytes.of(item)
    if isinstance(item, np.ndarray):
        if item.dtype != np.uint8 or not (item.ndim == 2 or (item.ndim == 3 and item.shape[2] in (3, 4))):
            raise TypeError(
                f"an image as an array is uint8 of shape (height, width), (height, width, 3) or (height, width, 4), "
                f"not {item.dtype} of shape {item.shape}"
            )
        return PixelBytes.of(Image.fromarray(item))
    raise _not_an_image(item)


def _not_an_image(item: object) -> TypeError:
    return TypeError(
        "give a path, the bytes of an image, a uint8 array or a PIL image, or a list of them, "
        f"not {type(item).__name__}"
    )


def _files_at(walker: Walker, path: str) -> Iterable[tuple[str, Stamp]]:
    """Absolute path and stamp of a file, or of the images below a folder."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise unreadable(path, error) from error
    if not os.path.isdir(path):
        return [(path, stamp_of(status))]
    names, stamps, _ = join_listings(walker.gather(f"{path[1:]}/" if path != "/" else ""))
    return ((f"/{name}", stamp) for name, stamp in zip(names, stamps, strict=True))
