"""Training images: decoded once, every one in a batch once, pixels in order, errors where they belong."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.finetune.images import (
    CachedImages,
    LabelledImages,
    cache_budget,
    plan_epoch,
    prepare_batches,
    resolve_workers,
)
from pipeline.runtime.distributed import World

from .support import (
    Pictures,
    labelled,
    tiny_params,
)


def test_images_are_decoded_once_within_the_budget() -> None:
    pictures = Pictures(4)
    cached = CachedImages(pictures, budget=3 * 16 * 16 * 3)
    for _ in range(3):
        for index in range(4):
            assert np.array_equal(np.asarray(cached.image(index)), pictures.arrays[index])
    assert pictures.decoded == 3 + 3
    assert cache_budget(5) == 5_000_000 and 0 < cache_budget("auto") <= 4 << 30


def test_targets_must_fit_their_images() -> None:
    with pytest.raises(ValueError, match="4 images but 3 targets"):
        LabelledImages(Pictures(4), np.zeros(3, np.int64))
    assert len(labelled(4)) == 4


@pytest.mark.parametrize("count", [1, 7, 8, 9, 33])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_image_once_over_all_processes(count: int, size: int) -> None:
    params = tiny_params(batch_size=4, accumulate=2)
    plans = [plan_epoch(count, params, epoch=1, world=World(rank, size, rank)) for rank in range(size)]
    rows = [row for plan in plans for batch in plan if batch.counts for row in batch.rows]
    assert sorted(rows) == list(range(count))
    assert len({tuple((batch.index, batch.closes) for batch in plan) for plan in plans}) == 1
    assert all(len(batch.rows) for plan in plans for batch in plan)
    assert plans[0][-1].closes


def test_order_depends_on_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [int(row) for batch in plan_epoch(20, tiny_params(seed=seed), epoch=epoch) for row in batch.rows]

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(0, 1)), tuple(order(0, 2)), tuple(order(1, 1))}) == 3


def test_step_rows_hold_the_whole_step() -> None:
    plan = plan_epoch(20, tiny_params(batch_size=4, accumulate=3), epoch=1)
    assert [batch.closes for batch in plan] == [False, False, True, False, True]
    assert sorted(np.concatenate([batch.rows for batch in plan[:3]])) == sorted(plan[0].step_rows)


@pytest.mark.parametrize("workers", [1, 3])
def test_pixels_arrive_in_order(workers: int) -> None:
    def pixels_of(row: int) -> NDArray[np.uint8]:
        time.sleep(0.002 * (row % 3))
        return np.full((4, 4, 3), row, np.uint8)

    rows = [np.arange(start, start + 5) for start in range(0, 40, 5)]
    batches = list(prepare_batches(rows, pixels_of, size=4, workers=workers))
    assert all(batch.shape == (5, 3, 4, 4) for batch in batches)
    assert batches[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.cat(batches)[:, 0, 0, 0].tolist() == list(range(40))


def test_an_error_is_raised_where_its_batch_is_due() -> None:
    def pixels_of(row: int) -> NDArray[np.uint8]:
        if row == 5:
            raise OSError("gone")
        return np.zeros((2, 2, 3), np.uint8)

    batches = prepare_batches([np.array([0, 1]), np.array([4, 5])], pixels_of, size=2, workers=2)
    assert len(next(batches)) == 2
    with pytest.raises(OSError, match="gone"):
        next(batches)


def test_workers() -> None:
    assert resolve_workers(3, torch.device("cpu")) == 3
    assert resolve_workers("auto", torch.device("cpu")) >= 1


def test_processes_share_the_cores_of_their_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.runtime.cores.usable_cores", lambda: 16)
    cuda, four = torch.device("cuda:0"), World(size=8, local_size=4)
    assert [resolve_workers("auto", cuda), resolve_workers("auto", cuda, four)] == [16, 4]
    assert resolve_workers("auto", torch.device("cpu"), four) == 2


def test_pinned_memory_is_asked_for_on_the_device_that_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere it would make a context on the first GPU, in every process."""
    current: list[torch.device] = []
    asked: list[list[torch.device]] = []
    empty = torch.empty

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        current.append(chosen)
        yield
        current.remove(chosen)

    def pinned(*shape: Any, pin_memory: bool = False, **rest: Any) -> torch.Tensor:
        asked.extend([list(current)] * pin_memory)
        return empty(*shape, **rest)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch, "empty", pinned)
    batches = prepare_batches(
        [np.arange(2)], lambda _row: np.zeros((2, 2, 3), np.uint8), size=2, workers=1, device=torch.device("cuda:1")
    )
    assert len(list(batches)) == 1 and asked == [[torch.device("cuda:1")]]
