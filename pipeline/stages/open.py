"""Open what a stage works on: the images of the params, their backbone, and the cache that binds them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..backbones import Backbone, BackboneIdentity, Transform, resolve_backbone
from ..data.images import Images, open_images
from ..features.cache import FeatureCache, FeatureTable, Filled
from ..features.inventory import key_folders, look_at
from ..features.store import SPEC_FILE, read_spec
from ..params import HeadParams, Params
from ..runtime.distributed import World, world_from_environment
from ..runtime.memory import memory_budget

# What a head holds at most beside features in float32, as many times their size: in float64, scaled, and so on.
COPIES = 7


def open_cache(
    params: Params,
    images: Images | None = None,
    *,
    begins: bool = False,
    world: World | None = None,
    quiet: bool = False,
) -> FeatureCache:
    """The features of ``data.root``, or of ``images``, under the backbone of the params; nothing is computed.

    Args:
        begins: whether features will be computed.
        world: the processes that share what is missing; by default this one does all.

    Raises:
        DataError, BackboneError, CacheError: see their messages.
    """
    if images is None:
        images = open_images(params.data, params.cache.dir)
    backbone = open_backbone(params, begins=begins)
    return FeatureCache(images, backbone, params.cache, params.extract, world=world, quiet=quiet)


def open_caches(
    params: Params,
    images: Images | None = None,
    *,
    begins: bool = False,
    world: World | None = None,
    quiet: bool = False,
) -> list[FeatureCache]:
    """A cache for each pooling of the params, all of the same images; arguments as in `open_cache`."""
    if images is None:
        images = open_images(params.data, params.cache.dir)
    each = [with_pooling(params, pooling) for pooling in params.backbone.poolings]
    return [open_cache(one, images, begins=begins, world=world, quiet=quiet) for one in each]


def features_in_memory(head: HeadParams) -> int:
    """Bytes of features up to which they and all that is made of them are held in memory, not read from a file."""
    return memory_budget(head.memory_mb) // COPIES


def with_pooling(params: Params, pooling: str) -> Params:
    """The params with one pooling only."""
    return params.model_copy(update={"backbone": params.backbone.model_copy(update={"pooling": pooling})})


def fill_together(caches: Sequence[FeatureCache], among: NDArray[np.bool_] | None = None) -> Filled:
    """Fill caches that differ in the pooling alone, in one pass over the images for each precision that they have.

    Args:
        among: bool (n,), to look at these images only.
    """
    passes: dict[str, list[FeatureCache]] = {}
    for cache in caches:
        passes.setdefault(cache.backbone.precision, []).append(cache)
    filled = [first.fill(first.missing(among, beside=others), beside=others) for first, *others in passes.values()]
    for more in filled[1:]:
        filled[0].clock.add(more.clock)
    computed = np.concatenate([each.computed for each in filled])
    return Filled(computed, filled[0].clock, sum(each.seconds for each in filled))


def open_backbone(params: Params, *, begins: bool = False) -> Backbone:
    """The backbone of the params, loaded when it is first called; ``begins`` as in `open_cache`."""
    return resolve_backbone(
        params.backbone,
        params.transform,
        params.extract,
        max_pixels=params.data.max_pixels,
        cache_dir=params.cache.dir,
        cached_precision=partial(_cached_precision, params.cache.dir),
        begins=begins,
        world=world_from_environment(),
    )


def _cached_precision(cache_dir: Path, identity: BackboneIdentity, transform: Transform) -> str | None:
    """The precision of most features of a network in the cache."""
    rows: Counter[str] = Counter()
    for folder in key_folders(cache_dir):
        spec = read_spec(folder / SPEC_FILE)
        same = spec and (spec.backbone, spec.weights_digest) == (identity.name, identity.digest)
        if spec and same and (spec.layer, spec.pooling) == (identity.layer, identity.pooling):
            rows[spec.precision] += look_at(folder).rows if dict(spec.transform) == transform.as_dict() else 0
    del rows["tf32"]  # which is only ever asked for by name
    return next((precision for precision, count in rows.most_common(1) if count), None)


def load_features(params: Params) -> FeatureTable:
    """The cached features of ``data.root`` with targets, paths, splits and groups; nothing is computed.

    Raises:
        MissingFeaturesError: images without a feature; ``extract`` computes them.
        DataError, BackboneError, CacheError: see their messages.
    """
    return open_cache(params).table()
