"""Several processes that train one classifier: torchrun starts them, each on its share of every batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed

from ..runtime.distributed import World


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
