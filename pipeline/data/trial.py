"""Decode suspects in a process of their own, under limits, so that one which kills its decoder kills nobody else.

Only a sign of the child's own that decoding began makes its end the image's doing: a child that cannot start, or is
killed from outside (by the kernel for want of memory, by a user), proves nothing.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, BinaryIO

from .decode import BadImage, Decoder

SECONDS = 60
# What an honest image needs: a few copies at four bytes a pixel, beside the interpreter and its libraries.
BASE_MEMORY = 2 << 30
MEMORY_PER_PIXEL = 16
# What the child writes: decoding of an image begins, it ended, it needed more memory than the limit.
BEGUN, ENDED, TOO_MUCH_MEMORY = b"b", b"e", b"m"
LENGTH = struct.Struct("<Q")


def find_killers(
    contents: Mapping[bytes, bytes], decoder: Decoder, *, seconds: int = SECONDS, memory: int | None = None
) -> dict[bytes, str]:
    """The contents whose decoding ends the process, takes ``seconds`` of CPU time or more than ``memory`` bytes.

    Each is decoded in a child; one that only fails to decode is no killer.

    Args:
        contents: bytes of the images, by any name.

    Returns:
        name to what happened, for the killers alone.
    """
    memory = memory or BASE_MEMORY + MEMORY_PER_PIXEL * decoder.max_pixels
    killers: dict[bytes, str] = {}
    left = dict(contents)
    while left:
        told, status = _try(list(left.values()), decoder, seconds, memory)
        begun, names = told.count(BEGUN), list(left)
        if not begun:
            break  # the child could not do its work, whatever the images are like
        if end := _end(told, status, seconds, memory):
            killers[names[begun - 1]] = end
        left = {name: left[name] for name in names[begun:]}
    return killers


def _try(contents: list[bytes], decoder: Decoder, seconds: int, memory: int) -> tuple[bytes, int]:
    """What a child told while it decoded the contents, and its exit status."""
    task = json.dumps({"decoder": vars(decoder), "seconds": seconds, "memory": memory}).encode()
    message = b"".join(LENGTH.pack(len(part)) + part for part in (task, *contents))
    # This package as it was found here, also where it is on no path of a new interpreter's own.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with suppress(OSError):  # no process can be started
        child = subprocess.run(
            [sys.executable, "-m", __name__], input=message, capture_output=True, check=False, env=environment
        )
        return child.stdout, child.returncode
    return b"", 0


def _end(told: bytes, status: int, seconds: int, memory: int) -> str | None:
    """What the decoding that was begun last did to the child; None where it did nothing, or nothing that is proven."""
    if told.endswith(TOO_MUCH_MEMORY):
        return f"decoding took more than {memory >> 20} MiB of memory"
    if not told.endswith(BEGUN) or -status in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        return None
    if -status in (signal.SIGPROF, signal.SIGXCPU):
        return f"decoding took longer than {seconds} s"
    if status < 0:
        return f"decoding ended the process with {signal.Signals(-status).name}"
    return f"decoding ended the process with status {status}"


def _decode_all(given: BinaryIO, told: BinaryIO) -> None:
    """The child: signs of each content's decoding, written at once."""
    task = json.loads(_next(given))
    # JSON knows no tuples, and Pillow wants colours to be tuples.
    settings: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in task["decoder"].items()
    }
    decoder = Decoder(**settings)
    _limit_memory(task["memory"])
    while data := _next(given):
        told.write(BEGUN)
        told.flush()
        # CPU time: a decoder that hangs burns it, a machine that is stalled does not.
        signal.setitimer(signal.ITIMER_PROF, task["seconds"])
        try:
            with suppress(BadImage):  # told by the extraction itself
                decoder(data)
        except MemoryError:
            told.write(TOO_MUCH_MEMORY)
            return
        signal.setitimer(signal.ITIMER_PROF, 0)
        told.write(ENDED)
        told.flush()


def _limit_memory(size: int) -> None:
    import resource

    # Some systems refuse; then only a crash or a hang is found.
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _next(given: BinaryIO) -> bytes:
    """The next part of the message; empty at its end."""
    head = given.read(LENGTH.size)
    return given.read(LENGTH.unpack(head)[0]) if head else b""


if __name__ == "__main__":
    _decode_all(sys.stdin.buffer, sys.stdout.buffer)
