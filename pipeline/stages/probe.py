"""Where fine-tuning starts: the head of a stage-two run, refitted without the images that select the epoch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ..artifacts import PARAMS_FILE, RunModel, list_runs, read_model, resolve_run
from ..data.scan import SPLITS
from ..errors import FinetuneError, RunError
from ..features.rounding import Features
from ..features.table import FeatureTable
from ..finetune import make_head_module, make_random_head
from ..finetune.history import Score
from ..heads import Head, hold_out, kinds_of_layers, log_losses, make_head, standardisation
from ..params import FinetuneParams, HeadParams, Params, load_params
from ..runtime.cores import usable_cores
from .load import Opened
from .records import backbone_record

TRAIN, VAL, TEST = range(len(SPLITS))


@dataclass(frozen=True)
class Parts:
    """Rows of a table (int positions): what trains, what selects the epoch, what is reported on, and their names."""

    train: NDArray[np.int64]
    selection: NDArray[np.int64]
    selection_name: str
    reported: int


@dataclass(frozen=True)
class Start:
    """The head that training begins with.

    Attributes:
        kind: the kind of head that the fine-tuned one is saved as.
        expected: the refitted probe's score on the selection set from cached features; None for a random head.
        run: folder of the stage-two run; None for a random head.
    """

    module: nn.Sequential
    kind: str
    expected: Score | None = None
    run: Path | None = None


def part_rows(table: FeatureTable, params: FinetuneParams, reported: int) -> Parts:
    """Select on val where a test split is reported, else on a stratified part of train, duplicates on one side."""
    train = np.flatnonzero(table.splits == TRAIN)
    val = np.flatnonzero((table.splits == VAL) & (table.targets >= 0))
    if reported == TEST and len(val):
        return Parts(train, val, "val", reported)
    kept, held = hold_out(table.targets[train], table.groups[train], params.selection_fraction, params.seed)
    if not len(held):
        raise FinetuneError(
            "No image can be set aside to select the epoch.",
            where=table.root,
            why="every class has a single independent image in train",
            remedy="add images, or give a test split so that val selects",
        )
    return Parts(train[kept], train[held], "a held-out part of train", reported)


def random_start(table: FeatureTable, params: FinetuneParams) -> Start:
    """A head with random weights."""
    width, classes = table.features.shape[1], len(table.class_names)
    module = make_random_head(width, classes, hidden=params.hidden, dropout=params.dropout, seed=params.seed)
    return Start(module, "mlp" if params.hidden else "linear")


def probe_start(params: Params, opened: Opened, parts: Parts, run: Path) -> Start:
    """The run's kind of head with the run's head params, fitted to the training part alone."""
    table = opened.table
    section = load_params(run / PARAMS_FILE).head
    kind = read_model(run).head.kind
    section = section.model_copy(update={"kind": kind, "calibrate": "none"})
    head = make_head(kind, section, class_names=table.class_names, jobs=usable_cores())
    X, y = table.features[parts.train], table.targets[parts.train]
    head.fit(X, y, table.groups[parts.train])
    module = _as_module(head, X, section, params.finetune.dropout)
    return Start(module, kind, _score(head, table, parts.selection), run)


def _as_module(head: Head, X: Features, section: HeadParams, dropout: float) -> nn.Sequential:
    """The head with its standardisation unfolded into a fixed layer, which conditions the training of its weights."""
    fitted = head.as_layers()
    assert fitted is not None
    mean, scale = standardisation(X, section.standardize)
    scale = np.where(np.isfinite(scale), scale, 1.0)
    weights, biases = list(fitted.weights), list(fitted.biases)
    biases[0] = biases[0] + weights[0] @ mean
    weights[0] = weights[0] * scale
    layers = list(zip(weights, biases, strict=True))
    return make_head_module(layers, mean=mean, scale=scale, dropout=dropout)


def _score(head: Head, table: FeatureTable, rows: NDArray[np.int64]) -> Score:
    y = table.targets[rows]
    probabilities = head.predict_proba(table.features[rows])
    index = np.searchsorted(head.classes_, y)
    accuracy = float((head.classes_[probabilities.argmax(axis=1)] == y).mean())
    return Score(float(log_losses(probabilities, index).mean()), accuracy, len(rows))


def find_probe(params: Params, opened: Opened, wanted: str | None) -> Path:
    """The run to start from: the one named, or the latest stage-two run that fits.

    Raises:
        FinetuneError: the named run does not fit, or none does.
    """
    if wanted is not None:
        folder = resolve_run(params.runs.dir, wanted)
        if problem := _misfit(read_model(folder), opened):
            raise FinetuneError(
                "This run cannot be fine-tuned with these params.",
                where=folder,
                why=problem,
                remedy="run train-head with the params at hand and start from that run",
            )
        return folder
    for entry in list_runs(params.runs.dir):
        try:
            if entry.problem is None and not _misfit(read_model(entry.path), opened, same_data=True):
                return entry.path.resolve()
        except RunError:
            continue  # removed or damaged since it was listed
    raise FinetuneError(
        "No stage-two run fits these params.",
        where=params.runs.dir,
        why=f"it must have the same images, backbone and transform, and a head of kind {', '.join(kinds_of_layers())}",
        remedy="run `pipeline train-head` first (make finetune does), or set finetune.start=random",
    )


def _misfit(model: RunModel, opened: Opened, *, same_data: bool = False) -> str | None:
    """Why a run cannot be the start, or None."""
    if model.head.kind not in kinds_of_layers():
        return f"its head is of kind {model.head.kind}; fine-tuning takes {', '.join(kinds_of_layers())}"
    if model.backbone != backbone_record(opened.origin.identity):
        return f"it was made with the backbone {model.backbone.name} with other weights, layer or pooling"
    if tuple(model.class_names) != opened.table.class_names:
        return "it knows other classes"
    if model.transform != opened.origin.transform.as_dict():
        return "it was made with another transform"
    if same_data and model.data.digest != opened.data_digest:
        return "it was made from other images, labels or splits"
    return None
