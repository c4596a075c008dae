"""What to do with the images of ``data.root``, from a listing and from the runs there are. No torch, no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..artifacts import RunMetrics, RunModel, list_runs, read_metrics, read_model
from ..data.digests import data_digest
from ..data.images import Images, open_images
from ..data.source import SPLITS, TRAIN
from ..errors import DataError, RunError
from ..evaluate.advice import TUNABLE_HEADS, Domain, Facts, Finetuned, Probe, TypedOptions, advice_lines, advise
from ..params import Params

Say = Callable[[str], None]
RANDOM = "random"
NO_OPTIONS = TypedOptions()
PastRun = tuple[str, RunModel, RunMetrics]


def advise_on(
    params: Params, say: Say = print, domain: Domain | None = None, options: TypedOptions = NO_OPTIONS
) -> dict[str, Any]:
    """Recommend probe, fine-tuning or training from scratch for ``data.root``; gives the summary of ``--json``.

    Raises:
        DataError: there are no images in train, or fewer than two classes.
    """
    images = open_images(params.data, params.cache.dir)
    summary = advise(_facts(params, images), domain, options)
    warnings = images.samples.warnings
    for line in (f"{len(images):,} images under {images.root}", *advice_lines(summary)):
        say(line)
    for warning in warnings:
        say(f"Warning: {warning}")
    return {"root": str(images.root), **summary, "warnings": [*summary["warnings"], *warnings]}


def _facts(params: Params, images: Images) -> Facts:
    """What the listing, the cache's index and the runs say; no image is opened."""
    names, targets, rows, known = images.samples.class_names, images.targets, np.arange(len(images)), images.known.all()
    splits = images.splits_of(rows) if known or images.samples.splits is not None else None  # else by contents
    val, test = params.data.val_fraction, params.data.test_fraction
    shares = [1 - val - test, val, test] if splits is None else [splits == number for number in range(len(SPLITS))]
    train, *others = (np.broadcast_to(share, len(images)).astype(float) for share in shares)
    counts = np.rint(np.bincount(targets[targets >= 0], train[targets >= 0], len(names))).astype(int).tolist()
    if len(names) < 2 or not any(counts):
        why = f"it has {len(names)} class folder(s), and a classifier needs two with images in train"
        remedy = "give each class a folder with its images"
        raise DataError("There is nothing to advise on.", where=images.root, why=why, remedy=remedy)
    digest, duplicates, leaked = None, None, None
    if known and splits is not None:
        labels = [names[target] if target >= 0 else "" for target in targets]
        digest = data_digest(images.digests, labels, [SPLITS[split] for split in splits])
        groups, is_train = images.groups_of(rows), splits == TRAIN
        duplicates = len(images) - len(np.unique(images.digests, axis=0))
        leaked = int(np.isin(groups[~is_train], groups[is_train]).sum())
    runs = list(_runs(params.runs.dir, images, digest))
    return Facts(
        counts=dict(zip(names, counts, strict=True)),
        others={name: n for name, part in zip(SPLITS[1:], others, strict=True) if (n := round(float(part.sum())))},
        backbone=params.backbone.name,
        estimated=splits is None,
        duplicates=duplicates,
        leaked=leaked,
        pretrained=params.backbone.weights != RANDOM,
        weighted=params.head.class_weight is not None,
        tunable=TUNABLE_HEADS.issuperset(params.head.kinds),
        probe=_probe(runs, params.backbone.name, len(images)),
        finetuned=next(filter(None, (_finetuned(*run) for run in runs)), None),
        curve=next((metrics.curve for _, _, metrics in runs if metrics.curve), []),
    )


def _runs(runs_dir: Path, images: Images, digest: str | None) -> Iterator[PastRun]:
    """The runs over these images, newest first: by content, or by folder and classes where contents are not known."""
    for entry in list_runs(runs_dir):
        try:
            model, metrics = read_model(entry.path), read_metrics(entry.path)
        except RunError:
            continue  # damaged: `compare` tells of it
        same_folder = model.data.root == str(images.root) and tuple(model.class_names) == images.class_names
        if same_folder or model.data.digest == digest:
            yield entry.name, model, metrics


def _probe(runs: list[PastRun], backbone: str, images: int) -> Probe | None:
    """The newest probe of this backbone, else of any; one on random weights tells nothing."""
    probes = [run for run in runs if run[1].verb == "train-head" and not run[1].backbone.weights.startswith(RANDOM)]
    for name, model, metrics in sorted(probes, key=lambda run: run[1].backbone.name != backbone):
        accuracy, interval = metrics.metrics.get("accuracy"), metrics.metrics.get("accuracy_ci95")
        chance, then = metrics.baseline_accuracy, sum(model.data.images.values())
        note = "" if then == images else f", made from {then:,} images"
        if isinstance(accuracy, float) and isinstance(interval, list) and chance is not None:
            return Probe(name, model.backbone.name, metrics.split, metrics.n, accuracy, interval, chance, note)
    return None


def _finetuned(name: str, model: RunModel, metrics: RunMetrics) -> Finetuned | None:
    chosen = metrics.selected
    if model.verb != "finetune" or "mcnemar_p" not in chosen:
        return None
    return Finetuned(name, float(chosen["difference"]), float(chosen["mcnemar_p"]))
