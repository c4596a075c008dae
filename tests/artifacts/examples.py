"""A small valid run for tests to write and to damage."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pipeline.artifacts import (
    METRICS_FILE,
    MODEL_FILE,
    PREDICTIONS_FILE,
    Predictions,
    RunMetrics,
    RunModel,
    publishing_run,
    write_predictions,
)
from pipeline.data.digests import data_digest as digest_of
from pipeline.evaluate import Provenance, ScoredImages
from pipeline.evaluate.score import score_images

NAMES = ("ant", "bee")


def model_values(**changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "created": datetime(2026, 11, 21, 14, 30, 5, tzinfo=UTC),
        "verb": "train-head",
        "class_names": list(NAMES),
        "backbone": {
            "name": "mobilenet_v2",
            "weights": "IMAGENET1K_V1",
            "digest": "00" * 16,
            "layer": None,
            "pooling": "avg",
        },
        "transform": {"resize": 256, "crop": 224},
        "precision": "float32",
        "storage_dtype": "float16",
        "feature_dim": 1280,
        "forward_shape": [32, 3, 224, 224],
        "feature_key": "abcdef",
        "head": {"kind": "logistic", "file": "head.safetensors"},
        "data": {"root": "/data/insects", "digest": "11" * 16, "images": {"train": 244, "val": 4}},
        "parameters": {"trainable": 2562, "total": 2_226_434},
        "versions": {"python": "3.11"},
        "seconds": 1.5,
    }
    return values | changes


def metrics_values(
    y: list[int], predicted: list[int], names: tuple[str, ...] = NAMES, **changes: Any
) -> dict[str, Any]:
    scores = score_of(y, predicted, None, names, train_counts=[3] + [1] * (len(names) - 1))
    return scores.model_dump() | {"protocol": "Nothing was chosen."} | changes


def score_of(
    y: ArrayLike,
    predicted: ArrayLike,
    probabilities: ArrayLike | None = None,
    names: Sequence[str] = NAMES,
    *,
    train_counts: ArrayLike | None = None,
    why_none: str | None = None,
    groups: ArrayLike | None = None,
) -> RunMetrics:
    """The metrics of images of val that have contents of their own; by default train held one image a class."""
    y, predicted = (np.asarray(values, np.int64 if np.size(values) == 0 else None) for values in (y, predicted))
    chances = None if probabilities is None else np.asarray(probabilities, np.float64)
    counts = np.ones(len(names), np.int64) if train_counts is None else np.asarray(train_counts)
    provenance = Provenance("the head", np.zeros((0, 16), np.uint8), counts)
    images = ScoredImages(y, predicted, chances, None if groups is None else np.asarray(groups))
    return score_images(images, names, provenance, split="val", why_none=why_none)


def predictions(y: list[int], predicted: list[int], names: tuple[str, ...] = NAMES, first: int = 0) -> Predictions:
    """Image number k has a digest of its own, the same in every run."""
    n = len(y)
    digests = np.zeros((n, 16), dtype=np.uint8)
    digests[:, :8] = np.arange(first, first + n, dtype="<u8")[:, None].view(np.uint8)
    return Predictions(
        paths=[f"val/{names[k]}/{index}.jpg" for index, k in enumerate(y)],
        digests=digests,
        splits=["val"] * n,
        labels=[names[k] for k in y],
        predicted=[names[k] for k in predicted],
        class_names=tuple(names),
        probabilities=None,
    )


def make_run(
    runs_dir: Path,
    name: str,
    y: list[int],
    predicted: list[int],
    *,
    rows: Predictions | None = None,
    metrics: RunMetrics | None = None,
    **changes: Any,
) -> Path:
    rows = rows or predictions(y, predicted)
    metrics = metrics or RunMetrics.model_validate(metrics_values(y, predicted))
    data = {**model_values()["data"], "digest": digest_of(rows.digests, rows.labels, rows.splits)}
    with publishing_run(runs_dir, name) as (folder, final):
        (folder / MODEL_FILE).write_bytes(RunModel.model_validate(model_values(**{"data": data, **changes})).to_json())
        (folder / METRICS_FILE).write_bytes(metrics.to_json())
        with open(folder / PREDICTIONS_FILE, "wb") as file:
            write_predictions(file, rows)
    return final
