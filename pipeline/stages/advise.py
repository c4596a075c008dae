"""What to do with the images of ``data.root``, from a scan and from the runs there are. No torch, no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..artifacts import RunMetrics, RunModel, list_runs, read_metrics, read_model
from ..data.digests import data_digest
from ..data.images import open_images
from ..data.source import SPLITS
from ..data.splits import leaked
from ..errors import DataError, RunError
from ..evaluate.advice import TUNABLE_HEADS, Domain, Facts, Probe, Tuned, TypedOptions, advice_lines, advise
from ..params import DataParams, Params, Place

Say = Callable[[str], None]
RANDOM = "random"


@dataclass(frozen=True)
class Folder:
    """The images of a folder; None is what is not known without reading files.

    Attributes:
        duplicates: files whose bytes occurred before.
        leaked: images of val and test that train holds too, byte for byte.
        digest: `data_digest`.
    """

    root: Place
    class_names: tuple[str, ...]
    targets: NDArray[np.integer]
    splits: NDArray[np.int8] | None
    warnings: tuple[str, ...]
    duplicates: int | None = None
    leaked: int | None = None
    digest: str | None = None


def advise_on(params: Params, say: Say, domain: Domain | None, options: TypedOptions) -> dict[str, Any]:
    """Recommend probe, fine-tuning or training from scratch for ``data.root``, with reasons and commands.

    Args:
        domain: how near the images are to the backbone's own; without it a probe's score tells, or both are said.
        options: what the commands repeat of the user's own.

    Returns:
        the summary of ``--json``.

    Raises:
        DataError: there are no images in train, or fewer than two classes.
    """
    folder = _look(params)
    summary = advise(_facts(params, folder), domain, options)
    for line in (f"{len(folder.targets):,} images under {folder.root}", *advice_lines(summary)):
        say(line)
    for warning in folder.warnings:
        say(f"Warning: {warning}")
    return {"root": str(folder.root), **summary, "warnings": [*summary["warnings"], *folder.warnings]}


def _look(params: Params) -> Folder:
    """List the folder and ask the cache's index what it remembers; no image is opened."""
    images = open_images(params.data, params.cache.dir)
    tree = images.samples
    if len(tree.class_names) < 2:
        raise DataError(
            "There is nothing to advise on.",
            where=tree.root,
            why=f"it has {len(tree.class_names)} class folder(s), and a classifier needs two",
            remedy="give each class a folder with its images",
        )
    if not images.known.all():
        return Folder(tree.root, tree.class_names, tree.targets, tree.splits, tree.warnings)
    digests, splits = images.digests, images.splits_of(np.arange(len(images)))
    duplicates = len(digests) - len(np.unique(digests, axis=0))
    leaks = sum(len(rows) for rows in leaked(digests, splits).values())
    labels = [tree.class_names[target] if target >= 0 else "" for target in tree.targets]
    digest = data_digest(digests, labels, [SPLITS[split] for split in splits])
    return Folder(tree.root, tree.class_names, tree.targets, splits, tree.warnings, duplicates, leaks, digest)


def _facts(params: Params, folder: Folder) -> Facts:
    counts, others = _counts(folder, params.data)
    if not any(counts):
        raise DataError("There is nothing to advise on.", where=folder.root, why="train has no image")
    runs = list(_runs(params, folder))
    return Facts(
        counts=dict(zip(folder.class_names, counts, strict=True)),
        others=others,
        backbone=params.backbone.name,
        estimated=folder.splits is None,
        duplicates=folder.duplicates,
        leaked=folder.leaked,
        pretrained=params.backbone.weights != RANDOM,
        weighted=params.head.class_weight is not None,
        tunable=TUNABLE_HEADS.issuperset(params.head.kinds),
        probe=_probe(runs, params.backbone.name, len(folder.targets)),
        tuned=next((tuned for run in runs if (tuned := _tuned(*run))), None),
        curve=next((tuple(metrics.curve) for _, _, metrics in runs if metrics.curve), ()),
    )


def _counts(folder: Folder, data: DataParams) -> tuple[list[int], dict[str, int]]:
    """Training images of each class, and those of the other splits; shares of all where splits are not known."""
    labelled, classes = folder.targets >= 0, len(folder.class_names)
    if folder.splits is not None:
        train = folder.targets[labelled & (folder.splits == 0)]
        rest = np.bincount(folder.splits, minlength=len(SPLITS)).tolist()
        counts = np.bincount(train, minlength=classes).tolist()
    else:
        every = np.bincount(folder.targets[labelled], minlength=classes).tolist()
        shares = (1 - data.val_fraction - data.test_fraction, data.val_fraction, data.test_fraction)
        rest = [round(share * sum(every)) for share in shares]
        counts = [max(round(shares[0] * n), min(n, 1)) for n in every]
    return counts, {name: n for name, n in zip(SPLITS[1:], rest[1:], strict=True) if n}


PastRun = tuple[str, RunModel, RunMetrics]


def _runs(params: Params, folder: Folder) -> Iterator[PastRun]:
    """The runs over these images, newest first: by content, or by folder and classes where contents are not known."""
    for entry in list_runs(params.runs.dir):
        try:
            model, metrics = read_model(entry.path), read_metrics(entry.path)
        except RunError:
            continue  # damaged: `compare` tells of it
        same_folder = model.data.root == str(folder.root) and tuple(model.class_names) == folder.class_names
        if model.data.digest == folder.digest or same_folder:
            yield entry.name, model, metrics


def _probe(runs: list[PastRun], backbone: str, images: int) -> Probe | None:
    """The newest probe of this backbone, else of any; one on random weights tells nothing."""
    probes = [run for run in runs if run[1].verb == "train-head" and not run[1].backbone.weights.startswith(RANDOM)]
    if not probes:
        return None
    name, model, metrics = next((run for run in probes if run[1].backbone.name == backbone), probes[0])
    accuracy, interval = metrics.metrics.get("accuracy"), metrics.metrics.get("accuracy_ci95")
    chance, then = metrics.baseline_accuracy, sum(model.data.images.values())
    if not isinstance(accuracy, float) or not isinstance(interval, list) or chance is None:
        return None
    note = "" if then == images else f", made from {then:,} images"
    bounds = (interval[0], interval[1])
    return Probe(name, model.backbone.name, metrics.split, metrics.n, accuracy, bounds, chance, note)


def _tuned(name: str, model: RunModel, metrics: RunMetrics) -> Tuned | None:
    chosen = metrics.selected
    if model.verb != "finetune" or "difference" not in chosen or "mcnemar_p" not in chosen:
        return None
    return Tuned(name, float(chosen["difference"]), float(chosen["mcnemar_p"]))
