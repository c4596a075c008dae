"""Resolve a device to one that is there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import DeviceError
from .distributed import World

if TYPE_CHECKING:
    import torch


def resolve_device(name: str, world: World | None = None) -> torch.device:
    """``auto`` is CUDA where there is one, then MPS, else the CPU; under torchrun each local rank takes its own GPU.

    Raises:
        DeviceError: the device asked for by name is not on this machine.
    """
    import torch

    local_rank = world.local_rank if world else 0
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank % max(torch.cuda.device_count(), 1)}"
    device = torch.device(name)
    count = torch.cuda.device_count()
    missing_cuda = device.type == "cuda" and (device.index or 0) >= count
    if missing_cuda or (device.type == "mps" and not torch.backends.mps.is_available()):
        raise DeviceError(
            f"The device {name} is not on this machine.",
            where="extract.device",
            why=f"torch {torch.__version__} sees {count} CUDA device(s)",
            remedy="use extract.device=auto or cpu, or install a torch build for your GPU",
        )
    return device
