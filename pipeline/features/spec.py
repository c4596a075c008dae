"""What determines the numbers of a feature, and the key that this gives."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import CacheError
from ..files import canonical_json, digest_bytes

# Raised whenever the way of computing changes the numbers for otherwise equal specs.
SCHEMA = 1
PLAIN_VIEW = "plain"
# Fields that came later, with the default at which they are left out, so that keys from before them hold.
LATER = {"code": None}
# Stands for the value of a field that one of two compared specs does not have.
ABSENT = "(absent)"


@dataclass(frozen=True)
class FeatureSpec:
    """Everything but the image that a feature depends on.

    Batch size, worker count, device, paths, labels and splits are not part of it: they do not change the numbers
    beyond the stated tolerance of the precision.

    Args:
        backbone: name of the architecture.
        weights_digest: hex BLAKE2b-128 of the backbone's tensors.
        layer: an earlier named layer, or None for the last.
        pooling: how the feature map becomes a vector.
        transform: the resolved transform, as a plain mapping.
        decoder: name of the rule that turns bytes into RGB pixels.
        precision: of the forward pass.
        dtype: storage dtype.
        view: ``plain``, or the name of an augmented view.
        code: hex digest of the source file of a backbone that is the user's own network.
    """

    backbone: str
    weights_digest: str
    layer: str | None
    pooling: str
    transform: Mapping[str, Any]
    decoder: str
    precision: str
    dtype: str
    view: str = PLAIN_VIEW
    schema: int = SCHEMA
    code: str | None = None

    @property
    def key(self) -> str:
        """16 hex digits that are equal for equal specs."""
        return digest_bytes(canonical_json(self.as_dict()).encode()).hex()[:16]

    @property
    def folder_name(self) -> str:
        """``<backbone>-<key>``, the folder of these features in the cache; ``/`` and ``:`` of a name become ``_``."""
        return f"{re.sub('[/:]', '_', self.backbone)}-{self.key}"

    def as_dict(self) -> dict[str, Any]:
        """A plain, JSON-able mapping of all fields; those that came later are left out at their default."""
        values = {**asdict(self), "transform": dict(self.transform)}
        return {name: value for name, value in values.items() if name not in LATER or value != LATER[name]}

    @classmethod
    def from_dict(cls, values: object) -> FeatureSpec:
        """The inverse of `as_dict`.

        Raises:
            CacheError: the mapping does not hold exactly the fields of a spec.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or {*values, *LATER} != names or not isinstance(values["transform"], dict):
            raise CacheError("This is not a feature spec.", why=f"its fields must be {', '.join(sorted(names))}")
        return cls(**values)


def differences(old: FeatureSpec, new: FeatureSpec) -> list[tuple[str, Any, Any]]:
    """The fields in which two specs differ, as ``(dotted name, old value, new value)``."""
    return list(_differences(old.as_dict(), new.as_dict(), ""))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted(set(old) | set(new)):
        before, after = old.get(name, ABSENT), new.get(name, ABSENT)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, f"{prefix}{name}.")
        elif canonical_json(before) != canonical_json(after):
            yield f"{prefix}{name}", before, after
