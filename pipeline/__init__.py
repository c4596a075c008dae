"""A folder of images becomes a classifier, and the expensive part is paid once.

The names below are the Python interface; they are imported when first used, so that ``import pipeline`` is quick.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .params import load_params
    from .stages.advise import advise_on as advise
    from .stages.compare import compare
    from .stages.embed import Embedder
    from .stages.extract import extract
    from .stages.finetune import finetune
    from .stages.open import load_features
    from .stages.run import evaluate, load_run, predict
    from .stages.train_head import train_head

__all__ = [
    "Embedder",
    "advise",
    "compare",
    "evaluate",
    "extract",
    "finetune",
    "load_features",
    "load_params",
    "load_run",
    "predict",
    "train_head",
]

_HOMES = {
    "Embedder": ("stages.embed", "Embedder"),
    "advise": ("stages.advise", "advise_on"),
    "compare": ("stages.compare", "compare"),
    "evaluate": ("stages.run", "evaluate"),
    "extract": ("stages.extract", "extract"),
    "finetune": ("stages.finetune", "finetune"),
    "load_features": ("stages.open", "load_features"),
    "load_params": ("params", "load_params"),
    "load_run": ("stages.run", "load_run"),
    "predict": ("stages.run", "predict"),
    "train_head": ("stages.train_head", "train_head"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(f".{module}", __name__), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Interface(ModuleType):
    """This module, whose `evaluate` and `finetune` stay functions when the folders of these names are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Interface
