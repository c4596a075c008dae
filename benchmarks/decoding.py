"""What an image costs the process that extracts, whose threads share one interpreter's lock; needs no GPU.

    python benchmarks/decoding.py --data FOLDER --rounds 5

Prints two Markdown tables. The first: milliseconds for which an image holds that lock, from the listing to the full
batch, where the threads decode and where helper processes decode for them. It is the extracting process's own CPU time
less that of what lets go of the lock: Pillow's kernels, digests, files, sockets, copies into the batch. It is an upper
bound, as reading, which lets go of it too, and the clock are counted in. Its inverse bounds the images a second on any
number of cores.

The second: 16 threads with a helper each. What lets go of the lock (reading, digest, a helper's answer) is replaced
by a sleep of its length, so that few cores do: images a second, beside what the sleeps alone allow, and CPU time of an
image, nearly all of it under the lock.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from pipeline.backbones import Features, Pixels
from pipeline.backbones.pipe import stack_pixels
from pipeline.data import folder as folder_module
from pipeline.data import images as images_module
from pipeline.data.decode import Decoder
from pipeline.data.framing import Framing
from pipeline.data.images import open_images
from pipeline.features.decoding import PIXELS, Decoding, Helpers, _Helper
from pipeline.features.extractor import extract_features
from pipeline.features.journal import journal
from pipeline.features.prepare import Decode, Preparation
from pipeline.features.quarantine import Quarantine
from pipeline.features.views import PLAIN
from pipeline.params.sections import DataParams
from pipeline.runtime.interrupt import Interruption

WORKERS, BATCH = 1, 64
# Seconds without the lock: to read a file of 100 kB from memory, to digest it, to decode and resize it; many threads.
READ, DIGEST, DECODE, MANY_WORKERS = 1e-4, 1e-4, 3e-3, 16
DECODING = Decoding(Decoder((255, 255, 255), True, 10**9), PLAIN, Framing(256, 224, "bilinear"))


def main() -> None:
    arguments = _arguments()
    helpers = Helpers(DECODING, WORKERS)
    while helpers.ready < WORKERS:
        time.sleep(0.05)
    costs: dict[str, list[float]] = {"threads decode": [], "helper processes decode": []}
    for _ in range(arguments.rounds):
        for name, decode in (("threads decode", DECODING), ("helper processes decode", helpers)):
            with unlocked_on_a_clock(helpers) as unlocked:
                costs[name].append(cost(arguments.data, decode, unlocked))
    helpers.close()
    print("| | ms an image holds the lock (median) | min to max | images/s at most |")
    print("| :-- | --: | --: | --: |")
    for name, values in costs.items():
        middle, spread = statistics.median(values), f"{min(values):.3f} to {max(values):.3f}"
        print(f"| {name} | {middle:.3f} | {spread} | {1000 / middle:.0f} |")
    print("\n| | images/s (median) | min to max | of what the sleeps allow | CPU ms an image |")
    print("| :-- | --: | --: | --: | --: |")
    rates, cpus = zip(*(with_sleeps(arguments.data) for _ in range(arguments.rounds)), strict=True)
    rate, allowed = statistics.median(rates), MANY_WORKERS / (READ + DIGEST + DECODE)
    cells = [f"{rate:.0f}", f"{min(rates):.0f} to {max(rates):.0f}", f"{100 * rate / allowed:.0f} %"]
    print(f"| {MANY_WORKERS} threads, sleeps for kernels | {' | '.join(cells)} | {statistics.median(cpus):.3f} |")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(os.environ.get("PIPELINE_SHARED", "../shared"))
    parser.add_argument("--data", type=Path, default=shared / "data" / "hymenoptera_data")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", help="not used: the device is replaced by a full batch in memory")
    return parser.parse_args()


class FullBatch:
    """In the place of `Forward`: pixels are stacked as for a device, and nothing is computed."""

    device, batch_size, stack = torch.device("meta"), BATCH, staticmethod(stack_pixels)

    def __call__(self, pixels: list[Pixels]) -> Features:
        self.stack(pixels, torch.empty((len(pixels), 224, 224, 3), dtype=torch.uint8))
        return np.zeros((len(pixels), 1), np.float32)


def cost(data: Path, decode: Decode, unlocked: list[float]) -> float:
    """Milliseconds of this process's CPU an image, less those without the lock."""
    images, cpu, _ = run(data, decode, WORKERS)
    return 1000 * (cpu - sum(unlocked)) / images


def run(data: Path, decode: Decode, workers: int, times: int = 1) -> tuple[int, float, float]:
    """Images, and seconds of CPU and of the wall clock, of an extraction of all images in ``data`` so many times."""
    with tempfile.TemporaryDirectory() as cache, journal(Path(cache), workers) as opened:
        images = open_images(DataParams(root=data), Path(cache))
        quarantine = Quarantine(Path(cache), "rule")
        preparation = Preparation(images, lambda _digest: False, quarantine, decode=decode, in_hand=opened.in_hand)
        stub: Any = FullBatch()
        positions = list(range(len(images))) * times
        cpu, wall = time.process_time(), time.perf_counter()
        extract_features(
            positions,
            preparation,
            stub,
            lambda _features, _digests: None,
            workers=workers,
            interruption=Interruption(),
            seen=lambda _content: None,
        )
        return len(positions), time.process_time() - cpu, time.perf_counter() - wall


class Asleep:
    """In the place of the socket to a helper, which answers after the time that decoding takes."""

    def sendall(self, _data: bytes) -> None:
        pass

    def recv_into(self, buffer: memoryview, size: int, _flags: int) -> int:
        time.sleep(DECODE)
        buffer[-1:] = PIXELS
        return size


def with_sleeps(data: Path) -> tuple[float, float]:
    """Images a second and milliseconds of CPU an image, where all that lets go of the lock sleeps instead."""
    helpers, numbers = Helpers(DECODING, 0), count()
    for _ in range(MANY_WORKERS):
        helper = object.__new__(_Helper)
        vars(helper).update(_side=224, _answer=3 * 224**2 + 1, _socket=Asleep())
        helpers._free.put(helper)

    def slowly(seconds: float, answer: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def stub(argument: Any) -> Any:
            time.sleep(seconds)
            return answer(argument)

        return stub

    content = b"\0" * 100_000, np.zeros(4, np.int64)
    digest = slowly(DIGEST, lambda _data: next(numbers).to_bytes(16))
    with ExitStack() as patched:
        for home, name, value in (
            (folder_module, "read_file", slowly(READ, lambda _path: content)),
            (images_module, "digest_bytes", digest),
            (os, "pwrite", lambda _descriptor, data, _offset: len(data)),
            (FullBatch, "stack", staticmethod(lambda _pixels, _batch: None)),
        ):
            patched.enter_context(mock.patch.object(home, name, value))
        few = len(open_images(DataParams(root=data), Path("/nowhere")))
        images, cpu, wall = run(data, helpers, MANY_WORKERS, max(1, 8000 // few))
    return images / wall, 1000 * cpu / images


@contextmanager
def unlocked_on_a_clock(helpers: Helpers) -> Iterator[list[float]]:
    """CPU seconds of each call that lets go of the lock while the block runs."""
    seconds: list[float] = []
    get_decoder, resize = Image._getdecoder, Image.Image.resize

    def timed(function: Any, *args: Any, **kwargs: Any) -> Any:
        started = time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(time.thread_time() - started)

    class Timed:
        def __init__(self, whole: Any, *names: str) -> None:
            self._whole = whole
            vars(self).update({name: partial(timed, getattr(whole, name)) for name in names})

        def __getattr__(self, name: str) -> Any:
            return getattr(self._whole, name)

    with ExitStack() as patched:
        for home, name, value in (
            (Image, "_getdecoder", lambda *args, **kwargs: Timed(get_decoder(*args, **kwargs), "decode")),
            (Image.Image, "resize", lambda *args, **kwargs: timed(resize, *args, **kwargs)),
            (images_module, "digest_bytes", partial(timed, images_module.digest_bytes)),
            *((os, name, partial(timed, getattr(os, name))) for name in ("open", "fstat", "pwrite")),
            (FullBatch, "stack", partial(timed, stack_pixels)),
            *((each, "_socket", Timed(each._socket, "sendall", "recv", "recv_into")) for each in helpers._helpers),
        ):
            patched.enter_context(mock.patch.object(home, name, value))
        yield seconds


if __name__ == "__main__":
    main()
