"""The zoos there are; to which one a name belongs, and where its weights come from."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from ..errors import BackboneError, WeightsError
from .torchvision import TorchvisionZoo
from .zoo import WeightsSource, Zoo, measure_features

# Which backbones there are: a new zoo is a file beside this one, and an entry here.
ZOOS: dict[str, Zoo] = {"torchvision": TorchvisionZoo()}

WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")


@dataclass(frozen=True)
class BackboneRow:
    """One line of the list of backbones; ``parameters`` without the classifier, ``input_size`` in pixels."""

    name: str
    feature_dim: int
    parameters: int
    weights: tuple[str, ...]
    input_size: int


def backbone_names() -> tuple[str, ...]:
    """The names that the zoos list, in their order."""
    return tuple(name for zoo in ZOOS.values() for name in zoo.names())


def find_zoo(name: str) -> Zoo:
    """The zoo that a backbone's name belongs to.

    Raises:
        BackboneError: no such name; the nearest ones are given.
    """
    for zoo in ZOOS.values():
        if zoo.owns(name):
            return zoo
    near = difflib.get_close_matches(name, backbone_names(), n=3, cutoff=0.5)
    raise BackboneError(
        f"There is no backbone {name!r}.",
        where="backbone.name",
        remedy=(f"did you mean {' or '.join(near)}? " if near else "") + "`pipeline backbones` lists every name",
    )


def locate_weights(name: str, weights: str, *, seed: int = 0) -> WeightsSource:
    """Resolve ``backbone.weights`` (aliases included) without opening or downloading anything.

    Raises:
        BackboneError: no such name.
        WeightsError: neither ``DEFAULT``, ``random``, a path, nor a name of this model's weights.
    """
    zoo = find_zoo(name)
    if weights == "random":
        return WeightsSource(f"random-{seed}")
    if "/" in weights or "\\" in weights or weights.endswith(WEIGHTS_SUFFIXES):
        return WeightsSource("file", Path(weights).expanduser().absolute())
    source = zoo.resolve(name, weights)
    if source is None:
        names = dict.fromkeys(["DEFAULT", *zoo.tags(name), "random"])
        raise WeightsError(
            f"{name} has no weights {weights!r}.",
            where="backbone.weights",
            remedy=f"use {', '.join(names)} or the path of a weights file",
        )
    return source


def list_backbones() -> list[BackboneRow]:
    """Every listed backbone with its size, from networks without weights; takes a few seconds."""
    return [_row(zoo, name) for zoo in ZOOS.values() for name in zoo.names()]


def _row(zoo: Zoo, name: str) -> BackboneRow:
    network = zoo.make(name)
    shape = network.classifier_shape  # known at once, where a pass would take longer than all the rest
    default = zoo.resolve(name, "DEFAULT")
    return BackboneRow(
        name,
        shape[1] if shape else measure_features(network, network.input_size, name),
        sum(parameter.numel() for parameter in network.parameters()),
        tuple(zoo.tags(name)),
        zoo.preset(name, default.tag if default else None).crop,
    )
