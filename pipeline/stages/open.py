"""Open what a stage works on: the images of the params, their backbone, and the cache that binds them."""

from __future__ import annotations

from ..backbones import Backbone, resolve_backbone
from ..data.images import Images, open_images
from ..features.cache import FeatureCache, FeatureTable
from ..params import Params
from ..runtime.distributed import World, world_from_environment


def open_cache(
    params: Params, images: Images | None = None, *, world: World | None = None, quiet: bool = False
) -> FeatureCache:
    """The features of ``data.root``, or of ``images``, under the backbone of the params; nothing is computed.

    Args:
        world: the processes that share what is missing; by default this one does all.

    Raises:
        DataError, BackboneError, CacheError: see their messages.
    """
    images = images or open_images(params.data, params.cache.dir)
    return FeatureCache(images, open_backbone(params), params.cache, params.extract, world=world, quiet=quiet)


def open_backbone(params: Params) -> Backbone:
    """The backbone of the params, loaded when it is first called."""
    return resolve_backbone(
        params.backbone,
        params.transform,
        params.extract,
        max_pixels=params.data.max_pixels,
        cache_dir=params.cache.dir,
        world=world_from_environment(),
    )


def load_features(params: Params) -> FeatureTable:
    """The cached features of ``data.root`` with targets, paths, splits and groups; nothing is computed.

    Raises:
        MissingFeaturesError: images without a feature; ``extract`` computes them.
        DataError, BackboneError, CacheError: see their messages.
    """
    return open_cache(params).table()
