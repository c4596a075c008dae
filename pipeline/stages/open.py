"""Open what a stage works on: the images of the params, their backbone, and the cache that binds them."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

from ..backbones import Backbone, BackboneIdentity, Transform, resolve_backbone
from ..data.images import Images, open_images
from ..features.cache import FeatureCache, FeatureTable
from ..features.inventory import key_folders, look_at
from ..features.store import SPEC_FILE, read_spec
from ..params import Params
from ..runtime.distributed import World, world_from_environment


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
    return next((precision for precision, count in rows.most_common(1) if count), None)


def load_features(params: Params) -> FeatureTable:
    """The cached features of ``data.root`` with targets, paths, splits and groups; nothing is computed.

    Raises:
        MissingFeaturesError: images without a feature; ``extract`` computes them.
        DataError, BackboneError, CacheError: see their messages.
    """
    return open_cache(params).table()
