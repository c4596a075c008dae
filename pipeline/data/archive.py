"""Images in tar shards, grouped as WebDataset does or in class folders, and in a zip of class folders.

Nothing is unpacked: a member is read by its offset, which an index in the cache remembers. A compressed tar has no
offsets, so that a process which reads of it decompresses it once, into a nameless temporary file.
WebDataset's rule: github.com/webdataset/webdataset; a sample is what has the same path up to the first dot of its name.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import json
import lzma
import os
import posixpath
import stat
import tarfile
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from ..errors import DataError
from ..params import ColumnParams, DataParams
from .folder import no_images, scan_tree
from .labels import Columns, as_samples, described, find_columns, some, splits_of_files
from .shards import Members, Shards, find_shards, list_members, warnings_of
from .source import UNLABELLED, Samples, Stamp
from .stores import name_of, stamp_of_piece, stamps_of_pieces
from .table import cell
from .walk import ListedTree, registered_extensions

OPENERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys((".tar.gz", ".tgz"), gzip.open),
    **dict.fromkeys((".tar.bz2", ".tbz2"), bz2.open),
    **dict.fromkeys((".tar.xz", ".txz"), lzma.open),
}
COMPRESSED = tuple(OPENERS)
TARS = (".tar", *COMPRESSED)
SUFFIXES = (*TARS, ".zip")
LABEL_KINDS = ("cls", "json", "txt")  # the surest first
LABEL_BYTES = 1 << 20
BROKEN = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError)
SCATTERED = -1  # where a member begins that does not lie in one piece
ZIP_HEAD = 30  # bytes of a member's own header in a zip before its name and its extra field
SLACK = 1024
ENCRYPTED = 1
UNZIP: dict[int, Callable[[bytes], bytes]] = {
    zipfile.ZIP_STORED: lambda data: data,
    zipfile.ZIP_DEFLATED: lambda data: zlib.decompress(data, -15),
    zipfile.ZIP_BZIP2: bz2.decompress,
}


class ArchiveSource:
    """The images in one archive or in many, as one set; see the module's text.

    A sample is called ``SHARD/MEMBER``. Archives with ``.cls``, ``.json`` or ``.txt`` beside their images are read as
    WebDataset; others as folders, those of all archives laid over one another.
    """

    def __init__(self, data: DataParams, shards: Shards, cache_dir: Path) -> None:
        self._data, self._shards, self._cache_dir = data, shards, cache_dir
        self._extensions = registered_extensions() if data.extensions == "all" else frozenset(data.extensions)
        self._spools: dict[str, BinaryIO] = {}
        self._lock = threading.RLock()
        self._places: dict[str, tuple[str, str, int, int, list[int]]] = {}
        self.name = name_of(data.root)

    @classmethod
    def at(cls, data: DataParams, cache_dir: Path) -> ArchiveSource | None:
        """The archives that ``data.root`` names, if it names some."""
        shards = find_shards(data.root, SUFFIXES)
        return cls(data, shards, cache_dir) if shards else None

    def list_samples(self) -> Samples:
        """From the index, or by looking through the archives that are new to it.

        Raises:
            DataError: an archive is not there or is none, or there is no image.
        """
        settings = [sorted(self._extensions), self._data.columns.model_dump()]
        members, stamps = list_members(self._shards, self._cache_dir, settings, self._scan)
        warnings = warnings_of(self._shards, members)
        if packed := [name for name in self._shards.names if name.lower().endswith(COMPRESSED)]:
            warnings.append(
                f"Compressed archives are slow to read ({some(packed)}): each process that needs their images "
                "decompresses them first. Decompress them once, or leave images uncompressed: they are already."
            )
        if any(held.labels for held in members):
            return self._grouped(members, stamps, warnings)
        return self._folders(members, stamps, warnings)

    def read(self, path: str) -> tuple[bytes, Stamp]:
        """The bytes of a member; those of one that is cut short are what there is of it."""
        shard, member, start, size, extra = self._places[path]
        if start == SCATTERED:
            return self._scattered(shard, member, size)
        if shard.lower().endswith(COMPRESSED):
            stamp = self._shards.store.stamp(shard)
            return os.pread(self._spool(shard).fileno(), size, start), stamp_of_piece(stamp, start, size)
        if extra:
            return self._zipped(shard, member, start, size, extra)
        data, stamp = self._shards.store.read_piece(shard, start, size)
        return data, stamp_of_piece(stamp, start, size)

    # -- samples ----------------------------------------------------------------------------------------------------

    def _grouped(self, members: list[Members], stamps: list[Stamp], warnings: list[str]) -> Samples:
        columns: list[list[str]] = [[], [], []]
        by_shard = splits_of_files(self._shards.names) or {}
        paths: list[str] = []
        pieces = []
        for shard, held, stamp in zip(self._shards.names, members, stamps, strict=True):
            rows = [row for row, name in enumerate(held.names) if self._is_image(name)]
            paths += [self._place(shard, held, row) for row in rows]
            pieces.append(
                stamps_of_pieces(stamp, [held.starts[row] for row in rows], [held.sizes[row] for row in rows])
            )
            for column, values in zip(columns, (held.labels, held.splits, held.groups), strict=True):
                column += [values[row] if values else "" for row in rows]
            if by_shard:
                columns[1][len(columns[1]) - len(rows) :] = [by_shard[shard]] * len(rows)
        if not paths:
            raise self._nothing({})
        labels, splits, groups = columns
        return as_samples(
            self._shards.base,
            paths,
            Columns(_without_captions(labels, warnings), None if self._data.layout == "flat" else splits, groups),
            np.concatenate(pieces),
            where=described(self._data.root),
            warnings=warnings,
            reads_at_once=self._shards.store.reads_at_once,
        )

    def _folders(self, members: list[Members], stamps: list[Stamp], warnings: list[str]) -> Samples:
        """One tree of all archives: ``CLASS/NAME`` and, behind a NUL, the archive's number, as names may repeat."""
        files: dict[str, Stamp] = {}
        for number, (held, stamp) in enumerate(zip(members, stamps, strict=True)):
            pieces = stamps_of_pieces(stamp, held.starts, held.sizes)
            files |= {f"{name}\0{number} {row}": pieces[row] for row, name in enumerate(held.names)}
        wrapper = ListedTree(files, self._data.extensions, _before_nul).wrapper()
        files = {path.removeprefix(wrapper): stamp for path, stamp in files.items()}
        walker, probe = (ListedTree(files, self._data.extensions, _before_nul) for _ in range(2))
        try:
            samples = scan_tree(walker, probe, self._data.root, self._data.layout)
        except DataError as error:
            if error.what == "No image was found.":
                raise self._nothing(dict(walker.ignored)) from error
            raise
        owners = [tuple(map(int, path.rpartition("\0")[2].split(" "))) for path in samples.paths]
        names = [self._shards.names[number] for number, _ in owners]
        paths = [self._place(name, members[number], row) for name, (number, row) in zip(names, owners, strict=True)]
        by_shard = (
            splits_of_files(self._shards.names) if samples.splits is None and self._data.layout != "flat" else None
        )
        if by_shard:
            labels = [samples.class_names[target] if target != UNLABELLED else "" for target in samples.targets]
            columns = Columns(labels, [by_shard[name] for name in names])
            samples = as_samples(self._data.root, paths, columns, samples.stamps, where=described(self._data.root))
        order = np.array(sorted(range(len(paths)), key=paths.__getitem__), np.intp)
        return replace(
            samples,
            root=self._shards.base,
            paths=[paths[row] for row in order],
            targets=samples.targets[order],
            splits=None if samples.splits is None else samples.splits[order],
            stamps=samples.stamps[order],
            ignored=dict(sorted(walker.ignored.items())),
            warnings=(*warnings, *samples.warnings),
            reads_at_once=self._shards.store.reads_at_once,
        )

    def _place(self, shard: str, held: Members, row: int) -> str:
        """The sample's path, under which its place is remembered."""
        path = f"{shard}/{held.names[row]}"
        extra = held.extras[row] if held.extras else []
        self._places[path] = (self._shards.path(shard), held.names[row], held.starts[row], held.sizes[row], extra)
        return path

    def _is_image(self, name: str) -> bool:
        return posixpath.splitext(name)[1].lower() in self._extensions and not posixpath.basename(name).startswith(".")

    def _nothing(self, ignored: dict[str, int]) -> DataError:
        empty = Samples(self._data.root, (), [], np.empty(0, np.int32), None, np.empty((0, 4), np.int64), ignored)
        return no_images(empty)

    # -- what an archive holds ---------------------------------------------------------------------------------------

    def _scan(self, path: str) -> Members:
        """All members of an archive.

        Raises:
            DataError: it is no archive, or cannot be read at all.
        """
        try:
            if path.lower().endswith(".zip"):
                with self._shards.store.open(path) as file:
                    return _scan_zip(file, path)
            with self._opened(path) as file:
                return self._scan_tar(file)
        except (*BROKEN, zipfile.BadZipFile) as error:
            raise DataError(
                "An archive cannot be read.",
                where=described(path),
                why=f"{type(error).__name__}: {error}",
                remedy="fetch or pack it again",
            ) from error

    def _opened(self, path: str) -> BinaryIO:
        if not path.lower().endswith(COMPRESSED):
            return self._shards.store.open(path)
        file = os.fdopen(os.dup(self._spool(path).fileno()), "rb")
        file.seek(0)
        return file

    def _spool(self, path: str) -> BinaryIO:
        """A compressed tar, decompressed: gone with the process, whatever ends it."""
        with self._lock:
            if path not in self._spools:
                opener = next(opens for suffix, opens in OPENERS.items() if path.lower().endswith(suffix))
                self._cache_dir.mkdir(parents=True, exist_ok=True)
                spool = tempfile.TemporaryFile(dir=self._cache_dir)  # noqa: SIM115 - kept open
                with self._shards.store.open(path) as packed, opener(packed) as plain, suppress(EOFError, zlib.error):
                    while piece := plain.read1(1 << 20):  # what comes before a missing end is good
                        spool.write(piece)
                spool.flush()
                self._spools[path] = cast(BinaryIO, spool)
            return self._spools[path]

    def _scan_tar(self, file: BinaryIO) -> Members:
        found = _TarIndex()
        groups = _Groups(self._data.columns)
        with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:
            for member in _members_of(tar, found):
                kind = groups.kind_of(member.name)
                if kind and member.isreg() and member.size <= LABEL_BYTES and not member.issparse():
                    where = file.tell()
                    file.seek(member.offset_data)
                    groups.add(member.name, kind, file.read(member.size))
                    file.seek(where)
                found.add(member)
        return groups.label(found.members(), self._is_image)

    def _scattered(self, shard: str, member: str, size: int) -> tuple[bytes, Stamp]:
        """A sparse member, put together by the standard library."""
        stamp = self._shards.store.stamp(shard)
        with (
            self._lock,
            self._opened(shard) as file,
            tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar,
        ):
            found = next((item for item in reversed(tar.getmembers()) if plain_name(item.name) == member), None)
            opened = tar.extractfile(found) if found else None
            if opened is None:
                raise OSError(errno.ENOENT, "the member has gone", f"{shard}/{member}")
            return opened.read(), stamp_of_piece(stamp, SCATTERED, size)

    def _zipped(self, shard: str, member: str, start: int, size: int, extra: list[int]) -> tuple[bytes, Stamp]:
        method, crc = extra
        head = ZIP_HEAD + len(member.encode("utf-8", "surrogateescape")) + SLACK
        data, stamp = self._shards.store.read_piece(shard, start, head + size)
        begin = ZIP_HEAD + int.from_bytes(data[26:28], "little") + int.from_bytes(data[28:30], "little")
        if begin > head:  # an extra field of more than a kilobyte
            data, stamp = self._shards.store.read_piece(shard, start, begin + size)
        try:
            plain = UNZIP[method](data[begin : begin + size])
        except KeyError:
            raise OSError(errno.ENOTSUP, f"packed by method {method}, which is not read: zip it anew", member) from None
        except (zlib.error, OSError, ValueError) as error:
            raise OSError(errno.EIO, f"damaged in the zip ({error})", member) from error
        if zlib.crc32(plain) != crc:
            raise OSError(errno.EIO, "damaged in the zip (its checksum differs)", member)
        return plain, stamp_of_piece(stamp, start, size)


def plain_name(name: str) -> str:
    """A member's name without what says nothing: ``./`` and ``/`` at its beginning. It is never used as a path."""
    while name.startswith(("./", "/")):
        name = name[name.index("/") + 1 :]
    return name


def _before_nul(name: str) -> str:
    return name.partition("\0")[0]


def _members_of(tar: tarfile.TarFile, found: _TarIndex) -> Iterator[tarfile.TarInfo]:
    """All members that can be read, without keeping them; why it ends before its end mark goes to ``found``."""
    while True:
        try:
            member = tar.next()
        except BROKEN as error:
            if not found.count:
                raise
            found.warnings.append(f"is cut short or damaged after {found.count} members ({error}).")
            return
        if member is None:
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset if found.count else 0)
            if found.count and not tar.fileobj.read(1):
                found.warnings.append(f"has no end mark after its {found.count} members: it may be cut short.")
            return
        tar.members = []  # type: ignore[attr-defined]  # else it holds a million of them
        found.count += 1
        yield member


class _TarIndex:
    """Where the content of each name begins; of a name that repeats the last counts, as when it is unpacked."""

    def __init__(self) -> None:
        self.count = 0
        self.warnings: list[str] = []
        self._places: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        self._repeated: set[str] = set()

    def add(self, member: tarfile.TarInfo) -> None:
        name = plain_name(member.name)
        if member.isreg():
            if name in self._places:
                self._repeated.add(name)
            self._places[name] = (SCATTERED if member.issparse() else member.offset_data, member.size)
        elif member.islnk():
            self._links[name] = plain_name(member.linkname)
        elif member.issym():
            self._links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))

    def members(self) -> Members:
        places = dict(self._places)
        lost = []
        for name, target in self._links.items():
            for _ in range(len(self._links)):
                if target in self._places or target not in self._links:
                    break
                target = self._links[target]
            if target in self._places:
                places[name] = self._places[target]
            else:
                lost.append(name)
        warnings = self.warnings
        if lost:
            warnings = [*warnings, f"has links that lead nowhere, left out: {some(lost)}."]
        if self._repeated:
            warnings = [*warnings, f"holds names more than once; the last counts: {some(sorted(self._repeated))}."]
        starts, sizes = [place[0] for place in places.values()], [place[1] for place in places.values()]
        return Members(list(places), starts, sizes, warnings=warnings)


class _Groups:
    """What lies beside the images under their key: labels, and fields of JSON."""

    def __init__(self, columns: ColumnParams) -> None:
        self._columns = columns
        self._kinds = (columns.label,) if columns.label in LABEL_KINDS else LABEL_KINDS
        self._texts: dict[str, dict[str, bytes]] = {}

    def kind_of(self, name: str) -> str | None:
        ending = posixpath.basename(name).partition(".")[2].lower()
        return ending if ending in LABEL_KINDS else None

    def add(self, name: str, kind: str, data: bytes) -> None:
        self._texts.setdefault(key_of(plain_name(name)), {})[kind] = data

    def label(self, members: Members, is_image: Callable[[str], bool]) -> Members:
        """The members with what is said of each image, where something is said of one."""
        keys = [key_of(name) for name in members.names]
        if not any(key in self._texts and is_image(name) for key, name in zip(keys, members.names, strict=True)):
            return members
        facts = {key: self._facts(texts) for key, texts in self._texts.items()}
        labels, splits, groups = (
            [facts.get(key, {}).get(fact, "") for key in keys] for fact in ("label", "split", "group")
        )
        return replace(members, labels=labels, splits=splits, groups=groups)

    def _facts(self, texts: dict[str, bytes]) -> dict[str, str]:
        facts = self._fields(texts.get("json"))
        plain = {
            kind: texts[kind].decode("utf-8", "surrogateescape").strip() for kind in ("cls", "txt") if kind in texts
        }
        if "label" in facts and "json" in self._kinds and (self._columns.label or "cls" not in plain):
            return facts
        label = next((plain[kind] for kind in self._kinds if kind in plain), "")
        return {**facts, "label": label}

    def _fields(self, data: bytes | None) -> dict[str, str]:
        if data is None:
            return {}
        try:
            row = json.loads(data)
        except (ValueError, RecursionError):
            return {}
        if not isinstance(row, dict):
            return {"label": cell(row)}
        wanted = {key: name for key, name in self._columns.model_dump().items() if name in row}
        found, _ = find_columns(list(row), ColumnParams(**wanted), where="")
        if self._columns.label and self._columns.label not in row:
            found.pop("label", None)
        return {key: cell(row[name]) for key, name in found.items() if key != "path"}


def key_of(name: str) -> str:
    """The path up to the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _without_captions(labels: list[str], warnings: list[str]) -> list[str]:
    """Texts that are nearly all different describe images; they are no classes."""
    different, count = len(set(labels)), len(labels)
    if different > 20 and 2 * different > count and any(" " in label for label in labels):
        warnings.append(
            f"The texts beside the images are {different} different ones for {count} images: captions, not classes. "
            "The images are taken as unlabelled; data.columns.label can name a field of .json, or cls."
        )
        return [""] * count
    return labels


def _scan_zip(file: BinaryIO, path: str) -> Members:
    with zipfile.ZipFile(file) as archive:
        infos = [
            info for info in archive.infolist() if not info.is_dir() and not stat.S_ISLNK(info.external_attr >> 16)
        ]
    if any(info.flag_bits & ENCRYPTED for info in infos):
        raise DataError(
            "The zip is encrypted.", where=described(path), why="its members need a password", remedy="unpack it first"
        )
    last = {plain_name(info.filename): info for info in infos}
    repeated = len(infos) - len(last)
    return Members(
        list(last),
        [info.header_offset for info in last.values()],
        [info.compress_size for info in last.values()],
        [[info.compress_type, info.CRC] for info in last.values()],
        warnings=[f"holds {repeated} names more than once; the last counts."] if repeated else [],
    )
