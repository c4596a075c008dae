"""From a torchvision model to a network that maps images to features: head removed, pooling or layer chosen."""

from __future__ import annotations

import copy
import difflib
from typing import Any

import torch
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import DualGraphModule, create_feature_extractor
from torchvision.models.vision_transformer import VisionTransformer
from torchvision.ops import StochasticDepth

from ..errors import BackboneError
from .catalogue import Architecture, classifier_path, find_architecture, make_classifier, meta_images
from .pooling import MapPool, TokenPool

# Where a model keeps its global pooling as a module, by the way its name begins.
_POOLING_MODULES = {
    "avgpool": ("convnext", "efficientnet", "googlenet", "inception", "mobilenet_v3", "regnet", "resn", "swin", "wide"),
    "classifier.3": ("squeezenet",),
    "classifier.0": ("maxvit",),
}
# Where pooling is a function call inside forward: the node whose output is pooled.
_LAST_MAPS = {"densenet": "relu", "mnasnet": "layers", "mobilenet_v2": "features", "shufflenet": "conv5"}
# What follows the pooling is a stack of fully connected layers made for 6 x 6 or 7 x 7 positions.
_NEEDS_POSITIONS = ("alexnet", "vgg")

_OUTPUT = "features"

_KEEPS_SHAPE = (
    nn.BatchNorm2d,
    nn.Dropout,
    nn.GELU,
    nn.Hardswish,
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.Sigmoid,
    StochasticDepth,
)


class FeatureNetwork(nn.Module):
    """Images (n, 3, h, w), normalised, to features (n, feature_dim); trainable.

    Parameters and buffers are torchvision's own under ``model.``. ``image_size`` is the only size, in pixels, that
    a model with position embeddings takes.
    """

    def __init__(
        self,
        model: nn.Module,
        pool: nn.Module | None = None,
        *,
        picks_layer: bool = False,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.pool = pool if pool is not None else nn.Identity()
        self.picks_layer = picks_layer
        self.image_size = image_size

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(images)
        pooled: Tensor = self.pool(output[_OUTPUT] if self.picks_layer else output)
        return pooled


class FrozenBackbone(nn.Module):
    """A `FeatureNetwork` that stays as it is: eval mode whatever is asked of it, no gradients.

    Even where a caller puts single submodules into training mode, they are back in eval mode before images
    pass, so that BatchNorm buffers never move.
    """

    def __init__(self, network: FeatureNetwork) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FrozenBackbone:
        """Stay in eval mode."""
        super().train(False)
        return self

    def forward(self, images: Tensor) -> Tensor:
        if any(module.training for module in self.network.modules()):
            self.network.eval()
        with torch.no_grad():
            features: Tensor = self.network(images)
        return features


def make_module(name: str, *, layer: str | None = None, pooling: str = "default") -> tuple[FeatureNetwork, int]:
    """The network of a backbone without weights (parameters on the meta device) and its feature dimension.

    Raises:
        BackboneError: no such name or layer, or a pooling that does not fit the model.
    """
    architecture = find_architecture(name)
    network = make_network(architecture, make_classifier(architecture), layer=layer, pooling=pooling)
    network = network.to("meta")
    return network, measure_features(network, _native_size(architecture, network), name)


def make_network(architecture: Architecture, model: nn.Module, *, layer: str | None, pooling: str) -> FeatureNetwork:
    """Turn a whole model (changed in place, meta or real) into a `FeatureNetwork`.

    Raises:
        BackboneError: no such layer, or a pooling that does not fit.
    """
    size = _native_size(architecture, model)
    original = set(dict(model.named_modules()))
    path = classifier_path(model)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Identity())
    if layer is not None:
        return _cut_at_layer(architecture, model, layer, pooling, size, original)
    if isinstance(model, VisionTransformer):
        return _pooled_tokens(architecture, model, pooling)
    return _pooled_maps(architecture, model, pooling)


def measure_features(network: FeatureNetwork, size: int, name: str) -> int:
    """The feature dimension, from a forward pass of one image of ``size`` pixels without computing anything.

    Raises:
        BackboneError: the model cannot take images of this size.
    """
    output = _run_on_meta(network, size, name)
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise BackboneError(f"The output of {name} is not one feature vector an image.", where="backbone.layer")
    return int(output.shape[1])


def _run_on_meta(network: nn.Module, size: int, name: str) -> Any:
    usual = int(find_architecture(name).downloads[0].transforms().crop_size[0])
    shadow = _shapes_only(copy.deepcopy(network).to("meta").eval())
    try:
        with torch.no_grad():
            return shadow(meta_images(size))
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        needed = _needed_size(network) or usual
        raise BackboneError(
            f"{name} cannot take images of {size} x {size} pixels.",
            where="transform.crop",
            why=" ".join(str(error).split())[:200],
            remedy=f"set transform.crop to {needed}",
        ) from error


def _shapes_only(network: nn.Module) -> nn.Module:
    """Drop layers that keep the shape: without them a pass on the meta device is ten times faster."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if type(child) in _KEEPS_SHAPE:
                setattr(module, name, nn.Identity())
    return network


def _needed_size(network: nn.Module) -> int | None:
    for module in network.modules():
        size = getattr(module, "image_size", None)
        if isinstance(size, int):
            return size
    return None


def _native_size(architecture: Architecture, model: nn.Module) -> int:
    """A size that the model is sure to take: that of its position embeddings, or of its plain ImageNet weights."""
    size = _needed_size(model)
    return size if size is not None else int(architecture.downloads[0].transforms().crop_size[0])


def _pooled_tokens(architecture: Architecture, model: VisionTransformer, pooling: str) -> FeatureNetwork:
    if pooling in ("default", "cls"):
        return FeatureNetwork(model)
    if pooling == "cls_avg":
        return FeatureNetwork(
            _pick(model, "encoder"), TokenPool(pooling), picks_layer=True, image_size=model.image_size
        )
    raise _pooling_error(architecture, pooling, "a vision transformer has a class token", "default, cls or cls_avg")


def _pooled_maps(architecture: Architecture, model: nn.Module, pooling: str) -> FeatureNetwork:
    if pooling == "default":
        return FeatureNetwork(model)
    if pooling in ("cls", "cls_avg"):
        raise _pooling_error(architecture, pooling, "it has no class token", "default, avg or max")
    if architecture.model.startswith(_NEEDS_POSITIONS):
        why = "its fully connected layers need the pooled map's positions"
        raise _pooling_error(architecture, pooling, why, "default, or backbone.layer=features with avg or max")
    if pooling == "avg":  # what every convolutional model of torchvision does by default
        return FeatureNetwork(model)
    for path, prefixes in _POOLING_MODULES.items():
        if architecture.model.startswith(prefixes):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, nn.AdaptiveMaxPool2d(1))
            return FeatureNetwork(model)
    for prefix, node in _LAST_MAPS.items():
        if architecture.model.startswith(prefix):
            return FeatureNetwork(_pick(model, node), MapPool("max", (2, 3)), picks_layer=True)
    raise _pooling_error(architecture, pooling, "its pooling cannot be replaced", "default")


def _cut_at_layer(
    architecture: Architecture, model: nn.Module, layer: str, pooling: str, size: int, names: set[str]
) -> FeatureNetwork:
    if layer not in names or not layer:
        raise _layer_error(architecture, layer, names)
    try:
        picked = _pick(model, layer)
    except ValueError as error:
        raise _layer_error(architecture, layer, names, "it lies inside a layer that is taken whole") from error
    output = _run_on_meta(FeatureNetwork(picked, picks_layer=True), size, architecture.name)
    pool = _pool_for(architecture, model, layer, output, pooling)
    return FeatureNetwork(picked, pool, picks_layer=True, image_size=_needed_size(model))


def _pick(model: nn.Module, node: str) -> nn.Module:
    """The part of ``model`` up to ``node``, with the parameters of that part only."""
    picked = create_feature_extractor(model, {node: _OUTPUT}, suppress_diff_warning=True)
    for graph in (picked.train_graph, picked.eval_graph):
        _drop_needless(graph)
    pruned: nn.Module = DualGraphModule(picked, picked.train_graph, picked.eval_graph)
    return pruned.eval()


def _drop_needless(graph: fx.Graph) -> None:
    """Erase what the output does not need; assertions about later layers would otherwise keep these layers alive."""
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op in ("output", "placeholder") or any(user in needed for user in node.users):
            needed.add(node)
    for node in reversed(graph.nodes):
        if node not in needed:
            graph.erase_node(node)


def _pool_for(architecture: Architecture, model: nn.Module, layer: str, output: Any, pooling: str) -> nn.Module | None:
    """The pooling of a layer's output by its shape: vectors stay, tokens and maps are pooled."""
    kind = "avg" if pooling == "default" else pooling
    shape = tuple(output.shape) if isinstance(output, Tensor) else ()
    if len(shape) == 3 and isinstance(model, VisionTransformer):
        return TokenPool(kind)
    if kind in ("cls", "cls_avg"):
        raise _pooling_error(architecture, pooling, f"the output of {layer} has no class token", "default, avg or max")
    if len(shape) == 2:
        return None
    if len(shape) == 4 and shape[2] == shape[3]:
        return MapPool(kind, (2, 3))
    if len(shape) == 4 and shape[1] == shape[2]:  # channels last, as inside Swin and ConvNeXt
        return MapPool(kind, (1, 2))
    raise BackboneError(
        f"The output of {layer} in {architecture.name} is no feature map, no tokens and no vector.",
        where="backbone.layer",
        why=f"its shape is {shape}" if shape else f"it is a {type(output).__name__}",
        remedy="choose the layer that contains it",
    )


def _pooling_error(architecture: Architecture, pooling: str, why: str, valid: str) -> BackboneError:
    return BackboneError(
        f"The pooling {pooling!r} does not fit {architecture.name}.",
        where="backbone.pooling",
        why=why,
        remedy=f"use {valid}",
    )


def _layer_error(architecture: Architecture, layer: str, names: set[str], why: str | None = None) -> BackboneError:
    near = [name for name in difflib.get_close_matches(layer, sorted(names - {""}), n=4, cutoff=0.4) if name != layer]
    top = sorted(name for name in names if name and "." not in name)
    return BackboneError(
        f"{architecture.name} has no layer {layer!r} to take features from.",
        where="backbone.layer",
        why=why,
        remedy=f"use {' or '.join(near or top)}",
    )
