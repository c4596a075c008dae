"""Where a training starts: the head of a stage-two run, refitted without the images that select the epoch, or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..artifacts import BackboneRecord, RunModel, list_runs, read_model, resolve_run
from ..errors import FinetuneError, RunError
from ..features.cache import FeatureTable
from ..features.rows import Rows, take_rows
from ..heads import head_device, kinds_of_layers, make_head, standardisation
from ..heads.common import Features, Floats
from ..params import FinetuneParams, HeadParams
from ..runtime.cores import usable_cores
from .classifier import make_head_module, make_random_head
from .history import SelectionScore
from .selection import selection_score
from .step import Setup

# How far the live score of epoch 0 may lie from the probe's on cached features. Cached ones are rounded to float16,
# which moves a hundredth of the images at most; computed in reduced precision they are others, and a few in a hundred
# change sides.
LOSS_GAP = 0.02
FLIPS = 0.01
REDUCED_LOSS_GAP = 0.1
REDUCED_FLIPS = 0.03
SMALLEST_SCALE = 0.1  # of the median one


@dataclass(frozen=True)
class Start:
    """The head that training begins with.

    Attributes:
        kind: of head that the fine-tuned one is saved as.
        expected: the refitted probe's score on the selection set from cached features; None for a random head.
    """

    head: nn.Sequential
    kind: str
    expected: SelectionScore | None = None


def random_start(table: FeatureTable, params: FinetuneParams) -> Start:
    """A head with random weights."""
    width, classes = table.features.shape[1], len(table.class_names)
    head = make_random_head(width, classes, hidden=params.hidden, dropout=params.dropout, seed=params.seed)
    return Start(head, "mlp" if params.hidden else "linear")


def probe_start(
    table: FeatureTable,
    rows: NDArray[np.int64],
    selection: NDArray[np.int64],
    section: HeadParams,
    kind: str,
    setup: Setup,
    *,
    dropout: float,
) -> Start:
    """A head of the probe's ``kind`` with the probe's ``section``, fitted to the images at ``rows`` alone.

    Its standardisation stays a fixed layer, which conditions the training of its weights.
    """
    X = take_rows(table.features, rows)
    mean, scale = _moments(X, section.standardize)
    changed = {"kind": kind, "calibrate": "none", "standardize": False}
    head = make_head(
        kind,
        section.model_copy(update=changed),
        class_names=table.class_names,
        jobs=usable_cores(),
        device=head_device(setup.device),
    )
    head.fit(_scaled(X, mean, scale), table.targets[rows], table.groups[rows])
    layers = head.as_layers()
    assert layers is not None and len(head.classes_) == len(table.class_names)
    logits = layers.logits(_scaled(take_rows(table.features, selection), mean, scale))
    score = selection_score(logits, table.targets[selection], setup.class_weights)
    return Start(make_head_module(layers, moments=(mean, scale), dropout=dropout), kind, score)


def _moments(X: Features, standardize: bool) -> tuple[Floats, Floats]:
    """Mean and scale (d,) of features (n, d); no scale is below a tenth of the median one.

    Features that hardly vary would otherwise be blown up: augmented images and moving weights were seen to reach
    40,000 deviations.
    """
    mean, scale = standardisation(X, standardize)
    usual = float(np.median(scale[np.isfinite(scale)])) if np.isfinite(scale).any() else 1.0
    return mean, np.where(np.isfinite(scale), np.maximum(scale, SMALLEST_SCALE * usual), usual)


def _scaled(X: Features, mean: Floats, scale: Floats) -> Features:
    if isinstance(X, Rows):
        return X.standardised(mean, scale)
    scaled: Features = ((X - mean) / scale).astype(np.float32)
    return scaled


def repeats(live: SelectionScore, expected: SelectionScore, n: int, *, precision: str, dtype: torch.dtype) -> bool:
    """Whether the live score of a start is that of its head on cached features, as far as ``n`` images can tell.

    Args:
        precision: that the cached features were computed in.
        dtype: that the live ones are computed in.
    """
    exact = precision == "float32" and dtype == torch.float32
    gap, flips = (LOSS_GAP, FLIPS) if exact else (REDUCED_LOSS_GAP, REDUCED_FLIPS)
    close = abs(live.loss - expected.loss) <= gap * max(1.0, expected.loss)
    return close and abs(live.accuracy - expected.accuracy) * n <= 1.5 + flips * n


def find_probe(
    runs_dir: Path,
    wanted: str | None,
    *,
    backbone: BackboneRecord,
    transform: dict[str, Any],
    class_names: Sequence[str],
    data_digest: str,
) -> Path:
    """The run to start from: the one ``wanted``, or the latest run of train-head that fits.

    Args:
        backbone, transform: what made the features at hand.
        class_names, data_digest: of the data at hand; a run that is asked for by name may be of other images.

    Raises:
        FinetuneError: the wanted run does not fit, or none does.
    """

    def misfit(model: RunModel) -> str | None:
        """Why a run cannot be the start, or None."""
        if model.head.kind not in kinds_of_layers():
            return f"its head is of kind {model.head.kind}; fine-tuning takes {', '.join(kinds_of_layers())}"
        if model.backbone != backbone:
            return f"it was made with the backbone {model.backbone.name} with other weights, layer or pooling"
        if model.class_names != list(class_names):
            return "it knows other classes"
        if model.transform != transform:
            return "it was made with another transform"
        return None

    if wanted is not None:
        folder = resolve_run(runs_dir, wanted)
        if problem := misfit(read_model(folder)):
            raise FinetuneError(
                "This run cannot be fine-tuned with these params.",
                where=folder,
                why=problem,
                remedy="run train-head with the params at hand and start from that run",
            )
        return folder
    for entry in list_runs(runs_dir):
        try:
            model = read_model(entry.path)
        except RunError:
            continue  # damaged, or removed since it was listed
        stage_two = model.verb == "train-head"  # a fine-tuned run that kept its probe would fit, too
        if stage_two and misfit(model) is None and model.data.digest == data_digest:
            return entry.path.resolve()
    raise FinetuneError(
        "No stage-two run fits these params.",
        where=runs_dir,
        why=f"it must have the same images, backbone and transform, and a head of kind {', '.join(kinds_of_layers())}",
        remedy="run `pipeline train-head` first (make finetune does), or set finetune.start=random",
    )
