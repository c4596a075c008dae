"""The run folder: names, files and their contents. Nothing here unpickles, imports torch or runs what a file names."""

from .files import (
    METRICS_FILE,
    MODEL_FILE,
    PARAMS_FILE,
    PREDICTIONS_FILE,
    REPORT_FILE,
    read_metrics,
    read_model,
)
from .predictions import Predictions, read_predictions, write_predictions
from .provenance import current_versions
from .runs import RunEntry, check_run_name, default_run_name, list_runs, publishing_run, resolve_run
from .schema import (
    BackboneRecord,
    ClassScores,
    ConfusedPair,
    CorrectionsRecord,
    CoveragePoint,
    CurvePoint,
    DataRecord,
    HeadRecord,
    Leak,
    ParameterCounts,
    ReliabilityBin,
    RunMetrics,
    RunModel,
    Uncorrected,
)

__all__ = [
    "METRICS_FILE",
    "MODEL_FILE",
    "PARAMS_FILE",
    "PREDICTIONS_FILE",
    "REPORT_FILE",
    "BackboneRecord",
    "ClassScores",
    "ConfusedPair",
    "CorrectionsRecord",
    "CoveragePoint",
    "CurvePoint",
    "DataRecord",
    "HeadRecord",
    "Leak",
    "ParameterCounts",
    "Predictions",
    "ReliabilityBin",
    "RunEntry",
    "RunMetrics",
    "RunModel",
    "Uncorrected",
    "check_run_name",
    "current_versions",
    "default_run_name",
    "list_runs",
    "publishing_run",
    "read_metrics",
    "read_model",
    "read_predictions",
    "resolve_run",
    "write_predictions",
]
