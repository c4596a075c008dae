"""Which image each decoding thread has in hand, in a file that outlives the process.

Some contents crash a decoder, or hang it until somebody kills the process. The next run finds here what was being
decoded then. An entry is two writes to the page cache, which survive the process; nothing is synced, since a power
cut is not the decoder's doing.
"""

from __future__ import annotations

import errno
import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..files import DIGEST_BYTES, lock_file, temporary_name
from .store import cannot_write

FOLDER, SUFFIX = "journal", ".slots"
# A slot: the length of the path, 0 while nothing is in hand; the content's digest; the path.
PATH_BYTES = 4096
SLOT = PATH_BYTES + DIGEST_BYTES + 2
LEFT_SECONDS = 86_400.0
EMPTY = b"\0\0"


@dataclass(frozen=True)
class Suspect:
    """A content that was being decoded when its process ended, and where it lay."""

    path: str
    digest: bytes


@contextmanager
def journal(cache_dir: Path, slots: int) -> Iterator[Journal]:
    """The journal of this process, gone when the block ends, left behind when the process is killed.

    Args:
        slots: how many contents can be in hand at once.

    Raises:
        CacheError: the cache folder cannot be written.
    """
    path = temporary_name(cache_dir / FOLDER / "slots")
    final = path.with_name(path.name.lstrip(".") + SUFFIX)
    with ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            held.callback(os.close, descriptor)
            held.callback(_remove, path, final)
            opened = Journal(descriptor, path, slots)
            # Locked before it has the name that others look for: whoever can lock it knows that its process has ended.
            # Where there are no locks nobody could know, and it stays nameless.
            if lock_file(descriptor, shared=False, blocking=True):
                os.rename(path, final)
        except OSError as error:
            raise cannot_write(path, error) from error
        yield opened


def _remove(*paths: Path) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink()


class Journal:
    """Slots of a locked file; see `journal`."""

    def __init__(self, descriptor: int, path: Path, slots: int) -> None:
        self._descriptor, self._path, self._free = descriptor, path, deque(range(slots))
        self._write(bytes(SLOT * slots), 0)

    @contextmanager
    def in_hand(self, path: str, digest: bytes) -> Iterator[None]:
        """Hold that the content ``digest`` (16 bytes) at ``path`` is being decoded while the block runs.

        Raises:
            CacheError: the cache folder cannot be written.
        """
        slot = self._free.pop()
        name = os.fsencode(path)[:PATH_BYTES]
        self._write(len(name).to_bytes(2, "little") + digest + name, slot)
        try:
            yield
        finally:
            self._write(EMPTY, slot)
            self._free.append(slot)

    def _write(self, data: bytes, slot: int) -> None:
        try:
            if os.pwrite(self._descriptor, data, slot * SLOT) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise cannot_write(self._path, error) from error


@contextmanager
def suspects_left_behind(cache_dir: Path) -> Iterator[list[Suspect]]:
    """What processes that have ended without closing their journal had in hand; forgotten when the block ends well.

    A journal that another process looks through at the moment is left to it. A suspect that the block takes out of the
    list is left to processes that have its content, for a day.
    """
    descriptors: list[int] = []
    found: dict[Path, list[Suspect]] = {}
    try:
        for file in sorted((cache_dir / FOLDER).glob(f"*{SUFFIX}")):
            with suppress(OSError):  # in use, or gone, or not ours to read
                descriptors.append(os.open(file, os.O_RDWR | os.O_CLOEXEC))
                if lock_file(descriptors[-1], shared=False, blocking=False):
                    found[file] = list(_read_slots(file.read_bytes()))
        suspects = [suspect for file in found.values() for suspect in file]
        yield suspects
        for file, its in found.items():
            with suppress(FileNotFoundError):
                if set(its) <= set(suspects) or time.time() - file.stat().st_mtime > LEFT_SECONDS:
                    file.unlink()
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _read_slots(data: bytes) -> Iterator[Suspect]:
    for start in range(0, len(data) - SLOT + 1, SLOT):
        slot = data[start : start + SLOT]
        length = int.from_bytes(slot[:2], "little")
        digest, name = slot[2 : 2 + DIGEST_BYTES], slot[2 + DIGEST_BYTES : 2 + DIGEST_BYTES + length]
        if length and len(name) == length and b"\0" not in name:
            yield Suspect(os.fsdecode(name), digest)
