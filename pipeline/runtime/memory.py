"""How much memory there is, and freed memory kept in the process instead of handed back after every layer."""

from __future__ import annotations

import ctypes
import os
import platform
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Literal

# From glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_THRESHOLD = 1 << 30


@cache
def reuse_freed_memory() -> bool:
    """Tell glibc's malloc to reuse large blocks; whether that could be done (elsewhere nothing changes).

    By default glibc maps every block over some MB anew and unmaps it when it is freed, so that each layer's output
    costs a page fault for every 4 kB: measured, a tenth to a quarter of a convolutional network's time on a CPU.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD) and libc.mallopt(M_TRIM_THRESHOLD, LARGEST_THRESHOLD))


def memory_budget(megabytes: int | Literal["auto"]) -> int:
    """Bytes; ``auto`` is half of the memory of this machine or container, however much of it is free."""
    if megabytes != "auto":
        return megabytes * 10**6
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # elsewhere than in a container, or without a limit, it says something else
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory // 2
