"""Where files lie: on this machine, or in an object store behind an fsspec URL. Whole files, and pieces of them.

Credentials are the store's own business (its environment variables and files); nothing of them is known here.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar, cast

import numpy as np

from ..errors import DataError
from ..files import digest_bytes
from ..params import Place, is_url
from .source import Stamp
from .walk import FileChanged, read_file, shown, stamp_of

T = TypeVar("T")
ATTEMPTS = 4
FIRST_WAIT = 0.2  # seconds before the second attempt; doubled before each further one
GIVEN_UP_AFTER = 32  # reads that failed one after the other: the store is away, and waiting helps none of the others
READS_AT_ONCE = 32  # what hides the latency of a store
BLOCK = 4 << 20  # bytes that reading through a file asks for at a time
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileChanged)
# What stores call the name of a content, the strongest first; and its time of change.
ETAGS = ("ETag", "etag", "md5Hash", "content_md5", "generation", "blob_id", "version_id")
TIMES = ("LastModified", "last_modified", "mtime", "updated", "created", "Last-Modified")
NEVER = np.iinfo(np.int64).max  # a time of change that no reading lies safely after


class Store(Protocol):
    """Files by path: absolute on this machine, a URL in a store."""

    reads_at_once: int

    def find(self, folder: str) -> dict[str, Stamp]:
        """All files below a folder, by path relative to it, in order; hidden ones too."""
        ...

    def children(self, folder: str) -> tuple[list[str], list[str]]:
        """Names of the files and of the folders directly in a folder, but for hidden ones."""
        ...

    def is_folder(self, path: str) -> bool:
        """Whether there is a folder."""
        ...

    def stamp(self, path: str) -> Stamp:
        """The stamp of one file."""
        ...

    def read(self, path: str) -> tuple[bytes, Stamp]:
        """A file's content and its stamp at that time."""
        ...

    def read_piece(self, path: str, start: int, size: int) -> tuple[bytes, Stamp]:
        """At most ``size`` bytes from ``start``, fewer where the file ends, and the file's stamp at that time."""
        ...

    def open(self, path: str) -> BinaryIO:
        """The file, to be read from its beginning on or by seeking."""
        ...


class Disk:
    """The files of this machine."""

    reads_at_once = 0

    def find(self, folder: str) -> dict[str, Stamp]:
        """All files below; links are followed, those that lead nowhere are not there."""
        found = {}
        for parent, folders, names in os.walk(folder, followlinks=True):
            folders.sort()
            for name in sorted(names):
                path = os.path.join(parent, name)
                with suppress(OSError):
                    found[os.path.relpath(path, folder)] = self.stamp(path)
        return found

    def children(self, folder: str) -> tuple[list[str], list[str]]:
        """In the order of their names."""
        with os.scandir(folder) as entries:
            listed = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
        return [name for name, is_dir in listed if not is_dir], [name for name, is_dir in listed if is_dir]

    def is_folder(self, path: str) -> bool:
        """As `os.path.isdir`."""
        return os.path.isdir(path)

    def stamp(self, path: str) -> Stamp:
        """Size, mtime_ns, ctime_ns, inode."""
        return stamp_of(os.stat(path))

    def read(self, path: str) -> tuple[bytes, Stamp]:
        """As `read_file`."""
        return read_file(path)

    def read_piece(self, path: str, start: int, size: int) -> tuple[bytes, Stamp]:
        """One ``pread``; the file must be as it was before and after."""
        with open(path, "rb", buffering=0) as file:
            before = stamp_of(os.fstat(file.fileno()))
            data = os.pread(file.fileno(), size, start)
            if (stamp_of(os.fstat(file.fileno())) != before).any():
                raise FileChanged(errno.EAGAIN, "the file changed while it was read", path)
        return data, before

    def open(self, path: str) -> BinaryIO:
        """The file."""
        return open(path, "rb")


class Objects:
    """An object store at a URL, whatever fsspec (filesystem-spec.readthedocs.io) has an implementation for.

    What can pass is tried again with growing waits. A read proves that its bytes are those of the stamp: by the MD5
    that S3's plain ETags are, else by asking for the stamp once more.

    Raises:
        DataError: fsspec or what it needs for this protocol is not installed.
    """

    reads_at_once = READS_AT_ONCE

    def __init__(self, url: str) -> None:
        self._fs = _file_system(url)
        self._failures = 0  # since the last success
        self._stamps: dict[str, tuple[Stamp, dict[str, Any]]] = {}

    def find(self, folder: str) -> dict[str, Stamp]:
        """All objects below; one listing."""
        top = self._fs._strip_protocol(folder).rstrip("/")
        listing = self._retried(lambda: self._fs.find(top, detail=True), folder)
        found: dict[str, Stamp] = {}
        for name, info in sorted(listing.items()):
            path = self._fs._strip_protocol(name).removeprefix(top).lstrip("/")
            if path:
                found[path] = self._noted(f"{folder}/{path}", info)
        return found

    def children(self, folder: str) -> tuple[list[str], list[str]]:
        """One listing of one level."""
        entries = self._retried(lambda: self._fs.ls(folder, detail=True), folder)
        kinds = [(info["name"].rstrip("/").rpartition("/")[2], info["type"] == "directory") for info in entries]
        listed = sorted((name, is_dir) for name, is_dir in kinds if name and not name.startswith("."))
        return [name for name, is_dir in listed if not is_dir], [name for name, is_dir in listed if is_dir]

    def is_folder(self, path: str) -> bool:
        """Never asked of the store: what is called like a file is one."""
        return False

    def stamp(self, path: str) -> Stamp:
        """Size, time of change, time of change, digest of the ETag; times are 0 where there is an ETag."""
        return self._noted(path, self._info(path))

    def read(self, path: str) -> tuple[bytes, Stamp]:
        """The object, whole and unchanged since its stamp was taken."""
        self._know(path)
        return self._unchanged(path, None, None)

    def read_piece(self, path: str, start: int, size: int) -> tuple[bytes, Stamp]:
        """One ranged request."""
        self._know(path)
        length = self._stamps[path][0][0]
        end = start + size if length < 0 else min(start + size, int(length))
        return self._unchanged(path, start, end) if end > start else (b"", self._stamps[path][0])

    def open(self, path: str) -> BinaryIO:
        """The object, read piece by piece as it is asked for."""
        return cast(BinaryIO, io.BufferedReader(_Pieces(self, path, int(self.stamp(path)[0])), BLOCK))

    def _know(self, path: str) -> None:
        """Ask for the stamp of what was not listed, or was listed without one, as HTTP's pages do."""
        if path not in self._stamps or self._stamps[path][0][1] == NEVER:
            self.stamp(path)

    def _unchanged(self, path: str, start: int | None, end: int | None) -> tuple[bytes, Stamp]:
        for _ in range(ATTEMPTS):
            stamp, info = self._stamps[path]
            wanted = end - start if end is not None and start is not None else int(stamp[0])
            data = self._retried(lambda: self._fs.cat_file(path, start=start, end=end), path)
            whole = wanted < 0 or len(data) == wanted
            if whole and start is None and hashlib.md5(data).hexdigest() == str(info.get("ETag")).strip('"'):
                return data, stamp
            if (self.stamp(path) == stamp).all() and whole:
                return data, stamp
        raise FileChanged(errno.EAGAIN, "the object changed or was cut short while it was read", path)

    def _info(self, path: str) -> dict[str, Any]:
        return cast(dict[str, Any], self._retried(lambda: self._fs.info(path), path))

    def _noted(self, path: str, info: dict[str, Any]) -> Stamp:
        stamp = _stamp_of_info(info)
        self._stamps[path] = stamp, {"ETag": info.get("ETag")}
        return stamp

    def _retried(self, action: Callable[[], T], path: str) -> T:
        """What ``action`` returns, tried again where its error may pass; any error as an OSError."""
        attempts = ATTEMPTS if self._failures < GIVEN_UP_AFTER else 1
        for attempt in range(attempts):
            try:
                result = action()
            except FINAL:
                raise
            except Exception as error:  # each store has errors of its own, few of them OSErrors
                if attempt + 1 == attempts:
                    self._failures += 1
                    why = f"{type(error).__name__}: {error}"
                    raise OSError(errno.EIO, f"not read after {attempts} attempts ({why})", path) from error
                time.sleep(FIRST_WAIT * 2**attempt * random.uniform(0.5, 1.5))
            else:
                self._failures = 0
                return result
        raise AssertionError("unreachable")


class _Pieces(io.RawIOBase):
    """An object as a file."""

    def __init__(self, store: Objects, path: str, size: int) -> None:
        self._store, self._path, self._size, self._position = store, path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        data, _ = self._store.read_piece(self._path, self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def store_at(place: Place) -> Store:
    """What reads the files at a place."""
    return Objects(str(place)) if is_url(place) else Disk()


def join(folder: Place, path: str) -> str:
    """``folder/path``; the path alone where it is absolute or the folder is nothing."""
    return path if str(folder) == "." else os.path.join(folder, path)


def parent_of(place: Place) -> Place:
    """The folder that a file lies in."""
    return str(place).rpartition("/")[0] if is_url(place) else Path(place).parent


def name_of(*places: Place) -> bytes:
    """By which the cache remembers what lies at these places."""
    return b"\0".join(os.fsencode(place if is_url(place) else os.path.realpath(place)) for place in places)


def stamp_of_piece(stamp: Stamp, start: int, size: int) -> Stamp:
    """The stamp of a piece of a file: where it begins, the file's times, and the digest of the rest."""
    rest = digest_bytes(f"{stamp[0]} {stamp[3]} {size}".encode())
    return np.array([start, stamp[1], stamp[2], int.from_bytes(rest[:8], "little", signed=True)], np.int64)


def stamps_of_pieces(stamp: Stamp, starts: Sequence[int], sizes: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """`stamp_of_piece` of each, int64 (n, 4)."""
    rows = [stamp_of_piece(stamp, start, size) for start, size in zip(starts, sizes, strict=True)]
    return np.array(rows, np.int64).reshape(len(rows), 4)


def _stamp_of_info(info: dict[str, Any]) -> Stamp:
    size = info.get("size")
    etag = next((str(info[key]) for key in ETAGS if info.get(key)), "")
    if etag.startswith("W/"):  # names what is equivalent, not what is equal
        etag = ""
    changed = 0 if etag else next((_nanoseconds(info[key]) for key in TIMES if info.get(key)), NEVER)
    name = int.from_bytes(digest_bytes(etag.encode())[:8], "little", signed=True) if etag else 0
    return np.array([-1 if size is None else int(size), changed, changed, name], np.int64)


def _nanoseconds(moment: Any) -> int:
    if isinstance(moment, str):
        try:
            moment = datetime.fromisoformat(moment)
        except ValueError:
            return int(NEVER)
    return int(moment.timestamp() * 1e9) if isinstance(moment, datetime) else int(float(moment) * 1e9)


def _file_system(url: str) -> Any:
    try:
        import fsspec

        # Listings are asked for once by us; a cache of them would hide changes. With more than one part at a time s3fs
        # asks for the size of each object before it reads it.
        options = {"max_concurrency": 1} if url.startswith(("s3://", "s3a://")) else {}
        return fsspec.core.url_to_fs(url, use_listings_cache=False, **options)[0]
    except ImportError as error:
        raise DataError(
            "The images lie in a store that this program cannot read yet.",
            where=shown(url),
            why=str(error),
            remedy='pip install "image-transfer-pipeline[remote]" (S3, HTTP; others: gcsfs, adlfs, huggingface_hub)',
        ) from error
    except ValueError as error:
        raise DataError(
            "The URL cannot be read.", where=shown(url), why=str(error), remedy="correct data.root"
        ) from error
