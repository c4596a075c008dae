"""torchvision's classification models as a zoo, and the starter, whose weights come with the package.

All that is known of these models by their names stands here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torchvision
from torch import fx, nn
from torchvision.models import get_model, get_model_weights, list_models
from torchvision.models.feature_extraction import DualGraphModule, create_feature_extractor
from torchvision.models.vision_transformer import VisionTransformer

from ..errors import BackboneError
from .transform import Transform
from .weights import checkpoint_file, download, read_checkpoint
from .zoo import (
    POOLINGS,
    FeatureNetwork,
    MapPool,
    Published,
    Tensors,
    TokenPool,
    WeightsSource,
    layer_error,
    pool_for,
    pooling_error,
    run_on_meta,
    without_storage,
)

# Weights that come with the package, by backbone name: (torchvision model, safetensors file). Such a file carries its
# transform in its metadata; `weights: DEFAULT` loads it, and nothing else has to know about it.
PACKAGED: dict[str, tuple[str, Path]] = {
    "starter": ("shufflenet_v2_x1_0", Path(__file__).parent / "starter" / "weights.safetensors"),
}

# What a builder must be told so that the model always is the one its weights were trained as: without auxiliary
# heads, and (googlenet, inception_v3) with the input renormalised inside, as torchvision does for its weights.
_BUILDER_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "transform_input": True, "init_weights": True},
    "inception_v3": {"aux_logits": False, "transform_input": True, "init_weights": True},
}
_AUXILIARY = re.compile(r"(^|\.)(aux1|aux2|AuxLogits)\.")
# Module names lost their dots long after these files were made; torchvision renames the keys in the same way.
_OLD_DENSENET = re.compile(
    r"^(.*denselayer\d+\.(?:norm|relu|conv))\.((?:[12])\.(?:weight|bias|running_mean|running_var|num_batches_tracked))$"
)
_POSITIONS = "encoder.pos_embedding"

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

_Cut = tuple[nn.Module, nn.Module | None]  # a model without its head, and the pooling that follows it


class TorchvisionZoo:
    """Every classification model of torchvision by its name there (quantised ones left out), and packaged ones."""

    packages = ("torch", "torchvision")

    def names(self) -> Sequence[str]:
        """Packaged ones first."""
        return (*PACKAGED, *_models())

    def owns(self, name: str) -> bool:
        return name in PACKAGED or name in _models()

    def version(self, name: str) -> str:
        return f"torchvision {torchvision.__version__}"

    def code_digest(self, name: str) -> None:
        return None

    def tags(self, name: str) -> Sequence[str]:
        """torchvision's enum names; of a packaged backbone its own weights only."""
        return ("DEFAULT",) if name in PACKAGED else tuple(item.name for item in get_model_weights(name))

    def resolve(self, name: str, weights: str) -> WeightsSource | None:
        """By enum name, with or without the enum's own (``ResNet50_Weights.IMAGENET1K_V1``)."""
        if name in PACKAGED:
            return WeightsSource("DEFAULT", PACKAGED[name][1]) if weights == "DEFAULT" else None
        item = get_model_weights(name).__members__.get(weights.rpartition(".")[2])
        if item is None:
            return None
        path = checkpoint_file(item.url)
        return WeightsSource(item.name, path, item.name, partial(download, item.url, path, what=str(item)))

    def licence(self, name: str) -> str | None:
        """That of packaged weights; torchvision states one for SWAG's alone, by the address of its text."""
        if name in PACKAGED:
            return "MIT"
        stated: str | None = get_model_weights(name).DEFAULT.meta.get("license")
        return "CC-BY-NC-4.0" if stated and "SWAG" in stated else stated

    def published(self, name: str) -> Published | None:
        """Of the default weights, from their metadata; none of a packaged backbone, which ImageNet does not score."""
        if name in PACKAGED:
            return None
        meta = get_model_weights(name).DEFAULT.meta
        return Published(meta["_metrics"]["ImageNet-1K"]["acc@1"] / 100, meta["_ops"], meta["_file_size"])

    def preset(self, name: str, source: WeightsSource, image_size: int | None = None) -> Transform:
        """For weights of unknown origin that of a packaged file, else of the plain ImageNet weights."""
        if source.tag is not None:
            return preset_transform(get_model_weights(name)[source.tag])
        packaged = read_checkpoint(PACKAGED[name][1]).transform if name in PACKAGED else None
        if packaged is not None:
            return packaged
        presets = [preset_transform(item) for item in _pretrained(_model_of(name))]
        fitting = [preset for preset in presets if image_size in (None, preset.crop)]
        return fitting[0] if fitting else _scaled(presets[0], image_size or presets[0].crop)

    def make(
        self,
        name: str,
        *,
        layer: str | None = None,
        pooling: str = "default",
        image_size: int | None = None,
        tensors: Tensors | None = None,
        initialise: bool = False,
    ) -> FeatureNetwork:
        """Without its classifier; parameters of later layers than ``layer`` are not there either."""
        model = make_model(name, tensors=tensors, initialise=initialise)
        return cut_model(name, model, layer=layer, pooling=pooling)

    def make_classifier(
        self, name: str, *, tensors: Tensors | None = None, initialise: bool = False
    ) -> tuple[FeatureNetwork, tuple[str, ...]]:
        """The whole model, with the names of ImageNet's 1000 classes."""
        model = make_model(name, tensors=tensors, initialise=initialise)
        categories = tuple(_pretrained(_model_of(name))[0].meta["categories"])
        return FeatureNetwork(model, **_facts_of(name, model)), categories

    def adapt(self, name: str, network: FeatureNetwork, tensors: Tensors) -> Tensors:
        model = _model_of(name)
        if model in _BUILDER_OPTIONS:
            return {key: tensor for key, tensor in tensors.items() if not _AUXILIARY.search(key)}
        if model.startswith("densenet"):
            return {_OLD_DENSENET.sub(r"\1\2", key): tensor for key, tensor in tensors.items()}
        return tensors


def make_model(name: str, *, tensors: Tensors | None = None, initialise: bool = False) -> nn.Module:
    """The whole torchvision model with its 1000-class head, in eval mode; arguments as in `Zoo.make`."""
    model = _model_of(name)
    options = dict(_BUILDER_OPTIONS.get(model, {}))
    size = _image_size_in(model, tensors or {})
    if size is not None:
        options["image_size"] = size
    with nullcontext() if initialise else without_storage():
        built: nn.Module = get_model(model, **options)
    return built.eval()


def cut_model(name: str, model: nn.Module, *, layer: str | None, pooling: str) -> FeatureNetwork:
    """Turn a whole model (changed in place, with storage or without) into a `FeatureNetwork`.

    Raises:
        BackboneError: no such layer, or a pooling that does not fit.
    """
    layers = {path for path, _ in model.named_modules()}
    facts = _facts_of(name, model)
    parent, _, child = facts["classifier"].rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    default = POOLINGS["avg"]
    if layer is not None:
        cut, pool = _cut_at_layer(name, model, layer, pooling, layers, facts["input_size"])
    elif isinstance(model, VisionTransformer):
        cut, pool = _pooled_tokens(name, model, pooling)
        default = POOLINGS["cls"]
    else:
        cut, pool = _pooled_maps(name, model, pooling)
        default = "its fully connected layers" if _model_of(name).startswith(_NEEDS_POSITIONS) else default
    # Where the pooling stands inside the model, what comes before it is not told apart from it.
    trunk = None if layer is None else ("torchvision", layer)
    return FeatureNetwork(cut, pool, pooling=POOLINGS.get(pooling, default), trunk_key=trunk, **facts)


def classifier_path(model: nn.Module) -> str:
    """The name of the layer that maps features to class scores: the last Linear (squeezenet: its last convolution)."""
    for kind in (nn.Linear, nn.Conv2d):
        paths: list[str] = [path for path, module in model.named_modules() if isinstance(module, kind)]
        if paths:
            return paths[-1]
    raise BackboneError(f"{type(model).__name__} has no classifier.")


def preset_transform(weights: Any) -> Transform:
    """The transform of torchvision ``weights`` (a member of a weights enum)."""
    preset = weights.transforms()
    resize, crop = preset.resize_size[0], preset.crop_size[0]
    return Transform(
        resize=None if resize is None else int(resize),
        crop=int(crop),
        interpolation=str(preset.interpolation.value),
        mean=tuple(map(float, preset.mean)),  # type: ignore[arg-type]
        std=tuple(map(float, preset.std)),  # type: ignore[arg-type]
    )


@cache
def _models() -> tuple[str, ...]:
    return tuple(list_models(module=torchvision.models))


def _model_of(name: str) -> str:
    """The torchvision model that a backbone is built from."""
    return PACKAGED[name][0] if name in PACKAGED else name


def _pretrained(model: str) -> list[Any]:
    """torchvision's weights of a model, plain ImageNet training (IMAGENET1K_V1) first."""
    return sorted(get_model_weights(model), key=lambda item: (item.name != "IMAGENET1K_V1", "E2E" in item.name))


def _scaled(preset: Transform, crop: int) -> Transform:
    """``preset`` at another crop, the resize in proportion."""
    resize = None if preset.resize is None else round(preset.resize * crop / preset.crop)
    return replace(preset, crop=crop, resize=resize)


def _image_size_in(model: str, tensors: Tensors) -> int | None:
    """The image size that position embeddings among ``tensors`` were made for; ``None`` where there are none."""
    if not model.startswith("vit_"):
        return None
    for key, tensor in tensors.items():
        if key.endswith(_POSITIONS) and tensor.dim() == 3:
            patches = int(tensor.shape[1]) - 1  # without the class token's
            side = math.isqrt(max(patches, 0))
            return side * int(model.rpartition("_")[2]) if side * side == patches > 0 else None
    return None


def _facts_of(name: str, model: nn.Module) -> dict[str, Any]:
    """What a `FeatureNetwork` tells of the whole ``model`` that it is part of."""
    only_size = model.image_size if isinstance(model, VisionTransformer) else None
    return {
        "input_size": only_size or preset_transform(_pretrained(_model_of(name))[0]).crop,
        "only_size": only_size is not None,
        "classifier": classifier_path(model),
        "shapes": {key: tensor.shape for key, tensor in model.state_dict().items()},
    }


# -- where the features are ------------------------------------------------------------------------------------------


def _pooled_tokens(name: str, model: nn.Module, pooling: str) -> _Cut:
    if pooling in ("default", "cls"):
        return model, None
    if pooling == "cls_avg":
        return _pick(model, "encoder"), TokenPool(pooling)
    raise pooling_error(name, pooling, "a vision transformer has a class token", "default, cls or cls_avg")


def _pooled_maps(name: str, model: nn.Module, pooling: str) -> _Cut:
    kind = _model_of(name)
    if pooling == "default":
        return model, None
    if pooling in ("cls", "cls_avg"):
        raise pooling_error(name, pooling, "it has no class token", "default, avg or max")
    if kind.startswith(_NEEDS_POSITIONS):
        why = "its fully connected layers need the pooled map's positions"
        raise pooling_error(name, pooling, why, "default, or backbone.layer=features with avg or max")
    if pooling == "avg":  # what every convolutional model of torchvision does by default
        return model, None
    for path, prefixes in _POOLING_MODULES.items():
        if kind.startswith(prefixes):
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.AdaptiveMaxPool2d(1))
            return model, None
    for prefix, node in _LAST_MAPS.items():
        if kind.startswith(prefix):
            return _pick(model, node), MapPool("max", (2, 3))
    raise pooling_error(name, pooling, "its pooling cannot be replaced", "default")


def _cut_at_layer(name: str, model: nn.Module, layer: str, pooling: str, layers: set[str], size: int) -> _Cut:
    if layer not in layers or not layer:
        raise layer_error(name, layer, layers)
    try:
        picked = _pick(model, layer)
    except ValueError as error:
        raise layer_error(name, layer, layers, "it lies inside a layer that is taken whole") from error
    tokens = isinstance(model, VisionTransformer)
    return picked, pool_for(name, layer, run_on_meta(picked, size), pooling, class_token=tokens)


def _pick(model: nn.Module, node: str) -> nn.Module:
    """The part of ``model`` up to ``node``, with the parameters of that part only."""
    picked = create_feature_extractor(model, {node: "output"}, suppress_diff_warning=True)
    for graph in (picked.train_graph, picked.eval_graph):
        _drop_needless(graph)
    pruned: nn.Module = DualGraphModule(picked, picked.train_graph, picked.eval_graph)
    return pruned.eval()


def _drop_needless(graph: fx.Graph) -> None:
    """Return the one output bare, and erase what it does not need.

    Assertions about later layers would otherwise keep these layers alive.
    """
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output":
            node.args = tuple(node.args[0].values())
        if node.op in ("output", "placeholder") or any(user in needed for user in node.users):
            needed.add(node)
    for node in reversed(graph.nodes):
        if node not in needed:
            graph.erase_node(node)
