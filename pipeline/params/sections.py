"""The sections of params.yaml, one frozen model each, with every default and its rule.

params.yaml in the project's root shows the same keys with the same defaults and explains them to users;
a test keeps the two together.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from ..errors import UsageError

# The extensions of torchvision's ImageFolder, repeated here so that reading params does not import torch.
IMAGE_EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

DEVICE_PATTERN = r"^(auto|cpu|mps|cuda(:\d+)?)$"
SECRETS = re.compile(
    r"://[^/@]*:[^/@]*@|[?&][^=]*(sig|token|key|secret|password|credential|policy)[^=]*=", re.IGNORECASE
)
SHARD_PATTERN = r"^\d+/[1-9]\d*$"
UNFREEZE_PATTERN = r"^(none|all|gradual|last-[1-9]\d*)$"
RUN_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"

# Mappings whose keys are the user's own words, so that a message may name them.
FREE_FORM = frozenset({"head.sklearn.params", "head.search"})

Precision = Literal["auto", "float32", "bfloat16", "float16"]
ExtractPrecision = Literal[Precision, "tf32"]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy and scikit-learn take


def _without_nul(value: Path | str) -> Path | str:
    if "\0" in str(value):
        raise ValueError("must not hold the character NUL, which no path has")
    return value


Name = Annotated[str, Field(min_length=1), AfterValidator(_without_nul)]
Folder = Annotated[Path, Field(strict=False), AfterValidator(_without_nul)]
Auto = Literal["auto"]


def is_url(place: object) -> bool:
    """Whether a place is an fsspec URL rather than a path of this machine."""
    return isinstance(place, str) and "://" in place


def as_place(value: object) -> Path | str:
    """A path of this machine as a `Path`, an fsspec URL as the text it is: a `Path` would make ``s3:/`` of ``s3://``.

    Raises:
        PydanticCustomError: a URL with a password or a signature, which would end up in runs and messages.
    """
    if isinstance(value, str) and is_url(value):
        if SECRETS.search(value):
            raise PydanticCustomError("secret", "a URL with a password or a signature")
        return value.rstrip("/")
    if not isinstance(value, str | Path):
        raise PydanticCustomError("path_type", "no path")
    return Path(value)


Place = Annotated[Path | str, BeforeValidator(as_place), AfterValidator(_without_nul)]


class Section(BaseModel):
    """A frozen section: unknown keys are errors, numbers are not read from text, NaN and infinity are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, ser_json_inf_nan="constants"
    )


class ColumnParams(Section):
    """Names of columns; ``None`` means: found by the names that people give them."""

    path: Name | None = None
    label: Name | None = None
    split: Name | None = None
    group: Name | None = None


class DataParams(Section):
    root: Place = Path("data/demo")
    layout: Literal["auto", "flat", "split"] = "auto"
    columns: ColumnParams = ColumnParams()
    images: Place | None = None
    corrections: Place | None = None
    extensions: list[str] | Literal["all"] = list(IMAGE_EXTENSIONS)
    group_pattern: str | None = None
    val_fraction: Fraction = 0.2
    test_fraction: Fraction = 0.0
    seed: Seed = 0
    on_bad_image: Literal["skip", "raise"] = "skip"
    max_pixels: Count = 178_956_970

    @field_validator("extensions")
    @classmethod
    def _lower_with_dot(cls, value: list[str] | str) -> list[str] | str:
        if isinstance(value, str):
            return value
        if not value:
            raise ValueError("must name at least one extension, or be `all`")
        return sorted({f".{item.lower().lstrip('.')}" for item in value})

    @field_validator("group_pattern")
    @classmethod
    def _pattern_with_one_group(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            groups = re.compile(value).groups
        except re.error as error:
            raise ValueError(f"must be a regular expression ({error})") from error
        if groups != 1:
            raise ValueError(f"must have exactly one (capturing) group that holds the name of the group, not {groups}")
        return value

    @model_validator(mode="after")
    def _leaves_a_train_split(self) -> DataParams:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction + test_fraction must stay below 1, or nothing is left to train on")
        return self


Pooling = Literal["default", "avg", "max", "cls", "cls_avg"]


class BackboneParams(Section):
    name: Name = "starter"
    weights: Name = "DEFAULT"
    layer: Name | None = None
    pooling: Pooling | list[Pooling] = "default"
    seed: Seed = 0

    @field_validator("pooling")
    @classmethod
    def _at_least_one(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, list) and (not value or len(set(value)) != len(value)):
            raise ValueError("must be a pooling, or a list of different ones")
        return value

    @property
    def poolings(self) -> tuple[str, ...]:
        """One or several."""
        return (self.pooling,) if isinstance(self.pooling, str) else tuple(self.pooling)

    @property
    def sole_pooling(self) -> str:
        """The only one.

        Raises:
            UsageError: there are several.
        """
        if len(self.poolings) > 1:
            raise UsageError(
                f"One pooling is needed here, and backbone.pooling names {', '.join(self.poolings)}.",
                where="backbone.pooling",
                remedy=f"choose one (train-head says which is best): -s backbone.pooling={self.poolings[0]}",
            )
        return self.poolings[0]


class TransformParams(Section):
    """``None`` means: as the preset of the weights says."""

    resize: Count | None = None
    crop: Count | None = None
    resize_mode: Literal["shortest", "squash"] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic"] | None = None
    mean: tuple[float, float, float] | None = Field(None, strict=False)
    std: tuple[Positive, Positive, Positive] | None = Field(None, strict=False)
    exif: bool = True
    background: tuple[
        Annotated[int, Field(ge=0, le=255)], Annotated[int, Field(ge=0, le=255)], Annotated[int, Field(ge=0, le=255)]
    ] = Field((255, 255, 255), strict=False)


class ExtractParams(Section):
    device: str = Field("auto", pattern=DEVICE_PATTERN)
    precision: ExtractPrecision = "auto"
    batch_size: Count | Auto = "auto"
    workers: Count | Auto = "auto"
    views: Annotated[int, Field(ge=0)] = 0
    views_seed: Seed = 0
    part_seconds: Positive = 30.0
    compile: bool = False
    decoder: Literal["pillow", "draft", "torchvision"] = "pillow"
    shard: str | None = Field(None, pattern=SHARD_PATTERN)

    @field_validator("shard")
    @classmethod
    def _shard_below_count(cls, value: str | None) -> str | None:
        if value is not None:
            index, count = map(int, value.split("/"))
            if index >= count:
                raise ValueError(f"must be i/n with i from 0 to n - 1, so at most {count - 1}/{count}")
        return value


class CacheParams(Section):
    dir: Folder = Path("cache")
    dtype: Literal["float16", "float32"] = "float16"


class LogisticParams(Section):
    strengths: Count = 45
    c_min: Positive = 1e-6
    c_max: Positive = 1e5
    path: Literal["auto", "full"] = "auto"
    choose_by: Literal["log_loss", "val_accuracy"] = "log_loss"
    tolerance: Positive = 3e-4

    @model_validator(mode="after")
    def _ordered(self) -> LogisticParams:
        if self.c_min > self.c_max:
            raise ValueError("c_min must not be above c_max")
        return self


class NetworkParams(Section):
    """A torch head trained by minibatches; ``hidden: []`` is a linear layer."""

    hidden: list[Count] = []
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    optimizer: Literal["adam", "adamw", "sgd"] = "adamw"
    lr: Positive = 1e-3
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegative = 1e-4
    batch_size: Count = 256
    epochs: Count = 100
    patience: Count = 10
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2


class MlpParams(NetworkParams):
    """The same keys with the defaults of a network with one hidden layer."""

    hidden: list[Count] = [256]
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.4


class SklearnParams(Section):
    estimator: Name = "svm"
    params: dict[str, Any] = {}


class HeadParams(Section):
    kind: Name | list[Name] = "logistic"
    folds: Annotated[int, Field(ge=2)] = 5
    seed: Seed = 0
    standardize: bool = True
    class_weight: Literal["balanced"] | dict[str, Positive] | None = None
    calibrate: Literal["none", "temperature"] = "none"
    memory_mb: Count | Auto = "auto"
    sample: Count | None = None
    search: dict[str, list[Any]] = {}
    prompts: Folder | None = None
    logistic: LogisticParams = LogisticParams()
    linear: NetworkParams = NetworkParams()
    mlp: MlpParams = MlpParams()
    sklearn: SklearnParams = SklearnParams()

    @field_validator("linear")
    @classmethod
    def _linear_is_linear(cls, value: NetworkParams) -> NetworkParams:
        if value.hidden:
            raise ValueError("linear has no hidden layers; choose kind mlp for them")
        return value

    @field_validator("kind")
    @classmethod
    def _at_least_one(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, list) and (not value or len(set(value)) != len(value)):
            raise ValueError("must be a name, or a list of different names")
        return value

    @model_validator(mode="after")
    def _val_chooses_once(self) -> HeadParams:
        on_val = self.logistic.choose_by == "val_accuracy" and "logistic" in self.kinds
        if on_val and (len(self.kinds) > 1 or self.calibrate != "none"):
            raise ValueError("logistic.choose_by: val_accuracy goes with kind: logistic alone and calibrate: none")
        return self

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds to train, one or several."""
        return (self.kind,) if isinstance(self.kind, str) else tuple(self.kind)


class AugmentParams(Section):
    """Random changes of training images (torchvision v2); 0 or false switches one off."""

    crop: Count | None = None
    crop_scale: Annotated[tuple[Probability, Probability], Field(strict=False)] | Auto = "auto"
    horizontal_flip: Probability | Auto = "auto"
    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    brightness: NonNegative = 0.0
    contrast: NonNegative = 0.0
    saturation: NonNegative = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    trivial_augment: bool = False
    erasing: Probability = 0.0

    @field_validator("crop_scale")
    @classmethod
    def _from_low_to_high(cls, value: tuple[float, float] | Auto) -> tuple[float, float] | Auto:
        if value != "auto" and not 0 < value[0] <= value[1]:
            raise ValueError("must be the smallest and the largest share, above 0, the smallest first")
        return value


class FinetuneParams(Section):
    epochs: Count = 5
    minutes: Positive | None = None
    batch_size: Count = 32
    device: str = Field("auto", pattern=DEVICE_PATTERN)
    precision: Precision = "auto"
    workers: Count | Auto = "auto"
    seed: Seed = 0
    start: Literal["probe", "random"] = "probe"
    hidden: list[Count] = []
    selection_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    select: Literal["log_loss", "accuracy"] = "log_loss"
    refit: bool = True
    backbone_lr: NonNegative | Auto = "auto"
    head_lr: NonNegative | Auto = "auto"
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    unfreeze: str = Field("all", pattern=UNFREEZE_PATTERN)
    batchnorm: Literal["auto", "frozen", "train"] = "auto"
    sync_batchnorm: bool = False
    compile: bool = False
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegative = 0.01
    schedule: Literal["one_cycle", "cosine", "step", "none"] = "cosine"
    warmup_epochs: NonNegative = 0.5
    one_cycle_peak: Annotated[float, Field(ge=1)] = 10.0
    step_epochs: Count = 7
    step_gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip_norm: NonNegative = 1.0
    accumulate: Count = 1
    patience: Annotated[int, Field(ge=0)] = 0
    class_weight: Literal["balanced"] | dict[str, Positive] | None = None
    interpolate: bool = True
    calibrate: Literal["none", "temperature"] = "temperature"
    checkpoint_minutes: Positive = 10.0
    image_cache_mb: Annotated[int, Field(ge=0)] | Auto = "auto"
    tensorboard: bool = False
    augment: AugmentParams = AugmentParams()


class RunsParams(Section):
    dir: Folder = Path("runs")
    name: str | None = Field(None, pattern=RUN_NAME_PATTERN)

    @field_validator("name")
    @classmethod
    def _not_latest(cls, value: str | None) -> str | None:
        if value == "latest":
            raise ValueError("must not be `latest`, which names the newest run")
        return value


class Params(Section):
    """The whole file. Functions below the composition root take one section, never this."""

    data: DataParams = DataParams()
    backbone: BackboneParams = BackboneParams()
    transform: TransformParams = TransformParams()
    extract: ExtractParams = ExtractParams()
    cache: CacheParams = CacheParams()
    head: HeadParams = HeadParams()
    finetune: FinetuneParams = FinetuneParams()
    runs: RunsParams = RunsParams()
