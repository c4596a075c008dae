"""scikit-learn heads as skops files, behind an exact allow-list; apart, since importing skops takes seconds."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import skops.io
from sklearn.base import ClassifierMixin
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from skops.io.exceptions import UntrustedTypesFoundException

from ..errors import HeadError, RunError
from ..params import HeadParams
from .base import Head
from .sklearn_head import SklearnHead
from .trees import check_trees
from .trusted import BASICS, LOADERS, TYPES

SCHEMA = "schema.json"
NODE_KEYS = {"__class__", "__module__", "__loader__"}


def save_sklearn(head: Head) -> tuple[bytes, dict[str, Any]]:
    """A skops file of a fitted scikit-learn head, and what else `load_sklearn` needs.

    Raises:
        HeadError: the head holds a type that could not be loaded again (some meta-estimators).
    """
    assert isinstance(head, SklearnHead)
    data = skops.io.dumps(head.pipeline, compression=zipfile.ZIP_DEFLATED)
    if unknown := sorted(set(unknown_names(data))):
        raise HeadError(
            f"{head.estimator} cannot be saved.",
            why=f"it holds {', '.join(unknown)}, which a run folder may not name",
            remedy="choose another classifier or other parameters",
        )
    return data, {
        "estimator": head.estimator,
        "temperature": head.temperature,
        "source": head.source,
        "has_probabilities": head.has_probabilities,
        "why_no_probabilities": head.why_no_probabilities,
    }


def load_sklearn(data: bytes, kind: str, meta: dict[str, Any], file: Path) -> SklearnHead:
    """The head of a skops file whose every name is on the allow-list; the names in ``meta`` are never imported.

    Raises:
        RunError: the file names another type, which is neither imported nor constructed.
        KeyError, TypeError, ValueError, zipfile.BadZipFile: the file or ``meta`` is damaged.
    """
    if unknown := sorted(set(unknown_names(data))):
        raise RunError(
            f"The head of this run names {unknown[0]}, which is not allowed in a run folder.",
            where=file,
            why=f"not on the list of types that may be loaded: {', '.join(unknown)}",
            remedy="train the head again yourself; do not load run folders from sources that you do not trust",
        )
    head = SklearnHead(kind, "svm", {}, HeadParams(), class_names=())
    try:
        head.pipeline = skops.io.loads(data, trusted=sorted(TYPES))
    except UntrustedTypesFoundException as error:
        raise ValueError(str(error)) from error
    _check_pipeline(head.pipeline)
    head.estimator, head.temperature, head.source = str(meta["estimator"]), float(meta["temperature"]), meta["source"]
    head.has_probabilities = bool(meta["has_probabilities"])
    head.why_no_probabilities = meta["why_no_probabilities"]
    if head.source not in (None, "predict_proba", "decision_function"):
        raise ValueError(f"probabilities cannot come from {head.source!r}")
    return head


def _check_pipeline(pipeline: Any) -> None:
    """Refuse what is not a classifier behind at most a scaler, and trees that point outside themselves."""
    steps = [step for _, step in pipeline.steps] if isinstance(pipeline, Pipeline) else []
    scaled = all(isinstance(step, StandardScaler) for step in steps[:-1])
    if not steps or not scaled or not isinstance(steps[-1], ClassifierMixin):
        raise ValueError("it holds no classifier")
    check_trees(pipeline)


def unknown_names(data: bytes) -> Iterator[str]:
    """Names in a skops file that are not on the allow-list, read from its schema as plain JSON."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        schema = json.loads(archive.read(SCHEMA))
    for node in _nodes(schema):
        name, loader = f"{node.get('__module__')}.{node.get('__class__')}", node.get("__loader__")
        allowed = BASICS if loader == "TypeNode" else TYPES
        if name not in allowed:
            yield name
        elif loader not in LOADERS:
            yield f"{loader} of {name}"


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in the schema that says how to build something."""
    open_ = [value]
    while open_:
        item = open_.pop()
        if isinstance(item, dict):
            if NODE_KEYS & set(item):
                yield item
            open_ += item.values()
        elif isinstance(item, list):
            open_ += item
