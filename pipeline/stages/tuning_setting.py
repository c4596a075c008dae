"""Where and how a fine-tuning runs, from its params and from what it starts with."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import FinetuneError
from ..features.table import FeatureTable
from ..files import canonical_json, digest_bytes
from ..finetune import Setting, balanced_weights, fold_head, resolve_batchnorm, resolve_training_dtype
from ..params import FinetuneParams
from ..runtime.distributed import World
from .load import Opened
from .probe import Parts, Start
from .sources import Origin


def make_setting(
    section: FinetuneParams,
    opened: Opened,
    parts: Parts,
    start: Start,
    *,
    world: World,
    device: torch.device,
    folder: Path,
) -> Setting:
    """Everything ``auto`` resolved, and the digest by which a checkpoint is known.

    Raises:
        FinetuneError: ``class_weight`` names a class that is not there.
    """
    from_scratch = opened.origin.identity.weights.startswith("random") and start.run is None
    return Setting(
        folder=folder,
        fingerprint=_fingerprint(section, opened.origin, opened.table, parts, start),
        device=device,
        dtype=resolve_training_dtype(section.precision, device),
        batchnorm=resolve_batchnorm(section.batchnorm, from_scratch=from_scratch),
        class_weights=_class_weights(section, opened.table, parts),
        world=world,
    )


def _fingerprint(section: FinetuneParams, origin: Origin, table: FeatureTable, parts: Parts, start: Start) -> str:
    """Digest of all that the result depends on."""
    head = [array.tolist() for layer in fold_head(start.module) for array in layer]
    facts = {
        "params": section.model_dump(mode="json", exclude={"workers", "image_cache_mb", "checkpoint_minutes"}),
        "backbone": asdict(origin.identity),
        "transform": origin.transform.as_dict(),
        "images": digest_bytes(table.digests[parts.train].tobytes()).hex(),
        "selection": digest_bytes(table.digests[parts.selection].tobytes()).hex(),
        "head": digest_bytes(canonical_json(head).encode()).hex(),
    }
    return digest_bytes(canonical_json(facts).encode()).hex()


def _class_weights(section: FinetuneParams, table: FeatureTable, parts: Parts) -> NDArray[np.float64] | None:
    given, names = section.class_weight, table.class_names
    if given is None:
        return None
    if given == "balanced":
        return balanced_weights(table.targets[parts.train], len(names))
    if unknown := sorted(set(given) - set(names)):
        raise FinetuneError(
            f"There is no class called {unknown[0]!r}.",
            where="finetune.class_weight",
            remedy=f"classes: {', '.join(names)}",
        )
    return np.array([given.get(name, 1.0) for name in names])
