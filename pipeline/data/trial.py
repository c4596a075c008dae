"""Decode suspects in a process of their own, under limits, so that one which kills its decoder kills nobody else."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .decode import BadImage, Decoder
from .walk import read_file

SECONDS = 60
# What an honest image needs: a few copies at four bytes a pixel, beside the interpreter and its libraries.
BASE_MEMORY = 2 << 30
MEMORY_PER_PIXEL = 16


def find_killers(
    paths: Sequence[Path], decoder: Decoder, *, seconds: int = SECONDS, memory: int | None = None
) -> dict[Path, str]:
    """The files whose decoding ends the process, takes longer than ``seconds`` or more than ``memory`` bytes.

    Each file is decoded in a child; a file that only fails to decode, or has gone, is no killer.

    Returns:
        path to what happened, for the killers alone.
    """
    memory = memory or BASE_MEMORY + MEMORY_PER_PIXEL * decoder.max_pixels
    killers: dict[Path, str] = {}
    left = list(paths)
    while left:
        finished, end = _try(left, decoder, seconds, memory)
        if finished < len(left):
            killers[left[finished]] = end
        left = left[finished + 1 :]
    return killers


def _try(paths: Sequence[Path], decoder: Decoder, seconds: int, memory: int) -> tuple[int, str]:
    """How many files a child got through, and how it ended."""
    task = {"paths": [str(path) for path in paths], "decoder": vars(decoder), "seconds": seconds, "memory": memory}
    child = subprocess.run(
        [sys.executable, "-m", __name__], input=json.dumps(task).encode(), capture_output=True, check=False
    )
    return child.stdout.count(b"\n"), _ending(child, seconds, memory)


def _ending(child: subprocess.CompletedProcess[bytes], seconds: int, memory: int) -> str:
    if child.returncode == -signal.SIGALRM:
        return f"decoding took longer than {seconds} s"
    if child.returncode < 0:
        return f"decoding ended the process with {signal.Signals(-child.returncode).name}"
    if b"MemoryError" in child.stderr:
        return f"decoding took more than {memory >> 20} MiB of memory"
    return f"decoding ended the process with status {child.returncode}"


def _decode_all() -> None:
    """The child: one line of output for each file that did not end it."""
    task = json.load(sys.stdin)
    # JSON knows no tuples, and Pillow wants colours to be tuples.
    settings: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in task["decoder"].items()
    }
    decoder = Decoder(**settings)
    resource.setrlimit(resource.RLIMIT_AS, (task["memory"], task["memory"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for path in task["paths"]:
        signal.alarm(task["seconds"])
        with suppress(BadImage, OSError):  # told by the extraction itself
            decoder(read_file(path)[0])
        print(flush=True)


if __name__ == "__main__":
    _decode_all()
