"""Name + weights -> a frozen `backbone network`: module, transform, feature dimension, identity."""

from .backbone import (
    Backbone,
    Features,
    Forward,
    Pixels,
    make_decoder,
    resolve_backbone,
)
from .build import (
    BackboneIdentity,
    BuiltNetwork,
    backbone_bytes,
    build_classifier,
    build_network,
    identify_network,
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
    "accept_precision",
    "backbone_bytes",
    "backbone_names",
    "build_classifier",
    "build_network",
    "identify_network",
    "list_backbones",
    "make_decoder",
    "make_module",
    "prepare_for_inference",
    "reduced_precision_of",
    "resolve_backbone",
    "trainable_module",
    "verdict_key",
]
