"""A folder of images becomes a classifier, and the expensive part is paid once.

The names below are the Python interface; they are imported when first used, so that ``import pipeline`` is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .params import load_params
    from .stages.embed import Embedder
    from .stages.extract import extract
    from .stages.open import load_features
    from .stages.run import load_run
    from .stages.train_head import train_head

__all__ = ["Embedder", "extract", "load_features", "load_params", "load_run", "train_head"]

_HOMES = {
    "Embedder": "stages.embed",
    "extract": "stages.extract",
    "load_features": "stages.open",
    "load_params": "params",
    "load_run": "stages.run",
    "train_head": "stages.train_head",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
