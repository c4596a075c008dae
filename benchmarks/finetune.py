"""A training epoch against the loop that everyone writes, on the same files with the same weights, in the same run.

    python benchmarks/finetune.py --data FOLDER --backbone mobilenet_v2 --weights FILE --images 244 --rounds 3

Prints a Markdown table: images a second of the plain loop (ImageFolder, torchvision transforms, DataLoader with 4
workers, float32, contiguous, AdamW) and of `train_classifier` with its defaults, medians over interleaved rounds, their
ratio, and the share reached of forward and backward alone. Each side runs in a process of its own and trains an epoch
when the other is idle. The first epoch of ours, which decodes the images that later ones find in memory, is shown
apart. FOLDER holds a folder for each class; fewer images than asked for are repeated. Runs unchanged on a GPU.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from pipeline.backbones import Transform, build_network, trainable_module
from pipeline.files import digest_bytes
from pipeline.finetune import (
    Callbacks,
    Classifier,
    EpochRow,
    LabelledImages,
    make_random_head,
    resolve_setup,
    train_classifier,
)
from pipeline.finetune.batchnorm import fused
from pipeline.finetune.step import TrainableClassifier
from pipeline.params.sections import BackboneParams, FinetuneParams, TransformParams
from pipeline.runtime.cores import usable_cores
from pipeline.runtime.device import resolve_device
from pipeline.runtime.memory import reuse_freed_memory

SIDES = ("plain", "ours", "alone")


def main() -> None:
    arguments = _arguments()
    if arguments.side:
        _run_side(arguments)
        return
    processes = {side: _start(side) for side in SIDES}
    rates: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(arguments.rounds + 1):
        for side, process in processes.items():
            rates[side].append(_ask(process))
    for process in processes.values():
        process.communicate()
    print(_machine(arguments.device))
    print(f"\n{arguments.backbone}, {arguments.images} images, batches of {arguments.batch_size}\n")
    print(_table(rates))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(os.environ.get("PIPELINE_SHARED", "../shared"))
    parser.add_argument("--data", type=Path, default=shared / "data" / "hymenoptera_data" / "train")
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--weights", default="random", help="a file, an enum name, or random")
    parser.add_argument("--images", type=int, default=244, help="of one epoch")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batchnorm", choices=("frozen", "train"), default="frozen", help="of ours; plain: train")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False, help="ours, by torch.compile"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def _table(rates: dict[str, list[float]]) -> str:
    median = {side: statistics.median(values[1:]) for side, values in rates.items()}
    names = {
        "plain": "plain loop (4 workers, float32, contiguous)",
        "ours": "train_classifier",
        "alone": "forward and backward alone, as train_classifier computes them",
    }
    lines = ["| | images/s (median) | rounds | against plain |", "|---|---|---|---|"]
    for side in SIDES:
        rounds = " ".join(f"{value:.1f}" for value in rates[side][1:])
        lines.append(f"| {names[side]} | {median[side]:.1f} | {rounds} | {median[side] / median['plain']:.2f} x |")
    first = rates["ours"][0]
    lines.append(f"| train_classifier, first epoch | {first:.1f} | {first:.1f} | {first / median['plain']:.2f} x |")
    lines.append(f"\nReached of forward and backward alone: {100 * median['ours'] / median['alone']:.0f} %")
    return "\n".join(lines)


def _machine(device: str) -> str:
    resolved = resolve_device(device)
    name = torch.cuda.get_device_name(resolved) if resolved.type == "cuda" else f"{usable_cores()} cores"
    return f"torch {torch.__version__}, torchvision {torchvision.__version__}, {resolved.type}: {name}"


# -- processes -------------------------------------------------------------------------------------------------------


def _start(side: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _ask(process: subprocess.Popen[str]) -> float:
    """Let the side train one epoch; its images a second."""
    assert process.stdin and process.stdout
    process.stdin.write("go\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def _run_side(arguments: argparse.Namespace) -> None:
    device = resolve_device(arguments.device)
    match arguments.side:
        case "plain":
            _run_plain(arguments, device)
        case "ours":
            _run_ours(arguments, device)
        case _:
            _run_alone(arguments, device)


def _turns(rounds: int) -> Iterator[None]:
    for _ in range(rounds + 1):
        if not sys.stdin.readline():
            return
        yield


def _positions(available: int, wanted: int) -> list[int]:
    return [
        position * available // wanted if wanted < available else position % available for position in range(wanted)
    ]


def _params(arguments: argparse.Namespace) -> FinetuneParams:
    return FinetuneParams(batch_size=arguments.batch_size, batchnorm=arguments.batchnorm, compile=arguments.compile)


def _build(arguments: argparse.Namespace, classes: int) -> tuple[Classifier, Transform]:
    params = BackboneParams(name=arguments.backbone, weights=arguments.weights)
    backbone = build_network(params, TransformParams())
    return Classifier(trainable_module(backbone), make_random_head(backbone.feature_dim, classes)), backbone.transform


# -- sides -----------------------------------------------------------------------------------------------------------


def _run_plain(arguments: argparse.Namespace, device: torch.device) -> None:
    classifier, transform = _build(arguments, len(ImageFolder(arguments.data).classes))
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(transform.crop),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(transform.mean, transform.std),
        ]
    )
    folder = ImageFolder(arguments.data, augment)
    subset = Subset(folder, _positions(len(folder), arguments.images))
    loader = DataLoader(subset, batch_size=arguments.batch_size, shuffle=True, num_workers=4)
    model = classifier.to(device).train()
    optimizer = torch.optim.AdamW(
        [{"params": model.backbone.parameters(), "lr": 1e-5}, {"params": model.head.parameters(), "lr": 1e-3}]
    )
    criterion = nn.CrossEntropyLoss()
    for _ in _turns(arguments.rounds):
        started, total = time.perf_counter(), 0.0
        for images, targets in loader:
            images, targets = images.to(device), targets.to(device)
            optimizer.zero_grad()
            loss = criterion(model(images), targets)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(images)
        print(arguments.images / (time.perf_counter() - started), flush=True)


class _Files:
    """The images of a folder, decoded as asked for."""

    def __init__(self, paths: list[str]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def image(self, index: int) -> Image.Image:
        with Image.open(self._paths[index]) as image:
            return image.convert("RGB")

    def digest(self, index: int) -> bytes:
        return digest_bytes(f"{index} {self._paths[index]}".encode())


def _run_ours(arguments: argparse.Namespace, device: torch.device) -> None:
    folder = ImageFolder(arguments.data)
    samples = [folder.samples[position] for position in _positions(len(folder), arguments.images)]
    images = LabelledImages(_Files([path for path, _ in samples]), np.array([target for _, target in samples]))
    one = LabelledImages(_Files([samples[0][0]]), np.array([samples[0][1]]))
    classifier, transform = _build(arguments, len(folder.classes))
    turns = _turns(arguments.rounds)

    def wait_for_turn(row: EpochRow) -> None:
        if row.images_per_second is not None:
            print(row.images_per_second, flush=True)
        next(turns, None)

    with tempfile.TemporaryDirectory() as scratch:
        params = _params(arguments).model_copy(update={"epochs": arguments.rounds + 1})
        train_classifier(
            classifier,
            images,
            one,
            transform,
            params,
            resolve_setup(params, device, targets=images.targets, class_names=folder.classes),
            folder=Path(scratch),
            fingerprint="benchmark",
            callbacks=Callbacks(on_epoch=wait_for_turn),
        )


def _run_alone(arguments: argparse.Namespace, device: torch.device) -> None:
    """The same network on one batch that lies on the device already."""
    reuse_freed_memory()
    classifier, transform = _build(arguments, 2)
    params = _params(arguments)
    setup = resolve_setup(params, device, targets=np.arange(2), class_names=("0", "1"))
    model = TrainableClassifier(classifier, params, setup)
    model.train_mode()
    images = torch.randn(arguments.batch_size, 3, transform.crop, transform.crop, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    targets = torch.zeros(len(images), dtype=torch.long, device=device)
    repeats = max(1, arguments.images // len(images))
    wait = torch.cuda.synchronize if device.type == "cuda" else nullcontext
    with fused(model.pairs):
        for _ in _turns(arguments.rounds):
            wait()
            started = time.perf_counter()
            for _ in range(repeats):
                model.optimizer.zero_grad()
                with setup.autocast():
                    logits = model.forward(images)
                nn.functional.cross_entropy(logits.float(), targets).backward()
            wait()
            print(repeats * len(images) / (time.perf_counter() - started), flush=True)


if __name__ == "__main__":
    main()
