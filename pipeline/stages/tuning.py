"""One fine-tuning: from the cached features to a classifier with its images, and through its epochs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..artifacts import PARAMS_FILE
from ..backbones import BuiltNetwork, Transform, build_network, trainable_module
from ..data.decode import read_bytes
from ..errors import FinetuneError
from ..features.table import FeatureTable
from ..files import publish_file
from ..finetune import (
    Classifier,
    EpochRow,
    LabelledImages,
    Outcome,
    Score,
    SelectionSet,
    Setting,
    TensorboardLog,
    TrainingNetwork,
    Watch,
    describe_groups,
    interpolate,
    train_classifier,
)
from ..params import Params, dump_params
from ..runtime.distributed import World
from ..runtime.interrupt import stop_after_batch
from ..runtime.progress import ProgressBar
from .load import Opened, open_features
from .probe import Parts, Start, find_probe, part_rows, probe_start, random_start
from .sources import Transformation, plain_view
from .train_head import check_trainable
from .tuning_setting import make_setting

Say = Callable[[str], None]
START_FILE = "start.json"
# How far the live score of epoch 0 may lie from the probe's score on cached features: storage is float16.
MAX_LOSS_GAP = 0.02


@dataclass(frozen=True)
class Job:
    """Everything that one fine-tuning works on; ``classifier`` is what trains.

    Attributes:
        folder: of the checkpoints; its name is the run's.
        say: takes the lines meant for the user; silent in all processes but the first.
        quiet: no progress bar.
    """

    params: Params
    folder: Path
    say: Say
    opened: Opened
    parts: Parts
    start: Start
    backbone: BuiltNetwork
    classifier: Classifier
    train_images: LabelledImages
    selection_images: LabelledImages
    setting: Setting
    quiet: bool = False

    @property
    def table(self) -> FeatureTable:
        """The images with their cached features, those of the probe."""
        return self.opened.table

    @property
    def transform(self) -> Transform:
        """The backbone's own."""
        return self.opened.origin.transform


def prepare_job(
    params: Params,
    world: World,
    device: torch.device,
    folder: Path,
    say: Say,
    *,
    from_run: str | None,
    quiet: bool = False,
) -> Job:
    """Open the features, part the rows, refit the probe, build the classifier.

    Raises:
        FinetuneError: no run fits, or no image is left to select the epoch.
        MissingFeaturesError: run extract first.
    """
    tell: Say = say if world.is_main else lambda _line: None
    opened = open_features(params)
    parts = part_rows(opened.table, params.finetune, check_trainable(opened.table))
    start = _find_start(params, opened, parts, tell, from_run)
    backbone = build_network(params.backbone, params.transform)
    view = plain_view(opened.origin.transform, params.data, params.extract)
    job = Job(
        params=params,
        folder=folder,
        say=tell,
        opened=opened,
        parts=parts,
        start=start,
        backbone=backbone,
        classifier=Classifier(trainable_module(backbone), start.module),
        train_images=_labelled(opened.table, parts.train, view),
        selection_images=_labelled(opened.table, parts.selection, view),
        setting=make_setting(params.finetune, opened, parts, start, world=world, device=device, folder=folder),
        quiet=quiet or not world.is_main,
    )
    if world.is_main:
        _remember(job)
    return job


def train_job(job: Job) -> Outcome:
    """Run the epochs, each told in a line; then, if asked for, look between start and end (WiSE-FT)."""
    section = job.params.finetune
    for line in _plan_lines(job):
        job.say(line)
    log = TensorboardLog(job.params.runs.dir / "tensorboard" / job.folder.name) if section.tensorboard else None
    total = section.epochs * len(job.parts.train) // job.setting.world.size
    with stop_after_batch() as interruption, ProgressBar("training", total, quiet=job.quiet) as bar:
        watch = Watch(on_epoch=lambda row: _tell(job, row, log), on_batch=bar.advance, interruption=interruption)
        images = (job.train_images, job.selection_images)
        outcome = train_classifier(job.classifier, *images, job.transform, section, job.setting, watch=watch)
    if log:
        log.close()
    return _interpolated(job, outcome) if section.interpolate else outcome


# -- what training starts from --------------------------------------------------------------------------------------


def _find_start(params: Params, opened: Opened, parts: Parts, say: Say, from_run: str | None) -> Start:
    if params.finetune.start == "random":
        return random_start(opened.table, params.finetune)
    run = find_probe(params, opened, from_run)
    say(f"Starting from the probe {run}")
    return probe_start(params, opened, parts, run)


def _remember(job: Job) -> None:
    """What ``--resume`` needs besides the checkpoint."""
    origin = {"from": None if job.start.run is None else str(job.start.run)}
    publish_file(job.folder / PARAMS_FILE, dump_params(job.params).encode())
    publish_file(job.folder / START_FILE, json.dumps(origin).encode())


class _Images:
    """The images at some rows of a table, decoded when asked for."""

    def __init__(self, table: FeatureTable, rows: NDArray[np.int64], view: Transformation) -> None:
        self._table, self._rows, self._view = table, rows, view

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, index: int) -> Image.Image:
        data, _ = read_bytes(self._table.root / self._table.paths[self._rows[index]])
        return self._view.decode(data)

    def digest(self, index: int) -> bytes:
        return bytes(self._table.digests[self._rows[index]])


def _labelled(table: FeatureTable, rows: NDArray[np.int64], view: Transformation) -> LabelledImages:
    return LabelledImages(_Images(table, rows, view), table.targets[rows])


# -- the epochs -----------------------------------------------------------------------------------------------------


def _plan_lines(job: Job) -> list[str]:
    """What trains at which rate, on how many images.

    Raises:
        FinetuneError: every rate is zero.
    """
    network = TrainingNetwork(
        Classifier(trainable_module(job.backbone), job.start.module),
        job.params.finetune,
        device=torch.device("cpu"),
        batchnorm=job.setting.batchnorm,
    )
    if not network.groups:
        raise FinetuneError("Nothing would train.", where="finetune", remedy="raise head_lr or backbone_lr above 0")
    parts = job.parts
    counts = f"{len(parts.train):,} images train, {len(parts.selection):,} of {parts.selection_name} select the epoch"
    groups = describe_groups(network.groups, network.total).splitlines()
    return [*groups, f"{counts}; BatchNorm {job.setting.batchnorm}; training folder {job.folder}"]


def _tell(job: Job, row: EpochRow, log: TensorboardLog | None) -> None:
    job.say(row.as_text())
    if log:
        log.write(row)
    if row.epoch == 0 and job.start.expected is not None:
        _check_repeats(job, row, job.start.expected)


def _check_repeats(job: Job, row: EpochRow, expected: Score) -> None:
    """Epoch 0 is the probe on live features: another score means that cache or transform are not what they should be.

    Raises:
        FinetuneError: the two scores differ.
    """
    gap = abs(row.selection_loss - expected.loss)
    close = gap <= MAX_LOSS_GAP and abs(row.selection_accuracy - expected.accuracy) * expected.n <= 1.5
    verdict = "repeats" if close else "DIFFERS FROM"
    cached = f"accuracy {expected.accuracy:.4f}, loss {expected.loss:.4f}"
    job.say(f"Epoch 0 {verdict} the probe on cached features: {cached} (live loss differs by {gap:.1e})")
    if not close:
        raise FinetuneError(
            "The probe's live score does not repeat its score on cached features.",
            where=job.start.run,
            why=f"live {row.selection_accuracy:.4f} and {row.selection_loss:.4f}, cached"
            f" {expected.accuracy:.4f} and {expected.loss:.4f}",
            remedy="check the cache with `pipeline cache verify`",
        )


def _interpolated(job: Job, outcome: Outcome) -> Outcome:
    section, device, transform = job.params.finetune, job.setting.device, job.transform
    chooser = SelectionSet(job.selection_images, transform, device, section, world=job.setting.world)
    train = SelectionSet(job.train_images, transform, device, section)

    def images() -> Iterator[torch.Tensor]:
        for batch in train.pixels():
            yield transform.normalise(batch.to(device), torch.float32)

    found = interpolate(job.classifier, outcome.start, outcome.tuned, chooser.score, images=images)
    job.say(f"Interpolation: {100 * found.share:.0f} % of the way from the probe is best on the selection set")
    best = outcome.tuned_epoch if found.share else 0
    return replace(outcome, tuned=found.state, best_epoch=best)
