"""Stage three: backbone and head trained together from the probe, and whether that was worth it.

`finetune` reads from top to bottom: features, rows, probe, classifier, training, choice, training on all of train,
score, comparison, run. What touches images, backbone and cache is in the helpers below; training itself is in
`pipeline.finetune`.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..artifacts import PARAMS_FILE, ParameterCounts, RunSummary, check_run_name, default_run_name
from ..backbones import Backbone, FeatureNetwork, backbone_bytes, is_own_code
from ..data.source import SPLITS
from ..errors import FinetuneError, Interrupted
from ..evaluate import Provenance, mcnemar_exact, metric_lines, score
from ..features.cache import FeatureCache, FeatureTable
from ..features.rows import take_rows
from ..files import publish_file
from ..finetune import (
    Callbacks,
    Choice,
    Classifier,
    EpochRow,
    LabelledImages,
    SelectionScore,
    Setup,
    Start,
    TensorboardLog,
    TrainingResult,
    choose,
    describe_groups,
    find_learning_rates,
    find_probe,
    first_groups,
    fold_head,
    history_csv,
    history_plot,
    hold_out_selection,
    mix_result,
    plan_epochs,
    probe_start,
    process_group,
    random_start,
    rate_curves_plot,
    repeats,
    resolve_augment,
    resolve_setup,
    seconds_per_image,
    train_classifier,
    training_fingerprint,
)
from ..heads import Head, Selection, head_of_layers
from ..params import FinetuneParams, Params, dump_params, load_params
from ..runtime.device import resolve_device
from ..runtime.distributed import World, from_main, world_from_environment
from ..runtime.interrupt import Interruption, stop_after_batch
from ..runtime.progress import ProgressBar
from .open import features_in_memory, open_cache
from .run import BACKBONE_FILE, Run, backbone_record, load_run, make_gallery, publish_run, run_model

Say = Callable[[str], None]
TRAINING_FOLDER = ".training"
START_FILE = "start.json"
REFIT_FOLDER = "all-of-train"


def finetune(
    params: Params,
    say: Say = print,
    *,
    from_run: str | None = None,
    resume: str | None = None,
    quiet: bool = False,
) -> RunSummary:
    """Train backbone and head together from the probe, choose, train on all of train, compare, publish a run.

    A part of train (val, where test is reported) chooses between the probe, the epochs and mixes of both (WiSE-FT,
    Wortsman et al. 2022) by log loss. The start is the probe's own head (LP-FT, Kumar et al. 2022).

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
        folder, earlier = params.runs.dir / TRAINING_FOLDER / _run_name(params), 0.0
    else:
        folder, params, from_run, earlier = _unfinished(params, resume)
    name, clock = folder.name, _Clock(folder, started - earlier)
    device = resolve_device(params.finetune.device, world)
    tell: Say = say if world.is_main else lambda _line: None

    with process_group(world, device), _resumable(clock):
        # The images with their cached features, and which of them train, choose and are reported.
        cache = open_cache(params)
        memory = features_in_memory(params.head)
        table, backbone = cache.table(memory), cache.backbone
        reported = table.reported_split()
        holdout = hold_out_selection(table, params.finetune, reported=reported)
        train, selection = _labelled(cache, table, holdout.train), _labelled(cache, table, holdout.selection)

        # The classifier: the backbone under the probe's head, refitted without the images that choose.
        probe = _find_probe(params, backbone, table, from_run, tell)
        job = _Job(params, cache, table, probe, device, world)
        setup = job.setup(holdout.train)
        start = job.start(holdout.train, holdout.selection, setup)
        classifier = Classifier(backbone.trainable(), start.head)
        total = sum(parameter.numel() for parameter in classifier.parameters())
        if resume is None:
            params = job.resolve(classifier, train, selection, setup, tell)
            job = replace(job, params=params)
        section = params.finetune
        for line in describe_groups(first_groups(classifier, section), total).splitlines():
            tell(line)
        counts = f"{len(train):,} images train, {len(selection):,} of {holdout.name} choose"
        tell(f"{counts}; BatchNorm {setup.batchnorm}; training folder {folder}")

        # Training, epoch by epoch; a killed one goes on from its folder.
        if world.is_main:
            _remember(folder, params, probe)
            clock.note()
        log = TensorboardLog(params.runs.dir / "tensorboard" / name) if section.tensorboard and world.is_main else None

        def on_epoch(row: EpochRow) -> None:
            tell(row.as_text())
            if world.is_main:
                clock.note()
            if log:
                log.write(row)
            if row.epoch == 0 and probe is not None and start.expected is not None:
                same = partial(repeats, n=len(selection), precision=backbone.precision, dtype=setup.dtype)
                _check_repeats(row.score, start.expected, same, probe, tell)

        with stop_after_batch() as stop:
            images = section.epochs * len(train) // world.size
            with ProgressBar("training", images, quiet=quiet or not world.is_main) as bar:
                result = train_classifier(
                    classifier,
                    train,
                    selection,
                    backbone.transform,
                    section,
                    setup,
                    folder=folder,
                    fingerprint=job.fingerprint(holdout.train, holdout.selection, start),
                    callbacks=Callbacks(on_epoch, bar.advance, stop),
                )
            if log:
                log.close()

            # What is best on the images that choose: the probe, an epoch, or a mix of both; then that on all of train.
            calibrates = "temperature" in (section.calibrate, params.head.calibrate)
            transform = backbone.transform
            with ProgressBar(
                "choosing among the probe, the epochs and mixes of both", quiet=quiet or not world.is_main
            ):
                choice = choose(result, classifier, train, selection, transform, section, setup, calibrate=calibrates)
            tell(_choice_line(choice, probe))
            every = np.flatnonzero(table.train)
            refits, warnings = section.refit and bool(choice.epoch) and len(every) > len(holdout.train), list[str]()
            if refits:
                end = _refit(job, choice, every, folder / REFIT_FOLDER, stop, tell, quiet=quiet)
                if end is None:
                    warnings.append("training on all of train diverged: the weights are those of the part")
                    refits = False
                classifier = end or classifier

        # The score of the best weights, through the one predict path; the probe itself where nothing beat it. All
        # processes compute features with them.
        weights = _backbone_bytes(classifier, backbone)
        from_main(lambda: publish_file(folder / BACKBONE_FILE, weights), world)
        tuned_params = _with_weights(params, folder / BACKBONE_FILE) if choice.epoch else params
        tuned = open_cache(tuned_params, cache.images, begins=True, world=world, quiet=not world.is_main)
        tuned.fill()
        if not world.is_main:
            return cast(RunSummary, {})
        features = tuned.read(table.digests, memory)
        kept = not choice.epoch and probe is not None
        head = probe.head if kept and probe is not None else _head(classifier, start, table, choice.temperature)

        # The comparison with the probe, on the same images.
        rows = table.labelled(reported)
        selected = {
            "epoch": choice.epoch,
            "selection": holdout.name,
            "kept_probe": kept,
            "share": choice.share,
            **({"temperature": choice.temperature} if calibrates and not kept else {}),
            "refit": refits,
            **(_compare(probe, head, table, features, rows) if probe is not None else {}),
        }
        if kept and probe is not None and probe.model.data.digest != table.data_digest:
            warnings.append(f"the probe that was kept was fitted to other images, of {probe.model.data.root}")
        fitted = every if refits or kept else holdout.train
        selections = _selections(selected, section, holdout.name, weighted=setup.class_weights is not None)
        provenance = _provenance(table, fitted, head, result, selected, selections, [*cache.warnings, *warnings])
        split = SPLITS[reported]
        metrics, predictions = score(head, replace(table, features=features), rows, provenance, split=split)

        # The run.
        model = run_model(tuned, table, head).model_copy(
            update={
                "verb": "finetune",
                "parent": None if probe is None else probe.folder.name,
                "feature_keys": list(dict.fromkeys([tuned.key, cache.key])),
                "seconds": clock.seconds,
                "parameters": ParameterCounts(trainable=max(row.trainable for row in result.history), total=total),
            }
        )

        def fill(run_folder: Path) -> None:
            (run_folder / BACKBONE_FILE).write_bytes(weights)
            (run_folder / "history.csv").write_text(history_csv(result.history))
            (run_folder / "history.svg").write_bytes(history_plot(result.history))

        gallery = make_gallery(cache, replace(table, features=features), split, predictions)
        with ProgressBar("publishing the run and its report", quiet=quiet):
            path = publish_run(
                params,
                name,
                head=head,
                model=model,
                metrics=metrics,
                predictions=predictions,
                gallery=gallery,
                fill=fill,
            )
        for line in [*_verdict_lines(selected, split, metrics.metrics["accuracy"], probe), *metric_lines(metrics)]:
            tell(line)
        tell(f"Run: {path} (backbone.weights={path / BACKBONE_FILE} extracts with it)")
    shutil.rmtree(folder, ignore_errors=True)
    return metrics.summary(str(path))


def find_lr(params: Params, say: Say = print, *, from_run: str | None = None) -> dict[str, Any]:
    """Draw loss against learning rate for head and backbone and suggest both rates; nothing is trained for good."""
    section, cache = params.finetune, open_cache(params)
    table, backbone = cache.table(features_in_memory(params.head)), cache.backbone
    holdout = hold_out_selection(table, section, reported=table.reported_split())
    probe = _find_probe(params, backbone, table, from_run, say)
    device = resolve_device(section.device)
    job = _Job(params, cache, table, probe, device, World())
    setup = job.setup(holdout.train)
    classifier = Classifier(backbone.trainable(), job.start(holdout.train, holdout.selection, setup).head)
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


@dataclass(frozen=True)
class _Clock:
    """How long a training takes, all its sessions together; what they took is noted in its folder now and then."""

    folder: Path
    started: float

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def note(self) -> None:
        file = self.folder / START_FILE
        publish_file(file, json.dumps({**json.loads(file.read_text()), "seconds": self.seconds}).encode())


@contextmanager
def _resumable(clock: _Clock) -> Iterator[None]:
    """Whenever it is interrupted, before, while or after it trains, say how to go on."""
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as error:
        if not (clock.folder / START_FILE).exists():
            raise
        clock.note()
        what = error.what if isinstance(error, Interrupted) else "Fine-tuning was interrupted; what is trained is kept."
        remedy = f"`pipeline finetune --resume` goes on (with several begun: --resume {clock.folder.name})"
        raise Interrupted(what, where=clock.folder, remedy=remedy) from error


def _unfinished(given: Params, wanted: str) -> tuple[Path, Params, str | None, float]:
    """The folder, the params and the starting run of a training that did not end, and the seconds that it took."""
    parent = given.runs.dir / TRAINING_FOLDER
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
    params = load_params(folder / PARAMS_FILE)
    if is_own_code(params.backbone.name) and params.backbone.name != given.backbone.name:
        raise FinetuneError(
            f"The training's network is the function {params.backbone.name}.",
            where=folder,
            why="nothing that a folder under runs names is imported",
            remedy=f"if you trust that module, name it yourself: -s backbone.name={params.backbone.name}",
        )
    start = json.loads((folder / START_FILE).read_text())
    return folder, params, start["from"], start.get("seconds", 0.0)


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


@dataclass(frozen=True)
class _Job:
    """What the training that chooses and the one on all of train have in common."""

    params: Params
    cache: FeatureCache
    table: FeatureTable
    probe: Run | None
    device: torch.device
    world: World

    def setup(self, rows: NDArray[np.int64]) -> Setup:
        """How the images at ``rows`` are trained on."""
        random = self.cache.backbone.identity.weights.startswith("random")
        return resolve_setup(
            self.params.finetune,
            self.device,
            targets=self.table.targets[rows],
            class_names=self.table.class_names,
            from_scratch=random and self.probe is None,
            world=self.world,
        )

    def start(self, rows: NDArray[np.int64], selection: NDArray[np.int64], setup: Setup) -> Start:
        """The head that training on the images at ``rows`` begins with; the first process fits it for all."""
        section = self.params.finetune
        if self.probe is None:
            return random_start(self.table, section)
        head, kind = self.probe.params.head, self.probe.model.head.kind
        fit = partial(probe_start, self.table, rows, selection, head, kind, setup, dropout=section.dropout)
        return from_main(fit, self.world)

    def fingerprint(self, rows: NDArray[np.int64], selection: NDArray[np.int64], start: Start) -> str:
        """Of all that the result depends on."""
        backbone = self.cache.backbone
        return training_fingerprint(
            self.params.finetune,
            backbone=backbone.identity.as_dict(),
            transform=backbone.transform.as_dict(),
            images=self.table.digests[rows],
            selection=self.table.digests[selection],
            head=fold_head(start.head),
        )

    def resolve(
        self, classifier: Classifier, train: LabelledImages, selection: LabelledImages, setup: Setup, say: Say
    ) -> Params:
        """The params with the augmentation that the probe bears and the epochs that there is time for."""
        section, transform = self.params.finetune, self.cache.backbone.transform
        classifier.to(setup.device)
        if self.probe is not None:
            augment = resolve_augment(classifier, selection, transform, section, setup)
            section = section.model_copy(update={"augment": augment})
            say(f"Augmentation: crops of {augment.crop_scale} of the area, mirrored {augment.horizontal_flip}")
        seconds = seconds_per_image(classifier, train, transform, section, setup)
        every = int(self.table.train.sum())
        refitted = every if section.refit and every > len(train) else 0
        epochs = plan_epochs(section, seconds * len(train), seconds * refitted)
        minutes = epochs * seconds * (len(train) + refitted) / 60
        then = f", then on all {every:,} of train" if refitted else ""
        say(f"An epoch takes about {seconds * len(train):.0f} s here. Planned: {epochs}{then}; about {minutes:.1f} min")
        if epochs < section.epochs:
            say(f"finetune.minutes={section.minutes:g} leaves time for {epochs} of {section.epochs} epochs")
        return self.params.model_copy(update={"finetune": section.model_copy(update={"epochs": epochs})})


def _refit(
    job: _Job, choice: Choice, rows: NDArray[np.int64], folder: Path, stop: Interruption, say: Say, *, quiet: bool
) -> Classifier | None:
    """The classifier trained on the images at ``rows``, all of train, as was chosen; None where that diverged."""
    say(f"Training on all {len(rows):,} images of train, {choice.epoch} epochs")
    section, backbone = job.params.finetune, job.cache.backbone
    setup, none = job.setup(rows), np.empty(0, np.int64)
    start = job.start(rows, none, setup)
    classifier, train = Classifier(backbone.trainable(), start.head), _labelled(job.cache, job.table, rows)
    images = choice.epoch * len(rows) // job.world.size
    with ProgressBar("training on all", images, quiet=quiet or not job.world.is_main) as bar:
        result = train_classifier(
            classifier,
            train,
            None,
            backbone.transform,
            section,
            setup,
            folder=folder,
            fingerprint=job.fingerprint(rows, none, start),
            until=choice.epoch,
            callbacks=Callbacks(lambda row: say(row.as_text()) if row.epoch else None, bar.advance, stop),
        )
    if result.warnings:
        return None
    mix_result(result, choice.share, classifier, train, backbone.transform, section, setup)
    return classifier


def _check_repeats(
    live: SelectionScore,
    expected: SelectionScore,
    same: Callable[[SelectionScore, SelectionScore], bool],
    probe: Run,
    say: Say,
) -> None:
    """Epoch 0 is the probe on live features: another score means that cache or transform are not what they should be.

    Raises:
        FinetuneError: the two scores differ.
    """
    gap, close = abs(live.loss - expected.loss), same(live, expected)
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


def _head(classifier: Classifier, start: Start, table: FeatureTable, temperature: float) -> Head:
    layers = fold_head(classifier.head.cpu()).fold_temperature(temperature)
    return head_of_layers(start.kind, layers, np.arange(len(table.class_names)))


def _compare(
    probe: Run, head: Head, table: FeatureTable, tuned: NDArray[np.float32], rows: NDArray[np.bool_]
) -> dict[str, Any]:
    """Probe against fine-tuned on the reported images at ``rows``: accuracies and McNemar's exact test.

    Args:
        tuned: features (n, d) of the table's images under the tuned backbone.
    """
    y = table.targets[rows]
    before = probe.head.predict(take_rows(table.features, rows)) == y
    after = head.predict(take_rows(tuned, rows)) == y
    only_probe, only_tuned = int((before & ~after).sum()), int((after & ~before).sum())
    return {
        "probe_run": probe.folder.name,
        "probe_accuracy": float(before.mean()),
        "difference": float(after.mean() - before.mean()),
        "only_probe_right": only_probe,
        "only_finetuned_right": only_tuned,
        "mcnemar_p": mcnemar_exact(before, after, table.groups[rows]),
    }


def _choice_line(choice: Choice, probe: Run | None) -> str:
    if not choice.epoch:
        return "No epoch and no mix beat epoch 0 on the images that choose: the run keeps what training started from."
    mix = f", {100 * choice.share:.0f} % of the way from the probe" if probe is not None else ""
    return f"Chosen: epoch {choice.epoch}{mix}, temperature {choice.temperature:.2f}"


def _selections(selected: dict[str, Any], section: FinetuneParams, on: str, *, weighted: bool) -> list[Selection]:
    """The choices, in their order, for the sentence on the protocol."""
    how = f"by its {'class-weighted ' if weighted else ''}{section.select.replace('_', ' ')}"
    kept = selected["kept_probe"]
    chosen = ["the probe rather than an epoch of fine-tuning" if kept else "the epoch"]
    if section.interpolate and "probe_run" in selected and not kept:
        chosen.append("the mix with the probe")
    selections = [Selection(what, how, on) for what in chosen]
    if "temperature" in selected:
        selections.append(Selection("the temperature", "by its log loss", on))
    return selections


def _provenance(
    table: FeatureTable,
    rows: NDArray[np.int64],
    head: Head,
    result: TrainingResult,
    selected: dict[str, Any],
    selections: list[Selection],
    warnings: list[str],
) -> Provenance:
    fitted = np.zeros(len(table), bool)
    fitted[rows] = True
    return Provenance(
        fitted=f"the {head.kind} head" if selected["kept_probe"] else f"the backbone with its {head.kind} head",
        # All of train counts as seen for the leak check: the selection part chose the epoch.
        train_digests=table.digests[table.train],
        train_counts=table.class_counts(fitted),
        selections=selections,
        selected=selected,
        history=[_finite(asdict(row)) for row in result.history],
        warnings=[*warnings, *result.warnings],
    )


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """A row for JSON, where a loss that diverged has no number."""
    infinite = {name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    return {name: None if name in infinite else value for name, value in row.items()}


def _verdict_lines(selected: dict[str, Any], split: str, tuned: object, probe: Run | None) -> list[str]:
    if probe is None or not isinstance(tuned, float):
        return []
    verdict = "the difference is real" if selected["mcnemar_p"] < 0.05 else "they are not shown to differ"
    return [
        f"The probe took {probe.model.seconds:.1f} s on cached features.",
        f"On {split}: probe {100 * selected['probe_accuracy']:.1f} %, fine-tuned {100 * tuned:.1f} %"
        f" ({100 * selected['difference']:+.1f} points; exact McNemar p = {selected['mcnemar_p']:.3g}: {verdict})",
    ]


# -- images, backbone, cache -----------------------------------------------------------------------------------------


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
