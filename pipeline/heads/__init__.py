"""Heads on cached features: one class, a table of kinds, chosen and calibrated on train alone."""

from .base import Head, Selection
from .common import log_losses, standardisation
from .crossval import OutOfFold, Score, hold_out, stratified_group_folds, stratified_sample
from .curve import curve_band, learning_curve
from .kinds import KINDS, head_device, head_of_layers, kinds_of_layers, load_head, make_head
from .layers import Layers, LayersHead
from .select import Choice, Entry, choose_among, choose_head

__all__ = [
    "KINDS",
    "Choice",
    "Entry",
    "Head",
    "Layers",
    "LayersHead",
    "OutOfFold",
    "Score",
    "Selection",
    "choose_among",
    "choose_head",
    "curve_band",
    "head_device",
    "head_of_layers",
    "hold_out",
    "kinds_of_layers",
    "learning_curve",
    "load_head",
    "log_losses",
    "make_head",
    "standardisation",
    "stratified_group_folds",
    "stratified_sample",
]
