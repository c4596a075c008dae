"""Run a frozen backbone over image files: read, decode and forward overlapped, memory bounded. Knows no HDF5.

On a CPU every core runs whole tasks - decode a few images, or one forward pass on a single torch thread - so that
no core waits for another inside a layer, and a feature does not depend on the number of cores. On a GPU the
cores decode, and a few threads wait for the batches that it has in hand.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from ..backbones import Features, Forward, Pixels
from ..backbones.backbone import SLOTS
from ..data.digests import Digests, stack_digests
from ..runtime.interrupt import Interruption
from ..runtime.memory import reuse_freed_memory

# Files that one decoding task handles: enough to hide the cost of a task, few enough to share work evenly.
CHUNK = 4


@dataclass(frozen=True)
class Prepared:
    """What reading one file gave: its digest (16 bytes), and pixels (3, h, w) where it has to be forwarded."""

    position: int
    digest: bytes | None
    pixels: Pixels | None = None


class Prepare(Protocol):
    """Read, digest and decode the file at a position; the seconds of each step go to the clock."""

    def __call__(self, position: int, clock: Clock) -> Prepared: ...


class Sink(Protocol):
    """Takes finished rows: features (n, d) and digests (n, 16)."""

    def __call__(self, features: Features, digests: Digests) -> None: ...


@dataclass
class Clock:
    """Seconds spent in each step, summed over threads, and seconds that a step waited for another."""

    busy: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("read", "decode", "forward", "write"), 0.0))
    waited: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("read", "decode", "forward", "write"), 0.0))

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Count the block's seconds as work of ``name``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.busy[name] += time.perf_counter() - started

    def add(self, other: Clock) -> None:
        """Add another clock's seconds to this one's."""
        for mine, theirs in ((self.busy, other.busy), (self.waited, other.waited)):
            for name, seconds in theirs.items():
                mine[name] += seconds

    def bound_by(self, *, shared_cores: bool) -> str:
        """The step that limits the rate: on shared cores the one that uses them most, else the one waited for."""
        if self.waited["write"] > 0.2 * sum(self.busy.values()):
            return "write"
        if not shared_cores and self.waited["decode"] >= self.waited["forward"]:
            return "forward"
        steps = ("read", "decode", "forward") if shared_cores else ("read", "decode")
        return max(steps, key=lambda name: self.busy[name])


def extract_features(
    positions: Sequence[int],
    prepare: Prepare,
    forward: Forward,
    sink: Sink,
    *,
    workers: int,
    interruption: Interruption,
    seen: Callable[[Prepared], None],
) -> Clock:
    """Prepare every position, forward what has pixels, hand rows to the sink in order.

    Args:
        workers: threads that decode; on a CPU they forward too.
        interruption: when it becomes true nothing new is read, and what was read is finished.
        seen: called in order for each prepared content (for bookkeeping and progress).

    Raises:
        Whatever ``prepare``, ``forward`` or ``sink`` raise; rows handed to the sink before stay there.
    """
    on_cpu = forward.device.type == "cpu"
    reuse_freed_memory()
    with single_threaded_torch(on_cpu), ThreadPoolExecutor(workers) as pool, _forward_pool(pool, on_cpu) as forwards:
        flow = _Flow(prepare, forward, sink, pool, forwards, seen)
        # A batch that grows, and one for each that can be forwarded as soon as it is whole.
        ahead = max(2 * workers, (workers + 1 if on_cpu else 2) * forward.batch_size // CHUNK)
        try:
            flow.run(positions, ahead=ahead, interruption=interruption)
        except BaseException:
            flow.cancel()
            raise
    return flow.clock


@contextmanager
def single_threaded_torch(enabled: bool) -> Iterator[None]:
    """One intra-op thread a torch call while the block runs: parallelism comes from calls side by side."""
    import torch

    before = torch.get_num_threads()
    if enabled:
        reuse_freed_memory()
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _forward_pool(pool: Executor, on_cpu: bool) -> Iterator[Executor]:
    if on_cpu:
        yield pool
        return
    with ThreadPoolExecutor(SLOTS) as forwards:
        yield forwards


class _Flow:
    """The moving parts of one extraction: chunks being prepared, pixels waiting for a batch, batches in flight."""

    def __init__(
        self,
        prepare: Prepare,
        forward: Forward,
        sink: Sink,
        pool: Executor,
        forwards: Executor,
        seen: Callable[[Prepared], None],
    ) -> None:
        self.prepare, self.forward, self.sink, self.seen = prepare, forward, sink, seen
        self.pool, self.forwards = pool, forwards
        self.clock = Clock()
        self.preparing: deque[Future[tuple[list[Prepared], Clock]]] = deque()
        self.waiting: list[Prepared] = []
        self.forwarding: deque[tuple[Future[tuple[Features, float]], list[Prepared]]] = deque()

    def run(self, positions: Sequence[int], *, ahead: int, interruption: Interruption) -> None:
        todo = iter(positions)
        while True:
            while len(self.preparing) < ahead and not interruption and (chunk := list(islice(todo, CHUNK))):
                self.preparing.append(self.pool.submit(self._prepare_chunk, chunk))
            if not self.preparing:
                break
            self._take_prepared()
            while len(self.waiting) >= self.forward.batch_size:
                self._submit(self.forward.batch_size)
            self._drain(keep=SLOTS)
        if self.waiting:
            self._submit(len(self.waiting))
        self._drain(keep=0)

    def cancel(self) -> None:
        """Drop what has not begun."""
        for future in self.preparing:
            future.cancel()
        for batch, _ in self.forwarding:
            batch.cancel()

    def _prepare_chunk(self, chunk: list[int]) -> tuple[list[Prepared], Clock]:
        clock = Clock()
        return [self.prepare(position, clock) for position in chunk], clock

    def _take_prepared(self) -> None:
        started = time.perf_counter()
        contents, clock = self.preparing.popleft().result()
        self.clock.waited["forward"] += time.perf_counter() - started
        self.clock.add(clock)
        for content in contents:
            self.seen(content)
            if content.pixels is not None:
                self.waiting.append(content)

    def _submit(self, count: int) -> None:
        batch, self.waiting = self.waiting[:count], self.waiting[count:]
        self.forwarding.append((self.forwards.submit(self._forward_batch, batch), batch))

    def _forward_batch(self, batch: list[Prepared]) -> tuple[Features, float]:
        started = time.perf_counter()
        features = self.forward([content.pixels for content in batch if content.pixels is not None])
        return features, time.perf_counter() - started

    def _drain(self, *, keep: int) -> None:
        """Hand finished batches on, in order; wait for the oldest while more than ``keep`` are in flight."""
        while self.forwarding and (len(self.forwarding) > keep or self.forwarding[0][0].done()):
            future, batch = self.forwarding.popleft()
            started = time.perf_counter()
            features, seconds = future.result()
            self.clock.waited["decode"] += time.perf_counter() - started
            self.clock.busy["forward"] += seconds
            started = time.perf_counter()
            self.sink(features, stack_digests([content.digest for content in batch if content.digest is not None]))
            self.clock.waited["write"] += time.perf_counter() - started
