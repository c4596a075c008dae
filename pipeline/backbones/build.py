"""From params to a frozen `BuiltNetwork`, or only to its identity when a memory knows it."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from ..errors import WeightsError
from ..params import BackboneParams, TransformParams
from .catalogue import Architecture, find_architecture, make_classifier
from .checkpoint import Checkpoint, checkpoint_bytes, read_checkpoint
from .download import checkpoint_file, fetch_checkpoint
from .memo import Stat, WeightsMemo, stat_of
from .network import FeatureNetwork, FrozenBackbone, make_network, measure_features
from .transform import Transform, adjust_transform, preset_transform
from .weights import WeightsSource, check_head, image_size_in, load_tensors, locate_weights, tensors_digest


@dataclass(frozen=True)
class BackboneIdentity:
    """What determines the features besides image and transform.

    Attributes:
        weights: the resolved label: an enum name, ``file`` or ``random-SEED``.
        digest: hex of `tensors_digest` over the network's tensors.
    """

    name: str
    weights: str
    digest: str
    layer: str | None = None
    pooling: str = "default"


@dataclass(frozen=True)
class BuiltNetwork:
    """A frozen network with the transform it expects.

    Attributes:
        module: normalised float images (n, 3, h, w) to features (n, feature_dim); stays in eval mode.
        parameters: number of them, without the classifier.
        notes: what the user should know about how the weights were read.
    """

    module: FrozenBackbone
    transform: Transform
    feature_dim: int
    identity: BackboneIdentity
    parameters: int
    notes: tuple[str, ...] = ()


def build_network(params: BackboneParams, transform: TransformParams) -> BuiltNetwork:
    """Load the weights and freeze the network.

    Raises:
        BackboneError: the name, layer, pooling or crop does not exist or does not fit.
        WeightsError: the weights cannot be found, downloaded, read or matched.
    """
    architecture = find_architecture(params.name)
    source = locate_weights(architecture, params.weights, seed=params.seed)
    checkpoint = _read_source(source)
    model, size = _make_model(architecture, source, checkpoint, params.seed)
    chosen = adjust_transform(_preset(architecture, source, checkpoint, size), transform)
    network = make_network(architecture, model, layer=params.layer, pooling=params.pooling)
    feature_dim = measure_features(network, chosen.crop, params.name)
    notes = _load(architecture, network, source, checkpoint)
    digest = tensors_digest(network.model.state_dict())
    identity = BackboneIdentity(params.name, source.label, digest, params.layer, params.pooling)
    count = sum(parameter.numel() for parameter in network.parameters())
    return BuiltNetwork(FrozenBackbone(network), chosen, feature_dim, identity, count, notes)


def identify_network(
    params: BackboneParams, transform: TransformParams, memo: WeightsMemo
) -> tuple[BackboneIdentity, Transform, int]:
    """Identity, transform and feature dimension; weights are only loaded and hashed where ``memo`` does not know them.

    Raises:
        BackboneError, WeightsError: as `build_network`.
    """
    architecture = find_architecture(params.name)
    source = locate_weights(architecture, params.weights, seed=params.seed)
    key = _memo_key(params, transform, source)
    file = _file_of(source)
    stat = _stat_for_memo(source, file)
    # A download that has since been removed was of the content its name promises.
    gone = source.kind == "enum" and stat is None
    known = _from_fact(memo.get(key, stat, whatever_stat=gone), params, source)
    if known is not None:
        return known
    read_ns = time.time_ns()
    built = build_network(params, transform)
    fact = {"digest": built.identity.digest, "transform": built.transform.as_dict(), "feature_dim": built.feature_dim}
    after = stat_of(file) if file else None
    if file is None or (after is not None and stat in (None, after)):
        memo.put(key, fact, stat=after, read_ns=read_ns)
    return built.identity, built.transform, built.feature_dim


def build_classifier(name: str, weights: str = "DEFAULT") -> tuple[FrozenBackbone, Transform, tuple[str, ...]]:
    """A whole pretrained model (images to 1000 class scores), its transform and the names of its classes.

    Raises:
        WeightsError: the weights cannot be had, or have no head of 1000 classes.
    """
    architecture = find_architecture(name)
    source = locate_weights(architecture, weights)
    checkpoint = _read_source(source)
    model, size = _make_model(architecture, source, checkpoint, 0)
    network = FeatureNetwork(model)
    transform = _preset(architecture, source, checkpoint, size)
    if checkpoint is not None:
        check_head(model, architecture, checkpoint, where=_file_of(source))
    _load(architecture, network, source, checkpoint)
    categories = tuple(architecture.downloads[0].meta["categories"])
    return FrozenBackbone(network), transform, categories


def trainable_module(backbone: BuiltNetwork) -> FeatureNetwork:
    """A copy to fine-tune, in training mode, all parameters trainable; in eval mode it computes the same features."""
    return copy.deepcopy(backbone.module.network).requires_grad_(True).train()


def backbone_bytes(network: FeatureNetwork, transform: Transform, *, name: str) -> bytes:
    """A weights file (safetensors, transform in its metadata) that `build_network` loads back by its path."""
    return checkpoint_bytes(network.model.state_dict(), transform, name=name)


def _read_source(source: WeightsSource) -> Checkpoint | None:
    if source.kind == "random":
        return None
    return read_checkpoint(fetch_checkpoint(source.enum) if source.path is None else source.path)


def _make_model(
    architecture: Architecture, source: WeightsSource, checkpoint: Checkpoint | None, seed: int
) -> tuple[nn.Module, int | None]:
    """The whole model for these weights, and the image size it was built for, where it has one."""
    if checkpoint is None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = make_classifier(architecture, initialise=True)
    else:
        model = make_classifier(architecture, image_size=image_size_in(architecture, checkpoint))
    return model, int(model.image_size) if isinstance(model, VisionTransformer) else None


def _preset(
    architecture: Architecture, source: WeightsSource, checkpoint: Checkpoint | None, size: int | None
) -> Transform:
    """The transform of the weights: metadata, else their own preset, else that of the plain ImageNet weights."""
    if checkpoint is not None and checkpoint.transform is not None:
        return checkpoint.transform
    if source.enum is not None:
        return preset_transform(source.enum)
    if architecture.packaged and architecture.packaged.is_file():
        packaged = read_checkpoint(architecture.packaged).transform
        if packaged is not None:
            return packaged
    presets = [preset_transform(item) for item in architecture.downloads]
    fitting = [preset for preset in presets if size in (None, preset.crop)]
    return fitting[0] if fitting else _scaled(presets[0], size or presets[0].crop)


def _scaled(preset: Transform, crop: int) -> Transform:
    """``preset`` at another crop, the resize in proportion."""
    resize = None if preset.resize is None else round(preset.resize * crop / preset.crop)
    return replace(preset, crop=crop, resize=resize)


def _load(
    architecture: Architecture, network: FeatureNetwork, source: WeightsSource, checkpoint: Checkpoint | None
) -> tuple[str, ...]:
    if checkpoint is None:
        return ()
    whole = make_classifier(architecture)
    return load_tensors(architecture, network.model, checkpoint, whole=whole, where=_file_of(source))


def _file_of(source: WeightsSource) -> Path | None:
    return source.path if source.kind == "file" else checkpoint_file(source.enum) if source.kind == "enum" else None


def _stat_for_memo(source: WeightsSource, file: Path | None) -> Stat | None:
    if file is None:
        return None
    stat = stat_of(file)
    if stat is None and source.kind == "file":
        raise WeightsError(
            "The weights file is not there.",
            where=file,
            remedy="check backbone.weights; a relative path is relative to params.yaml",
        )
    return stat


def _memo_key(params: BackboneParams, transform: TransformParams, source: WeightsSource) -> dict[str, Any]:
    """All that the fact depends on, but the content of the weights file."""
    return {
        "about": "backbone",
        "backbone": params.model_dump(include={"name", "layer", "pooling"}),
        "weights": [source.kind, source.label, str(_file_of(source))],
        "transform": transform.model_dump(mode="json"),
        "drawn_by": [torch.__version__, torch.backends.cpu.get_cpu_capability()] if source.kind == "random" else None,
        "torchvision": torchvision.__version__,
    }


def _from_fact(
    fact: Mapping[str, Any] | None, params: BackboneParams, source: WeightsSource
) -> tuple[BackboneIdentity, Transform, int] | None:
    """What a remembered fact says; ``None`` where it is absent or not of the shape it was written in."""
    if fact is None or not isinstance(fact.get("digest"), str) or not isinstance(fact.get("feature_dim"), int):
        return None
    try:
        transform = Transform.from_dict(fact.get("transform", {}))
    except WeightsError:
        return None
    identity = BackboneIdentity(params.name, source.label, fact["digest"], params.layer, params.pooling)
    return identity, transform, fact["feature_dim"]
