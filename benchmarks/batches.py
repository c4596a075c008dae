"""What it costs to be handed images in batches, as an engine's worker is, beside a plain `extract` of the same images.

    python benchmarks/batches.py [--data FOLDER] [--images N] [--rounds 3] [--backbone starter]

Each extraction has a cache of its own, on this machine; batches are of paths. The engine itself is left out: what it
adds (moving paths and rows, starting workers) is its own. The last column is a second pass over all batches, which the
cache then holds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from pipeline import Embedder
from pipeline.params import Params, load_params
from pipeline.stages import embed
from pipeline.stages.extract import extract

BATCHES = (64, 512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    shared = Path(os.environ.get("PIPELINE_SHARED", "../shared"))
    parser.add_argument("--data", type=Path, default=shared / "data" / "flowers5_128")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backbone", default="starter")
    arguments = parser.parse_args()
    paths = sorted(str(path) for path in arguments.data.resolve().rglob("*.jpg"))
    paths = paths[:: max(len(paths) // arguments.images, 1)][: arguments.images]
    with tempfile.TemporaryDirectory() as scratch:
        images = Path(scratch, "images")
        images.mkdir()
        for path in paths:
            os.symlink(path, images / path.replace("/", "_"))
        rounds = [_round(images, arguments.backbone, Path(scratch, str(i))) for i in range(arguments.rounds)]
    print(f"{len(paths)} images of {arguments.data.name}, {arguments.backbone}, median of {arguments.rounds}\n")
    print("| | images/s | ratio | again, images/s |\n| :-- | --: | --: | --: |")
    for way in rounds[0]:
        first, again = (statistics.median(seconds[way][i] for seconds in rounds) for i in range(2))
        base = statistics.median(seconds["extract"][0] for seconds in rounds)
        print(f"| {way} | {len(paths) / first:.0f} | {base / first:.2f} | {len(paths) / again:.0f} |")


def _round(images: Path, backbone: str, scratch: Path) -> dict[str, tuple[float, float]]:
    scratch.mkdir()
    (scratch / "params.yaml").touch()

    def params(cache: str) -> Params:
        places = [f"data.root={images}", f"cache.dir={scratch / cache}", f"backbone.name={backbone}"]
        return load_params(scratch / "params.yaml", [*places, "extract.precision=float32"])

    names = sorted(path.name for path in images.iterdir())
    seconds = {"extract": (_plain(params("plain")), _plain(params("plain")))}
    for size in BATCHES:
        embed._opened.cache_clear()
        batches = [names[start : start + size] for start in range(0, len(names), size)]
        embedder = Embedder(params(str(size)))
        seconds[f"batches of {size}"] = (_in_batches(embedder, batches), _in_batches(embedder, batches))
    return seconds


def _plain(params: Params) -> float:
    started = time.perf_counter()
    extract(params, lambda _line: None, quiet=True)
    return time.perf_counter() - started


def _in_batches(embedder: Embedder, batches: list[list[str]]) -> float:
    started = time.perf_counter()
    for names in batches:
        embedder({"path": names})
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
