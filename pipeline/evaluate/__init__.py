"""(y, probabilities) -> metrics with intervals, report; comparison of runs. Nothing here imports torch."""

from .compare import ComparedRun, Comparison, compare_runs
from .compare_text import comparison_markdown, comparison_notes, comparison_table
from .intervals import wilson
from .metrics import evaluate_predictions, per_class_table
from .protocol import Selection, check_leak, leak_sentence, protocol_sentence
from .significance import holm, mcnemar_exact

__all__ = [
    "ComparedRun",
    "Comparison",
    "Selection",
    "check_leak",
    "compare_runs",
    "comparison_markdown",
    "comparison_notes",
    "comparison_table",
    "evaluate_predictions",
    "holm",
    "leak_sentence",
    "mcnemar_exact",
    "per_class_table",
    "protocol_sentence",
    "wilson",
]
