"""List image files below a folder, with their stamps, at little more than the price of the system calls; read one.

A tree of 100 000 files is walked on every run, so the loop over a folder's entries does as little Python work a
file as it can: one look-up of the suffix and one ``stat``; everything else is done in NumPy or once a folder. Where a
``stat`` has to wait, as on a network disk, many wait at once.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .source import Stamp

Identity = tuple[int, int]
Extensions = Sequence[str] | Literal["all"]

STAT_FIELDS = ("st_size", "st_mtime_ns", "st_ctime_ns", "st_ino")
RESOURCE_FORKS = "__MACOSX"  # what macOS packs beside the files of an archive
KIND_BITS = 0o170000  # of a mode: what kind of file it is
# The first files of a folder tell what a stat takes; on a local disk it is a few microseconds, and threads cost more.
TRIED, SLOW_SECONDS, THREADS = 64, 5e-5, 32
_fields_and_mode = attrgetter(*STAT_FIELDS, "st_mode")


@dataclass(frozen=True)
class Listing:
    """The images directly in one folder, in the order of their names, and the names of its folders.

    Attributes:
        prefix: the folder relative to the root, ``""`` or ending in ``/``.
        stamps: int64 (n, 4), size, mtime_ns, ctime_ns, inode of each of ``names``.
    """

    prefix: str
    names: list[str]
    stamps: NDArray[np.int64]
    folders: list[str]
    identity: Identity


class Walker:
    """Walks folders below ``root``; counts what it ignores and keeps what the user should be warned of."""

    def __init__(self, root: Path, extensions: Extensions) -> None:
        self._root = str(root)
        self._wanted = registered_extensions() if extensions == "all" else frozenset(extensions)
        self._spellings = set(self._wanted)
        self.ignored: Counter[str] = Counter()
        self.warnings: list[str] = []

    def list_folder(self, prefix: str) -> Listing:
        """The images and folders directly in the folder ``prefix``.

        Raises:
            DataError: the folder cannot be read.
        """
        folder = os.path.join(self._root, prefix)
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                return self._list(prefix, descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise unreadable(folder, error) from error

    def gather(self, prefix: str, parents: tuple[Identity, ...] = ()) -> list[Listing]:
        """The folder ``prefix`` and all below it; symbolic links are followed, loops of them are not."""
        listings: list[Listing] = []
        pending = [(prefix, parents)]
        while pending:
            prefix, parents = pending.pop()
            listing = self.list_folder(prefix)
            if listing.identity in parents:
                self.warnings.append(f"The link {prefix[:-1]!r} leads back to a folder above it; it was not followed.")
                continue
            listings.append(listing)
            pending += [(f"{prefix}{name}/", (*parents, listing.identity)) for name in listing.folders]
        return listings

    def _list(self, prefix: str, descriptor: int) -> Listing:
        wanted: list[os.DirEntry[str]] = []
        folders: list[str] = []
        spellings = self._spellings
        with os.scandir(descriptor) as entries:
            for entry in entries:
                name = entry.name
                if name[0] == "." or name == RESOURCE_FORKS:
                    continue
                suffix = name[name.rfind(".") :]
                if suffix in spellings or self._spells(suffix):
                    wanted.append(entry)
                elif self._is_folder(prefix, entry):
                    folders.append(name)
                else:
                    self.ignored[os.path.splitext(name)[1].lower()] += 1
        names, rows = self._only_files(*self._with_stats(prefix, wanted), folders)
        order = sorting_order(names)
        status = os.fstat(descriptor)
        stamps = np.ascontiguousarray(rows[order, :-1])
        return Listing(prefix, take(names, order), stamps, sorted(folders), (status.st_dev, status.st_ino))

    def _with_stats(self, prefix: str, entries: list[os.DirEntry[str]]) -> tuple[list[str], NDArray[np.int64]]:
        """The names of the entries that have a stat, and its fields (n, 5)."""
        started = time.perf_counter()
        found = list(map(_try_stat, entries[:TRIED]))
        if time.perf_counter() - started > SLOW_SECONDS * len(found) and len(entries) > TRIED:
            with ThreadPoolExecutor(THREADS, thread_name_prefix="stat") as pool:
                blocks = [entries[start : start + TRIED] for start in range(TRIED, len(entries), TRIED)]
                for block in pool.map(lambda block: list(map(_try_stat, block)), blocks):
                    found += block
        else:
            found += map(_try_stat, entries[TRIED:])
        names: list[str] = []
        values: list[int] = []
        for entry, fields in zip(entries, found, strict=True):
            if isinstance(fields, OSError):
                self._without_stat(prefix, entry, fields)
            else:
                names.append(entry.name)
                values += fields
        return names, as_int64(values).reshape(len(names), len(STAT_FIELDS) + 1)

    def _spells(self, suffix: str) -> bool:
        """Whether ``suffix`` is a wanted extension in another case; remembered, so that it is asked once."""
        wanted = suffix.lower() in self._wanted
        if wanted:
            self._spellings.add(suffix)
        return wanted

    def _is_folder(self, prefix: str, entry: os.DirEntry[str]) -> bool:
        try:
            return entry.is_dir()
        except OSError as error:  # a link to itself
            self._without_stat(prefix, entry, error)
            return False

    def _without_stat(self, prefix: str, entry: os.DirEntry[str], error: OSError) -> None:
        """An entry that was listed and has no stat: gone since (no matter), a dead link, or out of reach."""
        if entry.is_symlink():
            self.warnings.append(f"The link {prefix + entry.name!r} leads nowhere ({error.strerror}); it was left out.")
        elif not isinstance(error, FileNotFoundError):
            raise error

    def _only_files(
        self, names: list[str], rows: NDArray[np.int64], folders: list[str]
    ) -> tuple[list[str], NDArray[np.int64]]:
        """Leave out what is called like an image and is none: folders (added to ``folders``), pipes, devices."""
        kinds = rows[:, -1] & KIND_BITS
        regular = kinds == stat.S_IFREG
        if regular.all():
            return names, rows
        for i in np.flatnonzero(~regular):
            if kinds[i] == stat.S_IFDIR:
                folders.append(names[i])
            else:
                self.ignored[os.path.splitext(names[i])[1].lower()] += 1
        return take(names, np.flatnonzero(regular)), rows[regular]


def _try_stat(entry: os.DirEntry[str]) -> tuple[int, ...] | OSError:
    try:
        fields: tuple[int, ...] = _fields_and_mode(entry.stat())
    except OSError as error:
        return error
    return fields


class ListedTree:
    """A tree whose files have been listed elsewhere: what a `Walker` gives, without a file system.

    Args:
        files: path -> stamp (4,); hidden files and folders are left out.
        name_of: what of a path is the file's name, where more stands in it.
    """

    def __init__(
        self, files: Mapping[str, Stamp], extensions: Extensions, name_of: Callable[[str], str] = lambda path: path
    ) -> None:
        wanted = registered_extensions() if extensions == "all" else frozenset(extensions)
        self.ignored: Counter[str] = Counter()
        self.warnings: list[str] = []
        self._files, self._wanted, self._name_of = files, wanted, name_of
        self._names: dict[str, list[str]] = {"": []}
        self._folders: dict[str, set[str]] = {}
        for path in files:
            folder, _, name = path.rpartition("/")
            parts = path.split("/")
            if any(part.startswith(".") and part != ".." for part in parts) or RESOURCE_FORKS in parts[:-1]:
                continue
            self._names.setdefault(f"{folder}/" if folder else "", []).append(name)
            for depth in range(len(parts) - 1):
                parent = "".join(f"{part}/" for part in parts[:depth])
                self._folders.setdefault(parent, set()).add(parts[depth])

    def list_folder(self, prefix: str) -> Listing:
        """As `Walker.list_folder`."""
        names = []
        for name in sorted(self._names.get(prefix, ())):
            suffix = os.path.splitext(self._name_of(name))[1].lower()
            if suffix in self._wanted:
                names.append(name)
            else:
                self.ignored[suffix] += 1
        stamps = np.array([self._files[prefix + name] for name in names], np.int64).reshape(len(names), 4)
        return Listing(prefix, names, stamps, sorted(self._folders.get(prefix, ())), (0, 0))

    def gather(self, prefix: str, parents: tuple[Identity, ...] = ()) -> list[Listing]:
        """As `Walker.gather`."""
        listing = self.list_folder(prefix)
        below = [item for name in listing.folders for item in self.gather(f"{prefix}{name}/", parents)]
        return [listing, *below]

    def wrapper(self) -> str:
        """The folders around everything, as ``photos/`` in an archive of one folder: "" or ending in ``/``."""
        prefix = ""
        while not self._names.get(prefix) and len(names := self._folders.get(prefix, set())) == 1:
            (name,) = names
            if not self._folders.get(f"{prefix}{name}/") or name in ("train", "val", "test"):
                break
            prefix = f"{prefix}{name}/"
        return prefix


def registered_extensions() -> frozenset[str]:
    """The extensions of every format that Pillow can open."""
    from PIL import Image  # importing all of Pillow's plugins takes a while, and is seldom asked for

    Image.init()
    return frozenset(extension for extension, name in Image.registered_extensions().items() if name in Image.OPEN)


def sorting_order(names: list[str]) -> NDArray[np.intp]:
    """The permutation that sorts ``names`` by code points; NumPy does it at twice the speed where they are ASCII."""
    try:
        return np.argsort(np.array(names, "S"), kind="stable")
    except UnicodeEncodeError:
        return np.array(sorted(range(len(names)), key=names.__getitem__), np.intp)


def take(names: list[str], rows: NDArray[np.intp]) -> list[str]:
    """``[names[row] for row in rows]`` without a loop in Python."""
    taken: list[str] = np.array(names, object)[rows].tolist()
    return taken


def as_int64(values: Sequence[int]) -> NDArray[np.int64]:
    """The values as int64; unsigned 64-bit inodes, as some network file systems have them, wrap around."""
    try:
        return np.fromiter(values, np.int64, len(values))
    except OverflowError:
        return np.array([value & (1 << 64) - 1 for value in values], np.uint64).view(np.int64)


def stamp_of(status: os.stat_result) -> Stamp:
    """int64 (4,): size, mtime_ns, ctime_ns, inode, comparable with the rows of `Listing.stamps`."""
    return as_int64(_fields_and_mode(status)[:-1])


class FileChanged(OSError):
    """The file was written to while it was read; reading it once more may succeed."""


def read_file(path: Path | str) -> tuple[bytes, Stamp]:
    """A file's content and, int64 (4,), its stamp at that time.

    Raises:
        FileChanged: it changed while it was read.
        OSError: it vanished, is no file, or cannot be read.
    """
    # Without O_NONBLOCK, opening a named pipe would wait for a writer for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb", buffering=0) as file:
        before = os.fstat(descriptor)
        if not stat.S_ISREG(before.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
        data = file.read()
        after = os.fstat(descriptor)
    if len(data) != after.st_size or _fields_and_mode(after) != _fields_and_mode(before):
        raise FileChanged(errno.EAGAIN, "the file changed while it was read", os.fspath(path))
    return data, stamp_of(after)


def unreadable(folder: str, error: OSError) -> DataError:
    """The error for a folder that cannot be listed."""
    remedy = "check the path"
    if isinstance(error, PermissionError):
        remedy = "give yourself the right to read it (chmod u+rx), or move it out of the data folder"
    return DataError("A folder cannot be read.", where=shown(folder), why=error.strerror, remedy=remedy)


def shown(path: str | Path) -> str:
    """A path fit for a message: quoted and escaped when it holds control characters or bytes that are no UTF-8."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def join_listings(listings: Iterable[Listing]) -> tuple[list[str], NDArray[np.int64], NDArray[np.intp]]:
    """All images of several listings, sorted by path.

    Returns:
        paths (n), stamps (n, 4), and for each row the number of its listing in ``listings``.
    """
    listings = list(listings)
    ranks = sorted(range(len(listings)), key=lambda i: listings[i].prefix)
    blocks = [listings[i] for i in ranks]
    paths = [prefix + name for prefix, names in ((block.prefix, block.names) for block in blocks) for name in names]
    stamps = np.concatenate([np.empty((0, len(STAT_FIELDS)), np.int64), *(block.stamps for block in blocks)])
    owners = np.repeat(np.array(ranks, np.intp), [len(block.names) for block in blocks])
    filled = [block.prefix for block in blocks if block.names]
    if any(later.startswith(former) for former, later in itertools.pairwise(filled)):
        # A folder holds images beside folders with images: their names interleave.
        order = sorting_order(paths)
        return take(paths, order), stamps[order], owners[order]
    return paths, stamps, owners
