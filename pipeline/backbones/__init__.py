"""Name + weights -> a frozen network: module, transform, feature dimension, identity.

The names below are imported when first used: what needs no network does not import the libraries that know them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backbone import (
        Backbone,
        Features,
        Forward,
        Pixels,
        make_decoder,
        resolve_backbone,
    )
    from .build import (
        BuiltNetwork,
        FrozenBackbone,
        backbone_bytes,
        build_classifier,
        build_network,
        identify_network,
        make_module,
        trainable_module,
    )
    from .catalogue import (
        ZOOS,
        BackboneRow,
        backbone_names,
        describe_backbone,
        first_worth_a_look,
        is_own_code,
        list_backbones,
    )
    from .identity import BackboneIdentity
    from .memo import WeightsMemo
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
    "first_worth_a_look",
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

# From the light to the heavy: those up to `backbone` import no torch.
_HOMES = ("memo", "identity", "transform", "precision", "backbone", "build", "catalogue", "prepare", "together", "zoo")


def __getattr__(name: str) -> Any:
    if name in __all__:
        modules = (import_module(f".{home}", __name__) for home in _HOMES)
        return next(vars(module)[name] for module in modules if name in vars(module))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
