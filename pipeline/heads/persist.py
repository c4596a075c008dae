"""Save and load fitted heads without pickle: safetensors for layers, skops behind an exact allow-list for the rest."""

from __future__ import annotations

import zipfile
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from ..errors import RunError
from ..files import read_regular_file
from ..params import HeadParams
from .base import Head, Ints
from .layers import Layers
from .logistic import LogisticHead
from .network import NetworkHead

LAYERS_FILE = "head.safetensors"
SKLEARN_FILE = "head.skops"


def save_head(head: Head, folder: Path) -> dict[str, Any]:
    """Write a fitted head's file into ``folder``; the JSON object that `load_head` needs beside it.

    Raises:
        HeadError: the head holds a type that could not be loaded again (some meta-estimators).
    """
    meta: dict[str, Any] = {
        "kind": head.kind,
        "classes": head.classes_.tolist(),
        "parameters": head.parameter_count(),
        "selected": head.selected,
    }
    if isinstance(head, LogisticHead | NetworkHead):
        assert head.layers is not None
        (folder / LAYERS_FILE).write_bytes(save_tensors(_tensors(head.layers)))
        return {**meta, "file": LAYERS_FILE, "dropout": head.layers.dropout}
    from .persist_sklearn import save_sklearn  # here, as importing skops and scikit-learn takes seconds

    data, more = save_sklearn(head)
    (folder / SKLEARN_FILE).write_bytes(data)
    return {**meta, **more, "file": SKLEARN_FILE}


def load_head(folder: Path, meta: dict[str, Any]) -> Head:
    """The fitted head that `save_head` wrote, predicting the same to the byte.

    Raises:
        RunError: the file is missing, damaged, or names a type that is not on the allow-list; that type is neither
            imported nor constructed.
    """
    try:
        file = {LAYERS_FILE: LAYERS_FILE, SKLEARN_FILE: SKLEARN_FILE}[meta["file"]]
        kind, classes = str(meta["kind"]), np.array([int(target) for target in meta["classes"]], dtype=np.int64)
        data = read_regular_file(folder / file)
        if file == LAYERS_FILE:
            head: Head = _load_layers(data, kind, len(classes), float(meta["dropout"]))
        else:
            from .persist_sklearn import load_sklearn

            head = load_sklearn(data, kind, meta, folder / file)
    except (KeyError, TypeError, ValueError, OSError, SafetensorError, zipfile.BadZipFile, zlib.error) as error:
        raise RunError(
            "The head of this run cannot be loaded.",
            where=folder,
            why=f"{type(error).__name__}: {error}",
            remedy="train it again with `pipeline train-head`",
        ) from error
    head.classes_ = classes
    head.selected = dict(meta.get("selected") or {})
    return head


def _tensors(layers: Layers) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for number, (weight, bias) in enumerate(zip(layers.weights, layers.biases, strict=True)):
        named[f"layers.{number}.weight"] = np.ascontiguousarray(weight)
        named[f"layers.{number}.bias"] = np.ascontiguousarray(bias)
    return named


def _load_layers(data: bytes, kind: str, classes: int, dropout: float) -> LogisticHead | NetworkHead:
    tensors = load_tensors(data)
    count = len(tensors) // 2
    weights = tuple(np.asarray(tensors[f"layers.{number}.weight"], dtype=np.float64) for number in range(count))
    biases = tuple(np.asarray(tensors[f"layers.{number}.bias"], dtype=np.float64) for number in range(count))
    widths = [weights[0].shape[1], *(weight.shape[0] for weight in weights)] if count else []
    shapes = [(outputs, inputs) for inputs, outputs in pairwise(widths)]
    fits = [weight.shape for weight in weights] == shapes and [len(bias) for bias in biases] == widths[1:]
    if not count or not fits or widths[-1] != classes:
        raise ValueError("the shapes of its layers do not fit together")
    return head_of_layers(kind, Layers(weights, biases, dropout=dropout), np.arange(classes))


def head_of_layers(kind: str, layers: Layers, classes: Ints) -> LogisticHead | NetworkHead:
    """A fitted head of ``kind`` (logistic, linear or mlp) that computes ``layers`` for the targets ``classes`` (c,)."""
    params = HeadParams()
    head: LogisticHead | NetworkHead = (
        LogisticHead(params, class_names=())
        if kind == "logistic"
        else NetworkHead(kind, params.linear if kind == "linear" else params.mlp, params, class_names=())
    )
    head.layers, head.classes_ = layers, classes
    return head
