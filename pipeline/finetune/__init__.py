"""Backbone and head trained together: where to start, parameter groups, the step, the loop, selection, checkpoints.

``train_classifier`` is the way in; it takes a `Classifier`, two `LabelledImages`, and a `Setup`.
"""

from .checkpoint import training_fingerprint
from .classifier import Classifier, fold_head, make_random_head
from .groups import describe_groups, first_groups
from .history import EpochRow, SelectionScore, TensorboardLog, history_csv, history_plot
from .images import LabelledImages
from .lr_find import RateCurve, find_learning_rates, rate_curves_plot
from .selection import Holdout, SelectionSet, hold_out_selection, selection_temperature
from .start import Start, find_probe, probe_start, random_start, repeats
from .step import Setup, resolve_setup
from .training import Callbacks, TrainingResult, interpolate_result, process_group, train_classifier

__all__ = [
    "Callbacks",
    "Classifier",
    "EpochRow",
    "Holdout",
    "LabelledImages",
    "RateCurve",
    "SelectionScore",
    "SelectionSet",
    "Setup",
    "Start",
    "TensorboardLog",
    "TrainingResult",
    "describe_groups",
    "find_learning_rates",
    "find_probe",
    "first_groups",
    "fold_head",
    "history_csv",
    "history_plot",
    "hold_out_selection",
    "interpolate_result",
    "make_random_head",
    "probe_start",
    "process_group",
    "random_start",
    "rate_curves_plot",
    "repeats",
    "resolve_setup",
    "selection_temperature",
    "train_classifier",
    "training_fingerprint",
]
