"""A pretrained classifier on images, without training anything: its top classes by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..backbones import build_classifier
from ..features.digests import Digests
from ..features.extractor import Forward, extract_features
from ..features.prepare import Preparation
from ..features.rounding import Features
from ..params import Params
from ..runtime.device import resolve_device
from ..runtime.interrupt import stop_after_batch
from ..runtime.progress import ProgressBar
from .predict import Prediction
from .sources import CPU_BATCH, open_paths, open_quarantine, plain_view, worker_count


def classify(params: Params, paths: Sequence[Path], *, top: int = 5, quiet: bool = False) -> list[Prediction]:
    """The ``top`` classes of each image by the pretrained model ``backbone.name`` with ``backbone.weights``.

    Raises:
        WeightsError: the weights cannot be had, or have no classifier.
        DataError: a path does not exist, or there is no image.
    """
    module, transform, categories = build_classifier(params.backbone.name, params.backbone.weights)
    source = open_paths(paths, params.data, params.cache)
    quarantine = open_quarantine(params, transform)
    view = plain_view(transform, params.data, params.extract)
    device = resolve_device(params.extract.device)
    forward = Forward(lambda: module.to(device), transform.normalise, device, CPU_BATCH)
    logits: dict[bytes, np.ndarray] = {}

    def sink(features: Features, digests: Digests) -> None:
        logits.update(zip(map(bytes, digests), features, strict=True))

    preparation = Preparation(source.books, set(), quarantine, decode=view.decode, crop=view.crop)
    count = len(source.tree.paths)
    with stop_after_batch() as interruption, ProgressBar("classifying", count, quiet=quiet) as bar:
        extract_features(
            range(count),
            preparation,
            forward,
            sink,
            workers=worker_count(params.extract),
            interruption=interruption,
            seen=lambda _content: bar.advance(),
        )
    return [_prediction(source, quarantine, logits, position, categories, top) for position in range(count)]


def _prediction(
    source: Any, quarantine: Any, logits: dict[bytes, np.ndarray], position: int, names: Sequence[str], top: int
) -> Prediction:
    books, path = source.books, str(source.books.path(position))
    scores = logits.get(books.digest(position)) if books.known[position] else None
    if scores is None:
        bad = quarantine.get(books.digest(position)) if books.known[position] else None
        return Prediction(
            path, error=f"{bad.reason}: {bad.remedy}" if bad else books.failures.get(position, "not read")
        )
    chances = np.exp(scores.astype(np.float64) - scores.max())
    chances /= chances.sum()
    best = tuple((names[target], float(chances[target])) for target in np.argsort(-chances, kind="stable")[:top])
    return Prediction(path, best[0][0], best[0][1], best)
