"""Which of how many processes this is (torchrun's environment, or an explicit shard), and what the others found."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
WAIT = timedelta(days=30)


@dataclass(frozen=True)
class World:
    """This process's ``rank`` among ``size`` processes; ``local_rank`` numbers the ``local_size`` on one machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """The one that prints and writes what exists once."""
        return self.rank == 0

    def share(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The positions in a scan that fall to this process: every size-th, whatever the others have done already."""
        mine: NDArray[np.int64] = positions[positions % self.size == self.rank]
        return mine


def world_from_environment() -> World:
    """torchrun's RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; a single process without them."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return World()
    return World(
        rank=int(os.environ["RANK"]),
        size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )


def gather(value: T, world: World) -> list[T]:
    """``value`` of every process that torchrun started or that is in a group, by rank; a shard has only its own."""
    if world.size == 1:
        return [value]
    import torch.distributed as dist  # only where it is needed: most of what asks for a world runs without torch

    joined = dist.is_initialized()
    if not joined and "TORCHELASTIC_RUN_ID" not in os.environ:
        return [value]
    if not joined:
        # The others may be at work for days yet, and whoever waits must not give them up.
        dist.init_process_group("gloo", timeout=WAIT)
    values: list[T | None] = [None] * world.size
    dist.all_gather_object(values, value)
    if not joined:
        dist.destroy_process_group()
    return [each for each in values if each is not None]


def from_main(make: Callable[[], T], world: World) -> T:
    """What ``make`` gives in the first process of the group, told to the others; what it raises is raised in all."""
    if world.size == 1:
        return make()
    import torch.distributed as dist  # as above

    told: list[Any] = [None, None]
    if world.is_main:
        try:
            told[0] = make()
        except Exception as error:  # noqa: BLE001 (raised below, once the others know that there is nothing to wait for)
            told[1] = error
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    made: T = told[0]
    return made
