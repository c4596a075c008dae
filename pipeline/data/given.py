"""Images given one by one, unlabelled: paths of files and folders, bytes, arrays, PIL images; rows of a table."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import DataError
from ..files import digest_bytes
from ..params import Place, as_place, is_url
from .decode import PixelBytes
from .folder import OTHER_SOURCES, no_images
from .source import UNLABELLED, Samples, Source, Stamp
from .stores import READS_AT_ONCE, Objects, join, name_of
from .walk import Extensions, Walker, join_listings, read_file, shown, stamp_of, unreadable

SECRETS_GO = "leave it out: the store's own settings are for who may read it"
BYTES = bytes | bytearray | memoryview
Given = str | os.PathLike[str] | bytes | NDArray[np.uint8] | Image.Image


class GivenSource:
    """What was given, in its order, within a folder in that of the names; what is named twice is taken once.

    A file that is named itself is taken whatever its extension, hidden or not. What has no path is called ``image N``
    by its place among what was given.

    Raises:
        TypeError: something is no image and no path.
    """

    def __init__(
        self, given: Given | Iterable[Given], extensions: Extensions, open_place: Callable[[str], Source] | None = None
    ) -> None:
        self._extensions, self._open_place = extensions, open_place
        self._sources: dict[str, tuple[Source, str]] = {}
        self._names: list[str] = []
        self._contents: dict[str, tuple[bytes, Stamp]] = {}
        for place, item in enumerate(_items(given)):
            is_path = isinstance(item, str | os.PathLike)
            self._names.append(_whole_path(item) if is_path else f"image {place}")
            if not is_path:
                self._contents[self._names[-1]] = _content(item)
        # What one reads to predict it once is not worth a note for ever; a folder or a shard may come again.
        lasts = not self._contents and any(os.path.isdir(name) or _is_place(name) for name in self._names)
        self.name = b"\0".join(sorted(name_of(path) for path in self._names)) if lasts else None

    def list_samples(self) -> Samples:
        """All images, those below a folder in its place.

        Raises:
            DataError: a path that does not exist or cannot be read, or no image at all.
        """
        walker = Walker(Path("/"), self._extensions)
        found: dict[str, Stamp] = {}
        warnings: list[str] = []
        reads_at_once = 0
        for name in self._names:
            if name in self._contents:
                files: Iterable[tuple[str, Stamp]] = [(name, self._contents[name][1])]
            elif self._open_place and _is_place(name):
                samples = self._list_place(name)
                files = [
                    (join(samples.root, path), stamp) for path, stamp in zip(samples.paths, samples.stamps, strict=True)
                ]
                warnings += samples.warnings
                reads_at_once = max(reads_at_once, samples.reads_at_once)
            else:
                files = _files_at(walker, name)
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
            warnings=(*walker.warnings, *warnings),
            reads_at_once=reads_at_once,
        )
        if not found:
            raise no_images(samples, where=", ".join(map(shown, self._names)))
        return samples

    def read(self, path: str) -> tuple[bytes, Stamp]:
        """As `read_file`; what was given without a path is at hand, and other places read for themselves."""
        if path in self._sources:
            source, name = self._sources[path]
            return source.read(name)
        return self._contents.get(path) or read_file(path)

    def _list_place(self, name: str) -> Samples:
        assert self._open_place is not None
        source = self._open_place(name)
        samples = source.list_samples()
        self._sources |= {join(samples.root, path): (source, path) for path in samples.paths}
        return samples


class BatchSource:
    """One image a row, in order and none left out: what cannot be had is an error when it is read, not before.

    Args:
        contents: the bytes of each image; what is no bytes is to be read at its path.
        paths: the file or URL of each image, relative to ``root``; of an image with bytes only its name.
    """

    name = None

    def __init__(self, contents: Sequence[Any], paths: Sequence[Any], root: Place) -> None:
        self._stores: dict[str, Objects] = {}
        self._contents: dict[str, Any] = {}
        self._names: list[str] = []
        for number, (data, path) in enumerate(zip(contents, paths, strict=True)):
            name = _place_of(path, root)
            if name is None or isinstance(data, BYTES):
                # No other row, nor a file, is called so.
                name = f"image {number}" + (f" ({name})" if name else "")
                self._contents[name] = data
            self._names.append(name)

    def list_samples(self) -> Samples:
        """All rows; nothing is looked at."""
        return Samples(
            root=Path(),
            class_names=(),
            paths=self._names,
            targets=np.full(len(self._names), UNLABELLED, np.int32),
            splits=None,
            stamps=np.zeros((len(self._names), 4), np.int64),
            reads_at_once=READS_AT_ONCE if any(map(is_url, set(self._names) - set(self._contents))) else 0,
        )

    def read(self, path: str) -> tuple[bytes, Stamp]:
        """The bytes that were given, or those of the file or the object at the path."""
        if path in self._contents:
            data = self._contents[path]
            if not isinstance(data, BYTES):
                raise OSError(errno.EINVAL, "the row holds neither bytes nor a path that may be read")
            return bytes(data), np.zeros(4, np.int64)
        try:
            return self._store(path).read(path) if is_url(path) else read_file(path)
        except ValueError as error:  # no path of this machine
            raise OSError(errno.EINVAL, str(error)) from error

    def _store(self, url: str) -> Objects:
        server = url[: url.find("/", url.find("://") + 3)]
        try:
            return self._stores.setdefault(server, self._stores.get(server) or Objects(url))
        except DataError as error:
            if isinstance(error.__cause__, ImportError):
                raise
            raise OSError(errno.EINVAL, error.why) from error


def _place_of(path: Any, root: Place) -> str | None:
    """The whole path or the URL of a row, None for none or one with a password, which is not repeated anywhere."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        return None
    if not is_url(path):
        return join(root, os.fspath(path))
    try:
        return str(as_place(path))
    except ValueError:
        return None


def _is_place(name: str) -> bool:
    """Whether a name is that of more than a file or a folder of this machine."""
    return is_url(name) or (name.lower().endswith(OTHER_SOURCES) and not os.path.isdir(name))


def _whole_path(item: str | os.PathLike[str]) -> str:
    try:
        return str(as_place(item)) if is_url(item) else os.path.abspath(item)
    except ValueError as error:
        raise DataError(f"{error}, which is not repeated here, cannot be read.", remedy=SECRETS_GO) from error


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
    if isinstance(item, BYTES):
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
