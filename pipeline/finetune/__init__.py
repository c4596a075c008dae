"""Backbone and head trained together: where to start, parameter groups, the step, the loop, selection, checkpoints.

``train_classifier`` is the way in; it takes a `Classifier`, two `LabelledImages`, and a `Setup`.
"""

from .checkpoint import training_fingerprint
from .classifier import Classifier, fold_head, make_random_head
from .groups import describe_groups, first_groups
from .history import EpochRow, SelectionScore, TensorboardLog, history_csv, history_plot
from .images import LabelledImages
from .lr_find import RateCurve, find_learning_rates, rate_curves_plot
from .selection import Holdout, SelectionSet, hold_out_selection
from .start import Start, find_probe, probe_start, random_start, repeats
from .step import Setup, resolve_setup
from .strength import resolve_augment
from .training import (
    Callbacks,
    Choice,
    TrainingResult,
    choose,
    mix_result,
    plan_epochs,
    process_group,
    seconds_per_image,
    train_classifier,
)

__all__ = [
    "Callbacks",
    "Choice",
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
    "choose",
    "describe_groups",
    "find_learning_rates",
    "find_probe",
    "first_groups",
    "fold_head",
    "history_csv",
    "history_plot",
    "hold_out_selection",
    "make_random_head",
    "mix_result",
    "plan_epochs",
    "probe_start",
    "process_group",
    "random_start",
    "rate_curves_plot",
    "repeats",
    "resolve_augment",
    "resolve_setup",
    "seconds_per_image",
    "train_classifier",
    "training_fingerprint",
]
