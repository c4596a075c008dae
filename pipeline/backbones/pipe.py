"""Feed a GPU: slots with pinned memory at both ends, so that host, copies and layers work at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..runtime.device import on_device
from .backbone import SLOTS

if TYPE_CHECKING:
    from .backbone import Features, Pixels


def stack_pixels(pixels: Sequence[Pixels], batch: Tensor) -> None:
    """Fill the first images of ``batch``, uint8 (n, h, w, 3) on the host, from pixels (3, h, w)."""
    np.stack([image.transpose(1, 2, 0) for image in pixels], out=batch[: len(pixels)].numpy())


class Pipe:
    """Batches of one shape through a GPU: called from `SLOTS` threads at once, a call returns when its batch is done.

    Copies to the device, layers and copies back have a stream each, in which batches follow one another; events make
    the streams of a batch wait for each other. No call waits for the work of another thread's batch.

    Args:
        compute: uint8 images (n, 3, h, w) on the device, channels last, to features (n, d) there.
        size: images of a batch; those that are missing stay what they were.
        shape: of an image: (3, h, w).
    """

    def __init__(
        self, compute: Callable[[Tensor], Tensor], device: torch.device, size: int, shape: tuple[int, ...]
    ) -> None:
        self._compute, self._device = compute, device
        self.size, self.shape = size, shape
        self._launching = threading.Lock()
        self._slots: SimpleQueue[_Slot] = SimpleQueue()
        with on_device(device):
            self._to_device, self._layers, self._to_host = (_stream(device) for _ in range(3))
            for _ in range(SLOTS):
                self._slots.put(_Slot.make(size, shape, device))

    def __call__(self, pixels: Sequence[Pixels]) -> Features:
        """Features (n, d), float32, of up to ``size`` images (3, h, w)."""
        slot = self._slots.get()
        try:
            stack_pixels(pixels, slot.pixels)
            with on_device(self._device), self._launching:
                self._launch(slot)
            slot.done.synchronize()
            assert slot.features is not None
            return np.array(slot.features[: len(pixels)].numpy())
        except BaseException:
            torch.cuda.synchronize(self._device)  # nothing may still be writing what the next batch will use
            raise
        finally:
            self._slots.put(slot)

    def _launch(self, slot: _Slot) -> None:
        with torch.cuda.stream(self._to_device):
            slot.images.copy_(slot.pixels, non_blocking=True)
            slot.arrived.record()
        with torch.cuda.stream(self._layers):
            slot.arrived.wait()
            features = self._compute(slot.images.permute(0, 3, 1, 2))
            slot.computed.record()
        with torch.cuda.stream(self._to_host):
            slot.computed.wait()
            features.record_stream(self._to_host)
            if slot.features is None:
                slot.features = pinned(tuple(features.shape), torch.float32)
            slot.features.copy_(features, non_blocking=True)
            slot.done.record()


def pinned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that a GPU can copy from and to while the host does something else."""
    return torch.zeros(shape, dtype=dtype, pin_memory=True)


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _event(*, blocking: bool) -> torch.cuda.Event:
    return torch.cuda.Event(blocking=blocking)  # type: ignore[no-untyped-call]


@dataclass
class _Slot:
    """Memory of one batch: uint8 ``pixels`` on the host and ``images`` on the device, and ``features`` on the host."""

    pixels: Tensor
    images: Tensor
    features: Tensor | None = None
    arrived: torch.cuda.Event = field(default_factory=lambda: _event(blocking=False))
    computed: torch.cuda.Event = field(default_factory=lambda: _event(blocking=False))
    # Whoever waits for a batch sleeps: other threads need the core to decode.
    done: torch.cuda.Event = field(default_factory=lambda: _event(blocking=True))

    @classmethod
    def make(cls, size: int, shape: tuple[int, ...], device: torch.device) -> _Slot:
        memory = (size, *shape[1:], shape[0])
        return cls(pinned(memory, torch.uint8), torch.zeros(memory, dtype=torch.uint8, device=device))
