"""Write a run folder: params, model, metrics, head, predictions, report; whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..artifacts import (
    METRICS_FILE,
    MODEL_FILE,
    PARAMS_FILE,
    PREDICTIONS_FILE,
    REPORT_FILE,
    HeadRecord,
    Predictions,
    RunMetrics,
    RunModel,
    publishing_run,
    write_predictions,
)
from ..evaluate.report import render_report
from ..heads import Head
from ..params import Params, dump_params

FillFolder = Callable[[Path], None]


def publish_run(
    params: Params,
    name: str,
    *,
    head: Head,
    model: RunModel,
    metrics: RunMetrics,
    predictions: Predictions,
    fill: FillFolder = lambda _folder: None,
) -> Path:
    """The absolute path of a new run folder under ``runs.dir``.

    Args:
        name: taken over, or followed by ``-2`` and so on where it exists.
        model: its ``head`` record is completed with what loading the head needs.
        fill: writes further files (a fine-tuned backbone) into the folder.

    Raises:
        RunError: the folder cannot be written.
    """
    with publishing_run(params.runs.dir, name) as (folder, path):
        record = HeadRecord.model_validate({**model.head.model_dump(), **head.save(folder)})
        model = model.model_copy(update={"head": record})
        (folder / PARAMS_FILE).write_text(dump_params(params), encoding="utf-8")
        (folder / MODEL_FILE).write_bytes(model.to_json())
        (folder / METRICS_FILE).write_bytes(metrics.to_json())
        with open(folder / PREDICTIONS_FILE, "wb") as file:
            write_predictions(file, predictions)
        report = render_report(model, metrics, name=path.name, params_text=dump_params(params))
        (folder / REPORT_FILE).write_text(report, encoding="utf-8")
        fill(folder)
    return path
