"""Features as rows of a table that leaves the cache and comes back: each tells its key, and is proven by a checksum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.digests import Digests, stack_digests
from ..data.parquet import parquet_file
from ..data.stores import Disk
from ..errors import CacheError
from ..files import DIGEST_BYTES, digest_bytes
from .rounding import Features

COLUMNS = ("key", "digest", "features", "reason", "checksum")
BATCH = 4096


def checksum(key: str, digest: str, features: Features, reason: str) -> str:
    """Hex BLAKE2b-128 of a row: its key, the hex digest of its image, and its features (d,) or why there are none.

    It tells damage, not forgery: who can write a row can write its checksum.
    """
    content = reason.encode() if reason else np.ascontiguousarray(features, "<f4").tobytes()
    return digest_bytes(f"{key} {digest} {len(content)} ".encode() + content).hex()


@dataclass(frozen=True)
class SealedRows:
    """Rows found whole: features (n, d) of the contents ``digests`` (n, 16) under ``keys``; how many had none."""

    keys: NDArray[np.str_]
    digests: Digests
    features: Features
    unreadable: int


def read_sealed(file: Path) -> Iterator[SealedRows]:
    """The rows of a Parquet file, some thousands at a time, each held against its checksum.

    Raises:
        CacheError: a row is damaged, or the file holds something else.
        DataError: pyarrow is not installed, or it is no Parquet file.
    """
    parquet = parquet_file(lambda: Disk().open(str(file)), str(file))
    if missing := [name for name in COLUMNS if name not in parquet.schema_arrow.names]:
        raise _refused(file, f"it has no column {', '.join(missing)}: it holds no rows of an Embedder")
    start = 0
    try:
        for batch in parquet.iter_batches(BATCH, columns=list(COLUMNS)):
            yield _proven({name: _values(batch.column(name)) for name in COLUMNS}, file, start)
            start += batch.num_rows
    except (OSError, ValueError, TypeError) as error:  # pyarrow's errors are of these kinds
        raise _refused(file, f"after row {start}: {error}") from error


def _values(column: Any) -> list[Any]:
    """Lists of floats as arrays, whichever kind of list an engine wrote."""
    column = getattr(column, "storage", column)  # of Ray's tensors
    if not hasattr(column, "flatten") or not hasattr(column.type, "value_type"):
        return list(column.to_pylist())
    flat = column.flatten().to_numpy(zero_copy_only=False)
    lengths = [0 if row is None else row for row in column.value_lengths().to_pylist()]
    return np.split(flat, np.cumsum(lengths)[:-1]) if lengths else []


def _proven(columns: dict[str, list[Any]], file: Path, start: int) -> SealedRows:
    keys, digests, features, unreadable = [], [], [], 0
    for number, row in enumerate(zip(*columns.values(), strict=True), start):
        key, digest, values, reason, told = row
        reason = reason or ""
        if not isinstance(values, np.ndarray) or checksum(key, digest, values, reason) != told:
            raise _refused(file, f"row {number} does not match its checksum")
        if reason:
            unreadable += 1
        elif len(bytes.fromhex(digest)) != DIGEST_BYTES or not np.isfinite(values).all():
            raise _refused(file, f"row {number} holds no digest, or features that are no finite numbers")
        else:
            keys.append(key)
            digests.append(bytes.fromhex(digest))
            features.append(np.asarray(values, np.float32))
    widths = {len(each) for each in features}
    if len(widths) > 1:
        raise _refused(file, f"features are {' and '.join(map(str, sorted(widths)))} values wide")
    table = np.stack(features) if features else np.empty((0, 0), np.float32)
    return SealedRows(np.array(keys, str), stack_digests(digests), table, unreadable)


def _refused(file: Path, why: str) -> CacheError:
    return CacheError(
        "Features are not imported; nothing of these files is.",
        where=file,
        why=why,
        remedy="let the job write it again: what its workers' caches hold costs nothing",
    )
