"""Images in batches, as an engine (Ray Data, Dask, Spark) hands them to its workers: the cache, worked on by many."""

from __future__ import annotations

import json
import threading
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.images import open_batch
from ..errors import DataError, NotFiniteError
from ..features.cache import FeatureCache
from ..features.sealed import checksum
from ..params import Params
from .open import open_cache

# A process fills one cache at a time, and with all the cores that it has.
_one_at_a_time = threading.Lock()


class Embedder:
    """A function of batches of images, for an engine to run on many machines.

    It pickles as its params alone. A process opens the cache and loads the backbone when the first batch needs them,
    and keeps both for later ones, however often the engine sends the function. New features are published in
    ``cache.dir``, which all workers may share; those that lie there are not computed again, so that a batch may be
    tried any number of times. Several machines without a shared ``cache.dir`` should be told ``extract.precision``:
    ``auto`` would be decided by each.

    Args:
        params: backbone, transform, extract and cache count; relative paths are relative to ``data.root``, which need
            not exist.
    """

    def __init__(self, params: Params) -> None:
        self._params = params.model_dump_json()

    def __call__(self, batch: Any) -> Any:
        """Features of n images, or why there are none.

        Args:
            batch: columns, as a mapping or a pandas DataFrame: ``bytes`` (whole image files) or ``path`` (of files or
                objects) or both, the second then being a name, and any others.

        Returns:
            the same kind of columns without ``bytes``, and with ``digest`` (hex BLAKE2b-128 of each image's bytes,
            empty where there were none to read), ``features`` (float32 (n, d), as the cache stores them, NaN where
            there are none; in a DataFrame n arrays), ``reason`` (why there are none, else empty), ``key`` and
            ``checksum``, by which `pipeline cache import` knows and proves a row.

        Raises:
            DataError: neither column is there.
            BackboneError, CacheError: the backbone cannot be had, or the cache not be written; see their messages.
        """
        with _one_at_a_time:
            columns = self._embed(batch)
        if hasattr(batch, "assign"):
            columns["features"] = list(columns["features"])
            return batch.drop(columns="bytes", errors="ignore").assign(**columns)
        return {name: batch[name] for name in batch if name != "bytes"} | columns

    def _embed(self, batch: Any) -> dict[str, Any]:
        opened = _opened(self._params)
        contents, paths = (list(batch[name]) if name in batch else None for name in ("bytes", "path"))
        if contents is None and paths is None:
            raise DataError(
                "A batch holds no images.",
                where=f"its columns: {', '.join(map(str, batch))}",
                remedy="call the column of whole image files `bytes`, or that of their places `path`",
            )
        nothing = [None] * len(contents or paths or [])
        params = opened.images.data
        images = open_batch(contents or nothing, paths or nothing, params, opened.store.cache_dir)
        return _rows(opened.of(images))


@lru_cache(maxsize=1)
def _opened(params: str) -> FeatureCache:
    """The cache of these params, of no images yet."""
    whole = Params.model_validate(json.loads(params))
    return open_cache(whole, open_batch([], [], whole.data, whole.cache.dir), begins=True, quiet=True)


def _rows(cache: FeatureCache) -> dict[str, Any]:
    """Fill the cache, and tell what became of each image."""
    lost = ""
    try:
        cache.fill()
    except NotFiniteError as error:
        lost = str(error.why)
    images, bad = cache.images, cache.quarantined
    # What has neither a feature nor a reason is an error of `read`, and the engine tries the batch again.
    has = cache.present if lost else cache.present | (images.known & ~bad)
    features = np.full((len(images), cache.store.feature_dim), np.nan, np.float32)
    features[has] = cache.read(images.digests[has])
    digests, reasons = [], []
    for row, known in enumerate(images.known):
        digests.append(images.digest(row).hex() if known else "")
        problem = cache.quarantine.problem_with(images, row) if bad[row] or not known else lost
        reasons.append("" if has[row] else problem)
    sums = [checksum(cache.key, *row) for row in zip(digests, features, reasons, strict=True)]
    return {
        "digest": _texts(digests),
        "features": features,
        "reason": _texts(reasons),
        "key": _texts([cache.key] * len(images)),
        "checksum": _texts(sums),
    }


def _texts(values: list[str]) -> NDArray[np.object_]:
    return np.array(values, object)
