"""What an image costs the process that extracts, whose threads share one interpreter's lock; needs no GPU.

    python benchmarks/decoding.py --data FOLDER --rounds 5

Prints a Markdown table: milliseconds of the extracting process's own CPU time an image, from the listing to the full
batch, where its threads decode (less Pillow's kernels, which let go of the lock) and where helper processes decode for
them. Its inverse bounds the images a second on any number of cores. CPU time is more than the time under the lock, as
reading, digesting and copying let go of it too; and it hardly depends on what else the machine does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.backbones import Features, Pixels
from pipeline.backbones.pipe import stack_pixels
from pipeline.data.decode import Decoder
from pipeline.data.framing import Framing
from pipeline.data.images import open_images
from pipeline.features.decoding import Decoding, Helpers
from pipeline.features.extractor import extract_features
from pipeline.features.journal import journal
from pipeline.features.prepare import Decode, Preparation
from pipeline.features.quarantine import Quarantine
from pipeline.features.views import PLAIN
from pipeline.params.sections import DataParams
from pipeline.runtime.interrupt import Interruption

WORKERS, BATCH = 2, 64
DECODING = Decoding(Decoder((255, 255, 255), True, 10**9), PLAIN, Framing(256, 224, "bilinear"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(os.environ.get("PIPELINE_SHARED", "../shared"))
    parser.add_argument("--data", type=Path, default=shared / "data" / "hymenoptera_data")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", help="not used: the device is replaced by a full batch in memory")
    arguments = parser.parse_args()
    helpers = Helpers(DECODING, WORKERS)
    while helpers.ready < WORKERS:
        time.sleep(0.05)
    costs: dict[str, list[float]] = {"threads decode": [], "helper processes decode": []}
    for _ in range(arguments.rounds):
        with kernels_on_a_clock() as kernels:
            costs["threads decode"].append(cost(arguments.data, DECODING, kernels))
        costs["helper processes decode"].append(cost(arguments.data, helpers, [0.0]))
    helpers.close()
    print("| | ms of one process's CPU an image (median) | min to max | images/s at most |")
    print("| :-- | --: | --: | --: |")
    for name, values in costs.items():
        middle, spread = statistics.median(values), f"{min(values):.3f} to {max(values):.3f}"
        print(f"| {name} | {middle:.3f} | {spread} | {1000 / middle:.0f} |")


class FullBatch:
    """In the place of `Forward`: pixels are stacked as for a device, and nothing is computed."""

    device, batch_size = torch.device("meta"), BATCH

    def __call__(self, pixels: list[Pixels]) -> Features:
        stack_pixels(pixels, torch.empty((len(pixels), 224, 224, 3), dtype=torch.uint8))
        return np.zeros((len(pixels), 1), np.float32)


def cost(data: Path, decode: Decode, kernels: list[float]) -> float:
    """Milliseconds of this process's CPU an image, less those of the kernels."""
    with tempfile.TemporaryDirectory() as cache, journal(Path(cache), WORKERS) as opened:
        images = open_images(DataParams(root=data), Path(cache))
        preparation = Preparation(images, set(), Quarantine(Path(cache), "rule"), decode=decode, in_hand=opened.in_hand)
        stub: Any = FullBatch()
        started = time.process_time()
        extract_features(
            range(len(images)),
            preparation,
            stub,
            lambda _features, _digests: None,
            workers=WORKERS,
            interruption=Interruption(),
            seen=lambda _content: None,
        )
        return 1000 * (time.process_time() - started - sum(kernels)) / len(images)


@contextmanager
def kernels_on_a_clock() -> Iterator[list[float]]:
    """CPU seconds of each call of Pillow's decoders and of its resize while the block runs."""
    seconds: list[float] = []
    get_decoder, resize = Image._getdecoder, Image.Image.resize  # type: ignore[attr-defined]

    def timed(function: Any, *args: Any, **kwargs: Any) -> Any:
        started = time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(time.thread_time() - started)

    class Timed:
        def __init__(self, decoder: Any) -> None:
            self._decoder = decoder

        def __getattr__(self, name: str) -> Any:
            return getattr(self._decoder, name)

        def decode(self, data: bytes) -> Any:
            return timed(self._decoder.decode, data)

    Image._getdecoder = lambda *args, **kwargs: Timed(get_decoder(*args, **kwargs))  # type: ignore[attr-defined]
    Image.Image.resize = lambda *args, **kwargs: timed(resize, *args, **kwargs)  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        Image._getdecoder, Image.Image.resize = get_decoder, resize  # type: ignore[attr-defined, method-assign]


if __name__ == "__main__":
    main()
