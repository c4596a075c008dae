"""Extraction against the loop that everyone writes, on the same files with the same weights, in the same run.

    python benchmarks/extract.py --data FOLDER --backbone mobilenet_v2 --weights FILE --images 397 --rounds 3

Prints a Markdown table: images a second of the plain loop (ImageFolder + DataLoader, the preset's transform, float32,
no_grad, batches of 32, with 4 and with 0 workers) and of `pipeline extract`, medians over interleaved rounds, their
ratio, the machine's own limit from decode and forward measured alone, and the share of it that was reached. With
``--forward`` only the forward pass is timed: as `extract` runs it, from pixels to features on the host, beside the same
network on a batch that stays on the device, on a GPU also captured, tuned and compiled. Runs unchanged on a GPU.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torchvision

from pipeline.backbones import Backbone, Forward, build_network, trainable_module
from pipeline.backbones.pipe import SLOTS
from pipeline.data.decode import decode_image
from pipeline.data.folder import scan_folder
from pipeline.data.index import DigestIndex
from pipeline.errors import DeviceError
from pipeline.features.extractor import single_threaded_torch
from pipeline.params import Params, load_params
from pipeline.params.sections import IMAGE_EXTENSIONS
from pipeline.runtime.cores import usable_cores
from pipeline.stages.extract import extract
from pipeline.stages.open import open_backbone


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as scratch:
        print(_machine(arguments.device))
        if arguments.forward:
            _forward(arguments, Path(scratch))
            return
        folder = _copy_images(arguments.data, Path(scratch) / "images", arguments.images)
        print(
            f"\n{arguments.images} images of {arguments.data.name}, {arguments.backbone}, {arguments.rounds} rounds\n"
        )
        _compare(arguments, folder, Path(scratch))
        if arguments.memory:
            _memory(arguments, folder, Path(scratch))
        if arguments.nothing:
            _nothing_to_do(Path(scratch), arguments.nothing)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(os.environ.get("PIPELINE_SHARED", "../shared"))
    parser.add_argument("--data", type=Path, default=shared / "data" / "hymenoptera_data")
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--weights", default="random", help="random, an enum name, or a file")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--torchvision", action="store_true", help="extract with extract.decoder=torchvision, too")
    parser.add_argument("--forward", action="store_true", help="time the forward pass alone")
    parser.add_argument("--batch-size", default="auto")
    parser.add_argument("--memory", action="store_true", help="peak memory at the number of images and four times it")
    parser.add_argument(
        "--nothing", type=int, default=0, metavar="FILES", help="time the unchanged tree of FILES files"
    )
    return parser.parse_args()


def _copy_images(source: Path, target: Path, count: int) -> Path:
    """The first ``count`` images, in two class folders; repeated under other bytes where there are fewer."""
    images = sorted(path for path in source.rglob("*") if path.suffix.lower() in IMAGE_EXTENSIONS)
    for number in range(count):
        original = images[number % len(images)]
        path = target / ("first", "second")[number % 2] / f"{number:06}{original.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Bytes after the end of a JPEG change its digest, and nothing else.
        path.write_bytes(original.read_bytes() + b"\0" * (number // len(images)))
    return target


def _machine(device: str) -> str:
    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.backends.cpu.get_cpu_capability()
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    return f"{time.strftime('%Y-%m-%d')}, {usable_cores()} cores, {kind}, device {device}, {versions}"


def _params(arguments: argparse.Namespace, folder: Path, cache: Path, *settings: str) -> Params:
    file = cache.parent / "params.yaml"
    file.write_text("")
    overrides = [
        f"data.root={folder}",
        f"cache.dir={cache}",
        f"backbone.name={arguments.backbone}",
        f"backbone.weights={arguments.weights}",
        f"extract.device={arguments.device}",
        f"extract.precision={arguments.precision}",
        f"extract.batch_size={arguments.batch_size}",
        *settings,
    ]
    return load_params(file, overrides)


def _compare(arguments: argparse.Namespace, folder: Path, scratch: Path) -> None:
    contestants: dict[str, Callable[[], float]] = {
        "plain loop, 4 workers": lambda: _plain_loop(arguments, folder, 4),
        "plain loop, 0 workers": lambda: _plain_loop(arguments, folder, 0),
        "pipeline extract": lambda: _ours(arguments, folder, scratch),
    }
    if arguments.torchvision:
        contestants["pipeline extract, decoder torchvision"] = lambda: _ours(
            arguments, folder, scratch, "extract.decoder=torchvision"
        )
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    limits: list[float] = []
    for _ in range(arguments.rounds):
        for name, run in contestants.items():
            rates[name].append(run())
        limits.append(_limit(arguments, folder, scratch))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    plain = max(medians["plain loop, 4 workers"], medians["plain loop, 0 workers"])
    limit = statistics.median(limits)
    print("| | images/s (median) | min to max | ratio to the better plain loop |")
    print("| :-- | --: | --: | --: |")
    for name, values in rates.items():
        print(
            f"| {name} | {medians[name]:.1f} | {min(values):.1f} to {max(values):.1f} | {medians[name] / plain:.2f} |"
        )
    spread, share = f"{min(limits):.1f} to {max(limits):.1f}", 100 * medians["pipeline extract"] / limit
    print(f"| limit of the machine | {limit:.1f} | {spread} | {share:.0f} % of it reached |\n")


def _plain_loop(arguments: argparse.Namespace, folder: Path, workers: int) -> float:
    """Images a second of the loop in every tutorial."""
    backbone = build_network(_section(arguments), Params().transform)
    model = trainable_module(backbone).eval()
    device = torch.device("cuda" if torch.cuda.is_available() and arguments.device != "cpu" else "cpu")
    model.to(device)
    weights = torchvision.models.get_model_weights(arguments.backbone)["IMAGENET1K_V1"]
    data = torchvision.datasets.ImageFolder(str(folder), weights.transforms())
    loader = torch.utils.data.DataLoader(data, batch_size=32, num_workers=workers)
    started = time.perf_counter()
    features = []
    with torch.no_grad():
        for images, _ in loader:
            features.append(model(images.to(device)).cpu())
    return len(data) / (time.perf_counter() - started)


def _section(arguments: argparse.Namespace) -> Any:
    return Params().backbone.model_copy(update={"name": arguments.backbone, "weights": arguments.weights})


def _ours(arguments: argparse.Namespace, folder: Path, scratch: Path, *settings: str) -> float:
    """Images a second of `extract` into an empty cache, from the first file opened to the last part published.

    NaN where it is refused.
    """
    cache = scratch / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    try:
        summary = extract(_params(arguments, folder, cache, *settings), lambda _line: None, quiet=True)
    except DeviceError as error:
        print(f"{error}\n")
        return math.nan
    return float(summary["images_per_second"])


def _limit(arguments: argparse.Namespace, folder: Path, scratch: Path) -> float:
    """Images a second that decode and forward alone allow: on a CPU cores / (sum of core-seconds), else the smaller."""
    params = _params(arguments, folder, scratch / "cache")
    backbone = open_backbone(params)
    forward = backbone.forward
    files = sorted(folder.rglob("*.*"))[: 24 * usable_cores()]

    def crop(file: Path) -> Any:
        image = decode_image(file.read_bytes(), background=(255, 255, 255), exif=True, max_pixels=10**9)
        return backbone.transform.pixels(image)

    with single_threaded_torch(backbone.device.type == "cpu"), ThreadPoolExecutor(usable_cores()) as pool:
        started = time.perf_counter()
        pixels = list(pool.map(crop, files))
        decode = len(files) / (time.perf_counter() - started)
        batches = [pixels[i : i + forward.batch_size] for i in range(0, len(pixels), forward.batch_size)]
        batches = [batch for batch in batches if len(batch) == forward.batch_size] or batches[:1]
        parallel = usable_cores() if backbone.device.type == "cpu" else SLOTS
        with ThreadPoolExecutor(parallel) as forwards:
            list(forwards.map(forward, batches[:parallel]))
            started = time.perf_counter()
            list(forwards.map(forward, batches * 2))
            rate = 2 * sum(map(len, batches)) / (time.perf_counter() - started)
    return 1 / (1 / decode + 1 / rate) if backbone.device.type == "cpu" else min(decode, rate)


def _forward(arguments: argparse.Namespace, scratch: Path) -> None:
    """A table of images a second of the forward pass, each the best of three times some seconds."""
    backbone = open_backbone(_params(arguments, scratch, scratch / "cache"))
    forward, crop = backbone.forward, backbone.transform.crop
    random = torch.randint(0, 256, (forward.batch_size, crop, crop, 3), dtype=torch.uint8)
    pixels, images = list(random.permute(0, 3, 1, 2).numpy()), random.to(backbone.device).permute(0, 3, 1, 2)
    with ThreadPoolExecutor(SLOTS) as pool:
        rates = {"as extract runs it": _rate(lambda n: list(pool.map(forward, [pixels] * n)), len(pixels), backbone)}

    def alone(n: int) -> None:
        for _ in range(n):
            forward._compute(images)

    rates["the network on a batch that stays there"] = _rate(alone, len(pixels), backbone)
    if backbone.device.type == "cuda":
        rates["the same, as a CUDA graph"] = _rate(_captured(forward, images), len(pixels), backbone)
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
            rates["the same, with cudnn.benchmark"] = _rate(alone, len(pixels), backbone)
        forward._module = torch.compile(forward.module)
        try:
            rates["the same, compiled"] = _rate(alone, len(pixels), backbone)
        except Exception as error:  # noqa: BLE001 - such as no C compiler, which is no reason to lose what was measured
            print(f"Not compiled: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    best = max(rates.values())
    print(f"\n{arguments.backbone}, {backbone.precision}, batches of {len(pixels)} images of {crop} pixels\n")
    print("| | images/s | of the best |\n| :-- | --: | --: |")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.0f} | {100 * rate / best:.0f} % |")


def _rate(run: Callable[[int], Any], images: int, backbone: Backbone) -> float:
    """Images a second of ``run(n)``, n batches of so many images; the best of three measurements."""

    def seconds(n: int) -> float:
        started = time.perf_counter()
        run(n)
        if backbone.device.type == "cuda":
            torch.cuda.synchronize(backbone.device)
        return time.perf_counter() - started

    with single_threaded_torch(backbone.device.type == "cpu"):
        seconds(SLOTS)
        count = max(SLOTS, round(2 * SLOTS / seconds(SLOTS)))
        return max(count * images / seconds(count) for _ in range(3))


def _captured(forward: Forward, images: torch.Tensor) -> Callable[[int], None]:
    """What `_compute` launches as one CUDA graph; ``n`` replays of it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward._compute(images)

    def replay(n: int) -> None:
        for _ in range(n):
            graph.replay()

    return replay


def _memory(arguments: argparse.Namespace, folder: Path, scratch: Path) -> None:
    """Peak resident memory of an extract of all images, and of a quarter of them, each in a process of its own."""
    quarter = scratch / "quarter"
    for path in sorted(folder.rglob("*.*"))[::4]:
        (quarter / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, quarter / path.parent.name)
    for name, data in (("a quarter of the images", quarter), ("all images", folder)):
        shutil.rmtree(scratch / "cache", ignore_errors=True)
        _params(arguments, data, scratch / "cache")
        command = [sys.executable, "-m", "pipeline", "extract", "-q", "-p", str(scratch / "params.yaml")]
        for setting in (
            f"data.root={data}",
            f"cache.dir={scratch / 'cache'}",
            f"backbone.name={arguments.backbone}",
            f"backbone.weights={arguments.weights}",
        ):
            command += ["-s", setting]
        _, status, usage = os.wait4(subprocess.Popen(command).pid, 0)
        assert status == 0
        print(f"Peak memory, {name}: {usage.ru_maxrss / 1024:.0f} MB")


def _nothing_to_do(scratch: Path, count: int) -> None:
    """Scan and look-up of an unchanged tree against os.scandir + stat on it, interleaved."""
    root = scratch / "many"
    for number in range(count):
        path = root / f"class{number % 100:03}" / f"{number:07}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    time.sleep(2.5)  # younger files are not trusted
    tree = scan_folder(root, layout="auto", extensions=IMAGE_EXTENSIONS)
    digests = torch.randint(0, 256, (count, 16), dtype=torch.uint8).numpy()
    known = digests[:, 0] >= 0
    index = scratch / "many.idx"
    DigestIndex().updated(tree.paths, tree.stats, digests, known, read_ns=time.time_ns()).save(index)
    ratios = []
    for _ in range(7):
        started = time.perf_counter()
        _scandir_and_stat(str(root))
        plain = time.perf_counter() - started
        started = time.perf_counter()
        tree = scan_folder(root, layout="auto", extensions=IMAGE_EXTENSIONS)
        found = DigestIndex.load(index).lookup(tree.paths, tree.stats)[1]
        ours = time.perf_counter() - started
        assert found.all()
        ratios.append((ours / plain, ours, plain))
    ratio, ours, plain = sorted(ratios)[len(ratios) // 2]
    print(
        f"Nothing to do, {count} files: scan and look-up {ours:.2f} s, scandir + stat {plain:.2f} s, ratio {ratio:.2f}"
    )


def _scandir_and_stat(folder: str) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                _scandir_and_stat(entry.path)
            else:
                entry.stat()


if __name__ == "__main__":
    main()
