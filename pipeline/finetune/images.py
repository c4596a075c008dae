"""The images of a training: labelled, decoded once where they fit into memory, in batches prepared ahead by threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..params.sections import FinetuneParams
from ..runtime.cores import worker_count
from ..runtime.device import on_device
from ..runtime.distributed import World
from ..runtime.seeds import make_generator

CACHE_LIMIT = 4 << 30  # bytes that `auto` never exceeds
MEMORY_SHARE = 0.25  # of the memory that is free when training starts
AHEAD = 3  # batches prepared before they are needed
WORKERS_LIMIT = 16
CPU = torch.device("cpu")
PixelsOf = Callable[[int], NDArray[np.uint8]]


class ImageSource(Protocol):
    """Images by position. `image` is called from several threads at once."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image.Image:
        """The decoded image, mode RGB."""
        ...

    def digest(self, index: int) -> bytes:
        """The content's digest; augmentation is seeded with it."""
        ...


class PixelTransform(Protocol):
    """What training needs of `backbones.Transform`."""

    @property
    def crop(self) -> int: ...

    @property
    def interpolation(self) -> str: ...

    @property
    def mean(self) -> Sequence[float]: ...

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """The evaluation pixels, uint8 (3, crop, crop)."""
        ...

    def normalise(self, batch: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 (n, 3, h, w) to the normalised floats the backbone takes."""
        ...


@dataclass(frozen=True)
class LabelledImages:
    """``source`` with one target (int64, an index of a class) per image."""

    source: ImageSource
    targets: NDArray[np.int64]

    def __post_init__(self) -> None:
        if len(self.source) != len(self.targets):
            raise ValueError(f"{len(self.source)} images but {len(self.targets)} targets")

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: NDArray[np.int64]) -> LabelledImages:
        """The images at ``rows``."""
        return LabelledImages(_Taken(self.source, rows), self.targets[rows])


@dataclass(frozen=True)
class _Taken:
    source: ImageSource
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> Image.Image:
        return self.source.image(int(self.rows[index]))

    def digest(self, index: int) -> bytes:
        return self.source.digest(int(self.rows[index]))


class CachedImages:
    """Keeps decoded images as uint8 arrays until ``budget`` bytes are full; the rest is decoded anew each time.

    Small images cost more to decode than to augment, and a training run decodes each of them in every epoch.
    """

    def __init__(self, source: ImageSource, budget: int) -> None:
        self._source, self._left = source, budget
        self._kept: dict[int, NDArray[np.uint8]] = {}

    def digest(self, index: int) -> bytes:
        return self._source.digest(index)

    def image(self, index: int) -> Image.Image:
        kept = self._kept.get(index)
        if kept is not None:
            return Image.fromarray(kept)
        image = self._source.image(index)
        size = image.width * image.height * 3
        if size <= self._left:  # a race of two threads overshoots the budget by an image at most
            self._left -= size
            self._kept[index] = np.asarray(image)
        return image


def available_memory() -> int:
    """Bytes free for this process: what the kernel calls available, else a quarter of the physical memory."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux; the estimate below serves
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


def cache_budget(megabytes: int | Literal["auto"]) -> int:
    """Bytes for `CachedImages`; ``auto`` is a quarter of the free memory, 4 GiB at most, shared by local processes."""
    if megabytes != "auto":
        return megabytes * 10**6
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(int(available_memory() * MEMORY_SHARE), CACHE_LIMIT) // processes


# -- batches -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """One forward and backward pass of this process.

    Attributes:
        rows: the images of this process; never empty, see ``counts``.
        step_rows: all images of the optimizer step, of every process and accumulated batch.
        counts: false where this process only keeps the others company with a borrowed image.
        closes: the optimizer steps after this batch.
    """

    index: int
    rows: NDArray[np.int64]
    step_rows: NDArray[np.int64]
    counts: bool
    closes: bool


def plan_epoch(count: int, params: FinetuneParams, *, epoch: int, world: World | None = None) -> list[Batch]:
    """The batches of one epoch in an order that depends on (seed, epoch) alone; every image occurs once.

    ``params.batch_size`` is that of one process; processes share each stretch of ``batch_size * world.size`` images.
    """
    world = world or World()
    order = make_generator(params.seed, "order", epoch).permutation(count).astype(np.int64)
    together = params.batch_size * world.size
    batches: list[Batch] = []
    for start in range(0, count, together * params.accumulate):
        step_rows = order[start : start + together * params.accumulate]
        for begin in range(0, len(step_rows), together):
            mine = step_rows[begin : begin + together][world.rank :: world.size]
            closes = begin + together >= len(step_rows)
            batches.append(Batch(len(batches), mine if len(mine) else step_rows[:1], step_rows, len(mine) > 0, closes))
    return batches


def resolve_workers(workers: int | Literal["auto"], device: torch.device, world: World | None = None) -> int:
    """Threads that prepare images: beside a GPU all of this process's share of the cores, on the CPU half of it."""
    if workers != "auto":
        return workers
    cores = worker_count("auto", world)
    return min(cores, WORKERS_LIMIT) if device.type == "cuda" else max(1, min(cores // 2, WORKERS_LIMIT))


def prepare_batches(
    rows: Sequence[NDArray[np.int64]],
    pixels_of: PixelsOf,
    *,
    size: int,
    workers: int,
    device: torch.device = CPU,
) -> Iterator[Tensor]:
    """Pixels of each entry of ``rows`` in turn: uint8 (n, 3, size, size) in channels-last memory.

    Pillow lets go of the interpreter's lock while it decodes and resizes, so threads suffice. An error of one image
    is raised where its batch is asked for.

    Args:
        device: where they go: on the way to a GPU their memory is pinned.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="images")
    waiting: deque[tuple[Tensor, list[Future[None]]]] = deque()
    try:
        for batch in rows:
            waiting.append(_submit(pool, batch, pixels_of, size=size, workers=workers, device=device))
            if len(waiting) > AHEAD:
                yield _finished(waiting.popleft())
        while waiting:
            yield _finished(waiting.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(
    pool: ThreadPoolExecutor,
    rows: NDArray[np.int64],
    pixels_of: PixelsOf,
    *,
    size: int,
    workers: int,
    device: torch.device,
) -> tuple[Tensor, list[Future[None]]]:
    with on_device(device):
        batch = torch.empty((len(rows), size, size, 3), dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = batch.numpy()

    def fill(positions: range) -> None:
        for position in positions:
            target[position] = pixels_of(int(rows[position]))

    futures = [pool.submit(fill, range(first, len(rows), workers)) for first in range(min(workers, len(rows)))]
    return batch, futures


def _finished(prepared: tuple[Tensor, list[Future[None]]]) -> Tensor:
    batch, futures = prepared
    for future in futures:
        future.result()
    return batch.permute(0, 3, 1, 2)
