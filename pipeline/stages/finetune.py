"""Stage three: backbone and head trained together from the probe, and whether that was worth it.

`finetune` reads from top to bottom: features, rows, probe, classifier, training, score, comparison, run. What touches
images, backbone and cache is in the helpers of the last section; training itself is in `pipeline.finetune`.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..artifacts import PARAMS_FILE, ParameterCounts, check_run_name, default_run_name
from ..backbones import Backbone, FeatureNetwork, backbone_bytes
from ..data.source import SPLITS
from ..errors import FinetuneError
from ..evaluate import Provenance, mcnemar_exact, metric_lines, score
from ..features.cache import FeatureCache, FeatureTable
from ..files import publish_file
from ..finetune import (
    Callbacks,
    Classifier,
    EpochRow,
    Holdout,
    LabelledImages,
    SelectionScore,
    Setup,
    Start,
    TensorboardLog,
    TrainingResult,
    describe_groups,
    find_learning_rates,
    find_probe,
    first_groups,
    fold_head,
    history_csv,
    history_plot,
    hold_out_selection,
    interpolate_result,
    probe_start,
    process_group,
    random_start,
    rate_curves_plot,
    resolve_setup,
    train_classifier,
    training_fingerprint,
)
from ..heads import Head, Selection, head_of_layers
from ..params import Params, dump_params, load_params
from ..runtime.device import resolve_device
from ..runtime.distributed import World, world_from_environment
from ..runtime.interrupt import stop_after_batch
from ..runtime.progress import ProgressBar
from .open import open_cache
from .run import BACKBONE_FILE, Run, backbone_record, load_run, publish_run, run_model

Say = Callable[[str], None]
TRAINING_FOLDER = ".training"
START_FILE = "start.json"
# How far the live score of epoch 0 may lie from the probe's score on cached features: storage is float16.
MAX_LOSS_GAP = 0.02


def finetune(
    params: Params,
    say: Say = print,
    *,
    from_run: str | None = None,
    resume: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train backbone and head together, keep the best epoch, compare with the probe, publish a run.

    Args:
        from_run: the stage-two run to start from; by default the latest that fits.
        resume: name of a training that was interrupted or killed (or ``latest``); its own params are used.

    Returns:
        the summary of ``--json``; in processes other than torchrun's first an empty one.

    Raises:
        FinetuneError: there is nothing to start or go on from, or nothing to train.
        MissingFeaturesError: run extract first.
        Interrupted: Ctrl-C; ``resume`` goes on.
    """
    started = time.perf_counter()
    world = world_from_environment()
    if resume is None:
        folder = params.runs.dir / TRAINING_FOLDER / _run_name(params)
    else:
        folder, params, from_run = _unfinished(params.runs.dir / TRAINING_FOLDER, resume)
    section, name = params.finetune, folder.name
    device = resolve_device(section.device, world)
    tell: Say = say if world.is_main else lambda _line: None

    with process_group(world, device):
        # The images with their cached features, and which of them train, select the epoch and are reported.
        cache = open_cache(params)
        table, backbone = cache.table(), cache.backbone
        reported = table.reported_split()
        holdout = hold_out_selection(table, section, reported=reported)

        # The classifier: the backbone under the probe's head, refitted without the images that select.
        probe = _find_probe(params, backbone, table, from_run, tell)
        start = _start(params, table, holdout, probe)
        classifier = Classifier(backbone.trainable(), start.head)
        total = sum(parameter.numel() for parameter in classifier.parameters())
        setup = _setup(params, backbone, table, holdout, probe, device=device, world=world)
        for line in describe_groups(first_groups(classifier, section), total).splitlines():
            tell(line)
        counts = f"{len(holdout.train):,} images train, {len(holdout.selection):,} of {holdout.name} select the epoch"
        tell(f"{counts}; BatchNorm {setup.batchnorm}; training folder {folder}")

        # Training, epoch by epoch; a killed one goes on from its folder.
        if world.is_main:
            _remember(folder, params, probe)
        train = _labelled(cache, table, holdout.train)
        selection = _labelled(cache, table, holdout.selection)
        log = TensorboardLog(params.runs.dir / "tensorboard" / name) if section.tensorboard and world.is_main else None

        def on_epoch(row: EpochRow) -> None:
            tell(row.as_text())
            if log:
                log.write(row)
            if row.epoch == 0 and probe is not None and start.expected is not None:
                _check_repeats(row.score, start.expected, len(holdout.selection), probe, tell)

        images = section.epochs * len(holdout.train) // world.size
        with stop_after_batch() as stop, ProgressBar("training", images, quiet=quiet or not world.is_main) as bar:
            result = train_classifier(
                classifier,
                train,
                selection,
                backbone.transform,
                section,
                setup,
                folder=folder,
                fingerprint=_fingerprint(params, backbone, table, holdout, start),
                callbacks=Callbacks(on_epoch, bar.advance, stop),
            )
        if log:
            log.close()
        if section.interpolate:
            transform = backbone.transform
            result, share = interpolate_result(result, classifier, train, selection, transform, section, setup)
            tell(f"Interpolation: {100 * share:.0f} % of the way from the probe is best on the selection set")
        if not world.is_main:
            return {}

        # The score of the best weights, through the one predict path; the probe itself where no epoch beat it.
        classifier.load_state_dict(result.best)
        weights = _backbone_bytes(classifier, backbone)
        publish_file(folder / BACKBONE_FILE, weights)
        tuned = open_cache(_with_weights(params, folder / BACKBONE_FILE) if result.best_epoch else params, cache.images)
        tuned.fill()
        features = tuned.read(table.digests)
        head = _head(classifier, start, table) if result.best_epoch or probe is None else probe.head

        # The comparison with the probe, on the same images.
        rows = table.labelled(reported)
        selected = {
            "epoch": result.best_epoch,
            "selection": holdout.name,
            "kept_probe": not result.best_epoch and probe is not None,
            **(_compare(probe, head, table, features, rows) if probe is not None else {}),
        }
        provenance = _provenance(table, holdout, head, result, selected, cache.warnings)
        split = SPLITS[reported]
        metrics, predictions = score(head, replace(table, features=features), rows, provenance, split=split)
        for line in [*_verdict_lines(selected, split, metrics.metrics["accuracy"], probe), *metric_lines(metrics)]:
            tell(line)

        # The run.
        model = run_model(tuned, table, head).model_copy(
            update={
                "verb": "finetune",
                "parent": None if probe is None else probe.folder.name,
                "seconds": time.perf_counter() - started,
                "parameters": ParameterCounts(trainable=max(row.trainable for row in result.history), total=total),
            }
        )

        def fill(run_folder: Path) -> None:
            (run_folder / BACKBONE_FILE).write_bytes(weights)
            (run_folder / "history.csv").write_text(history_csv(result.history))
            (run_folder / "history.svg").write_bytes(history_plot(result.history))

        path = publish_run(params, name, head=head, model=model, metrics=metrics, predictions=predictions, fill=fill)
        tell(f"Run: {path} (backbone.weights={path / BACKBONE_FILE} extracts with it)")
    shutil.rmtree(folder, ignore_errors=True)
    return metrics.summary(str(path))


def find_lr(params: Params, say: Say = print, *, from_run: str | None = None) -> dict[str, Any]:
    """Draw loss against learning rate for head and backbone and suggest both rates; nothing is trained for good."""
    section, cache = params.finetune, open_cache(params)
    table, backbone = cache.table(), cache.backbone
    holdout = hold_out_selection(table, section, reported=table.reported_split())
    probe = _find_probe(params, backbone, table, from_run, say)
    classifier = Classifier(backbone.trainable(), _start(params, table, holdout, probe).head)
    device = resolve_device(section.device)
    setup = _setup(params, backbone, table, holdout, probe, device=device, world=World())
    train = _labelled(cache, table, holdout.train)
    curves = find_learning_rates(classifier, train, backbone.transform, section, setup)
    plot = params.runs.dir / f"{default_run_name(params.data.root, params.backbone.name, 'find-lr')}.svg"
    publish_file(plot, rate_curves_plot(curves))
    suggested = {curve.name: curve.suggestion for curve in curves}
    say(f"Suggested: {' '.join(f'finetune.{key}={value:g}' for key, value in suggested.items())}")
    say(f"Curves: {plot.resolve()}")
    return {"suggested": suggested, "plot": str(plot.resolve())}


# -- trainings that did not end --------------------------------------------------------------------------------------


def _run_name(params: Params) -> str:
    """The name of the run to be.

    Raises:
        RunError: the chosen one is taken.
    """
    if params.runs.name:
        check_run_name(params.runs.dir, params.runs.name)
    return params.runs.name or default_run_name(params.data.root, params.backbone.name, "finetuned")


def _remember(folder: Path, params: Params, probe: Run | None) -> None:
    """What ``--resume`` needs besides the checkpoint."""
    publish_file(folder / PARAMS_FILE, dump_params(params).encode())
    publish_file(folder / START_FILE, json.dumps({"from": None if probe is None else str(probe.folder)}).encode())


def _unfinished(parent: Path, wanted: str) -> tuple[Path, Params, str | None]:
    """The folder, the params and the starting run of a training that did not end."""
    names = sorted((file.parent for file in parent.glob(f"*/{START_FILE}")), key=_age)
    folder = names[-1] if wanted == "latest" and names else parent / Path(wanted).name
    if folder not in names:
        there = ", ".join(folder.name for folder in names) or "none"
        raise FinetuneError(
            f"There is no unfinished training {wanted!r}.",
            where=parent,
            why=f"unfinished are: {there}",
            remedy="start one with `pipeline finetune`",
        )
    return folder, load_params(folder / PARAMS_FILE), json.loads((folder / START_FILE).read_text())["from"]


def _age(folder: Path) -> float:
    return (folder / START_FILE).stat().st_mtime


# -- the start -------------------------------------------------------------------------------------------------------


def _find_probe(params: Params, backbone: Backbone, table: FeatureTable, wanted: str | None, say: Say) -> Run | None:
    """The stage-two run to start from; None where the head starts at random."""
    if params.finetune.start == "random":
        return None
    probe = load_run(
        find_probe(
            params.runs.dir,
            wanted,
            backbone=backbone_record(backbone.identity),
            transform=backbone.transform.as_dict(),
            class_names=table.class_names,
            data_digest=table.data_digest,
        )
    )
    say(f"Starting from the probe {probe.folder}")
    return probe


def _start(params: Params, table: FeatureTable, holdout: Holdout, probe: Run | None) -> Start:
    if probe is None:
        return random_start(table, params.finetune)
    kind, dropout = probe.model.head.kind, params.finetune.dropout
    return probe_start(table, holdout, probe.params.head, kind, dropout=dropout)


def _check_repeats(live: SelectionScore, expected: SelectionScore, n: int, probe: Run, say: Say) -> None:
    """Epoch 0 is the probe on live features: another score means that cache or transform are not what they should be.

    Raises:
        FinetuneError: the two scores differ.
    """
    gap = abs(live.loss - expected.loss)
    close = gap <= MAX_LOSS_GAP and abs(live.accuracy - expected.accuracy) * n <= 1.5
    verdict = "repeats" if close else "DIFFERS FROM"
    cached = f"accuracy {expected.accuracy:.4f}, loss {expected.loss:.4f}"
    say(f"Epoch 0 {verdict} the probe on cached features: {cached} (live loss differs by {gap:.1e})")
    if not close:
        raise FinetuneError(
            "The probe's live score does not repeat its score on cached features.",
            where=probe.folder,
            why=f"live {live.accuracy:.4f} and {live.loss:.4f}, cached {expected.accuracy:.4f} and {expected.loss:.4f}",
            remedy="check the cache with `pipeline cache verify`",
        )


# -- the score, and the probe's --------------------------------------------------------------------------------------


def _head(classifier: Classifier, start: Start, table: FeatureTable) -> Head:
    return head_of_layers(start.kind, fold_head(classifier.head.cpu()), np.arange(len(table.class_names)))


def _compare(
    probe: Run, head: Head, table: FeatureTable, tuned: NDArray[np.float32], rows: NDArray[np.bool_]
) -> dict[str, Any]:
    """Probe against fine-tuned on the reported images at ``rows``: accuracies and McNemar's exact test.

    Args:
        tuned: features (n, d) of the table's images under the tuned backbone.
    """
    y = table.targets[rows]
    before = probe.head.predict(table.features[rows]) == y
    after = head.predict(tuned[rows]) == y
    only_probe, only_tuned = int((before & ~after).sum()), int((after & ~before).sum())
    return {
        "probe_run": probe.folder.name,
        "probe_accuracy": float(before.mean()),
        "difference": float(after.mean() - before.mean()),
        "only_probe_right": only_probe,
        "only_finetuned_right": only_tuned,
        "mcnemar_p": mcnemar_exact(only_probe, only_tuned),
    }


def _provenance(
    table: FeatureTable,
    holdout: Holdout,
    head: Head,
    result: TrainingResult,
    selected: dict[str, Any],
    warnings: list[str],
) -> Provenance:
    fitted = np.zeros(len(table), bool)
    fitted[holdout.train] = True
    return Provenance(
        fitted=f"the backbone with its {head.kind} head",
        # All of train counts as seen for the leak check: the selection part chose the epoch.
        train_digests=table.digests[table.train],
        train_counts=table.class_counts(fitted),
        selections=[Selection("the epoch", "by its accuracy", holdout.name)],
        selected=selected,
        history=[_finite(asdict(row)) for row in result.history],
        warnings=[*warnings, *result.warnings],
    )


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """A row for JSON, where a loss that diverged has no number."""
    infinite = {name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    return {name: None if name in infinite else value for name, value in row.items()}


def _verdict_lines(selected: dict[str, Any], split: str, tuned: object, probe: Run | None) -> list[str]:
    lines = []
    if not selected["epoch"]:
        lines.append("No epoch beat epoch 0 on the selection set: the run keeps what training started from.")
    if probe is None or not isinstance(tuned, float):
        return lines
    verdict = "the difference is real" if selected["mcnemar_p"] < 0.05 else "they are not shown to differ"
    return [
        *lines,
        f"The probe took {probe.model.seconds:.1f} s on cached features.",
        f"On {split}: probe {100 * selected['probe_accuracy']:.1f} %, fine-tuned {100 * tuned:.1f} %"
        f" ({100 * selected['difference']:+.1f} points; exact McNemar p = {selected['mcnemar_p']:.3g}: {verdict})",
    ]


# -- images, backbone, cache -----------------------------------------------------------------------------------------


def _setup(
    params: Params,
    backbone: Backbone,
    table: FeatureTable,
    holdout: Holdout,
    probe: Run | None,
    *,
    device: torch.device,
    world: World,
) -> Setup:
    return resolve_setup(
        params.finetune,
        device,
        targets=table.targets[holdout.train],
        class_names=table.class_names,
        from_scratch=backbone.identity.weights.startswith("random") and probe is None,
        world=world,
    )


def _fingerprint(params: Params, backbone: Backbone, table: FeatureTable, holdout: Holdout, start: Start) -> str:
    return training_fingerprint(
        params.finetune,
        backbone=backbone.identity.as_dict(),
        transform=backbone.transform.as_dict(),
        images=table.digests[holdout.train],
        selection=table.digests[holdout.selection],
        head=fold_head(start.head),
    )


class _TableImages:
    """The images at some rows of a table, read and decoded when asked for."""

    def __init__(self, cache: FeatureCache, table: FeatureTable, rows: NDArray[np.int64]) -> None:
        self._read, self._decode = cache.images.source.read, cache.backbone.decoder
        self._table, self._rows = table, rows

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, index: int) -> Image.Image:
        data, _ = self._read(self._table.paths[self._rows[index]])
        return self._decode(data)

    def digest(self, index: int) -> bytes:
        return bytes(self._table.digests[self._rows[index]])


def _labelled(cache: FeatureCache, table: FeatureTable, rows: NDArray[np.int64]) -> LabelledImages:
    return LabelledImages(_TableImages(cache, table, rows), table.targets[rows])


def _backbone_bytes(classifier: Classifier, backbone: Backbone) -> bytes:
    network = classifier.backbone
    assert isinstance(network, FeatureNetwork)
    return backbone_bytes(network.cpu(), backbone.transform, name=backbone.identity.name)


def _with_weights(params: Params, file: Path) -> Params:
    backbone = params.backbone.model_copy(update={"weights": str(file.resolve())})
    return params.model_copy(update={"backbone": backbone})
