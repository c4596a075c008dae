"""Which images make up each step of an epoch, and their pixels, prepared by threads while the device computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..params.sections import FinetuneParams
from ..runtime.cores import usable_cores
from ..runtime.distributed import World
from ..runtime.seeds import make_generator

AHEAD = 3  # batches prepared before they are needed
WORKERS_LIMIT = 16
PixelsOf = Callable[[int], NDArray[np.uint8]]


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


def resolve_workers(workers: int | Literal["auto"], device: torch.device) -> int:
    """Threads that prepare images: beside a GPU all cores, on the CPU about half, whose other half computes."""
    if workers != "auto":
        return workers
    cores = usable_cores()
    return min(cores, WORKERS_LIMIT) if device.type == "cuda" else max(1, min(cores // 2, WORKERS_LIMIT))


def prepare_batches(
    rows: Sequence[NDArray[np.int64]], pixels_of: PixelsOf, *, size: int, workers: int, pin: bool = False
) -> Iterator[Tensor]:
    """Pixels of each entry of ``rows`` in turn: uint8 (n, 3, size, size) in channels-last memory.

    Pillow lets go of the interpreter's lock while it decodes and resizes, so threads suffice. An error of one image
    is raised where its batch is asked for.
    """
    pool = ThreadPoolExecutor(workers, thread_name_prefix="images")
    waiting: deque[tuple[Tensor, list[Future[None]]]] = deque()
    try:
        for batch in rows:
            waiting.append(_submit(pool, batch, pixels_of, size=size, workers=workers, pin=pin))
            if len(waiting) > AHEAD:
                yield _finished(waiting.popleft())
        while waiting:
            yield _finished(waiting.popleft())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(
    pool: ThreadPoolExecutor, rows: NDArray[np.int64], pixels_of: PixelsOf, *, size: int, workers: int, pin: bool
) -> tuple[Tensor, list[Future[None]]]:
    batch = torch.empty((len(rows), size, size, 3), dtype=torch.uint8, pin_memory=pin)
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
