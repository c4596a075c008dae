"""Several processes that train one classifier: torchrun starts them, each on its share of every batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed

from ..runtime.distributed import World

Result = TypeVar("Result")


@contextmanager
def process_group(world: World, device: torch.device) -> Iterator[None]:
    """Join the other processes (NCCL between GPUs, gloo elsewhere); nothing for a single process."""
    if world.size == 1 or torch.distributed.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def by_main(world: World, compute: Callable[[], Result]) -> Result:
    """``compute`` in the main process, its result in every one: only that process needs to see the files."""
    result = [compute() if world.is_main else None]
    if world.size > 1:
        torch.distributed.broadcast_object_list(result)
    return result[0]  # type: ignore[return-value]
