"""The run of a fine-tuning: scored through the one predict path, held against its probe, published."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..artifacts import HeadRecord, ParameterCounts, RunMetrics, RunModel, read_model
from ..backbones import FeatureNetwork, backbone_bytes
from ..data.scan import SPLITS
from ..errors import RunError
from ..evaluate import Provenance, Selection, mcnemar_exact, metric_lines, score
from ..features.table import FeatureTable
from ..files import publish_file
from ..finetune import Outcome, fold_head, history_csv, history_plot
from ..heads import Head, Layers, head_of_layers
from ..params import Params
from .embedding import Embedding
from .predict import BACKBONE_FILE, load_run
from .publish import publish_run
from .records import class_counts, run_model
from .sources import (
    Origin,
    batch_size,
    build_forward,
    open_folder,
    open_quarantine,
    open_store,
    plain_view,
    resolve_origin,
    worker_count,
)
from .tuning import Job

TRAIN = SPLITS.index("train")


def publish_tuned(job: Job, outcome: Outcome, started: float) -> dict[str, Any]:
    """Score the best state as `predict` would, say whether it was worth it, publish the run.

    Args:
        started: when the verb began, by `time.perf_counter`.

    Returns:
        the summary of ``--json``.
    """
    params = job.params
    job.classifier.load_state_dict(outcome.best)
    weights = _weights(job)
    publish_file(job.folder / BACKBONE_FILE, weights)
    head = _head(job, outcome)
    features, origin, key = _embed(_tuned_params(job) if outcome.best_epoch else params, job)
    tuned = replace(job.table, features=features)
    reported = tuned.splits == job.parts.reported
    metrics, predictions = score(
        head, tuned, reported, _making(job, tuned, head, outcome), split=SPLITS[job.parts.reported]
    )
    model = _model(job, outcome, origin, head, key, started)
    for line in [*_verdict_lines(job, metrics, outcome), *metric_lines(metrics)]:
        job.say(line)

    def fill(folder: Path) -> None:
        (folder / BACKBONE_FILE).write_bytes(weights)
        (folder / "history.csv").write_text(history_csv(outcome.history))
        (folder / "history.svg").write_bytes(history_plot(outcome.history))

    path = publish_run(
        params, job.folder.name, head=head, model=model, metrics=metrics, predictions=predictions, fill=fill
    )
    job.say(f"Run: {path} (backbone.weights={path / BACKBONE_FILE} extracts with it)")
    return metrics.summary(str(path))


# -- the tuned classifier, as any other run has it ------------------------------------------------------------------


def _weights(job: Job) -> bytes:
    network = job.classifier.backbone
    assert isinstance(network, FeatureNetwork)
    return backbone_bytes(network.cpu(), job.transform, name=job.params.backbone.name)


def _tuned_params(job: Job) -> Params:
    weights = str((job.folder / BACKBONE_FILE).resolve())
    return job.params.model_copy(update={"backbone": job.params.backbone.model_copy(update={"weights": weights})})


def _head(job: Job, outcome: Outcome) -> Head:
    """The trained head; the probe itself, fitted to all of train, where no epoch beat it."""
    if not outcome.best_epoch and job.start.run is not None:
        return load_run(job.start.run).head
    folded = fold_head(job.classifier.head.cpu())
    layers = Layers(tuple(weight for weight, _ in folded), tuple(bias for _, bias in folded))
    return head_of_layers(job.start.kind, layers, np.arange(len(job.table.class_names)))


def _embed(params: Params, job: Job) -> tuple[NDArray[np.float32], Origin, str]:
    """The table's images through the (tuned) backbone of ``params``, cached like any other features."""
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
    return embedding.store.read(job.table.digests), origin, embedding.store.spec.key


def _model(job: Job, outcome: Outcome, origin: Origin, head: Head, key: str, started: float) -> RunModel:
    batch = batch_size(job.params.extract, origin)
    model = run_model(job.table, origin, head, dtype=job.params.cache.dtype, batch=batch, key=key)
    return model.model_copy(
        update={
            "verb": "finetune",
            "parent": None if job.start.run is None else job.start.run.name,
            "seconds": time.perf_counter() - started,
            "parameters": _counts(job, outcome),
            "head": HeadRecord(kind=head.kind),
        }
    )


def _counts(job: Job, outcome: Outcome) -> ParameterCounts:
    total = sum(parameter.numel() for parameter in job.classifier.parameters())
    return ParameterCounts(trainable=max((row.trainable for row in outcome.history), default=0), total=total)


# -- its score, and the probe's -------------------------------------------------------------------------------------


def _making(job: Job, tuned: FeatureTable, head: Head, outcome: Outcome) -> Provenance:
    train = np.zeros(len(tuned), bool)
    train[job.parts.train] = True
    return Provenance(
        fitted=f"the backbone with its {head.kind} head",
        # All of train counts as seen for the leak check: the selection part chose the epoch.
        train_digests=tuned.digests[tuned.splits == TRAIN],
        train_counts=class_counts(tuned, train),
        selections=[Selection("the epoch", "by its accuracy", job.parts.selection_name)],
        selected=_selected(job, tuned, head, outcome),
        history=[_finite(asdict(row)) for row in outcome.history],
        warnings=[*job.opened.warnings, *outcome.warnings],
    )


def _selected(job: Job, tuned: FeatureTable, head: Head, outcome: Outcome) -> dict[str, Any]:
    return {
        "epoch": outcome.best_epoch,
        "selection": job.parts.selection_name,
        "kept_probe": not outcome.best_epoch and job.start.run is not None,
        **_comparison(job, tuned, head),
    }


def _comparison(job: Job, tuned: FeatureTable, head: Head) -> dict[str, Any]:
    """Probe against fine-tuned on the reported images: accuracies and McNemar's exact test."""
    if job.start.run is None:
        return {}
    table = job.table
    rows = (table.splits == job.parts.reported) & (table.targets >= 0)
    y = table.targets[rows]
    probe_right = load_run(job.start.run).head.predict(table.features[rows]) == y
    tuned_right = head.predict(tuned.features[rows]) == y
    only_probe, only_tuned = int((probe_right & ~tuned_right).sum()), int((tuned_right & ~probe_right).sum())
    return {
        "probe_run": job.start.run.name,
        "probe_accuracy": float(probe_right.mean()),
        "difference": float(tuned_right.mean() - probe_right.mean()),
        "only_probe_right": only_probe,
        "only_finetuned_right": only_tuned,
        "mcnemar_p": mcnemar_exact(only_probe, only_tuned),
    }


def _verdict_lines(job: Job, metrics: RunMetrics, outcome: Outcome) -> list[str]:
    lines = []
    if not outcome.best_epoch:
        lines.append("No epoch beat epoch 0 on the selection set: the run keeps what training started from.")
    chosen, tuned = metrics.selected, metrics.metrics["accuracy"]
    if job.start.run is None or not isinstance(tuned, float):
        return lines
    with suppress(RunError):  # the probe's run may have been removed while this one trained
        lines.append(f"The probe took {read_model(job.start.run).seconds:.1f} s on cached features.")
    probe, p = chosen["probe_accuracy"], chosen["mcnemar_p"]
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
