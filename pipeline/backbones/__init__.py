"""Name + weights -> a frozen `Backbone`: module, transform, feature dimension, identity."""

from .build import (
    Backbone,
    BackboneIdentity,
    backbone_bytes,
    build_backbone,
    build_classifier,
    resolve_backbone,
    trainable_module,
)
from .catalogue import BackboneRow, backbone_names, list_backbones
from .memo import WeightsMemo
from .network import FeatureNetwork, FrozenBackbone, make_module
from .precision import Verdict, accept_precision, reduced_precision_of, verdict_key
from .prepare import PreparedBackbone, prepare_for_inference
from .transform import Transform

__all__ = [
    "Backbone",
    "BackboneIdentity",
    "BackboneRow",
    "FeatureNetwork",
    "FrozenBackbone",
    "PreparedBackbone",
    "Transform",
    "Verdict",
    "WeightsMemo",
    "accept_precision",
    "backbone_bytes",
    "backbone_names",
    "build_backbone",
    "build_classifier",
    "list_backbones",
    "make_module",
    "prepare_for_inference",
    "reduced_precision_of",
    "resolve_backbone",
    "trainable_module",
    "verdict_key",
]
