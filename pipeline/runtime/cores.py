"""How many cores are ours, and how many of them a process among several may use."""

from __future__ import annotations

import os
from typing import Literal

from .distributed import World


def usable_cores() -> int:
    """Cores this process may run on (affinity and cgroup masks respected)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_count(workers: int | Literal["auto"], world: World | None = None) -> int:
    """Threads to work with: as asked for, or this process's share of the usable cores."""
    return max(usable_cores() // (world.size if world else 1), 1) if workers == "auto" else workers
