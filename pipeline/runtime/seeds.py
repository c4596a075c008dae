"""Derive every random number from names and numbers, never from a worker's state."""

from __future__ import annotations

import hashlib

import numpy as np

Item = int | str | bytes


def derive_seed(*items: Item) -> int:
    """A 63-bit seed from (seed, epoch or view, item); equal items give equal seeds on every machine."""
    state = hashlib.blake2b(digest_size=8)
    for item in items:
        data = item if isinstance(item, bytes) else repr(item).encode()
        state.update(type(item).__name__.encode() + len(data).to_bytes(8, "little") + data)
    return int.from_bytes(state.digest(), "little") >> 1


def make_generator(*items: Item) -> np.random.Generator:
    """A NumPy generator seeded by `derive_seed`."""
    return np.random.default_rng(derive_seed(*items))
