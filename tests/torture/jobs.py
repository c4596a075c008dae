"""What the children of the torture tests do. Importing this imports everything they need, once, in their server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import load_run, stages
from pipeline.errors import CacheError
from pipeline.features import rows
from pipeline.features.parts import build_part, part_name
from pipeline.files import publish_file
from pipeline.params import Params, load_params
from pipeline.params.sections import FinetuneParams
from pipeline.stages.cache import collect_garbage, verify_cache
from pipeline.stages.extract import extract
from pipeline.stages.open import open_cache
from pipeline.stages.train_head import train_head
from tests.finetune.support import state_digest, train_tiny

HEAD = ("head.logistic.strengths=5", "head.folds=2")


def silent(_line: str) -> None:
    """Say nothing."""


def params_of(settings: list[str]) -> Params:
    """Params of nothing but these settings."""
    torch.set_num_threads(1)
    file = Path(next(one for one in settings if one.startswith("cache.dir=")).partition("=")[2]).parent / "params.yaml"
    if not file.exists():
        file.touch()
    return load_params(file, settings)


def extract_job(settings: list[str]) -> dict[str, Any]:
    """Extract quietly; the summary."""
    return extract(params_of(settings), silent, quiet=True)


def verify_job(settings: list[str]) -> dict[str, Any]:
    """Verify the whole cache, and two features by computing them again."""
    return verify_cache(params_of(settings), silent, sample=2)


def train_job(settings: list[str]) -> dict[str, Any]:
    """Train a head; the metrics."""
    return dict(train_head(params_of([*settings, *HEAD]), silent)["metrics"])


def train_by_blocks_job(settings: list[str]) -> dict[str, Any]:
    """As `train_job`, with features that are read from a file, some rows at a time."""
    stages.open.COPIES, rows.BLOCK_BYTES = 10**12, 1 << 14
    return train_job(settings)


def collect_job(settings: list[str]) -> str | None:
    """Collect garbage of thirty days; why it was refused, if it was."""
    try:
        collect_garbage(params_of(settings), silent, lambda _question: True, days=30)
    except CacheError as error:
        return str(error)
    return None


def collect_often_job(settings: list[str], until: str) -> int:
    """Collect garbage again and again until a file appears; how often it was not refused."""
    times = 0
    while not os.path.exists(until):
        times += collect_job(settings) is None
    return times


def finetune_job(folder: str, params: str) -> str:
    """A tiny training, continued where it was left; the digest of the weights it ends with."""
    torch.set_num_threads(1)
    result, _ = train_tiny(Path(folder), FinetuneParams.model_validate_json(params), batchnorm="train")
    return state_digest(result.tuned)


def read_often_job(settings: list[str], reference: str, until: str) -> int:
    """Read all features there are until a file appears, hold each against the reference; how many were looked at.

    Raises:
        AssertionError: a row is not that of its image.
    """
    known = np.load(reference)
    rows = {digest.tobytes(): row for digest, row in zip(known["digests"], known["features"], strict=True)}
    looked = 0
    while True:
        last = os.path.exists(until)
        params = params_of(settings)
        store = open_cache(params).store
        digests = store.digests
        for digest, row in zip(digests, store.read(digests), strict=True):
            assert (rows[digest.tobytes()] == row).all()
            looked += 1
        assert not store.warnings
        if last:
            return looked


def split_job(settings: list[str]) -> int:
    """Put every row of the cache into a part of its own, as predicting one image at a time does; how many there are."""
    store = open_cache(params_of(settings)).store
    for part in store.parts:
        names = set()
        for digest, row in zip(part.digests, part.read(), strict=True):
            data = build_part(row[None], digest[None], store.spec)
            publish_file(store.folder / part_name(data), data)
            names.add(part_name(data))
        if part.path.name not in names:
            part.path.unlink()
    store.refresh()
    return len(store.parts)


def merge_job(settings: list[str]) -> int:
    """Merge what is small; how many parts are left."""
    store = open_cache(params_of(settings)).store
    with store.writing():
        pass
    return len(store.parts)


def split_and_merge_job(settings: list[str], times: int) -> None:
    """Both, again and again."""
    for _ in range(times):
        split_job(settings)
        merge_job(settings)


def load_run_job(folder: str, images: list[str]) -> int:
    """Load a run and predict with it; how many predictions it gave."""
    return len(list(load_run(folder).predict([Path(image) for image in images])))
