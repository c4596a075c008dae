"""Score a finished run on a folder of labelled images, its own or another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..artifacts import RunMetrics, read_metrics, read_predictions
from ..data.images import open_images
from ..data.source import SPLITS
from ..errors import DataError
from ..evaluate import Provenance, score
from ..features.cache import FeatureTable
from ..params import Place, as_place
from ..runtime.memory import memory_budget
from .run import Run

Say = Callable[[str], None]


def evaluate_run(run: Run, root: Place | None = None, *, quiet: bool = False) -> RunMetrics:
    """The metrics of ``run`` on the images under ``root``, embedded first where the cache lacks them.

    A folder without splits is scored whole; one with splits on its test, or else its val. Without ``root`` the run's
    own data and reported split are scored again.

    Raises:
        DataError: no labelled images, or a class that the run does not know.
    """
    elsewhere = {} if root is None else {"root": as_place(root), "images": None, "corrections": None, "layout": "auto"}
    data = run.params.data.model_copy(update=elsewhere)
    images = open_images(data, run.params.cache.dir)
    cache = run.cache(images, quiet=quiet)
    cache.fill()
    table = in_run_order(cache.table(memory_budget(run.params.head.memory_mb)), run.class_names)
    split, chosen = _reported(table, run, whole=root is not None and images.samples.splits is None)
    return _score(run, table, split, chosen)


def in_run_order(table: FeatureTable, class_names: tuple[str, ...]) -> FeatureTable:
    """The table with targets that index the run's classes.

    Raises:
        DataError: the folder has a class that the run does not know, or no class folders.
    """
    unknown = sorted(set(table.class_names) - set(class_names))
    if unknown or not table.class_names:
        raise DataError(
            "The folder's classes are not those of the run." if unknown else "The folder has no classes to score.",
            where=table.root,
            why=f"the run knows {', '.join(class_names)}" + (f", not {', '.join(unknown)}" if unknown else ""),
            remedy="one folder a class, named as in the run; `predict` classifies images without labels",
        )
    order = np.array([class_names.index(name) for name in table.class_names])
    targets = np.where(table.targets >= 0, order[table.targets], -1)
    found = None if table.found is None else np.where(table.found >= 0, order[table.found], -1)
    return replace(table, class_names=class_names, targets=targets, found=found)


def _reported(table: FeatureTable, run: Run, *, whole: bool) -> tuple[str, NDArray[np.bool_]]:
    if whole:
        return "all", table.targets >= 0
    splits = [SPLITS[split] for split in np.unique(table.splits[table.targets >= 0])]
    own = read_metrics(run.folder).split
    name = own if own in splits else next((name for name in ("test", "val", "train") if name in splits), "all")
    chosen = table.splits == SPLITS.index(name) if name in SPLITS else table.targets >= 0
    return name, chosen & (table.targets >= 0)


def _score(run: Run, table: FeatureTable, split: str, chosen: NDArray[np.bool_]) -> RunMetrics:
    recorded = read_predictions(run.folder, probabilities=False)
    # An image of train without a label was left out by the user.
    train = np.array(
        [name == "train" and label != "" for name, label in zip(recorded.splits, recorded.labels, strict=True)]
    )
    labels = [label for label, is_train in zip(recorded.labels, train, strict=True) if is_train]
    counts = np.bincount([run.class_names.index(label) for label in labels], minlength=len(run.class_names))
    provenance = Provenance(
        fitted=f"the {run.model.head.kind} head",
        train_digests=recorded.digests[train],
        train_counts=counts,
        selected=read_metrics(run.folder).selected,
    )
    metrics, _ = score(run.head, table, chosen, provenance, split=split, where=f"{split} under {table.root}")
    return metrics
