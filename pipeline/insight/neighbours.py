"""The exact nearest neighbours of every image among all others, in one blocked pass that is kept and extended."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.digests import Digests, locate
from ..features.rows import mean_row
from ..files import DIGEST_BYTES, digest_bytes, publish_file
from ..runtime.progress import ProgressBar
from ..runtime.seeds import make_generator

NEIGHBOURS = 20
BLOCK = 4096
# Above this share of rows to look at, one symmetric pass over all costs less than theirs against all.
MANY = 0.4

Features = NDArray[np.float32]
Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Neighbours:
    """The k nearest neighbours of each of n distinct contents, nearest first.

    Attributes:
        digests: uint8 (n, 16), the contents.
        index: int64 (n, k), rows of ``digests``; k is below `NEIGHBOURS` only where n is too small.
        similarity: float32 (n, k), cosine of the features less their ``mean`` (d,), at most 1.
    """

    digests: Digests
    index: Ints
    similarity: Floats
    mean: Floats

    def __len__(self) -> int:
        return len(self.digests)

    def save(self, file: Path) -> None:
        """Publish as NumPy arrays behind a digest of themselves.

        Raises:
            OSError: the file cannot be written.
        """
        body = io.BytesIO()
        index = self.index.astype(np.int32)
        np.savez(body, digests=self.digests, index=index, similarity=self.similarity, mean=self.mean)
        publish_file(file, digest_bytes(body.getvalue()) + body.getvalue())

    @classmethod
    def load(cls, file: Path) -> Self | None:
        """What `save` wrote; None where there is nothing, or where it is damaged: it only saves time."""
        try:
            data = file.read_bytes()
            if digest_bytes(data[DIGEST_BYTES:]) != data[:DIGEST_BYTES]:
                return None
            with np.load(io.BytesIO(data[DIGEST_BYTES:])) as arrays:
                index = arrays["index"].astype(np.int64)
                return cls(arrays["digests"], index, arrays["similarity"], arrays["mean"])
        except (OSError, KeyError, ValueError, zipfile.BadZipFile):
            return None


def find_neighbours(
    digests: Digests,
    features: Features,
    *,
    known: Neighbours | None = None,
    k: int = NEIGHBOURS,
    device: str | torch.device = "cpu",
    quiet: bool = True,
) -> Neighbours:
    """The ``k`` nearest neighbours by cosine of each row of ``features`` (n, d), the mean subtracted; exact.

    Memory beside the features, which may be `Rows`: two blocks of 4096 rows, their products (64 MiB), and the answer.

    Args:
        digests: uint8 (n, 16), all different, of the rows.
        known: what an earlier pass found; only rows that are new, or that lost a neighbour, are compared again, with
            the mean of that pass.
    """
    k = min(k, max(len(digests) - 1, 0))
    start = None if known is None or known.index.shape[1] != k else _carried_over(known, digests)
    if start is not None and start.todo.mean() <= MANY:
        search = _Search(features, start.neighbours.mean, device, start.neighbours)
        search.update(np.flatnonzero(start.todo), start.fresh, quiet)
    else:
        mean = mean_row(features)
        empty = Neighbours(digests, np.full((len(digests), k), -1), np.full((len(digests), k), -np.inf), mean)
        search = _Search(features, mean, device, empty)
        search.search_all(quiet)
    return search.found


@dataclass(frozen=True)
class _Start:
    """Rows of before, renumbered: ``todo`` (n,) are to be compared with all, of which ``fresh`` (n,) are new."""

    neighbours: Neighbours
    todo: NDArray[np.bool_]
    fresh: NDArray[np.bool_]


def _carried_over(known: Neighbours, digests: Digests) -> _Start:
    old = locate(known.digests, digests)
    new = np.append(locate(digests, known.digests), -1)
    fresh: NDArray[np.bool_] = np.less(old, 0)
    index = np.where(fresh[:, None], -1, new[known.index[old]])
    todo: NDArray[np.bool_] = np.any(index < 0, axis=1)
    similarity = np.where(todo[:, None], np.float32(-np.inf), known.similarity[old])
    index[todo] = -1
    return _Start(Neighbours(digests, index, similarity, known.mean), todo, fresh)


class _Search:
    """The best that was seen so far for each row, and the passes that better it."""

    def __init__(self, features: Features, mean: Floats, device: str | torch.device, start: Neighbours) -> None:
        self.features, self.mean, self.device, self.start = features, mean, torch.device(device), start
        self.index = torch.from_numpy(start.index).to(self.device)
        self.value = torch.from_numpy(start.similarity.astype(np.float32)).to(self.device)

    @property
    def found(self) -> Neighbours:
        """The answer."""
        value, index = self.value.clamp(max=1.0).cpu().numpy(), self.index.cpu().numpy()
        return replace(self.start, index=index, similarity=value)

    def search_all(self, quiet: bool) -> None:
        """Every pair once: a product serves the rows of both of its blocks.

        In a random order, so that what is near comes early for most rows and little of the rest passes the bar.
        """
        if self.index.shape[1] == 0:
            return
        order = make_generator("neighbours", len(self.features)).permutation(len(self.features))
        blocks = list(_blocks(order))
        with ProgressBar("comparing", len(blocks) * (len(blocks) + 1) // 2, quiet=quiet) as bar:
            for number, rows in enumerate(blocks):
                left = self._rows(rows)
                for other, columns in enumerate(blocks[number:], start=number):
                    right = left if other == number else self._rows(columns)
                    products = left @ right.T
                    if other == number:
                        products.fill_diagonal_(-torch.inf)
                    else:
                        self._offer(columns, products, rows, axis=1)
                    self._offer(rows, products, columns, axis=0)
                    bar.advance()

    def update(self, todo: Ints, fresh: NDArray[np.bool_], quiet: bool) -> None:
        """The rows ``todo`` against all; of them the ``fresh`` ones are offered to the others, too."""
        everyone = np.arange(len(self.features))
        others = np.ones(len(self.features), bool)
        others[todo] = False
        parts = [(rows, columns) for rows in _blocks(todo) for columns in _blocks(everyone)]
        with ProgressBar("comparing", len(parts), quiet=quiet) as bar:
            for rows, columns in parts:
                products = self._rows(rows) @ self._rows(columns).T
                row, column = np.nonzero(rows[:, None] == columns[None, :])
                products[torch.from_numpy(row), torch.from_numpy(column)] = -torch.inf
                self._offer(rows, products, columns, axis=0)
                new, old = fresh[rows], others[columns]
                if new.any() and old.any():
                    part = products[torch.from_numpy(np.flatnonzero(new))][:, torch.from_numpy(np.flatnonzero(old))]
                    self._offer(columns[old], part, rows[new], axis=1)
                bar.advance()

    def _rows(self, rows: Ints) -> Tensor:
        """Unit rows (b, d); a feature that equals the mean has no direction and stays 0, far from everything."""
        centred = torch.from_numpy(self.features[rows]).to(self.device) - torch.from_numpy(self.mean).to(self.device)
        return torch.nn.functional.normalize(centred, dim=1)

    def _offer(self, rows: Ints, products: Tensor, columns: Ints, *, axis: int) -> None:
        """Similarities of ``rows`` along ``axis`` of ``products``, of ``columns`` along the other: keep the best."""
        k, mine = self.index.shape[1], torch.from_numpy(rows).to(self.device)
        ids = torch.from_numpy(columns).to(self.device)
        worst = self.value[mine, -1]
        if torch.isinf(worst).any():  # a row that has not seen k others: all of these may be among its best
            value, place = (products if axis == 0 else products.T).topk(min(k, len(columns)), dim=1)
            value, index = torch.cat([self.value[mine], value], 1), torch.cat([self.index[mine], ids[place]], 1)
            self.value[mine], best = value.topk(k, dim=1)
            self.index[mine] = index.gather(1, best)
            return
        better = (products > (worst[:, None] if axis == 0 else worst[None, :])).nonzero()
        if len(better):
            self._merge(mine, better[:, axis], products[better[:, 0], better[:, 1]], ids[better[:, 1 - axis]])

    def _merge(self, mine: Tensor, row: Tensor, value: Tensor, index: Tensor) -> None:
        """Better neighbours (m,) of the rows ``mine[row]`` into theirs, of which only those rows are touched."""
        k = self.index.shape[1]
        touched, row = torch.unique(row, return_inverse=True)
        mine = mine[touched]
        row = torch.cat([torch.arange(len(mine), device=self.device).repeat_interleave(k), row])
        value = torch.cat([self.value[mine].flatten(), value])
        index = torch.cat([self.index[mine].flatten(), index])
        order = value.argsort(descending=True, stable=True)
        order = order[row[order].argsort(stable=True)]
        row = row[order]
        rank = torch.arange(len(row), device=self.device) - torch.searchsorted(row, row)
        order = order[rank < k]
        self.value[mine], self.index[mine] = value[order].reshape(-1, k), index[order].reshape(-1, k)


def _blocks(rows: Ints) -> Iterator[Ints]:
    for start in range(0, len(rows), BLOCK):
        yield rows[start : start + BLOCK]
