"""The zoos there are; to which one a name belongs, and where its weights come from."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..errors import BackboneError, WeightsError
from .openclip import OpenClipZoo
from .own import OwnZoo
from .timm import TimmZoo
from .torchvision import TorchvisionZoo
from .zoo import WALL, WeightsSource, Zoo, measure_features

# Which backbones there are: a new zoo is a file beside this one, and an entry here.
ZOOS: dict[str, Zoo] = {
    "torchvision": TorchvisionZoo(),
    "timm": TimmZoo(),
    "openclip": OpenClipZoo(),
    "own": OwnZoo(),
}

WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")


@dataclass(frozen=True)
class BackboneRow:
    """One line of the list of backbones; ``parameters`` without the classifier, ``input_size`` in pixels.

    ``pooling`` says in words what ``backbone.pooling: default`` is; ``accuracy, gflops, download_mb`` are as in
    `Published`, None where the library publishes none.
    """

    name: str
    feature_dim: int
    parameters: int
    weights: tuple[str, ...]
    input_size: int
    pooling: str
    licence: str | None
    transform: dict[str, Any]
    accuracy: float | None = None
    gflops: float | None = None
    download_mb: float | None = None


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


def is_own_code(name: str) -> bool:
    """Whether the backbone is the user's own network, for which a module of that name is imported."""
    return isinstance(find_zoo(name), OwnZoo)


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
        path = Path(weights).expanduser().absolute()
        config = path.with_name("config.json")
        return WeightsSource("file", path, config=config if config.is_file() else None)
    source = zoo.resolve(name, weights)
    if source is None:
        names = dict.fromkeys(["DEFAULT", *zoo.tags(name), "random"])
        raise WeightsError(
            f"{name} has no weights {weights!r}.",
            where="backbone.weights",
            remedy=f"use {', '.join(names)} or the path of a weights file",
        )
    return source


def list_backbones(
    patterns: Sequence[str] = (),
    *,
    licence: str | None = None,
    parameters: int | None = None,
    width: int | None = None,
) -> Iterator[BackboneRow]:
    """Backbones with their sizes, one by one, from networks without weights: a few a second.

    Those that no params could make usable (no pooling, no such transform) are passed over.

    Args:
        patterns: parts of names, or whole names with ``*`` and ``?``; none: all names of zoos below `WALL` names.
        licence: part of the licence that the library states.
        parameters, width: at most so many parameters and features.

    Raises:
        BackboneError: one of the patterns is the name of such a backbone.
    """
    for name in matching_names(patterns):
        zoo = find_zoo(name)
        if licence is not None and licence.lower() not in (zoo.licence(name) or "").lower():
            continue
        try:
            row = describe_backbone(name)
        except BackboneError:
            if name in patterns:
                raise
            continue
        if row.parameters <= (parameters or row.parameters) and row.feature_dim <= (width or row.feature_dim):
            yield row


def matching_names(patterns: Sequence[str] = ()) -> list[str]:
    """The names for `list_backbones`, those of a zoo in the order of `first_worth_a_look`."""
    known = set(backbone_names())
    wanted = [item if item in known or set(item) & set("*?[") else f"*{item}*" for item in patterns]
    found: list[str] = []
    for zoo in ZOOS.values():
        names = zoo.names()
        if patterns:
            names = [name for name in names if any(fnmatchcase(name, pattern) for pattern in wanted)]
        elif len(names) > WALL:
            continue
        first = first_worth_a_look(zoo, names)
        shown = {name: zoo.published(name) for name in names if name not in set(first)}
        found += [*first, *sorted(shown, key=lambda name: -(published.accuracy if (published := shown[name]) else 0))]
    return found


def first_worth_a_look(zoo: Zoo, names: Sequence[str]) -> list[str]:
    """Those names of one zoo that are in nothing behind another: by what they compute, each more accurate than all
    before it. Those of which nothing is published stand before them, where a zoo publishes of others.
    """
    published = {name: zoo.published(name) for name in names}
    known = {name: figures for name, figures in published.items() if figures is not None}
    first, best = [name for name in names if name not in known] if known else [], 0.0
    for name, figures in sorted(known.items(), key=lambda pair: (pair[1].gflops, -pair[1].accuracy)):
        if figures.accuracy > best:
            first.append(name)
            best = figures.accuracy
    return first


def describe_backbone(name: str) -> BackboneRow:
    """Sizes, pooling, transform and terms of a backbone, from its network without weights.

    Raises:
        BackboneError: no such name.
    """
    zoo = find_zoo(name)
    network = zoo.make(name)
    shape = network.classifier_shape  # known at once, where a pass would take longer than all the rest
    source = zoo.resolve(name, "DEFAULT") or WeightsSource("random-0")
    transform = zoo.preset(name, source, network.input_size if network.only_size else None)
    return BackboneRow(
        name,
        shape[1] if shape else measure_features(network, network.input_size, name),
        sum(parameter.numel() for parameter in network.parameters()),
        tuple(zoo.tags(name)),
        transform.crop,
        network.pooling,
        zoo.licence(name),
        transform.as_dict(),
        *(zoo.published(name) or ()),
    )
