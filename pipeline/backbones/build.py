"""From params to a frozen `BuiltNetwork`, or only to its identity when a memory knows it."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import WeightsError
from ..params import BackboneParams, TransformParams
from .catalogue import find_zoo, locate_weights
from .identity import BackboneIdentity, Identified, remember
from .memo import Stat, WeightsMemo, stat_of
from .transform import Transform, adjust_transform
from .weights import Checkpoint, check_classifier, checkpoint_bytes, load_tensors, read_checkpoint, tensors_digest
from .zoo import FeatureNetwork, WeightsSource, Zoo, measure_features


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
    name, zoo = params.name, find_zoo(params.name)
    source = locate_weights(name, params.weights, seed=params.seed)
    checkpoint = _read(source)
    stored = checkpoint.transform if checkpoint else None
    size = transform.crop or (stored.crop if stored else None)
    with _seeded(params.seed):
        network = zoo.make(
            name, layer=params.layer, pooling=params.sole_pooling, image_size=size, **_content(checkpoint)
        )
    chosen = adjust_transform(stored or _preset(zoo, name, source, network), transform)
    feature_dim = measure_features(network, chosen.crop, name)
    notes = load_tensors(zoo, name, network, checkpoint.tensors, where=source.path) if checkpoint else ()
    identity = _identity(params, source, tensors_digest(network.model.state_dict()))
    count = sum(parameter.numel() for parameter in network.parameters())
    return BuiltNetwork(FrozenBackbone(network), chosen, feature_dim, identity, count, notes)


def identify_network(
    params: BackboneParams, transform: TransformParams, memo: WeightsMemo
) -> tuple[BackboneIdentity, Transform, int]:
    """Identity, transform and feature dimension; weights are only loaded and hashed where ``memo`` does not know them.

    Raises:
        BackboneError, WeightsError: as `build_network`.
    """
    known = identify(params, transform, memo)
    return known.identity, known.transform, known.feature_dim


def identify(params: BackboneParams, transform: TransformParams, memo: WeightsMemo) -> Identified:
    """As `identify_network`, with the number of parameters, and remembered for `recall` where it may be.

    Raises:
        BackboneError, WeightsError: as `build_network`.
    """
    read_ns = time.time_ns()
    known = _identify(params, transform, memo)
    file, packages = locate_weights(params.name, params.weights).path, getattr(find_zoo(params.name), "packages", ())
    if packages and file is not None and file.is_file():
        remember(params, transform, memo, known, file=file, packages=packages, read_ns=read_ns)
    return known


def _identify(params: BackboneParams, transform: TransformParams, memo: WeightsMemo) -> Identified:
    source = locate_weights(params.name, params.weights, seed=params.seed)
    # What a user's own code loads or draws by itself may be other tomorrow.
    if source.drawn and find_zoo(params.name).code_digest(params.name):
        return _identified(build_network(params, transform))
    key = _memo_key(params, transform, source)
    stat = _stat_for_memo(source)
    # A download that has since been removed was of the content its name promises.
    gone = source.fetch is not None and stat is None
    known = _from_fact(memo.get(key, stat, whatever_stat=gone), params, source)
    if known is not None:
        return known
    read_ns = time.time_ns()
    built = build_network(params, transform)
    fact = {
        "digest": built.identity.digest,
        "transform": built.transform.as_dict(),
        "feature_dim": built.feature_dim,
        "parameters": built.parameters,
    }
    # A download has its place only now.
    path = locate_weights(params.name, params.weights, seed=params.seed).path
    after = stat_of(path) if path else None
    if source.drawn or (after is not None and stat in (None, after)):
        memo.put(key, fact, stat=after, read_ns=read_ns)
    return _identified(built)


def _identified(built: BuiltNetwork) -> Identified:
    return Identified(built.identity, built.transform, built.feature_dim, built.parameters)


def make_module(name: str, *, layer: str | None = None, pooling: str = "default") -> tuple[FeatureNetwork, int]:
    """The network of a backbone without weights (parameters on the meta device) and its feature dimension.

    Raises:
        BackboneError: no such name or layer, or a pooling that does not fit the network.
    """
    network = find_zoo(name).make(name, layer=layer, pooling=pooling).to("meta")
    return network, measure_features(network, network.input_size, name)


def build_classifier(name: str, weights: str = "DEFAULT") -> tuple[FrozenBackbone, Transform, tuple[str, ...]]:
    """A whole pretrained model (images to class scores), its transform and the names of its classes.

    Raises:
        BackboneError: there is no classifier for this backbone.
        WeightsError: the weights cannot be had, or have no head of its classes.
    """
    zoo, source = find_zoo(name), locate_weights(name, weights)
    checkpoint = _read(source)
    with _seeded(0):
        network, categories = zoo.make_classifier(name, **_content(checkpoint))
    stored = checkpoint.transform if checkpoint else None
    transform = stored or _preset(zoo, name, source, network)
    if checkpoint is not None:
        check_classifier(zoo, name, network, checkpoint.tensors, where=source.path)
        load_tensors(zoo, name, network, checkpoint.tensors, where=source.path)
    return FrozenBackbone(network), transform, categories


def trainable_module(backbone: BuiltNetwork) -> FeatureNetwork:
    """A copy to fine-tune, in training mode, all parameters trainable; in eval mode it computes the same features."""
    return copy.deepcopy(backbone.module.network).requires_grad_(True).train()


def backbone_bytes(network: FeatureNetwork, transform: Transform, *, name: str) -> bytes:
    """A weights file (safetensors, transform in its metadata) that `build_network` loads back by its path."""
    return checkpoint_bytes(network.model.state_dict(), transform, name=name)


def _read(source: WeightsSource) -> Checkpoint | None:
    """What the weights' file holds, fetched where it is not there yet; ``None`` for random weights."""
    there = source.path is not None and source.path.is_file()
    path = source.fetch() if source.fetch is not None and not there else source.path
    return None if path is None else read_checkpoint(path)


def _content(checkpoint: Checkpoint | None) -> dict[str, Any]:
    """How `Zoo.make` gets what the network will hold."""
    return {"initialise": True} if checkpoint is None else {"tensors": checkpoint.tensors}


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw from ``seed``, and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _preset(zoo: Zoo, name: str, source: WeightsSource, network: FeatureNetwork) -> Transform:
    """What the zoo knows of the transform of these weights."""
    return zoo.preset(name, source, network.input_size if network.only_size else None)


def _identity(params: BackboneParams, source: WeightsSource, digest: str) -> BackboneIdentity:
    code = find_zoo(params.name).code_digest(params.name)
    return BackboneIdentity(params.name, source.label, digest, params.layer, params.sole_pooling, code)


def _stat_for_memo(source: WeightsSource) -> Stat | None:
    if source.path is None:
        return None
    stat = stat_of(source.path)
    if stat is None and source.fetch is None:
        raise WeightsError(
            "The weights file is not there.",
            where=source.path,
            remedy="check backbone.weights; a file of params names paths from where it lies",
        )
    return stat


def _memo_key(params: BackboneParams, transform: TransformParams, source: WeightsSource) -> dict[str, Any]:
    """All that the fact depends on, but the content of the weights file."""
    where = source.origin or (None if source.path is None else str(source.path))
    return {
        "about": "backbone",
        "backbone": params.model_dump(include={"name", "layer", "pooling"}),
        "weights": [source.label, where],
        "transform": transform.model_dump(mode="json"),
        "drawn_by": [torch.__version__, torch.backends.cpu.get_cpu_capability()] if source.drawn else None,
        "zoo": find_zoo(params.name).version(params.name),
        **({} if source.config is None else {"config": stat_of(source.config)}),
    }


def _from_fact(fact: Mapping[str, Any] | None, params: BackboneParams, source: WeightsSource) -> Identified | None:
    """What a remembered fact says; ``None`` where it is absent or not of the shape it was written in."""
    if fact is None or not isinstance(fact.get("digest"), str) or not isinstance(fact.get("feature_dim"), int):
        return None
    try:
        transform = Transform.from_dict(fact.get("transform", {}))
    except WeightsError:
        return None
    parameters = fact.get("parameters")
    if not isinstance(parameters, int):  # from before it was remembered
        network, _ = make_module(params.name, layer=params.layer, pooling=params.sole_pooling)
        parameters = sum(parameter.numel() for parameter in network.parameters())
    return Identified(_identity(params, source, fact["digest"]), transform, fact["feature_dim"], parameters)
