"""Backbone and head trained together: parameter groups, augmentation, the loop, checkpoints.

``train_classifier`` is the way in; it takes a `Classifier`, two `LabelledImages`, and a `Setting`.
"""

from .batchnorm import resolve_batchnorm
from .classifier import Classifier, fold_head, make_head_module, make_random_head
from .contract import Outcome, Setting, State, Watch
from .groups import describe_groups, group_rows
from .history import EpochRow, Score, TensorboardLog, history_csv, history_plot
from .images import LabelledImages
from .lr_find import Sweep, find_learning_rates, sweeps_plot
from .network import TrainingNetwork
from .objective import balanced_weights
from .parallel import process_group
from .precision import resolve_training_dtype
from .selection import SelectionSet
from .training import train_classifier
from .wiseft import Interpolation, interpolate

__all__ = [
    "Classifier",
    "EpochRow",
    "Interpolation",
    "LabelledImages",
    "Outcome",
    "Score",
    "SelectionSet",
    "Setting",
    "State",
    "Sweep",
    "TensorboardLog",
    "TrainingNetwork",
    "Watch",
    "balanced_weights",
    "describe_groups",
    "find_learning_rates",
    "fold_head",
    "group_rows",
    "history_csv",
    "history_plot",
    "interpolate",
    "make_head_module",
    "make_random_head",
    "process_group",
    "resolve_batchnorm",
    "resolve_training_dtype",
    "sweeps_plot",
    "train_classifier",
]
