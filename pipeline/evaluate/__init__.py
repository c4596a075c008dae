"""(head, features) -> metrics with intervals and a protocol; comparison of runs; advice. Nothing here imports torch."""

from .compare import (
    Comparison,
    compare_runs,
    comparison_groups,
    comparison_markdown,
    comparison_notes,
    comparison_table,
    mcnemar_exact,
)
from .intervals import wilson
from .metrics import METRICS, Metric, ScoredImages, Weighted
from .protocol import Provenance
from .score import ClassifierOutput, apply_head, metric_lines, score

__all__ = [
    "METRICS",
    "ClassifierOutput",
    "Comparison",
    "Metric",
    "Provenance",
    "ScoredImages",
    "Weighted",
    "apply_head",
    "compare_runs",
    "comparison_groups",
    "comparison_markdown",
    "comparison_notes",
    "comparison_table",
    "mcnemar_exact",
    "metric_lines",
    "score",
    "wilson",
]
