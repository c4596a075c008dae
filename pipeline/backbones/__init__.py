"""Name + weights -> a frozen network: module, transform, feature dimension, identity."""

from .backbone import Backbone, Forward, make_decoder, resolve_backbone
from .build import (
    BackboneIdentity,
    BuiltNetwork,
    FrozenBackbone,
    backbone_bytes,
    build_classifier,
    build_network,
    identify_network,
    make_module,
    trainable_module,
)
from .catalogue import ZOOS, BackboneRow, backbone_names, describe_backbone, is_own_code, list_backbones
from .memo import WeightsMemo
from .pipe import Features, Pixels
from .precision import Verdict, accept_precision, kind_of_device, reduced_precisions_of, verdict_key
from .prepare import PreparedBackbone, prepare_for_inference
from .together import forward_together
from .transform import Transform
from .zoo import FeatureNetwork, WeightsSource, Zoo

__all__ = [
    "ZOOS",
    "Backbone",
    "BackboneIdentity",
    "BackboneRow",
    "BuiltNetwork",
    "FeatureNetwork",
    "Features",
    "Forward",
    "FrozenBackbone",
    "Pixels",
    "PreparedBackbone",
    "Transform",
    "Verdict",
    "WeightsMemo",
    "WeightsSource",
    "Zoo",
    "accept_precision",
    "backbone_bytes",
    "backbone_names",
    "build_classifier",
    "build_network",
    "describe_backbone",
    "forward_together",
    "identify_network",
    "is_own_code",
    "kind_of_device",
    "list_backbones",
    "make_decoder",
    "make_module",
    "prepare_for_inference",
    "reduced_precisions_of",
    "resolve_backbone",
    "trainable_module",
    "verdict_key",
]
