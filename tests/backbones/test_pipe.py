"""Every batch comes back whole and its own, however many are under way; a failed one leaves the pipe usable."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.backbones import Forward, Transform
from pipeline.backbones import pipe as module
from pipeline.backbones.pipe import SLOTS, Pipe, stack_pixels

CPU, SHAPE, SIZE = torch.device("cpu"), (3, 4, 4), 5


class Stand:
    """In the place of streams and events of CUDA, which the CPU has none of."""

    def __init__(self, *_: object, **__: object) -> None: ...
    def record(self) -> None: ...
    def wait(self) -> None: ...

    def synchronize(self) -> None:
        time.sleep(0.002)  # the device is still at work: other threads go on


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The streams that were launched into, in order, on a CPU that stands for a GPU."""
    order: list[str] = []

    @contextmanager
    def stream(_stream: Stand) -> Iterator[None]:
        order.append(threading.current_thread().name)
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stand)
    monkeypatch.setattr(torch.cuda, "Event", Stand)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: order.append("synchronised"))
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(module, "pinned", lambda shape, dtype: torch.zeros(shape, dtype=dtype))
    return order


def compute(images: Tensor) -> Tensor:
    assert images.is_contiguous(memory_format=torch.channels_last)
    return images.float().flatten(1)[:, :7]


def batch_of(seed: int, count: int = SIZE) -> list[Any]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, *SHAPE)).astype(np.uint8))


@pytest.mark.parametrize("threads", [1, SLOTS, 2 * SLOTS])
def test_batches_side_by_side_come_back_as_their_own(launched: list[str], threads: int) -> None:
    pipe = Pipe(compute, CPU, SIZE, SHAPE)
    batches = [batch_of(seed, 1 + seed % SIZE) for seed in range(40)]
    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(pipe, batches))
    for pixels, features in zip(batches, results, strict=True):
        assert np.array_equal(features, np.stack(pixels).reshape(len(pixels), -1)[:, :7])
    # The three streams of a batch are launched into without another thread in between.
    assert all(len(set(launched[start : start + 3])) == 1 for start in range(0, len(launched), 3))


def test_a_batch_that_fails_leaves_all_slots_for_the_next(launched: list[str]) -> None:
    def fail_on_zero(images: Tensor) -> Tensor:
        if not images[0].any():
            raise torch.OutOfMemoryError("simulated")
        return compute(images)

    pipe = Pipe(fail_on_zero, CPU, SIZE, SHAPE)
    for _ in range(SLOTS + 1):
        with pytest.raises(torch.OutOfMemoryError):
            pipe([np.zeros(SHAPE, np.uint8)])
    assert launched.count("synchronised") == SLOTS + 1
    assert len(pipe(batch_of(1))) == SIZE


def test_pixels_lie_in_memory_as_images_do() -> None:
    """So that nothing is turned around on the way: not by a decoding thread, nor by the device."""
    batch = torch.zeros(SIZE, 4, 4, 3, dtype=torch.uint8)
    pixels = batch_of(0, 3)
    stack_pixels(pixels, batch)
    assert np.array_equal(batch[:3].permute(0, 3, 1, 2).numpy(), np.stack(pixels)) and not batch[3:].any()


def test_constants_of_the_normalisation_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would be a copy to the device that waits for all that the device has been told to do."""
    transform, images = Transform(mean=(0.1, 0.2, 0.3)), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    with torch.inference_mode():
        first = transform.normalise(images)
    monkeypatch.setattr(torch, "tensor", None)
    again = transform.normalise(images)
    assert torch.equal(first, again)
    (again * torch.ones(3, 1, 1, requires_grad=True)).sum().backward()


# -- on a GPU ----------------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 32, 3, 2), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return layers.eval()


@pytest.mark.gpu
def test_a_gpu_computes_what_a_cpu_does_in_any_company(cuda: torch.device) -> None:
    images = list(np.random.default_rng(0).integers(0, 256, (200, 3, 64, 64)).astype(np.uint8))
    normalise = Transform().normalise
    on_cpu = Forward(network, normalise, CPU, 8)(images)
    forward = Forward(lambda: network().to(cuda), normalise, cuda, 16)
    with ThreadPoolExecutor(SLOTS) as pool:
        parts = list(pool.map(forward, [images[start : start + 16] for start in range(0, 200, 16)]))
    np.testing.assert_allclose(np.concatenate(parts), on_cpu, rtol=1e-4, atol=1e-5)
    assert np.array_equal(forward(images[3:7]), np.concatenate(parts)[3:7])


@pytest.mark.gpu
def test_normalising_on_a_gpu_is_what_it_is_on_a_cpu(cuda: torch.device) -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    torch.testing.assert_close(Transform().normalise(images.to(cuda)).cpu(), Transform().normalise(images))


@pytest.mark.gpu
def test_a_gpu_that_runs_out_of_memory_gets_smaller_batches(cuda: torch.device) -> None:
    class Hungry(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            torch.empty(len(images) << 34, dtype=torch.uint8, device=images.device)  # 16 GiB an image
            return images.mean((2, 3))

    forward = Forward(Hungry, lambda images: images.float(), cuda, 64)
    assert len(forward(list(np.zeros((64, 3, 8, 8), np.uint8)))) == 64 and forward.batch_size < 64


@pytest.mark.gpu
def test_float32_is_exact_and_tf32_is_not(cuda: torch.device) -> None:
    from pipeline.runtime.device import resolve_device, tf32

    resolve_device(str(cuda))
    layer = nn.Conv2d(64, 64, 3, bias=False).to(cuda)
    images = torch.randn(8, 64, 32, 32, device=cuda)
    with torch.no_grad():
        exact = nn.functional.conv2d(images.double(), layer.weight.double())
        error = float((layer(images) - exact).norm() / exact.norm())
        with tf32():
            loose = float((layer(images) - exact).norm() / exact.norm())
    assert error < 1e-6
    if torch.cuda.get_device_capability(cuda) >= (8, 0):
        assert loose > 1e-5
