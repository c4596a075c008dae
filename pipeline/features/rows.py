"""Features larger than memory: a flat file of rows, of which only the block at hand is in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .rounding import Features

BLOCK_BYTES = 16 << 20
# Rows that are not neighbours and are looked up through one map: the system maps some 64 kB around each.
SCATTERED = 256
PREFIX, SUFFIX = "rows-", ".npy"


class Rows:
    """Rows (n, d) of a NumPy file (m, d), looked up when they are asked for; what is given out is float32.

    A map is made for each look and dropped after it, so that what was read is in the system's cache and not ours.
    """

    ndim = 2
    dtype = np.dtype(np.float32)

    def __init__(
        self, file: Path, chosen: NDArray[np.int64] | None = None, moments: tuple[Any, Any] | None = None
    ) -> None:
        stored = np.load(file, mmap_mode="c")
        if stored.ndim != 2 or stored.dtype not in (np.float16, np.float32):
            raise ValueError(f"{file} holds no features")
        self.file, self.stored_dtype, self._moments = file, stored.dtype, moments
        self._chosen = np.arange(len(stored)) if chosen is None else chosen
        self.shape: tuple[int, int] = (len(self._chosen), stored.shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that all rows take in memory."""
        return 4 * self.shape[0] * self.shape[1]

    def __getitem__(self, rows: Any) -> Features:
        """The rows of a slice, a mask or positions, in memory."""
        return self.stored(rows).astype(np.float32, copy=False)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """All rows, in memory."""
        return self[:].astype(dtype or self.dtype, copy=False)

    def stored(self, rows: Any) -> NDArray[Any]:
        """As rows are given out, of the type in which they are stored where they are not standardised."""
        found = self._look_up(rows)
        if self._moments is None:
            return found
        mean, scale = self._moments
        return np.asarray(((found - mean) / scale).astype(np.float32))

    def _look_up(self, rows: Any) -> NDArray[Any]:
        chosen = self._chosen[rows]
        stored = np.load(self.file, mmap_mode="c")
        if len(chosen) and chosen[-1] - chosen[0] == len(chosen) - 1 and (np.diff(chosen) == 1).all():
            return np.asarray(stored[chosen[0] : chosen[-1] + 1])
        found = np.empty((len(chosen), stored.shape[1]), stored.dtype)
        for start in range(0, len(chosen), SCATTERED):
            part = slice(start, start + SCATTERED)
            found[part] = np.load(self.file, mmap_mode="c")[chosen[part]]
        return found

    def take(self, rows: Any) -> Rows:
        """The rows of a slice, a mask or positions, none of them read yet."""
        return Rows(self.file, self._chosen[rows], self._moments)

    def standardised(self, mean: NDArray[np.float64], scale: NDArray[np.float64]) -> Rows:
        """The same less ``mean`` (d,), divided by ``scale`` (d,)."""
        return Rows(self.file, self._chosen, (mean, scale))

    def blocks(self) -> Iterator[slice]:
        """Slices that cover all rows, each of so many as go well into memory."""
        return row_blocks(self)


def row_blocks(features: Any) -> Iterator[slice]:
    """Slices that cover the rows of features (n, d), each of so many as go well into memory."""
    step = max(BLOCK_BYTES // (4 * features.shape[1]), 1)
    for start in range(0, len(features), step):
        yield slice(start, min(start + step, len(features)))


def mean_row(features: Any) -> Features:
    """The mean (d,) of features (n, d), which are read by blocks; of none, 0."""
    total = sum((features[rows].sum(axis=0, dtype=np.float64) for rows in row_blocks(features)), np.zeros(1))
    return np.asarray(np.broadcast_to(total / max(len(features), 1), features.shape[1:]), np.float32)


def take_rows(features: Any, rows: Any) -> Any:
    """The rows (..., m, d) of features (..., n, d); not read yet where they are `Rows`."""
    return features.take(rows) if isinstance(features, Rows) else features[..., rows, :]
