"""Each feature lands on its digest, in order, once, within bounded memory, with the same bits in any company."""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.backbones import Features, Forward, Pixels
from pipeline.data.digests import Digests
from pipeline.features.extractor import (
    CHUNK,
    Clock,
    Prepare,
    Prepared,
    extract_features,
    single_threaded_torch,
)
from pipeline.files import digest_bytes
from pipeline.runtime.interrupt import Interruption

SIDE = 16


def image(seed: int) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (3, SIDE, SIDE)).astype(np.uint8)


IMAGES = [image(seed) for seed in range(60)]
DIGESTS = [digest_bytes(pixels.tobytes()) for pixels in IMAGES]


def make_network() -> nn.Module:
    """A tiny convolutional network with the layers of a real one."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 32, 3, 1, 1, groups=4), nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 20)).eval()


NETWORK = make_network()


def normalise(batch: torch.Tensor) -> torch.Tensor:
    return batch.float() / 255 - 0.5


def make_forward(network: nn.Module = NETWORK, *, batch_size: int = 8) -> Forward:
    return Forward(lambda: network, normalise, torch.device("cpu"), batch_size)


def prepare_image(position: int, clock: Clock) -> Prepared:
    """The image at a position, as if it were read from a file."""
    with clock.step("decode"):
        return Prepared(position, DIGESTS[position % 60], IMAGES[position % 60])


class Table:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.digests: list[bytes] = []
        self.rows: list[bytes] = []

    def __call__(self, features: Features, digests: Digests) -> None:
        assert len(features) == len(digests)
        self.digests += [digest.tobytes() for digest in digests]
        self.rows += [row.tobytes() for row in features]


def extract(
    positions: Sequence[int],
    prepare: Prepare = prepare_image,
    forward: Forward | None = None,
    table: Any = None,
    *,
    workers: int = 2,
    interruption: Interruption | None = None,
    seen: Any = None,
) -> Table:
    table = table or Table()
    extract_features(
        positions,
        prepare,
        forward or make_forward(),
        table,
        workers=workers,
        interruption=Interruption() if interruption is None else interruption,  # one that was not requested is false
        seen=seen or (lambda _content: None),
    )
    return table


ALONE = {digest: extract([position]).rows[0] for position, digest in enumerate(DIGESTS)}


def test_features_of_different_images_differ() -> None:
    assert len(set(ALONE.values())) == len(IMAGES)


@pytest.mark.parametrize("count", [0, 1, CHUNK, 7, 8, 9, 41])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_every_row_lands_on_its_digest_in_order(count: int, workers: int) -> None:
    positions = np.random.default_rng(count).permutation(60)[:count].tolist()

    def slow_at_times(position: int, clock: Clock) -> Prepared:
        time.sleep(0.002 * (position % 3 == 0))
        return prepare_image(position, clock)

    table = extract(positions, slow_at_times, workers=workers)
    assert table.digests == [DIGESTS[position] for position in positions]
    assert table.rows == [ALONE[digest] for digest in table.digests]


@pytest.mark.parametrize("seed", range(4))
def test_company_changes_no_bit(seed: int) -> None:
    random = np.random.default_rng(seed)
    positions = random.permutation(60)[: int(random.integers(9, 60))].tolist()
    table = extract(positions, workers=seed + 1)
    assert table.rows == [ALONE[digest] for digest in table.digests]


def test_a_batch_is_padded_to_one_shape() -> None:
    shapes: set[tuple[int, ...]] = set()

    class Watching(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            shapes.add(tuple(images.shape))
            assert images.is_contiguous(memory_format=torch.channels_last)
            return NETWORK(images)

    extract(range(13), forward=make_forward(Watching()))
    make_forward(Watching())(IMAGES[:3])
    assert shapes == {(8, 3, SIDE, SIDE)}


def test_the_forward_pass_agrees_with_plain_torch() -> None:
    with torch.inference_mode():
        plain = NETWORK(normalise(torch.from_numpy(np.stack(IMAGES[:20])))).numpy()
    np.testing.assert_allclose(make_forward()(IMAGES[:20]), plain, rtol=1e-4, atol=1e-6)


def test_what_needs_no_forward_pass_gets_none() -> None:
    def prepare(position: int, clock: Clock) -> Prepared:
        if position % 3 == 0:
            return Prepared(position, None)
        return Prepared(position, DIGESTS[position], IMAGES[position] if position % 3 == 1 else None)

    seen: list[int] = []
    table = extract(range(40), prepare, seen=lambda content: seen.append(content.position))
    assert table.digests == [DIGESTS[position] for position in range(1, 40, 3)]
    assert table.rows == [ALONE[digest] for digest in table.digests]
    assert seen == list(range(40))


@pytest.mark.parametrize("slow", ["forward", "sink"])
def test_memory_stays_bounded(slow: str) -> None:
    """Pixels that were decoded and have not come out as features: a few batches, however many files there are."""
    lock, held, most = threading.Lock(), [0], [0]

    def prepare(position: int, clock: Clock) -> Prepared:
        with lock:
            held[0] += 1
            most[0] = max(most[0], held[0])
        return prepare_image(position, clock)

    class Slow(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            time.sleep(0.004 * (slow == "forward"))
            return NETWORK(images)

    class Counting(Table):
        def __call__(self, features: Features, digests: Digests) -> None:
            time.sleep(0.004 * (slow == "sink"))
            with lock:
                held[0] -= len(digests)
            super().__call__(features, digests)

    table = extract(range(600), prepare, make_forward(Slow()), Counting(), workers=2)
    assert len(table.rows) == 600 and held[0] == 0
    assert most[0] <= 16 * 8


def test_an_interruption_finishes_what_was_read_and_reads_nothing_more() -> None:
    interruption, read = Interruption(), []

    def prepare(position: int, clock: Clock) -> Prepared:
        read.append(position)
        if position == 10:
            interruption.request()
        return prepare_image(position, clock)

    table = extract(range(600), prepare, interruption=interruption)
    assert 11 <= len(read) <= 16 * 8
    assert table.digests == [DIGESTS[position % 60] for position in sorted(read)]


def test_an_interruption_before_the_start_reads_nothing() -> None:
    interruption = Interruption()
    interruption.request()
    assert extract(range(20), interruption=interruption).rows == []


class Failing(nn.Module):
    """Fails from the third batch on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > 2:
            raise RuntimeError("no more")
        return NETWORK(images)


class FullTable(Table):
    """Takes two batches."""

    def __call__(self, features: Features, digests: Digests) -> None:
        if len(self.rows) >= 16:
            raise RuntimeError("no more")
        super().__call__(features, digests)


def failing_prepare(position: int, clock: Clock) -> Prepared:
    if position == 50:
        raise RuntimeError("no more")
    return prepare_image(position, clock)


@pytest.mark.parametrize("where", ["prepare", "forward", "sink"])
@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_ends_it_at_once_and_keeps_the_rows_before(where: str, workers: int) -> None:
    table = FullTable() if where == "sink" else Table()
    read: list[int] = []

    def prepare(position: int, clock: Clock) -> Prepared:
        read.append(position)
        return failing_prepare(position, clock) if where == "prepare" else prepare_image(position, clock)

    forward = make_forward(Failing() if where == "forward" else NETWORK)
    with pytest.raises(RuntimeError, match="no more"):
        extract(range(2000), prepare, forward, table, workers=workers)
    assert table.digests == DIGESTS[: len(table.digests)]
    assert table.rows == [ALONE[digest] for digest in table.digests]
    assert len(table.rows) == 16 or where != "sink"
    assert len(read) < 300


class Activation:
    """Stands for what a layer gave, which a traceback can keep alive."""


class OutOfMemory(nn.Module):
    """A device that holds ``fitting`` images at most."""

    def __init__(self, fitting: int, error: Exception | None = None) -> None:
        super().__init__()
        self.fitting, self.sizes = fitting, []
        self.error = error or torch.cuda.OutOfMemoryError("simulated")
        self.alive: weakref.ref[Activation] | None = None

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        activation = Activation()
        self.alive = weakref.ref(activation)
        self.sizes.append(len(images))
        if len(images) > self.fitting:
            raise type(self.error)(*self.error.args)  # a new one, that nothing but its handler holds
        return NETWORK(images)


def test_a_batch_that_does_not_fit_is_halved_until_it_does() -> None:
    network, told = OutOfMemory(fitting=3), list[int]()
    forward = Forward(lambda: network, normalise, torch.device("cpu"), 16, halved=told.append)
    table = extract(range(40), forward=forward, workers=1)
    assert table.digests == DIGESTS[:40] and forward.batch_size == 2 and told == [8, 4, 2]
    assert network.sizes[:4] == [16, 8, 4, 2]
    assert network.sizes.count(2) == 20
    expected = np.frombuffer(b"".join(ALONE[digest] for digest in table.digests), np.float32)
    np.testing.assert_allclose(np.frombuffer(b"".join(table.rows), np.float32), expected, rtol=1e-4, atol=1e-6)


def test_halving_is_said(caplog: pytest.LogCaptureFixture) -> None:
    make_forward(OutOfMemory(fitting=4), batch_size=8)(IMAGES[:8])
    assert "batches of 8 images: they are of 4" in caplog.text


def test_a_later_batch_that_does_not_fit_is_computed_in_parts_and_the_next_is_whole_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    network = OutOfMemory(fitting=8)
    forward = make_forward(network, batch_size=8)
    forward(IMAGES[:8])
    network.fitting = 4
    rows = forward(IMAGES[8:16])
    network.fitting = 8
    forward(IMAGES[16:24])
    assert network.sizes == [8, 8, 4, 4, 8] and forward.batch_size == 8 and len(rows) == 8
    assert "in parts" in caplog.text


def test_memory_is_given_back_once_nothing_holds_it_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside an ``except`` the traceback still holds the frames, and with them what the layers gave."""
    network = OutOfMemory(fitting=4)
    held: list[bool] = []

    def look(*_: object) -> int:
        held.append((network.alive is not None and network.alive() is not None) or sys.exc_info()[1] is not None)
        return 0

    monkeypatch.setattr("pipeline.backbones.backbone.gc.collect", look)
    make_forward(network, batch_size=8)(IMAGES[:8])
    assert held == [False]


@pytest.mark.parametrize(
    "message",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "GET was unable to find an engine to execute this computation",
        "CUDA error: out of memory",
        "MPS backend out of memory",
    ],
)
def test_every_way_of_saying_that_memory_ran_out_is_understood(message: str) -> None:
    forward = make_forward(OutOfMemory(fitting=4, error=RuntimeError(message)), batch_size=8)
    assert len(forward(IMAGES[:8])) == 8 and forward.batch_size == 4


def test_another_error_is_not_taken_for_a_lack_of_memory() -> None:
    network = OutOfMemory(fitting=4, error=RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal"):
        make_forward(network, batch_size=8)(IMAGES[:8])
    assert network.sizes == [8]


def test_a_single_image_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(torch.cuda.OutOfMemoryError, match="simulated"):
        extract(range(4), forward=make_forward(OutOfMemory(fitting=0), batch_size=4))


def test_torch_gets_its_threads_back() -> None:
    before, inside = torch.get_num_threads(), []

    def work() -> None:
        with single_threaded_torch(True):
            inside.append(torch.get_num_threads())
            raise RuntimeError("no more")

    torch.set_num_threads(3)
    try:
        with pytest.raises(RuntimeError, match="no more"):
            work()
        assert inside == [1] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def clock_of(busy: dict[str, float], waited: dict[str, float]) -> Clock:
    clock = Clock()
    clock.busy.update(busy)
    clock.waited.update(waited)
    return clock


@pytest.mark.parametrize(
    ("busy", "waited", "shared_cores", "bound_by"),
    [
        ({"read": 1, "decode": 9, "forward": 3}, {}, True, "decode"),
        ({"read": 1, "decode": 3, "forward": 9}, {}, True, "forward"),
        ({"read": 9, "decode": 3, "forward": 1}, {"forward": 5}, False, "read"),
        ({"read": 1, "decode": 9, "forward": 1}, {"decode": 5, "forward": 1}, False, "forward"),
        ({"read": 1, "decode": 1, "forward": 1}, {"write": 5}, True, "write"),
    ],
)
def test_what_bounds_the_rate(
    busy: dict[str, float], waited: dict[str, float], shared_cores: bool, bound_by: str
) -> None:
    assert clock_of(busy, waited).bound_by(shared_cores=shared_cores) == bound_by


def test_the_clock_counts_each_step() -> None:
    clock = Clock()
    with clock.step("read"):
        time.sleep(0.01)
    other = Clock()
    other.add(clock)
    other.add(clock)
    assert clock.busy["read"] >= 0.01 and other.busy["read"] == 2 * clock.busy["read"]
    assert clock.busy["decode"] == 0.0
