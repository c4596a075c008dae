"""Heads on cached features: one contract, several kinds, chosen and calibrated on train alone."""

from .base import Head
from .crossval import OutOfFold
from .curve import curve_band, learning_curve
from .folds import hold_out, stratified_group_folds
from .layers import Layers, standardisation
from .make import known_kinds, make_head
from .persist import head_of_layers, load_head, save_head
from .select import Choice, Entry, choose_head

__all__ = [
    "Choice",
    "Entry",
    "Head",
    "Layers",
    "OutOfFold",
    "choose_head",
    "curve_band",
    "head_of_layers",
    "hold_out",
    "known_kinds",
    "learning_curve",
    "load_head",
    "make_head",
    "save_head",
    "standardisation",
    "stratified_group_folds",
]
