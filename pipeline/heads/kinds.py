"""The table of the kinds of heads. To add one, write its file and add its entry here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..params import HeadParams
from .base import Head
from .common import Ints
from .layers import Layers, LayersHead
from .logistic import LogisticHead
from .network import NetworkHead
from .prompts import PromptsHead
from .sklearn_head import ALIASES, SklearnHead

if TYPE_CHECKING:
    import torch

KINDS: dict[str, type[Head]] = {
    "logistic": LogisticHead,
    "linear": NetworkHead,
    "mlp": NetworkHead,
    "prompts": PromptsHead,
    "sklearn": SklearnHead,
    **dict.fromkeys(ALIASES, SklearnHead),
}


def family_of(kind: str) -> type[Head]:
    """What makes and loads heads of ``kind``; every kind that is not in the table is a path below ``sklearn.``."""
    return KINDS.get(kind, SklearnHead)


def kinds_of_layers() -> tuple[str, ...]:
    """The kinds whose heads are linear layers (`Head.as_layers`), which fine-tuning can start from."""
    return tuple(kind for kind, family in KINDS.items() if family.as_layers is not Head.as_layers)


def head_device(device: torch.device) -> str:
    """Where heads are fitted beside a backbone on ``device``: MPS lacks float64, which the solver proves with."""
    return str(device) if device.type == "cuda" else "cpu"


def make_head(kind: str, params: HeadParams, *, class_names: Sequence[str], jobs: int = 1, device: str = "cpu") -> Head:
    """An unfitted head of ``kind``: a key of `KINDS`, or a dotted path below ``sklearn.``.

    Args:
        class_names: names by target, for class weights and messages.
        jobs: how many folds and candidates are fitted at once.
        device: where torch heads are fitted, as torch names it.

    Raises:
        HeadError: no such kind (near names are given), or parameters that it does not have.
    """
    head = family_of(kind)(kind, params, class_names=class_names, jobs=jobs, device=device)
    head.check()
    return head


def load_head(folder: Path, record: Mapping[str, Any]) -> Head:
    """The fitted head that `Head.save` wrote into ``folder``, from the ``record`` that it returned.

    Raises:
        RunError: the head is missing, damaged, of a kind unknown here, or names a type that is not allowed, which is
            then neither imported nor constructed.
    """
    return family_of(str(record.get("kind"))).load(folder, record)


def head_of_layers(kind: str, layers: Layers, classes: Ints) -> LayersHead:
    """A fitted head that computes ``layers`` for the targets ``classes`` (c,).

    It is of ``kind`` where such heads are layers and nothing else; else linear or mlp, whichever they are.
    """
    family = family_of(kind)
    if not issubclass(family, LayersHead):
        kind, family = "linear" if len(layers.weights) == 1 else "mlp", NetworkHead
    head = family(kind, HeadParams())
    head.layers, head.classes_ = layers, classes
    return head
