"""A run: published from what a stage made, loaded from its folder alone, applied to images. One path for every run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..artifacts import (
    METRICS_FILE,
    MODEL_FILE,
    PARAMS_FILE,
    PREDICTIONS_FILE,
    REPORT_FILE,
    BackboneRecord,
    CorrectionsRecord,
    DataRecord,
    HeadRecord,
    ParameterCounts,
    Predictions,
    RunMetrics,
    RunModel,
    RunSummary,
    current_versions,
    publishing_run,
    read_model,
    write_predictions,
)
from ..backbones import Backbone, BackboneIdentity, Transform, kind_of_device, make_decoder
from ..backbones.backbone import DECODER_RULES
from ..data.images import Given, Images, open_given
from ..data.source import SPLITS
from ..errors import RunError
from ..evaluate import ClassifierOutput, apply_head
from ..features.cache import FeatureCache, FeatureTable
from ..heads import Head, load_head
from ..insight.gallery import Curator, Gallery
from ..insight.thumbnails import Thumbnails
from ..params import Params, Place, dump_params, load_params

if TYPE_CHECKING:
    from ..backbones import BuiltNetwork

BACKBONE_FILE = "backbone.safetensors"
FEW_IMAGES = 64


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
    """A finished run, ready to classify images.

    Attributes:
        imports: ``backbone.name`` was named by the caller, so that a network of the user's own may be imported.
    """

    folder: Path
    params: Params
    model: RunModel
    head: Head
    imports: bool = False

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes that the head tells apart, by target."""
        return tuple(self.model.class_names)

    @cached_property
    def backbone(self) -> Backbone:
        """The backbone that made the run's features: all of it from the run's own records.

        Raises:
            RunError: the records name a rule of decoding that this program does not have.
        """
        record, params = self.model.backbone, self.params
        transform = Transform.from_dict(self.model.transform, where=self.folder)
        return Backbone(
            identity=BackboneIdentity(
                record.name, record.weights, record.digest, record.layer, record.pooling, record.code
            ),
            transform=transform,
            feature_dim=self.model.feature_dim,
            decoder=make_decoder(transform, params.data.max_pixels, self._decoding_rule()),
            place=params.extract.device,
            precision=self.model.precision,
            batch=self.model.forward_shape[0],
            made_on=self.model.device,
            source=self._build_network,
            compiled=params.extract.compile,
        )

    def _decoding_rule(self) -> str:
        """As recorded; runs of before it was recorded have it in their params."""
        rule = self.model.decoder or DECODER_RULES[self.params.extract.decoder]
        if rule not in DECODER_RULES.values():
            raise RunError(
                "The run's images were decoded by a rule that this program does not have.",
                where=self.folder,
                why=f"it is {rule!r}; known are {', '.join(DECODER_RULES.values())}",
                remedy="use the version of the program that made the run",
            )
        return rule

    def _build_network(self) -> BuiltNetwork:
        """The run's own network, proven to be the one it was made with."""
        from ..backbones import build_network, is_own_code

        own = self.folder / BACKBONE_FILE
        section, record = self.params.backbone, self.model.backbone
        if is_own_code(section.name) and not self.imports:
            raise RunError(
                f"The run's network is the function {section.name}, which is not in its folder.",
                where=self.folder,
                why="a run folder is data: nothing that it names is imported",
                remedy=f"if you trust that module, name it yourself: --backbone {section.name}",
            )
        if own.exists():
            section = section.model_copy(update={"weights": str(own)})
        built = build_network(section, self.params.transform)
        if built.identity.code != record.code:
            raise RunError(
                f"The source file of {section.name} is not what it was when the run was made.",
                where=self.folder,
                why=f"its digest is {built.identity.code}, the run has {record.code}",
                remedy="use the module as it was then, or train again",
            )
        if built.identity.digest != record.digest:
            raise RunError(
                "The run was made with other weights than those found now.",
                where=f"{self.folder} ({section.weights})",
                why=f"their digest is {built.identity.digest}, the run has {record.digest}",
                remedy="give the weights file it was made with: -s backbone.weights=PATH",
            )
        return built

    def cache(self, images: Images, *, quiet: bool = False) -> FeatureCache:
        """The features of ``images`` under the run's backbone, stored as the run's were."""
        storage = self.params.cache.model_copy(update={"dtype": self.model.storage_dtype})
        extract = self.params.extract.model_copy(update={"views": 0})
        return FeatureCache(images, self.backbone, storage, extract, quiet=quiet)

    def predict(
        self,
        images: Given | Iterable[Given],
        *,
        top: int = 5,
        say: Callable[[str], None] = lambda _line: None,
        quiet: bool = True,
    ) -> list[Prediction]:
        """Classify images in the order given, those of a folder by name; bad ones get an ``error``.

        Args:
            images: a path of a file or folder, bytes, a uint8 array (h, w), (h, w, 3) or (h, w, 4), a PIL image, or
                a list of them.
            top: how many classes to list for an image, most probable first.
            say: takes what the user should be warned of.

        Raises:
            TypeError: something is no image and no path.
            DataError: a path does not exist, or there is no image.
        """
        return self._predict(open_given(images, self.params.data, self.params.cache.dir), top, say, quiet)

    def evaluate(self, data: Place | None = None, *, quiet: bool = True) -> RunSummary:
        """The scores on the labelled images of ``data``, or on the run's own.

        Raises:
            DataError: no labelled images, or a class that the run does not know.
        """
        from .evaluate import evaluate_run  # which knows runs

        return evaluate_run(self, data, quiet=quiet).summary(str(self.folder))

    def _predict(self, images: Images, top: int, say: Callable[[str], None], quiet: bool) -> list[Prediction]:
        if len(images) <= FEW_IMAGES:
            images.read_unknown(quiet=True)  # so that where all have features, nothing that computes is imported
        cache = self.cache(images, quiet=quiet)
        cache.fill()
        for warning in cache.warnings:
            say(f"Warning: {warning}")
        rows = np.flatnonzero(cache.present)
        output = apply_head(self.head, cache.read(images.digests[rows]), len(self.class_names))
        problem = cache.quarantine.problem_with
        return label_images(images, rows.tolist(), output, self.class_names, top, problem=problem)


def predict(run: Run | Path | str, images: Given | Iterable[Given], *, top: int = 5) -> list[Prediction]:
    """Classify images with a run, or the run in that folder; as `Run.predict`."""
    return (run if isinstance(run, Run) else load_run(run)).predict(images, top=top)


def evaluate(run: Run | Path | str, data: Place | None = None, *, quiet: bool = True) -> RunSummary:
    """The scores of a run, or of the run in that folder, on ``data`` or on its own images; as `Run.evaluate`."""
    return (run if isinstance(run, Run) else load_run(run)).evaluate(data, quiet=quiet)


def load_run(folder: Path | str, overrides: Sequence[str] = ()) -> Run:
    """A run folder as an object that predicts; nothing in it is unpickled or imported.

    Args:
        overrides: ``key.path=value`` for params that differ here, such as ``backbone.weights`` or ``cache.dir``; with
            ``backbone.name=module:function`` that module may be imported.

    Raises:
        RunError: the folder is missing, damaged or made by something else.
    """
    folder = Path(os.path.abspath(folder))
    model = read_model(folder)
    params = load_params(folder / PARAMS_FILE, overrides)
    imports = any(override.partition("=")[0].strip() == "backbone.name" for override in overrides)
    return Run(folder, params, model, load_head(folder, model.head.model_dump()), imports)


def label_images(
    images: Images,
    rows: Sequence[int],
    output: ClassifierOutput,
    names: Sequence[str],
    top: int,
    *,
    problem: Callable[[Images, int], str],
) -> list[Prediction]:
    """A prediction for each image: ``output`` holds those at ``rows``, ``problem`` says what ails the others."""
    place = {row: index for index, row in enumerate(rows)}
    return [
        _prediction(images.path(row), output, place[row], names, top)
        if row in place
        else Prediction(images.path(row), error=problem(images, row))
        for row in range(len(images))
    ]


def _prediction(path: str, output: ClassifierOutput, index: int, names: Sequence[str], top: int) -> Prediction:
    label = names[int(output.predicted[index])]
    if output.probabilities is None:
        return Prediction(path, label, None, ((label, None),))
    row = output.probabilities[index]
    order = np.argsort(-row, kind="stable")[:top]
    best = tuple((names[target], float(row[target])) for target in order)
    return Prediction(path, label, float(row[int(output.predicted[index])]), best)


# -- a run from what a stage made -------------------------------------------------------------------------------------


def run_model(cache: FeatureCache, table: FeatureTable, head: Head) -> RunModel:
    """``model.json`` of a run of stage two, still without what saving the head adds and without the seconds."""
    backbone = cache.backbone
    crop = backbone.transform.crop
    return RunModel(
        created=datetime.now(UTC),
        verb="train-head",
        class_names=list(table.class_names),
        backbone=backbone_record(backbone.identity),
        transform=backbone.transform.as_dict(),
        decoder=backbone.decoder.rule,
        precision=backbone.precision,
        storage_dtype=cache.store.spec.dtype,
        feature_dim=backbone.feature_dim,
        forward_shape=[backbone.batch_size, 3, crop, crop],
        device=kind_of_device(backbone.device),
        feature_key=cache.key,
        feature_keys=[cache.key, *(view.key for view in cache.views())],
        head=HeadRecord(kind=head.kind),
        data=DataRecord(
            root=str(table.root),
            digest=table.data_digest,
            images={name: int((table.splits == number).sum()) for number, name in enumerate(SPLITS)},
            corrections=_corrections_record(cache.images, table),
        ),
        parameters=_parameter_counts(backbone, head),
        versions=current_versions(),
        seconds=0.0,
    )


def _corrections_record(images: Images, table: FeatureTable) -> CorrectionsRecord | None:
    corrections, found = images.corrections, table.found
    if corrections is None or found is None:
        return None
    changed = found != table.targets
    left_out = int((changed & (table.targets < 0)).sum())
    return CorrectionsRecord(
        file=str(corrections.file),
        digest=corrections.digest,
        relabelled=int(changed.sum()) - left_out,
        left_out=left_out,
    )


def backbone_record(identity: BackboneIdentity) -> BackboneRecord:
    """Which backbone made the features."""
    return BackboneRecord(
        name=identity.name,
        weights=identity.weights,
        digest=identity.digest,
        layer=identity.layer,
        pooling=identity.pooling,
        code=identity.code,
    )


def _parameter_counts(backbone: Backbone, head: Head) -> ParameterCounts:
    """Trained numbers of the head, and those of the whole classifier; None where a head has no meaningful count."""
    trainable, frozen = head.parameter_count(), backbone.parameters
    total = None if trainable is None or frozen is None else trainable + frozen
    return ParameterCounts(trainable=trainable, total=total)


def make_gallery(cache: FeatureCache, table: FeatureTable, split: str, predictions: Predictions) -> Gallery:
    """The pictures of a run's report: mistakes on ``split``, and all images as points.

    Args:
        table: all images of ``cache`` that can be used, with the features that the head was given.
    """
    place = {name: target for target, name in enumerate(table.class_names)}
    predicted = np.array([place[name] for name in predictions.predicted], np.int64)
    rows = np.flatnonzero(table.labelled(SPLITS.index(split)))
    chances = None if predictions.probabilities is None else predictions.probabilities[rows]
    positions = np.flatnonzero(cache.present)
    thumbnails = Thumbnails(cache.images, positions, cache.backbone.decoder, cache.store.cache_dir)
    curator = Curator(table, thumbnails, SPLITS)
    gallery = curator.mistakes(rows, predicted[rows], chances)
    wrong = rows[predicted[rows] != table.targets[rows]]
    return replace(gallery, map=curator.map(wrong, method="PCA", pictures=False))


def publish_run(
    params: Params,
    name: str,
    *,
    head: Head,
    model: RunModel,
    metrics: RunMetrics,
    predictions: Predictions,
    gallery: Gallery | None = None,
    fill: Callable[[Path], None] = lambda _folder: None,
) -> Path:
    """The absolute path of a new run folder under ``runs.dir``: whole, or not there.

    Args:
        name: taken over, or followed by ``-2`` and so on where it exists.
        model: its ``head`` record is completed with what loading the head needs.
        gallery: the pictures of its report.
        fill: writes further files (a fine-tuned backbone) into the folder.

    Raises:
        RunError: the folder cannot be written.
    """
    from ..export.card import CARD_FILE, render_card
    from ..report import Content, render_report  # here, as its plots take a while to import

    with publishing_run(params.runs.dir, name) as (folder, path):
        record = HeadRecord.model_validate({**model.head.model_dump(), **head.save(folder)})
        model = model.model_copy(update={"head": record})
        (folder / PARAMS_FILE).write_text(dump_params(params), encoding="utf-8")
        (folder / MODEL_FILE).write_bytes(model.to_json())
        (folder / METRICS_FILE).write_bytes(metrics.to_json())
        with open(folder / PREDICTIONS_FILE, "wb") as file:
            write_predictions(file, predictions)
        report = render_report(Content(path.name, model, metrics, dump_params(params), gallery or Gallery()))
        (folder / REPORT_FILE).write_text(report, encoding="utf-8")
        card = render_card(path.name, model, metrics, predictions, params)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
        fill(folder)
    return path
