"""What to do with the images of ``data.root``, from a scan and from the runs there are. No torch, no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..artifacts import RunMetrics, RunModel, data_digest, list_runs, read_metrics, read_model
from ..data.images import open_images
from ..data.source import SPLITS
from ..data.source import Samples as ImageTree
from ..data.splits import group_ids, leaked
from ..errors import DataError, RunError
from ..evaluate.advice import advise
from ..evaluate.advice_facts import Facts, Point, Probe, Tuned
from ..evaluate.advice_rules import Domain
from ..evaluate.advice_text import Given, advice_lines, advice_values
from ..params import DataParams, Params

Say = Callable[[str], None]
TRAIN = SPLITS.index("train")
RANDOM = "random"


@dataclass(frozen=True)
class Scan:
    """The scanned images; ``digests`` and ``splits`` are None where they are not known without reading files."""

    tree: ImageTree
    digests: NDArray[np.uint8] | None
    splits: NDArray[np.int8] | None


def advise_on(
    params: Params, say: Say = print, *, domain: Domain | None = None, given: Given | None = None
) -> dict[str, Any]:
    """Recommend probe, fine-tuning or training from scratch for ``data.root``, with reasons and commands.

    Args:
        domain: how near the images are to the backbone's own; without it a probe's score tells, or both are said.
        given: what the commands repeat of the user's own.

    Returns:
        the summary of ``--json``.

    Raises:
        DataError: there are no images, or fewer than two classes.
    """
    given = given or Given()
    scan = _scan(params)
    facts = _facts(params, scan)
    advice = advise(facts, domain)
    say(f"{len(scan.tree.paths):,} images under {scan.tree.root}")
    for line in advice_lines(facts, advice, given):
        say(line)
    for warning in scan.tree.warnings:
        say(f"Warning: {warning}")
    values = advice_values(facts, advice, given)
    return {"root": str(scan.tree.root), **values, "warnings": [*values["warnings"], *scan.tree.warnings]}


def _scan(params: Params) -> Scan:
    """The tree, and what the cache's index remembers of it; no image is opened."""
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
        return Scan(tree, None, tree.splits)
    return Scan(tree, images.digests, images.splits_of(np.arange(len(images))))


def _facts(params: Params, scan: Scan) -> Facts:
    counts, others = _counts(scan, params.data)
    if not sum(counts):
        raise DataError("There is nothing to advise on.", where=scan.tree.root, why="train has no image")
    runs = list(_runs(params, scan))
    probe = _pick_probe(runs, params.backbone.name)
    return Facts(
        class_names=scan.tree.class_names,
        counts=counts,
        others=others,
        backbone=params.backbone.name,
        estimated=scan.splits is None,
        duplicates=_duplicates(scan),
        leaked=_leaked(scan),
        pretrained=params.backbone.weights != RANDOM,
        weighted=params.head.class_weight is not None,
        head_kinds=params.head.kinds,
        probe=probe and _probe(*probe, scan),
        tuned=next((tuned for run in runs if (tuned := _tuned(*run))), None),
        curve=next((_curve(metrics) for _, _, metrics in runs if metrics.curve), ()),
    )


def _counts(scan: Scan, data: DataParams) -> tuple[tuple[int, ...], dict[str, int]]:
    """Training images of each class, and those of the other splits; shares of all where splits are not known."""
    targets, splits = scan.tree.targets, scan.splits
    labelled, classes = targets >= 0, len(scan.tree.class_names)
    shares = (1 - data.val_fraction - data.test_fraction, data.val_fraction, data.test_fraction)
    if splits is None:
        every = np.bincount(targets[labelled], minlength=classes)
        counts = tuple(max(round(shares[TRAIN] * n), min(n, 1)) for n in every.tolist())
        rest = [round(share * int(every.sum())) for share in shares]
    else:
        counts = tuple(np.bincount(targets[labelled & (splits == TRAIN)], minlength=classes).tolist())
        rest = [int((splits == split).sum()) for split in range(len(SPLITS))]
    return counts, {name: n for name, n in zip(SPLITS[1:], rest[1:], strict=True) if n}


def _duplicates(scan: Scan) -> int | None:
    return None if scan.digests is None else len(scan.digests) - len(np.unique(group_ids(scan.digests, None)))


def _leaked(scan: Scan) -> int | None:
    if scan.digests is None or scan.splits is None:
        return None
    return sum(map(len, leaked(scan.digests, scan.splits).values()))


Run = tuple[str, RunModel, RunMetrics]


def _runs(params: Params, scan: Scan) -> Iterator[Run]:
    """The runs over these images, newest first: by content, or by folder and classes where contents are not known."""
    digest = _data_digest(scan)
    for entry in list_runs(params.runs.dir):
        try:
            model, metrics = read_model(entry.path), read_metrics(entry.path)
        except RunError:
            continue  # damaged: `compare` tells of it
        same_folder = Path(model.data.root) == scan.tree.root and tuple(model.class_names) == scan.tree.class_names
        if model.data.digest == digest or same_folder:
            yield entry.name, model, metrics


def _data_digest(scan: Scan) -> str | None:
    tree = scan.tree
    if scan.digests is None or scan.splits is None:
        return None
    labels = [tree.class_names[target] if target >= 0 else "" for target in tree.targets]
    return data_digest(scan.digests, labels, [SPLITS[split] for split in scan.splits])


def _pick_probe(runs: list[Run], backbone: str) -> Run | None:
    """The newest probe of this backbone, else of any; one on random weights tells nothing."""
    probes = [run for run in runs if run[1].verb == "train-head" and not run[1].backbone.weights.startswith(RANDOM)]
    return next((run for run in probes if run[1].backbone.name == backbone), probes[0] if probes else None)


def _probe(name: str, model: RunModel, metrics: RunMetrics, scan: Scan) -> Probe | None:
    accuracy, interval = metrics.metrics.get("accuracy"), metrics.metrics.get("accuracy_ci95")
    if not isinstance(accuracy, float) or not isinstance(interval, list) or metrics.baseline_accuracy is None:
        return None
    then = sum(model.data.images.values())
    note = "" if then == len(scan.tree.paths) else f", made from {then:,} images"
    bounds = (interval[0], interval[1])
    chance = metrics.baseline_accuracy
    return Probe(name, model.backbone.name, metrics.split, metrics.n, accuracy, bounds, chance, note)


def _tuned(name: str, model: RunModel, metrics: RunMetrics) -> Tuned | None:
    chosen = metrics.selected
    if model.verb != "finetune" or "difference" not in chosen or "mcnemar_p" not in chosen:
        return None
    return Tuned(name, float(chosen["difference"]), float(chosen["mcnemar_p"]))


def _curve(metrics: RunMetrics) -> tuple[Point, ...]:
    return tuple(Point(point.images, point.accuracy, point.high) for point in metrics.curve)
