"""Resolve a device to one that is there, and what its use asks of the process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DeviceError
from .distributed import World

if TYPE_CHECKING:
    import torch

# What CUDA, cuDNN (8 and 9), cuBLAS and MPS say when memory runs out; not all of it comes as torch's own error.
OUT_OF_MEMORY = ("out of memory", "alloc_failed", "allocation_failed", "unable to find an engine")

_blocks: list[str] = []  # what each block of fast products found set
_blocks_lock = Lock()


def resolve_device(name: str, world: World | None = None) -> torch.device:
    """``auto`` is CUDA where there is one, then MPS, else the CPU; under torchrun each local rank takes its own GPU.

    On CUDA float32 is from then on IEEE's in the whole process, where torch would round convolutions to TF32.

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
    if device.type == "cuda":
        _allow_tf32(False, False)
    return device


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Inside the block ``device`` is this thread's current one: pinned memory makes no context on another GPU."""
    if device.type != "cuda":
        return nullcontext()
    import torch

    return torch.cuda.device(device)


def to_device(values: NDArray[np.int64], device: torch.device) -> torch.Tensor:
    """Integers on the device, by way of pinned memory to a GPU, so that the host need not wait for it."""
    import torch

    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor.to(device)
    with on_device(device):
        return tensor.pin_memory().to(device, non_blocking=True)


@contextmanager
def tf32() -> Iterator[None]:
    """Inside the block CUDA may round the factors of float32 products to TF32, in all threads of the process."""
    import torch

    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    _allow_tf32(True, True)
    try:
        yield
    finally:
        _allow_tf32(*before)


@contextmanager
def fast_products(device: torch.device, *, rounded: bool) -> Iterator[None]:
    """Inside the block float32 products take the fastest way there is, in all threads of the process.

    On CUDA their factors are rounded to TF32, if ``rounded``. On a CPU they stay float32, by oneDNN, which does them
    twice as fast as MKL where the CPU is not Intel's; but not where oneDNN has matrix units (AMX) and would round.
    """
    if device.type == "cuda" and rounded:
        with tf32():
            yield
    elif device.type == "cpu" and _onednn_is_exact():
        with _onednn():
            yield
    else:
        yield


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether ``device`` is a CPU with instructions for products of bfloat16: two or three times those of float32."""
    import torch

    known = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


@contextmanager
def _onednn() -> Iterator[None]:
    import torch

    backend: Any = torch.backends.mkldnn  # torch declares no types of it
    with _blocks_lock:
        _blocks.append(backend.matmul.fp32_precision)
        backend.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        with _blocks_lock:
            backend.matmul.fp32_precision = _blocks.pop()  # what the first had found goes to the last to leave


@cache
def _onednn_is_exact() -> bool:
    """Whether this CPU's fast products are of float32: factors with more bits than bfloat16 has are told from 1."""
    import torch

    factor = torch.full((64, 64), 1 + 2.0**-12)
    with _onednn():
        return bool((factor @ factor > len(factor)).all())


def _allow_tf32(convolutions: bool, products: bool) -> None:
    import torch

    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device had too little memory for what was asked of it."""
    import torch

    text = str(error).lower()
    told = isinstance(error, RuntimeError) and any(words in text for words in OUT_OF_MEMORY)
    return isinstance(error, torch.OutOfMemoryError) or told
