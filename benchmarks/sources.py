"""The same images as a folder, a tar and Parquet: images a second of the first extraction, seconds of the second.

    python benchmarks/sources.py --data FOLDER [--images N] [--rounds 3] [--backbone starter]

The folder is the baseline of each ratio, measured in the same run, interleaved; each first extraction has a cache of
its own, and the second repeats it there. Then each place is read without decoding (`Images.read_unknown`): what a
source alone can cost. Parquet needs pyarrow.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

from pipeline.data.images import open_images
from pipeline.params import load_params
from pipeline.stages.extract import extract


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    shared = Path(os.environ.get("PIPELINE_SHARED", "../shared"))
    parser.add_argument("--data", type=Path, default=shared / "data" / "hymenoptera_data")
    parser.add_argument("--images", type=int, default=397)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backbone", default="starter")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        places = _places(arguments.data, Path(scratch), arguments.images)
        rows = [_measure(places, arguments.backbone, Path(scratch) / "caches") for _ in range(arguments.rounds)]
    print(f"{arguments.images} images of {arguments.data.name}, {arguments.backbone}, median of {arguments.rounds}\n")
    print("| source | first extraction, images/s | ratio | second, s | only read and hashed, images/s | ratio |")
    print("| :-- | --: | --: | --: | --: | --: |")
    medians = {kind: [statistics.median(row[kind][i] for row in rows) for i in range(3)] for kind in places}
    for kind, (first, second, read) in medians.items():
        base_first, _, base_read = medians["folder"]
        rates = f"{arguments.images / first:.0f} | {base_first / first:.2f} | {second:.2f}"
        print(f"| {kind} | {rates} | {arguments.images / read:.0f} | {base_read / read:.2f} |")


def _places(data: Path, scratch: Path, count: int) -> dict[str, Path]:
    """The same ``count`` images, evenly from all of ``data``, three times."""
    files = sorted(path for path in data.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    files = files[:: max(len(files) // count, 1)][:count]
    names = [str(path.relative_to(data)) for path in files]
    for path, name in zip(files, names, strict=True):
        (scratch / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, scratch / "folder" / name)
    with tarfile.open(scratch / "images.tar", "w") as tar:
        for name in names:
            tar.add(scratch / "folder" / name, name)
    places = {"folder": scratch / "folder", "tar": scratch / "images.tar"}
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return places
    images = [{"bytes": path.read_bytes(), "path": name} for path, name in zip(files, names, strict=True)]
    table = pa.table({"image": images, "label": [Path(name).parent.name for name in names]})
    pq.write_table(table, scratch / "images.parquet", row_group_size=100)
    # Files written a moment ago are not trusted by the index yet.
    for path in [*scratch.rglob("*")]:
        os.utime(path, (time.time() - 3600,) * 2)
    time.sleep(2.5)
    return {**places, "Parquet": scratch / "images.parquet"}


def _measure(places: dict[str, Path], backbone: str, caches: Path) -> dict[str, tuple[float, float, float]]:
    seconds = {}
    for kind, place in places.items():
        shutil.rmtree(caches, ignore_errors=True)
        (caches / "params.yaml").parent.mkdir(parents=True)
        (caches / "params.yaml").touch()
        overrides = [f"data.root={place}", f"cache.dir={caches}", f"backbone.name={backbone}"]
        params = load_params(caches / "params.yaml", overrides)
        first, second = _seconds(params), _seconds(params)
        started = time.perf_counter()
        open_images(params.data, caches / "other").read_unknown(quiet=True)
        seconds[kind] = (first, second, time.perf_counter() - started)
    return seconds


def _seconds(params: object) -> float:
    started = time.perf_counter()
    extract(params, lambda _line: None, quiet=True)  # type: ignore[arg-type]
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
