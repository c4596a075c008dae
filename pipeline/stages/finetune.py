"""Stage three: backbone and head trained together from the probe, and whether that was worth it."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..artifacts import PARAMS_FILE, HeadRecord, ParameterCounts, check_run_name, default_run_name, read_metrics
from ..backbones import Backbone, FeatureNetwork, Transform, backbone_bytes, build_backbone, trainable_module
from ..data.decode import read_bytes
from ..data.scan import SPLITS
from ..errors import FinetuneError
from ..evaluate import Selection, mcnemar_exact, protocol_sentence
from ..features.table import FeatureTable
from ..files import canonical_json, digest_bytes, publish_file
from ..finetune import (
    Classifier,
    EpochRow,
    LabelledImages,
    Outcome,
    SelectionSet,
    Setting,
    TensorboardLog,
    TrainingNetwork,
    Watch,
    balanced_weights,
    describe_groups,
    find_learning_rates,
    fold_head,
    history_csv,
    history_plot,
    interpolate,
    process_group,
    resolve_training_dtype,
    sweeps_plot,
    train_classifier,
)
from ..heads import Head, Layers, head_of_layers
from ..params import Params, dump_params, load_params
from ..runtime.device import resolve_device
from ..runtime.distributed import World, world_from_environment
from ..runtime.interrupt import stop_after_batch
from .embedding import Embedding
from .load import Opened, open_features
from .predict import BACKBONE_FILE, load_run
from .probe import Parts, Start, find_probe, part_rows, probe_start, random_start
from .publish import publish_run
from .records import backbone_record, class_counts, run_model
from .score import Scored, apply_head, metric_lines, predictions_of, score_split
from .sources import (
    Origin,
    Transformation,
    batch_size,
    build_forward,
    open_folder,
    open_quarantine,
    open_store,
    plain_view,
    resolve_origin,
    worker_count,
)
from .train_head import check_trainable

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
        FinetuneError: there is nothing to start or go on from.
        Interrupted: Ctrl-C; ``resume`` goes on.
    """
    started = time.perf_counter()
    world = world_from_environment()
    if resume is not None:
        params, from_run, folder = _resumed(params, resume)
    else:
        if params.runs.name:
            check_run_name(params.runs.dir, params.runs.name)
        name = params.runs.name or default_run_name(params.data.root, params.backbone.name, "finetuned")
        folder = params.runs.dir / TRAINING_FOLDER / name
    device = resolve_device(params.finetune.device, world)
    with process_group(world, device):
        job = _Job(params, world, device, folder, say)
        job.prepare(from_run)
        outcome = job.train(quiet=quiet)
        if not world.is_main:
            return {}
        summary = job.publish(outcome, started)
    shutil.rmtree(folder, ignore_errors=True)
    return summary


def find_lr(params: Params, say: Say = print, *, from_run: str | None = None) -> dict[str, Any]:
    """Draw loss against learning rate for head and backbone and suggest both rates; nothing is trained for good."""
    name = default_run_name(params.data.root, params.backbone.name, "find-lr")
    device = resolve_device(params.finetune.device)
    job = _Job(params, World(), device, params.runs.dir / TRAINING_FOLDER / name, say)
    job.prepare(from_run)
    sweeps = find_learning_rates(job.classifier, job.train_images, job.transform, params.finetune, job.setting)
    plot = params.runs.dir / f"{name}.svg"
    publish_file(plot, sweeps_plot(sweeps))
    shutil.rmtree(job.folder, ignore_errors=True)
    suggested = {sweep.name: sweep.suggestion for sweep in sweeps}
    settings = " ".join(f"finetune.{key}={value:g}" for key, value in suggested.items())
    say(f"Suggested: {settings}")
    say(f"Curves: {plot.resolve()}")
    return {"suggested": suggested, "plot": str(plot.resolve())}


def _resumed(params: Params, resume: str) -> tuple[Params, str | None, Path]:
    """The params, the starting run and the folder of a training that did not end."""
    parent = params.runs.dir / TRAINING_FOLDER
    names = sorted((folder for folder in parent.glob("*") if (folder / START_FILE).exists()), key=_age)
    wanted = names[-1] if resume == "latest" and names else parent / Path(resume).name
    if wanted not in names:
        there = ", ".join(folder.name for folder in names) or "none"
        raise FinetuneError(
            f"There is no unfinished training {resume!r}.",
            where=parent,
            why=f"unfinished are: {there}",
            remedy="start one with `pipeline finetune`",
        )
    start = json.loads((wanted / START_FILE).read_text())
    return load_params(wanted / PARAMS_FILE), start["from"], wanted


def _age(folder: Path) -> float:
    return (folder / START_FILE).stat().st_mtime


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


class _Job:
    """One fine-tuning from the cached features to the published run."""

    def __init__(self, params: Params, world: World, device: torch.device, folder: Path, say: Say) -> None:
        self.params, self.world, self.device, self.folder = params, world, device, folder
        self.say: Say = say if world.is_main else lambda _line: None

    def prepare(self, from_run: str | None) -> None:
        """Open the features, part the rows, refit the probe, build the classifier."""
        params, section = self.params, self.params.finetune
        self.opened: Opened = open_features(params)
        table = self.opened.table
        self.parts: Parts = part_rows(table, section, check_trainable(table))
        self.start: Start = self._start(from_run)
        self.backbone: Backbone = build_backbone(params.backbone, params.transform)
        self.transform: Transform = self.opened.origin.transform
        self.classifier = Classifier(trainable_module(self.backbone), self.start.module)
        view = plain_view(self.transform, params.data, params.extract)
        self.train_images = self._images(self.parts.train, view)
        self.selection_images = self._images(self.parts.selection, view)
        self.setting = self._setting()
        if self.world.is_main:
            self._remember()

    def _start(self, from_run: str | None) -> Start:
        if self.params.finetune.start == "random":
            return random_start(self.opened.table, self.params.finetune)
        run = find_probe(self.params, self.opened, from_run)
        self.say(f"Starting from the probe {run}")
        return probe_start(self.params, self.opened, self.parts, run)

    def _images(self, rows: NDArray[np.int64], view: Transformation) -> LabelledImages:
        return LabelledImages(_Images(self.opened.table, rows, view), self.opened.table.targets[rows])

    def _setting(self) -> Setting:
        section, identity = self.params.finetune, self.opened.origin.identity
        from_scratch = identity.weights.startswith("random")
        frozen = section.batchnorm == "frozen" or (section.batchnorm == "auto" and not from_scratch)
        start = [array.tolist() for layer in fold_head(self.start.module) for array in layer]
        facts = {
            "params": section.model_dump(mode="json", exclude={"workers", "image_cache_mb", "checkpoint_minutes"}),
            "backbone": asdict(identity),
            "transform": self.transform.as_dict(),
            "images": digest_bytes(self.opened.table.digests[self.parts.train].tobytes()).hex(),
            "selection": digest_bytes(self.opened.table.digests[self.parts.selection].tobytes()).hex(),
            "head": digest_bytes(canonical_json(start).encode()).hex(),
        }
        return Setting(
            folder=self.folder,
            fingerprint=digest_bytes(canonical_json(facts).encode()).hex(),
            device=self.device,
            dtype=resolve_training_dtype(section.precision, self.device),
            batchnorm="frozen" if frozen else "train",
            class_weights=self._class_weights(),
            world=self.world,
        )

    def _class_weights(self) -> NDArray[np.float64] | None:
        given, names = self.params.finetune.class_weight, self.opened.table.class_names
        if given is None:
            return None
        if given == "balanced":
            return balanced_weights(self.opened.table.targets[self.parts.train], len(names))
        if unknown := sorted(set(given) - set(names)):
            raise FinetuneError(
                f"There is no class called {unknown[0]!r}.",
                where="finetune.class_weight",
                remedy=f"classes: {', '.join(names)}",
            )
        return np.array([given.get(name, 1.0) for name in names])

    def _remember(self) -> None:
        """What ``--resume`` needs besides the checkpoint."""
        start = {"from": None if self.start.run is None else str(self.start.run)}
        publish_file(self.folder / PARAMS_FILE, dump_params(self.params).encode())
        publish_file(self.folder / START_FILE, json.dumps(start).encode())

    def train(self, *, quiet: bool) -> Outcome:
        """Run the epochs, each told in a line; then, if asked for, look between start and end (WiSE-FT)."""
        section = self.params.finetune
        network = TrainingNetwork(
            Classifier(trainable_module(self.backbone), self.start.module),
            section,
            device=torch.device("cpu"),
            batchnorm=self.setting.batchnorm,
        )
        if not network.groups:
            raise FinetuneError("Nothing would train.", where="finetune", remedy="raise head_lr or backbone_lr above 0")
        for line in describe_groups(network.groups, network.total).splitlines():
            self.say(line)
        del network
        counts = f"{len(self.parts.train):,} images train, {len(self.parts.selection):,} of {self.parts.selection_name}"
        self.say(f"{counts} select the epoch; BatchNorm {self.setting.batchnorm}; training folder {self.folder}")
        log = TensorboardLog(self.params.runs.dir / "tensorboard" / self.folder.name) if section.tensorboard else None
        with stop_after_batch() as interruption:
            watch = Watch(on_epoch=lambda row: self._tell(row, log), interruption=interruption)
            outcome = self._train(watch)
        if log:
            log.close()
        return self._interpolated(outcome) if section.interpolate else outcome

    def _train(self, watch: Watch) -> Outcome:
        images = (self.train_images, self.selection_images)
        return train_classifier(
            self.classifier, *images, self.transform, self.params.finetune, self.setting, watch=watch
        )

    def _tell(self, row: EpochRow, log: TensorboardLog | None) -> None:
        self.say(row.as_text())
        if log:
            log.write(row)
        expected = self.start.expected
        if row.epoch == 0 and expected is not None:
            gap = abs(row.selection_loss - expected.loss)
            close = gap <= MAX_LOSS_GAP and abs(row.selection_accuracy - expected.accuracy) * expected.n <= 1.5
            verdict = "repeats" if close else "DIFFERS FROM"
            self.say(
                f"Epoch 0 {verdict} the probe on cached features: accuracy {expected.accuracy:.4f},"
                f" loss {expected.loss:.4f} (live loss differs by {gap:.1e})"
            )
            if not close:
                raise FinetuneError(
                    "The probe's live score does not repeat its score on cached features.",
                    where=self.start.run,
                    why=f"live {row.selection_accuracy:.4f} and {row.selection_loss:.4f}, cached"
                    f" {expected.accuracy:.4f} and {expected.loss:.4f}",
                    remedy="check the cache with `pipeline cache verify`",
                )

    def _interpolated(self, outcome: Outcome) -> Outcome:
        section = self.params.finetune
        chooser = SelectionSet(self.selection_images, self.transform, self.device, section, world=self.world)
        pixels = SelectionSet(self.train_images, self.transform, self.device, section)

        def images() -> Any:
            for batch in pixels._pixels():
                yield self.transform.normalise(batch.to(self.device), torch.float32)

        found = interpolate(self.classifier, outcome.start, outcome.tuned, chooser.score, images=images)
        self.say(f"Interpolation: {100 * found.share:.0f} % of the way from the probe is best on the selection set")
        best = outcome.tuned_epoch if found.share else 0
        return replace(outcome, tuned=found.state, best_epoch=best)

    # -- the run -----------------------------------------------------------------------------------------------------

    def publish(self, outcome: Outcome, started: float) -> dict[str, Any]:
        """Score the best state through the one predict path and publish the run."""
        params, table = self.params, self.opened.table
        self.classifier.load_state_dict(outcome.best)
        weights = self._weights()
        publish_file(self.folder / BACKBONE_FILE, weights)
        tuned = self._tuned_params() if outcome.best_epoch else params
        head = self._head(outcome)
        features, origin, key = self._embed(tuned, table)
        scored = apply_head(head, features, len(table.class_names))
        metrics = self._metrics(scored, head, outcome)
        model = run_model(
            table, origin, head, dtype=params.cache.dtype, batch=batch_size(params.extract, origin), key=key
        ).model_copy(
            update={
                "verb": "finetune",
                "backbone": backbone_record(origin.identity),
                "parent": None if self.start.run is None else self.start.run.name,
                "seconds": time.perf_counter() - started,
                "parameters": self._counts(outcome),
                "head": HeadRecord(kind=head.kind),
            }
        )
        for line in [*self._verdict_lines(metrics, outcome), *metric_lines(metrics)]:
            self.say(line)

        def fill(folder: Path) -> None:
            (folder / BACKBONE_FILE).write_bytes(weights)
            (folder / "history.csv").write_text(history_csv(outcome.history))
            (folder / "history.svg").write_bytes(history_plot(outcome.history))

        predictions = predictions_of(table, scored)
        path = publish_run(
            params, self.folder.name, head=head, model=model, metrics=metrics, predictions=predictions, fill=fill
        )
        self.say(f"Run: {path} (backbone.weights={path / BACKBONE_FILE} extracts with it)")
        summary: dict[str, Any] = metrics.summary(str(path))
        return summary

    def _weights(self) -> bytes:
        network = self.classifier.backbone
        assert isinstance(network, FeatureNetwork)
        return backbone_bytes(network.cpu(), self.transform, name=self.params.backbone.name)

    def _tuned_params(self) -> Params:
        backbone = self.params.backbone.model_copy(update={"weights": str((self.folder / BACKBONE_FILE).resolve())})
        return self.params.model_copy(update={"backbone": backbone})

    def _head(self, outcome: Outcome) -> Head:
        """The trained head; the probe itself, fitted to all of train, where no epoch beat it."""
        if not outcome.best_epoch and self.start.run is not None:
            return load_run(self.start.run).head
        folded = fold_head(self.classifier.head.cpu())
        layers = Layers(tuple(weight for weight, _ in folded), tuple(bias for _, bias in folded))
        return head_of_layers(self.start.kind, layers, np.arange(len(self.opened.table.class_names)))

    def _embed(self, params: Params, table: FeatureTable) -> tuple[NDArray[np.float32], Origin, str]:
        """The table's images through the (tuned) backbone, cached like any other features."""
        source, origin = open_folder(params.data, params.cache), resolve_origin(params)
        embedding = Embedding(
            source=source,
            store=open_store(params, origin),
            quarantine=open_quarantine(params, origin.transform),
            transformation=plain_view(origin.transform, params.data, params.extract),
            make_forward=lambda: build_forward(params, origin),
            workers=worker_count(params.extract),
            part_seconds=params.extract.part_seconds,
            quiet=True,
        )
        embedding.run(embedding.find_todo())
        return embedding.store.read(table.digests), origin, embedding.store.spec.key

    def _counts(self, outcome: Outcome) -> ParameterCounts:
        total = sum(parameter.numel() for parameter in self.classifier.parameters())
        trainable = max((row.trainable for row in outcome.history), default=0)
        return ParameterCounts(trainable=trainable, total=total)

    def _metrics(self, scored: Scored, head: Head, outcome: Outcome) -> Any:
        table, parts = self.opened.table, self.parts
        rows = table.splits == parts.reported
        train = np.zeros(len(table), bool)
        train[parts.train] = True
        facts = {
            "split": SPLITS[parts.reported],
            "selected": {
                "epoch": outcome.best_epoch,
                "selection": parts.selection_name,
                "kept_probe": not outcome.best_epoch and self.start.run is not None,
                **self._comparison(scored),
            },
            "history": [_finite(asdict(row)) for row in outcome.history],
            "warnings": [*self.opened.warnings, *outcome.warnings],
            "protocol": protocol_sentence(
                [Selection("the epoch", "by its accuracy", parts.selection_name)],
                fitted=f"the backbone with its {head.kind} head",
                fitted_on="train",
                n_fitted=len(parts.train),
                reported_on=SPLITS[parts.reported],
                n=int((rows & (table.targets >= 0)).sum()),
            ),
        }
        # All of train counts as seen for the leak check: the selection part chose the epoch.
        seen = table.digests[table.splits == 0]
        return score_split(
            table, scored, rows, train_digests=seen, train_counts=class_counts(table, train), facts=facts
        )

    def _comparison(self, scored: Scored) -> dict[str, Any]:
        """Probe against fine-tuned on the reported images: accuracies and McNemar's exact test."""
        if self.start.run is None:
            return {}
        table = self.opened.table
        rows = (table.splits == self.parts.reported) & (table.targets >= 0)
        y = table.targets[rows]
        probe = load_run(self.start.run).head.predict(table.features[rows]) == y
        tuned = scored.predicted[rows] == y
        only_probe, only_tuned = int((probe & ~tuned).sum()), int((tuned & ~probe).sum())
        return {
            "probe_run": self.start.run.name,
            "probe_accuracy": float(probe.mean()),
            "difference": float(tuned.mean() - probe.mean()),
            "only_probe_right": only_probe,
            "only_finetuned_right": only_tuned,
            "mcnemar_p": mcnemar_exact(only_probe, only_tuned),
        }

    def _verdict_lines(self, metrics: Any, outcome: Outcome) -> list[str]:
        lines = []
        if not outcome.best_epoch:
            lines.append("No epoch beat epoch 0 on the selection set: the run keeps what training started from.")
        chosen = metrics.selected
        if "probe_run" not in chosen:
            return lines
        with suppress(OSError):
            seconds = read_metrics(self.start.run) and load_run(self.start.run).model.seconds  # type: ignore[arg-type]
            lines.append(f"The probe took {seconds:.1f} s on cached features.")
        tuned, probe, p = metrics.metrics["accuracy"], chosen["probe_accuracy"], chosen["mcnemar_p"]
        verdict = "the difference is real" if p < 0.05 else "they are not shown to differ"
        lines.append(
            f"On {metrics.split}: probe {100 * probe:.1f} %, fine-tuned {100 * tuned:.1f} %"
            f" ({100 * chosen['difference']:+.1f} points; exact McNemar p = {p:.3g}: {verdict})"
        )
        return lines


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """A row for JSON, where a loss that diverged has no number."""
    infinite = {name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)}
    return {name: None if name in infinite else value for name, value in row.items()}
