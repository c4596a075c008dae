"""How the cache and its index grow, on made-up parts and files: seconds, each beside a baseline of the same run.

    python benchmarks/scale.py parts [--parts 10000]      one image a predict, so many times; opened and read again
    python benchmarks/scale.py rows [--rows 1000000]      located and read, beside copying as many bytes
    python benchmarks/scale.py index [--files 1000000]    learnt and looked up, beside scandir and stat of so many files
    python benchmarks/scale.py stats [--files 2000]       files whose stat takes 0.3 ms, as on a network disk
    python benchmarks/scale.py head [--rows 50000 --width 1024 --kind logistic]  from a file, beside in memory

Everything lies in a temporary folder (`TMPDIR`).
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from pipeline.data import walk
from pipeline.data.digests import Digests
from pipeline.data.images import open_images
from pipeline.features.parts import build_part, part_name
from pipeline.features.rows import Rows
from pipeline.features.spec import FeatureSpec
from pipeline.features.store import FeatureStore
from pipeline.heads import make_head
from pipeline.params import DataParams, HeadParams


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def row(what: str, value: float, baseline: str, base: float) -> None:
    """A line of the table."""
    print(f"| {what} | {value:.2f} | {baseline} | {base:.2f} | {value / base:.2f} |")


def make_spec(width: int) -> FeatureSpec:
    """A spec of no backbone in particular."""
    return FeatureSpec("made-up", "ab" * 16, None, str(width), {}, "pillow-rgb-1", "float32", "float16")


def make_rows(count: int, width: int, seed: int) -> tuple[np.ndarray, Digests]:
    """Random float16 features (n, d) and digests (n, 16)."""
    generator = np.random.default_rng(seed)
    return generator.random((count, width), np.float32).astype(np.float16), generator.integers(
        0, 256, (count, 16), np.uint8
    )


def parts(folder: Path, count: int, width: int) -> None:
    """As many predicts of one image."""
    spec = make_spec(width)
    store = FeatureStore(folder / "old", spec, width)
    with store.writing():
        features, digests = make_rows(count, width, 0)
        for number in range(count):
            data = build_part(features[number : number + 1], digests[number : number + 1], spec)
            (store.folder / part_name(data)).write_bytes(data)
        opened = seconds(lambda: FeatureStore(folder / "old", spec, width))
        merged = time.perf_counter()
    row(f"merge {count} parts of one row that had piled up", time.perf_counter() - merged, "open them", opened)
    row("open what came of them", seconds(lambda: FeatureStore(folder / "old", spec, width)), "open them", opened)

    def predict(number: int) -> None:
        store = FeatureStore(folder / "new", spec, width)
        with store.writing():
            store.publish(features[number : number + 1].astype(np.float32), digests[number : number + 1])

    first = seconds(lambda: [predict(number) for number in range(100)]) / 100
    rest = seconds(lambda: [predict(number) for number in range(100, count)]) / (count - 100)
    row("store one more row (ms, merging included)", 1000 * rest, "the same in a new key", 1000 * first)
    store = FeatureStore(folder / "new", spec, width)
    again = seconds(lambda: FeatureStore(folder / "new", spec, width))
    row(f"open the {len(store.parts)} parts after {count} predicts", again, f"open {count} parts", opened)
    row("read all rows", seconds(lambda: store.read(digests)), f"open {count} parts", opened)


def rows(folder: Path, count: int, width: int) -> None:
    """Parts of 4096 rows, their digests asked for in another order."""
    spec = make_spec(width)
    store = FeatureStore(folder, spec, width)
    store.folder.mkdir(parents=True)
    every = []
    for start in range(0, count, 4096):
        features, digests = make_rows(min(4096, count - start), width, start)
        data = build_part(features, digests, spec)
        (store.folder / part_name(data)).write_bytes(data)
        every.append(digests)
    digests = np.concatenate(every)
    digests = digests[np.random.default_rng(1).permutation(count)]
    FeatureStore(folder, spec, width)
    copied = seconds(lambda: np.ones((count, width), np.float16).astype(np.float32))
    store = FeatureStore(folder, spec, width)
    row(
        f"open {len(store.parts)} parts, all proven", seconds(lambda: FeatureStore(folder, spec, width)), "copy", copied
    )
    row(f"sort and locate {count} rows", seconds(lambda: store.contains(digests)), "copy to float32", copied)
    row(f"read {count} rows of {width}", seconds(lambda: store.read(digests)), "copy to float32", copied)


def index(folder: Path, count: int) -> None:
    """Empty files: what a listing, a look-up and the learning of a few more cost."""
    root = folder / "images"
    for number in range(count):
        if number % 1000 == 0:
            (root / f"{number // 1000:05}").mkdir(parents=True)
        (root / f"{number // 1000:05}" / f"{number:08}.jpg").touch()
    old = time.time_ns() - 10**10

    def plain() -> None:
        for entry in os.scandir(root):
            for file in os.scandir(entry):
                file.stat()

    data = DataParams(root=root)
    plain()
    images = open_images(data, folder / "cache")
    images.digests[:] = np.random.default_rng(0).integers(0, 256, images.digests.shape, np.uint8)
    learn = np.arange(count)
    images._read_ns[:], images.known[:] = time.time_ns() + 10**10, True
    learnt = seconds(images.remember)
    listed = seconds(plain)
    row(
        f"list and look up {count} unchanged files",
        seconds(lambda: open_images(data, folder / "cache")),
        "scandir and stat",
        listed,
    )
    row(f"learn {count} contents", learnt, "scandir and stat", listed)
    again = open_images(data, folder / "cache")
    assert again.known.all() and old
    few = learn[:: max(count // 100, 1)]
    again._read_ns[few] = time.time_ns() + 10**10
    row(f"learn {len(few)} more", seconds(again.remember), f"learn {count}", learnt)
    row("list and look up again", seconds(lambda: open_images(data, folder / "cache")), "scandir and stat", listed)


def stats(folder: Path, count: int) -> None:
    """A network disk is made up: each stat waits for 0.3 ms."""
    root = folder / "images" / "one"
    root.mkdir(parents=True)
    for number in range(count):
        (root / f"{number}.jpg").touch()
    fields = walk._fields_and_mode

    def slow(status: os.stat_result) -> tuple[int, ...]:
        time.sleep(3e-4)
        return fields(status)

    walk._fields_and_mode = slow  # type: ignore[assignment]
    base = seconds(lambda: [slow(entry.stat()) for entry in os.scandir(root)])
    row(
        f"list {count} files",
        seconds(lambda: open_images(DataParams(root=folder / "images"), folder / "cache")),
        "one after another",
        base,
    )


def head(folder: Path, count: int, width: int, kind: str) -> None:
    """Ten classes; each fit in a process of its own, whose largest size is that of everything in it.

    The features are made in another one: a process begins with the largest size of the one that starts it.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(_make, folder, count, width).result()
    told = {}
    for how in ("nothing", "memory", "blocks"):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            told[how] = pool.submit(_fit, str(folder), how, kind).result()
    print(f"| C, proven gap, right of 2,000 | {told['blocks'][2:]} | in memory | {told['memory'][2:]} | |")
    row(f"fit {kind} to {count} rows of {width}, by blocks", told["blocks"][0], "in memory", told["memory"][0])
    megabytes = {how: float(values[1]) / 1000 for how, values in told.items()}
    row("largest size of the process, MB", megabytes["blocks"], "in memory", megabytes["memory"])
    row("largest size of the process, MB", megabytes["blocks"], "without features", megabytes["nothing"])


def _make(folder: Path, count: int, width: int) -> None:
    np.save(folder / "targets.npy", np.random.default_rng(0).integers(0, 10, count))
    targets = np.load(folder / "targets.npy")
    centres = 0.04 * np.random.default_rng(1).normal(size=(10, width)).astype(np.float32)
    features = np.lib.format.open_memmap(folder / "rows.npy", "w+", np.float16, (count, width))
    for start in range(0, count, 4096):
        mine = targets[start : start + 4096]
        noise = np.random.default_rng(start).normal(size=(len(mine), width)).astype(np.float32)
        features[start : start + 4096] = np.maximum(
            noise * np.geomspace(1, 0.1, width, dtype=np.float32) + centres[mine], 0
        )
    features.flush()


def _fit(folder: str, how: str, kind: str) -> tuple[float, int, float | None, float | None, int]:
    """Seconds, kilobytes, C and the proven gap of the refit where there are such, and how many of 2,000 are right."""
    targets, given = np.load(f"{folder}/targets.npy"), Rows(Path(folder) / "rows.npy")
    fitted = make_head(kind, HeadParams(), class_names=[])
    rows = given[:2000] if how == "nothing" else given[:] if how == "memory" else given
    started = time.perf_counter()
    fitted.fit(rows, targets[: len(rows)])  # type: ignore[arg-type]
    spent = time.perf_counter() - started
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    right = int((fitted.predict(given[:2000]) == targets[:2000]).sum())
    return spent, size, fitted.selected.get("C"), fitted.selected.get("certificate", {}).get("gap"), right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["parts", "rows", "index", "stats", "head"])
    parser.add_argument("--parts", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--kind", default="logistic")
    given = parser.parse_args()
    print("| what | seconds | baseline | seconds | ratio |\n| :-- | --: | :-- | --: | --: |")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if given.what == "parts":
            parts(folder, given.parts, given.width)
        elif given.what == "rows":
            rows(folder, given.rows, given.width)
        elif given.what == "head":
            head(folder, given.rows, given.width, given.kind)
        else:
            {"index": index, "stats": stats}[given.what](folder, given.files)


if __name__ == "__main__":
    main()
