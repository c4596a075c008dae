"""The records of a run: what model.json says about data, backbone and head."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np

from ..artifacts import (
    BackboneRecord,
    DataRecord,
    HeadRecord,
    ParameterCounts,
    RunModel,
    current_versions,
)
from ..backbones import BackboneIdentity, make_module
from ..data.scan import SPLITS
from ..features.table import FeatureTable
from ..heads import Head
from .load import digest_of_data
from .sources import Origin


def backbone_record(identity: BackboneIdentity) -> BackboneRecord:
    """Which backbone made the features."""
    return BackboneRecord(
        name=identity.name,
        weights=identity.weights,
        digest=identity.digest,
        layer=identity.layer,
        pooling=identity.pooling,
    )


def data_record(table: FeatureTable) -> DataRecord:
    """The data by its digest, and the images of each split."""
    images = {name: int((table.splits == number).sum()) for number, name in enumerate(SPLITS)}
    return DataRecord(root=str(table.root), digest=digest_of_data(table), images=images)


def parameter_counts(origin: Origin, head: Head) -> ParameterCounts:
    """Trained numbers of the head, and those of the whole classifier; None where a head has no meaningful count."""
    trainable = head.parameter_count()
    if trainable is None:
        return ParameterCounts(trainable=None, total=None)
    network, _ = make_module(origin.identity.name, layer=origin.identity.layer, pooling=origin.identity.pooling)
    return ParameterCounts(trainable=trainable, total=trainable + sum(p.numel() for p in network.parameters()))


def parameter_line(counts: ParameterCounts) -> str:
    """``Trainable: 2,562 / 2,226,434 (0.1 %)``."""
    if counts.trainable is None or counts.total is None:
        return "Trainable: this kind of head has no parameters to count"
    share = 100 * counts.trainable / counts.total
    return f"Trainable: {counts.trainable:,} / {counts.total:,} ({share:.1f} %)"


def run_model(table: FeatureTable, origin: Origin, head: Head, *, dtype: str, batch: int, key: str) -> RunModel:
    """``model.json`` of a run of stage two, still without what saving the head adds and without the seconds."""
    crop = origin.transform.crop
    return RunModel(
        created=datetime.now(UTC),
        verb="train-head",
        class_names=list(table.class_names),
        backbone=backbone_record(origin.identity),
        transform=origin.transform.as_dict(),
        precision=origin.precision,
        storage_dtype=dtype,
        feature_dim=origin.feature_dim,
        forward_shape=[batch, 3, crop, crop],
        feature_key=key,
        head=HeadRecord(kind=head.kind),
        data=data_record(table),
        parameters=parameter_counts(origin, head),
        versions=current_versions(),
        seconds=0.0,
    )


def class_counts(table: FeatureTable, rows: np.ndarray) -> np.ndarray:
    """Images of each class among ``rows`` (bool (n,)), int (c,)."""
    targets = table.targets[rows]
    return np.bincount(targets[targets >= 0], minlength=len(table.class_names))
