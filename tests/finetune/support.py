"""A tiny backbone, tiny images and a tiny training, shared by the tests and by the processes they start."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from pipeline.backbones.transform import Transform
from pipeline.files import digest_bytes
from pipeline.finetune import (
    Callbacks,
    Classifier,
    LabelledImages,
    Setup,
    TrainingResult,
    make_random_head,
    process_group,
    train_classifier,
)
from pipeline.params.sections import AugmentParams, FinetuneParams
from pipeline.runtime.distributed import world_from_environment

TRANSFORM = Transform(resize=16, crop=16)
STILL = AugmentParams(crop_scale=(1.0, 1.0), horizontal_flip=0.0)


class Pictures:
    """Noisy squares whose brighter channel tells the class."""

    def __init__(self, count: int, *, seed: int = 0, classes: int = 3, size: tuple[int, int] = (16, 16)) -> None:
        random = np.random.default_rng(seed)
        self.targets = np.arange(count, dtype=np.int64) % classes
        self.arrays = random.integers(0, 120, (count, *size, 3), dtype=np.uint8)
        for array, target in zip(self.arrays, self.targets, strict=True):
            array[..., target] += 60
        self.decoded = 0

    def __len__(self) -> int:
        return len(self.arrays)

    def image(self, index: int) -> Image.Image:
        self.decoded += 1
        return Image.fromarray(self.arrays[index])

    def digest(self, index: int) -> bytes:
        return digest_bytes(self.arrays[index].tobytes())


def labelled(count: int, *, seed: int = 0, size: tuple[int, int] = (16, 16)) -> LabelledImages:
    pictures = Pictures(count, seed=seed, size=size)
    return LabelledImages(pictures, pictures.targets)


def tiny_backbone() -> nn.Sequential:
    """Three blocks with BatchNorm, one of them depthwise with a kernel larger than its map at the end."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 5, 1, 2, groups=8, bias=False), nn.BatchNorm2d(8), nn.Hardswish()),
        nn.Sequential(nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).train()


def tiny_classifier(*, dropout: float = 0.0) -> Classifier:
    return Classifier(tiny_backbone(), make_random_head(12, 3, dropout=dropout, seed=0))


def tiny_params(**changes: Any) -> FinetuneParams:
    base: dict[str, Any] = {
        "epochs": 3,
        "batch_size": 8,
        "backbone_lr": 1e-2,
        "head_lr": 1e-2,
        "workers": 1,
        "image_cache_mb": 1,
    }
    return FinetuneParams(**{**base, **changes})


def train_tiny(
    folder: Path,
    params: FinetuneParams,
    *,
    count: int = 36,
    fingerprint: str = "tiny",
    callbacks: Callbacks | None = None,
    **setup: Any,
) -> tuple[TrainingResult, Classifier]:
    classifier = tiny_classifier(dropout=params.dropout)
    result = train_classifier(
        classifier,
        labelled(count),
        labelled(18, seed=1),
        TRANSFORM,
        params,
        Setup(**{"world": world_from_environment(), **setup}),
        folder=folder,
        fingerprint=fingerprint,
        callbacks=callbacks,
    )
    return result, classifier


def state_digest(state: dict[str, torch.Tensor]) -> str:
    return digest_bytes(b"".join(name.encode() + value.numpy().tobytes() for name, value in state.items())).hex()


def main() -> None:
    """``support.py JSON``: train; with ``kill_at`` die by SIGKILL after so many batches, or within a rename."""
    task = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    batches = 0

    def die_when_due(count: int) -> None:
        nonlocal batches
        batches += 1
        if batches == task.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)

    renames, rename = 0, os.rename

    def rename_or_die(source: Any, target: Any) -> None:
        nonlocal renames
        renames += 1
        if renames == task.get("kill_in_rename"):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    os.rename = rename_or_die
    params = FinetuneParams.model_validate_json(task["params"])
    changes = {"batchnorm": task["batchnorm"], "count": task.get("count", 36)}
    with process_group(world_from_environment(), torch.device("cpu")):
        result, _ = train_tiny(Path(task["folder"]), params, callbacks=Callbacks(on_batch=die_when_due), **changes)
    rows = [[row.epoch, row.train_loss, row.selection_loss, row.selection_accuracy] for row in result.history]
    print(json.dumps({"tuned": state_digest(result.tuned), "history": rows}))


if __name__ == "__main__":
    main()
