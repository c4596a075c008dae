"""Publish files and folders atomically, and digest content. Nothing here imports torch.

A reader sees a published file whole or not at all: the bytes are written under a temporary name in the same
folder, synced, renamed, and the folder is synced, so that this also holds across a power cut.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

DIGEST_BYTES = 16
TEMPORARY_PREFIX = ".tmp-"
# What some network file systems answer where they have no locks, or do not sync folders.
NOT_OFFERED = frozenset({errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})


def digest_bytes(data: bytes | bytearray | memoryview) -> bytes:
    """BLAKE2b-128 of ``data`` (16 bytes)."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def digest_file(path: Path) -> bytes:
    """BLAKE2b-128 of a file's content, read in pieces of 1 MiB."""
    state = hashlib.blake2b(digest_size=DIGEST_BYTES)
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            state.update(piece)
    return state.digest()


def read_regular_file(path: Path) -> bytes:
    """The content of a file that is one; a device or a pipe in its place could be read for ever.

    Raises:
        OSError: there is none, it is something else, or it cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path.read_bytes()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces, the same text for equal values; refuses NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def seal_json(value: Any) -> bytes:
    """JSON behind the digest of itself, so that a flipped bit shows."""
    body = json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode()
    return digest_bytes(body).hex().encode() + b"\n" + body


def unseal_json(data: bytes) -> Any:
    """The inverse of `seal_json`.

    Raises:
        ValueError: a byte of it changed.
    """
    seal, _, body = data.partition(b"\n")
    if seal != digest_bytes(body).hex().encode():
        raise ValueError("the seal does not match what it seals")
    return json.loads(body)


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable, on file systems that can tell."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
    finally:
        os.close(descriptor)


def reserve(path: Path) -> None:
    """Give a sparse file the space that its size claims: where the disk is full, a write to its map ends the process.

    Raises:
        OSError: there is too little.
    """
    size = path.stat().st_size
    if not hasattr(os, "posix_fallocate"):  # macOS
        if shutil.disk_usage(path.parent).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def temporary_name(path: Path) -> Path:
    """A fresh hidden name beside ``path``, carrying the process id so that leftovers can be told apart."""
    return path.parent / f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(4)}-{path.name}"


def publish_file(path: Path, data: bytes, *, replace: bool = True) -> None:
    """Write ``data`` to ``path``, whole or not at all.

    Args:
        replace: what is there, or leave it: of several that publish at once the first wins.

    Raises:
        FileExistsError: there is something, and it is not to be replaced.
        OSError: the disk is full or the folder cannot be written; nothing is left under ``path``'s name
            that was not there before, and the temporary file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.rename(temporary, path)
        else:
            _link(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def publish_written(temporary: Path, path: Path) -> None:
    """Sync what was written under a `temporary_name`, and rename it to ``path``.

    Raises:
        OSError: the folder cannot be written; the temporary file is left to the caller.
    """
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.rename(temporary, path)
    sync_folder(path.parent)


def _link(temporary: Path, path: Path) -> None:
    """Rename a file to a name that nothing has; where there are no hard links, as nearly so as can be had."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, *NOT_OFFERED):
            raise
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        os.rename(temporary, path)
    else:
        temporary.unlink()


@contextmanager
def publishing_folder(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``path`` when the block ends well, and vanishes when it does not.

    Args:
        durable: sync every file first, so that the folder is whole after a power cut too; thousands of small
            files that can be made again are not worth the wait.

    Raises:
        FileExistsError: ``path`` exists already; it is left alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        if durable:
            _sync_tree(temporary)
        if os.path.lexists(path):
            raise FileExistsError(f"{path} exists already")
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)


def _sync_tree(tree: Path) -> None:
    for folder, _, names in os.walk(tree, topdown=False):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(folder))


@contextmanager
def file_lock(path: Path, *, shared: bool, blocking: bool = True) -> Iterator[bool]:
    """Hold an advisory lock on ``path``; the kernel drops it when the process dies, so no lock goes stale.

    Yields whether it is held: False where the file system has no locks.

    Args:
        shared: many holders at once (writers of a cache) or only one (its garbage collector).
        blocking: wait for the lock, or raise at once.

    Raises:
        BlockingIOError: somebody else holds the lock and ``blocking`` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield lock_file(descriptor, shared=shared, blocking=blocking)
    finally:
        os.close(descriptor)


def lock_file(descriptor: int, *, shared: bool, blocking: bool) -> bool:
    """Lock an open file as `file_lock` does; False where the file system has no locks.

    Raises:
        BlockingIOError: somebody else holds the lock and ``blocking`` is false.
    """
    operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(descriptor, operation if blocking else operation | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NOT_OFFERED:
            raise
        return False
    return True


def human_bytes(count: float) -> str:
    """``123456`` -> ``123.5 kB`` (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if round(count, 1) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
