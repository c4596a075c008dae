"""params.yaml as typed, validated, frozen objects; every error of a file is reported at once."""

from .load import dump_params, load_params
from .sections import (
    AugmentParams,
    BackboneParams,
    CacheParams,
    DataParams,
    ExtractParams,
    FinetuneParams,
    HeadParams,
    LogisticParams,
    MlpParams,
    NetworkParams,
    Params,
    RunsParams,
    SklearnParams,
    TransformParams,
)

__all__ = [
    "AugmentParams",
    "BackboneParams",
    "CacheParams",
    "DataParams",
    "ExtractParams",
    "FinetuneParams",
    "HeadParams",
    "LogisticParams",
    "MlpParams",
    "NetworkParams",
    "Params",
    "RunsParams",
    "SklearnParams",
    "TransformParams",
    "dump_params",
    "load_params",
]
