"""What determines a backbone's features besides the image, and how a later command knows it without any library.

The libraries that know the networks take seconds to import. What they said is remembered with the versions that they
had and the stamps of the files that they named; while these are the same, nobody has to ask them again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..errors import WeightsError
from ..params import BackboneParams, TransformParams
from .memo import WeightsMemo, stat_of
from .transform import Transform

# What moves the place where libraries keep what they download.
PLACES = ("HOME", "HF_HOME", "HF_HUB_CACHE", "TORCH_HOME", "XDG_CACHE_HOME")


@dataclass(frozen=True)
class BackboneIdentity:
    """What determines the features besides image and transform.

    Attributes:
        weights: the resolved label: a zoo's name for them (torchvision's enum name), ``file`` or ``random-SEED``.
        digest: hex of `tensors_digest` over the network's tensors.
        code: hex digest of the source file of a network of the user's own; ``None`` for all others.
    """

    name: str
    weights: str
    digest: str
    layer: str | None = None
    pooling: str = "default"
    code: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``code`` only where there is one, so that what was keyed without it stays."""
        return {key: value for key, value in asdict(self).items() if key != "code" or value is not None}


@dataclass(frozen=True)
class Identified:
    """A network as far as it is known without its tensors; ``parameters`` counts them, without the classifier."""

    identity: BackboneIdentity
    transform: Transform
    feature_dim: int
    parameters: int


def recall(params: BackboneParams, transform: TransformParams, memo: WeightsMemo) -> Identified | None:
    """What `remember` was told of the same params, if libraries and files are what they were then; no library is
    imported."""
    fact = memo.get(_key(params, transform), whatever_stat=True)
    if fact is None or fact.get("versions") != versions_of(fact.get("versions") or ()):
        return None
    if not (files := fact.get("files")) or files != _stamps(files):
        return None
    try:
        stored = Transform.from_dict(fact["transform"])
        return Identified(BackboneIdentity(**fact["identity"]), stored, fact["feature_dim"], fact["parameters"])
    except (KeyError, TypeError, WeightsError):
        return None


def remember(
    params: BackboneParams,
    transform: TransformParams,
    memo: WeightsMemo,
    known: Identified,
    *,
    file: Path,
    packages: Iterable[str],
    read_ns: int,
) -> None:
    """Keep what was found out for `recall`.

    Args:
        file: of the weights; a ``config.json`` beside it belongs to it.
        packages: the distributions that know the network.
        read_ns: when the file was looked at, nanoseconds since the epoch.
    """
    fact = {
        "identity": known.identity.as_dict(),
        "transform": known.transform.as_dict(),
        "feature_dim": known.feature_dim,
        "parameters": known.parameters,
        "versions": versions_of(packages),
        "files": _stamps([str(file), str(file.with_name("config.json"))]),
    }
    memo.put(_key(params, transform), fact, stat=stat_of(file), read_ns=read_ns)


def versions_of(packages: Iterable[str]) -> dict[str, str | None]:
    """The versions of distributions, from their metadata; ``None`` for one that is not installed."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _stamps(files: Iterable[str]) -> dict[str, list[int] | None]:
    stats = {file: stat_of(Path(file)) for file in files}
    return {file: None if stat is None else list(stat) for file, stat in stats.items()}


def _key(params: BackboneParams, transform: TransformParams) -> Mapping[str, Any]:
    return {
        "about": "resolved backbone",
        "backbone": params.model_dump(mode="json"),
        "transform": transform.model_dump(mode="json"),
        "places": {name: os.environ.get(name) for name in PLACES},
    }
