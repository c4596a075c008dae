"""What ``model.json`` and ``metrics.json`` hold, as typed, validated objects. Nothing here imports torch.

Names of classes and files may hold bytes that are no UTF-8 (Python keeps them as lone surrogates). pydantic's own
``str`` refuses such text, so fields that carry names are declared as `Text`, and the JSON is written as pure ASCII.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, field_validator, model_validator

FORMAT_VERSION: Final = 1
PROGRAM: Final = "image-transfer-pipeline"


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be text, not {type(value).__name__}")
    return value


Text = Annotated[str, PlainValidator(_text)]
Share = Annotated[float, Field(ge=0, le=1)]
Interval = Annotated[list[float], Field(min_length=2, max_length=2)]
Count = Annotated[int, Field(ge=0)]


class Record(BaseModel):
    """Frozen and strict; keys this version does not know are ignored, NaN and infinity are refused."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)

    def to_json(self) -> bytes:
        """Indented pure-ASCII JSON; lone surrogates become escapes and are read back as they were."""
        value = self.model_dump(mode="python")
        return (json.dumps(value, indent=1, allow_nan=False, default=_plain) + "\n").encode("ascii")


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    raise TypeError(f"{type(value).__name__} has no place in a run folder's JSON")


class BackboneRecord(Record):
    """Which backbone the features came from; ``digest`` is that of its tensors, in hex, ``code`` that of the source
    file of a network of the user's own."""

    name: Text
    weights: Text
    digest: Text
    layer: Text | None = None
    pooling: Text
    code: Text | None = None


class HeadRecord(Record):
    """The kind of head and what its own loader needs to find and check its file."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    kind: Text


class CorrectionsRecord(Record):
    """The user's corrections of labels: the table, its digest in hex, and how many images it changed and left out."""

    file: Text
    digest: Text
    relabelled: Count
    left_out: Count


class DataRecord(Record):
    """The data a run was made from. ``digest`` is `data_digest`; ``images`` counts the images of each split."""

    root: Text
    digest: Text
    images: dict[Text, Count]
    corrections: CorrectionsRecord | None = None


class ParameterCounts(Record):
    """Parameters of the classifier; ``trainable`` is None for heads that have no countable parameters."""

    trainable: Count | None
    total: Count | None


class RunModel(Record):
    """``model.json``: everything that prediction needs besides the tensors.

    ``forward_shape`` is the shape (images, channels, height, width) that every forward batch was padded to, on a
    ``device`` of that kind (None for runs from before it was recorded);
    ``decoder`` is the rule by which bytes became pixels (runs from before it was recorded have it in their params);
    ``feature_key`` is the cache's key of the features that were scored, ``feature_keys`` are all that were used;
    ``seconds`` is the wall time of the verb that made the run.
    """

    program: Literal["image-transfer-pipeline"] = PROGRAM
    format_version: Literal[1] = FORMAT_VERSION
    created: datetime = Field(strict=False)
    verb: Text
    class_names: Annotated[list[Text], Field(min_length=1)]
    backbone: BackboneRecord
    transform: dict[Text, Any]
    decoder: Text | None = None
    precision: Annotated[str, Field(pattern=r"^(float32|tf32|bfloat16|float16)$")]
    storage_dtype: Annotated[str, Field(pattern=r"^float(16|32)$")]
    feature_dim: Annotated[int, Field(ge=1)]
    forward_shape: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=4, max_length=4)]
    device: Text | None = None
    feature_key: Text | None = None
    feature_keys: list[Text] = []
    head: HeadRecord
    data: DataRecord
    parameters: ParameterCounts
    versions: dict[Text, Text]
    seconds: Annotated[float, Field(ge=0)]
    parent: Text | None = None

    @field_validator("created", mode="before")
    @classmethod
    def _not_a_number(cls, value: object) -> object:
        if not isinstance(value, (str, datetime)):
            raise ValueError("must be a date and time")
        return value

    @field_validator("created")
    @classmethod
    def _with_zone(cls, value: datetime) -> datetime:
        if value.tzinfo is None:
            raise ValueError("must carry a time zone")
        return value

    @field_validator("class_names")
    @classmethod
    def _different(cls, value: list[str]) -> list[str]:
        if len(set(value)) != len(value):
            raise ValueError("must be different names")
        return value


class ClassScores(Record):
    """One row of the per-class table; a score that has no meaning (no such images, never predicted) is None."""

    label: Text
    n: Count
    predicted: Count
    precision: Share | None
    recall: Share | None
    recall_ci95: Interval | None
    f1: Share | None


class ReliabilityBin(Record):
    """Images whose top probability lies in (low, high]: how many, how sure, how often right."""

    low: float
    high: float
    n: Count
    confidence: Share
    accuracy: Share


class ConfusedPair(Record):
    label: Text
    predicted: Text
    n: Count


class Leak(Record):
    """Reported images that train holds too: byte for byte, or (``by_group`` of them) only by their group.

    The accuracy is that of the ``n`` others.
    """

    leaked: Count
    by_group: Count = 0
    n: Count
    accuracy: Share | None
    accuracy_ci95: Interval | None


class Uncorrected(Record):
    """The score by the labels as they were found, where ``corrected`` images of the reported split were corrected."""

    corrected: Count
    n: Count
    accuracy: Share | None
    accuracy_ci95: Interval | None


class CoveragePoint(Record):
    """The ``n`` images with at least this confidence: how many of them are classified rightly."""

    n: Count
    confidence: Share
    accuracy: Share
    accuracy_ci95: Interval | None


class CurvePoint(Record):
    """One point of a learning curve; ``low`` and ``high`` are its band."""

    images: Count
    accuracy: Share
    low: Share
    high: Share


class RunMetrics(Record):
    """``metrics.json``: the scores, how they came about, and all that the report draws.

    ``metrics`` holds the numbers (``accuracy``) and their 95 % intervals (``accuracy_ci95``); a value that cannot be
    given is None and ``reasons`` says why under the same name. ``confusion[i][j]`` counts images of class i
    predicted as class j; it is None above 1000 classes. ``history`` has one row an epoch, ``leaderboard`` one a head.
    ``groups`` numbers the group of each scored image, in the order of ``predictions.csv``; None where each is alone.
    """

    program: Literal["image-transfer-pipeline"] = PROGRAM
    format_version: Literal[1] = FORMAT_VERSION
    split: Text
    n: Count
    metrics: dict[Text, float | Interval | None]
    reasons: dict[Text, Text] = {}
    baseline_accuracy: Share | None
    baseline_class: Text | None = None
    class_names: list[Text]
    confusion: list[list[Count]] | None
    confused: list[ConfusedPair] = []
    per_class: list[ClassScores]
    reliability: list[ReliabilityBin] | None = None
    coverage: list[CoveragePoint] = []
    protocol: Text
    leak: Leak | None = None
    uncorrected: Uncorrected | None = None
    groups: list[Count] | None = None
    warnings: list[Text] = []
    selected: dict[Text, Any] = {}
    leaderboard: list[dict[Text, Any]] = []
    history: list[dict[Text, Any]] = []
    curve: list[CurvePoint] = []

    @model_validator(mode="after")
    def _sizes_agree(self) -> RunMetrics:
        classes = len(self.class_names)
        if len(self.per_class) != classes:
            raise ValueError(f"per_class has {len(self.per_class)} rows for {classes} classes")
        square = self.confusion is None or (
            len(self.confusion) == classes and all(len(row) == classes for row in self.confusion)
        )
        if not square:
            raise ValueError(f"confusion must be {classes} x {classes}")
        if self.groups is not None and len(self.groups) != self.n:
            raise ValueError(f"groups has {len(self.groups)} entries for {self.n} images")
        return self

    def summary(self, run: str) -> dict[str, Any]:
        """The ``--json`` summary of train-head, finetune and evaluate; ``run`` is the folder's absolute path."""
        scores = ("split", "n", "metrics", "baseline_accuracy", "uncorrected", "leak")
        names = (*scores, "selected", "reasons", "protocol", "warnings")
        values = self.model_dump(mode="python")
        return {"run": run, **{name: values[name] for name in names}}
