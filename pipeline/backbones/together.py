"""Several poolings of one network in one pass over the images."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .backbone import Backbone, Forward
from .build import FrozenBackbone
from .prepare import REDUCED, prepare_for_inference
from .zoo import FeatureNetwork


class Together(FeatureNetwork):
    """The features of several networks side by side, (n, the sum of their dimensions).

    Networks that compute the same before they pool, as their ``trunk_key`` says, hold and compute it once.
    """

    def __init__(self, networks: Sequence[FeatureNetwork]) -> None:
        super().__init__(nn.ModuleList(networks), input_size=networks[0].input_size)
        first: dict[Hashable, FeatureNetwork] = {}
        for network in networks:
            trunk = first.setdefault(network.trunk_key or id(network), network)
            if trunk is not network:
                network.model.load_state_dict(trunk.model.state_dict(), strict=False, assign=True)

    def forward(self, images: Tensor) -> Tensor:
        outputs: dict[Hashable, Any] = {}
        features = []
        for number, network in enumerate(self.model.children()):
            assert isinstance(network, FeatureNetwork)
            key = network.trunk_key or number
            if key not in outputs:
                outputs[key] = network.trunk(images)
            features.append(network.pooled(outputs[key]))
        return torch.cat(features, 1)


def forward_together(backbones: Sequence[Backbone]) -> Forward:
    """Pixels to the features of all ``backbones``, of one name, transform and precision, side by side."""
    first = backbones[0]
    if len(backbones) == 1:
        return first.forward

    def load(precision: str) -> nn.Module:
        built = [backbone.build() for backbone in backbones]
        module = FrozenBackbone(Together([item.module.network for item in built]))
        joint = replace(built[0], module=module, feature_dim=sum(item.feature_dim for item in built))
        prepared: nn.Module = prepare_for_inference(
            joint, device=first.device, precision=precision, fuse=not first.compiled
        )
        return torch.compile(prepared) if first.compiled else prepared  # type: ignore[return-value]

    shape = (first.transform.normalise, first.device, first.batch_size)
    exact = Forward(lambda: load("float32"), *shape) if first.precision in REDUCED else None
    return Forward(lambda: load(first.precision), *shape, exact=exact, halved=first.remember_fit)
