"""Stage two: a head on cached features, its score, and a run folder that predicts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..artifacts import (
    BackboneRecord,
    DataRecord,
    HeadRecord,
    ParameterCounts,
    RunMetrics,
    RunModel,
    check_run_name,
    current_versions,
    data_digest,
    default_run_name,
)
from ..data.scan import SPLITS
from ..errors import DataError
from ..features.table import FeatureTable
from ..params import Params
from ..runtime.device import usable_cores
from .load import Opened, open_features
from .publish import publish_run
from .score import apply_head, metric_lines, predictions_of, score_split
from .sources import batch_size

Say = Callable[[str], None]
TRAIN, VAL, TEST = range(3)


def train_head(params: Params, say: Say = print) -> dict[str, Any]:
    """Fit the head of ``params.head`` on train, score it on test (on val where there is no test), publish a run.

    Returns:
        the summary of ``--json``.

    Raises:
        MissingFeaturesError: run extract first.
        DataError: fewer than two classes, or nothing to report on.
        HeadError, RunError: see their messages.
    """
    started = time.perf_counter()
    if params.runs.name:
        check_run_name(params.runs.dir, params.runs.name)
    opened = open_features(params)
    table = opened.table
    reported = reported_split(table)
    ...
