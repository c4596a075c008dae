"""(head, features) -> metrics with intervals and a protocol; comparison of runs; advice. Nothing here imports torch."""

from .compare import (
    Comparison,
    compare_runs,
    comparison_markdown,
    comparison_notes,
    comparison_table,
    mcnemar_exact,
)
from .intervals import wilson
from .metrics import METRICS, Metric, ScoredImages, Weighted
from .protocol import Provenance
from .score import Classified, classify, metric_lines, score

__all__ = [
    "METRICS",
    "Classified",
    "Comparison",
    "Metric",
    "Provenance",
    "ScoredImages",
    "Weighted",
    "classify",
    "compare_runs",
    "comparison_markdown",
    "comparison_notes",
    "comparison_table",
    "mcnemar_exact",
    "metric_lines",
    "score",
    "wilson",
]
