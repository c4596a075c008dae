"""How many cores are ours, and how many of them a process among several may use."""

from __future__ import annotations

from typing import Literal

from .distributed import World


def usable_cores() -> int:
    """Cores this process may use, as joblib finds out: its affinity, its container's quota, LOKY_MAX_CPU_COUNT."""
    from joblib import cpu_count  # here, as importing it takes a while

    return int(cpu_count())


def worker_count(workers: int | Literal["auto"], world: World | None = None) -> int:
    """Threads to work with: as asked for, or this process's share of this machine's usable cores."""
    return max(usable_cores() // (world.local_size if world else 1), 1) if workers == "auto" else workers
