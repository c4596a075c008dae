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
from .transform import Transform

__all__ = [
    "Backbone",
    "BackboneIdentity",
    "BackboneRow",
    "FeatureNetwork",
    "FrozenBackbone",
    "Transform",
    "WeightsMemo",
    "backbone_bytes",
    "backbone_names",
    "build_backbone",
    "build_classifier",
    "list_backbones",
    "make_module",
    "resolve_backbone",
    "trainable_module",
]
