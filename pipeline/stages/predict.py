"""A run applied to images: the features of `extract`, through the cache, and the run's head. One path for every run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..artifacts import PARAMS_FILE, RunModel, read_model
from ..backbones import BackboneIdentity, BuiltNetwork, Transform, build_network
from ..errors import RunError
from ..evaluate import Classified, classify
from ..heads import Head, load_head
from ..params import Params, load_params
from ..runtime.device import resolve_device
from .embedding import Embedding
from .sources import (
    Origin,
    Source,
    forward_of,
    open_paths,
    open_quarantine,
    open_store,
    plain_view,
    worker_count,
)

BACKBONE_FILE = "backbone.safetensors"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Prediction:
    """One image's classes, most probable first; or the ``error`` that kept it from being classified.

    ``top`` holds (label, probability); the probability is None where the head gives none.
    """

    path: str
    label: str | None = None
    probability: float | None = None
    top: tuple[tuple[str, float | None], ...] = ()
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """``path, label, probability, top`` or ``path, error``, for JSON."""
        if self.error is not None:
            return {"path": self.path, "error": self.error}
        top = [{"label": label, "probability": probability} for label, probability in self.top]
        return {"path": self.path, "label": self.label, "probability": self.probability, "top": top}


@dataclass(frozen=True)
class Run:
    """A finished run, ready to classify images."""

    folder: Path
    params: Params
    model: RunModel
    head: Head

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.model.class_names)

    def origin(self) -> Origin:
        """Where the run's features come from."""
        record = self.model.backbone
        identity = BackboneIdentity(record.name, record.weights, record.digest, record.layer, record.pooling)
        transform = Transform.from_dict(self.model.transform, where=self.folder)
        device = resolve_device(self.params.extract.device)
        return Origin(identity, transform, self.model.feature_dim, device, self.model.precision)

    def build_network(self) -> BuiltNetwork:
        """The run's own backbone, proven to be the one it was made with.

        Raises:
            RunError: the weights named in the run's params are others now.
        """
        own = self.folder / BACKBONE_FILE
        section = self.params.backbone
        if own.exists():
            section = section.model_copy(update={"weights": str(own)})
        backbone = build_network(section, self.params.transform)
        if backbone.identity.digest != self.model.backbone.digest:
            raise RunError(
                "The run was made with other weights than those found now.",
                where=f"{self.folder} ({section.weights})",
                why=f"their digest is {backbone.identity.digest}, the run has {self.model.backbone.digest}",
                remedy="give the weights file it was made with: -s backbone.weights=PATH",
            )
        return backbone

    def embedding(self, source: Source, *, quiet: bool = False) -> Embedding:
        """What brings a source's features into the cache under this run's key, with its forward shape."""
        origin = self.origin()
        params = self.params.model_copy(
            update={"cache": self.params.cache.model_copy(update={"dtype": self.model.storage_dtype})}
        )
        size = self.model.forward_shape[0]
        return Embedding(
            source=source,
            store=open_store(params, origin),
            quarantine=open_quarantine(params, origin.transform),
            transformation=plain_view(origin.transform, params.data, params.extract),
            make_forward=lambda: forward_of(self.build_network, origin, size),
            workers=worker_count(params.extract),
            part_seconds=params.extract.part_seconds,
            quiet=quiet,
        )

    def predict(self, paths: Sequence[Path | str], *, top: int = 5, quiet: bool = True) -> list[Prediction]:
        """Classify image files and folders of them, in sorted order; bad files get an ``error``.

        Args:
            top: how many classes to list for an image, most probable first.

        Raises:
            DataError: a path does not exist, or there is no image.
        """
        source = open_paths([Path(path) for path in paths], self.params.data, self.params.cache)
        embedding = self.embedding(source, quiet=quiet)
        embedding.run(embedding.find_todo())
        return classify_source(embedding, lambda features: self._classify(features), self.class_names, top)

    def _classify(self, features: np.ndarray) -> Classified:
        return classify(self.head, features, len(self.model.class_names))


def load_run(folder: Path | str, overrides: Sequence[str] = ()) -> Run:
    """A run folder as an object that predicts; nothing in it is unpickled or imported.

    Args:
        overrides: ``key.path=value`` for params that differ here, such as ``backbone.weights`` or ``cache.dir``.

    Raises:
        RunError: the folder is missing, damaged or made by something else.
    """
    folder = Path(os.path.abspath(folder))
    model = read_model(folder)
    params = load_params(folder / PARAMS_FILE, overrides)
    return Run(folder, params, model, load_head(folder, model.head.model_dump()))


def classify_source(
    embedding: Embedding, answer: Callable[[np.ndarray], Classified], names: Sequence[str], top: int
) -> list[Prediction]:
    """A prediction for each file of the embedding's source, in its order."""
    tree, books = embedding.source.tree, embedding.source.books
    good = books.known & embedding.store.contains(books.digests)
    rows = np.flatnonzero(good)
    answers = answer(embedding.store.read(books.digests[rows]))
    results: dict[int, Prediction] = {}
    for index, row in enumerate(rows.tolist()):
        results[row] = _prediction(str(tree.root / tree.paths[row]), answers, index, names, top)
    for row in np.flatnonzero(~good).tolist():
        bad = embedding.quarantine.get(books.digest(row)) if books.known[row] else None
        error = f"{bad.reason}: {bad.remedy}" if bad else books.failures.get(row, "not read")
        results[row] = Prediction(str(tree.root / tree.paths[row]), error=error)
    return [results[row] for row in range(len(tree.paths))]


def _prediction(path: str, answers: Classified, index: int, names: Sequence[str], top: int) -> Prediction:
    label = names[int(answers.predicted[index])]
    if answers.probabilities is None:
        return Prediction(path, label, None, ((label, None),))
    row = answers.probabilities[index]
    order = np.argsort(-row, kind="stable")[:top]
    best = tuple((names[target], float(row[target])) for target in order)
    return Prediction(path, label, float(row[int(answers.predicted[index])]), best)
