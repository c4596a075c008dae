"""Backbone and head as one trainable module, and the head back as plain layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..heads import Layers
from ..runtime.seeds import derive_seed


class Standardise(nn.Module):
    """``(x - mean) / scale`` with constants of the training features; buffers, so no optimizer moves them."""

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.scale


class Classifier(nn.Module):
    """Normalised images (n, 3, h, w) -> logits (n, classes)."""

    def __init__(self, backbone: nn.Module, head: nn.Sequential) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        # The head stays in float32: it is small, and its logits are what is compared with the probe's.
        features = self.backbone(images)
        with torch.autocast(images.device.type, enabled=False):
            logits: Tensor = self.head(features.float())
        return logits


def make_head_module(
    layers: Layers, *, moments: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None, dropout: float = 0.0
) -> nn.Sequential:
    """Layers of standardised features as a module: standardisation, Linear layers, ReLU and dropout between them.

    A single layer has its dropout in front, as torchvision's classifiers do.

    Args:
        moments: mean and scale (d,) of the standardisation; without them there is none.
    """
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    if moments is not None:
        mean, scale = moments
        modules["standardise"] = Standardise(_float32(mean), _float32(scale))
    if dropout and len(layers.weights) == 1:
        modules["dropout"] = nn.Dropout(dropout)
    for position, (weight, bias) in enumerate(zip(layers.weights, layers.biases, strict=True)):
        if position:
            modules[f"relu{position}"] = nn.ReLU()
            if dropout:
                modules[f"dropout{position}"] = nn.Dropout(dropout)
        modules[f"linear{position}"] = _linear(weight, bias)
    return nn.Sequential(modules)


def make_random_head(
    inputs: int, classes: int, *, hidden: Sequence[int] = (), dropout: float = 0.0, seed: int = 0
) -> nn.Sequential:
    """A head with torch's default initialisation, drawn from ``seed`` alone."""
    sizes = [inputs, *hidden, classes]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "head"))
        drawn = [nn.Linear(first, second) for first, second in pairwise(sizes)]
    return make_head_module(_layers(drawn), dropout=dropout)


def fold_head(head: nn.Sequential) -> Layers:
    """The head's layers with the standardisation folded into the first: what a run stores."""
    layers = _layers([module for module in head if isinstance(module, nn.Linear)])
    if not isinstance(head[0], Standardise):
        return layers
    mean, scale = _float64(head[0].mean), _float64(head[0].scale)
    weight, bias = layers.weights[0], layers.biases[0]
    return Layers((weight / scale, *layers.weights[1:]), (bias - weight @ (mean / scale), *layers.biases[1:]))


def _layers(linears: Sequence[nn.Linear]) -> Layers:
    return Layers(
        tuple(_float64(linear.weight) for linear in linears), tuple(_float64(linear.bias) for linear in linears)
    )


def _linear(weight: NDArray[np.floating], bias: NDArray[np.floating]) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):  # what it draws is overwritten below
        linear = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        linear.weight.copy_(_float32(weight))
        linear.bias.copy_(_float32(bias))
    return linear


def _float32(values: NDArray[np.floating]) -> Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.float32)


def _float64(values: Tensor) -> NDArray[np.float64]:
    return values.detach().cpu().double().numpy()
