"""(y, probabilities) -> metrics with intervals, report; comparison of runs. Nothing here imports torch."""

from .intervals import wilson
from .metrics import evaluate_predictions, per_class_table
from .protocol import Selection, check_leak, protocol_sentence
from .significance import holm, mcnemar_exact

__all__ = [
    "Selection",
    "check_leak",
    "evaluate_predictions",
    "holm",
    "mcnemar_exact",
    "per_class_table",
    "protocol_sentence",
    "wilson",
]
