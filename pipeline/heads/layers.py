"""Linear layers with ReLU between them, in float64: what every torch head becomes once it is fitted.

A row's logits are computed by one matrix product per row. Libraries choose their summation order by the shape of
a product, so a product over a whole batch would let a row's last bits depend on how many rows stand beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from ..files import read_regular_file
from .base import Head
from .common import CHUNK_ROWS, Features, Floats, one_library_thread


@dataclass(frozen=True)
class Layers:
    """``weights[i]`` is (out, in) and ``biases[i]`` (out,), float64; ``dropout`` is what they were trained with."""

    weights: tuple[Floats, ...]
    biases: tuple[Floats, ...]
    dropout: float = 0.0
    _columns: tuple[Floats, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        columns = tuple(np.ascontiguousarray(weight.T, dtype=np.float64) for weight in self.weights)
        object.__setattr__(self, "_columns", columns)

    def logits(self, X: NDArray[Any]) -> Floats:
        """Logits (n, c) of features (n, d); the bits of a row depend on that row alone."""
        parts = [np.empty((0, len(self.biases[-1])))]
        with one_library_thread():
            for start in range(0, len(X), CHUNK_ROWS):
                parts.append(self._rows(X[start : start + CHUNK_ROWS].astype(np.float64)))
        return np.concatenate(parts)

    def _rows(self, rows: Floats) -> Floats:
        for number, (columns, bias) in enumerate(zip(self._columns, self.biases, strict=True)):
            if number:
                rows = np.maximum(rows, 0.0)
            rows = np.matmul(np.ascontiguousarray(rows)[:, None, :], columns)[:, 0, :] + bias
        return rows

    def fold_standardisation(self, mean: Floats, scale: Floats) -> Layers:
        """The same function of raw features, where this one takes ``(x - mean) / scale``; an infinite scale gives 0."""
        first = self.weights[0] / scale
        biases = (self.biases[0] - first @ mean, *self.biases[1:])
        return replace(self, weights=(first, *self.weights[1:]), biases=biases)

    def fold_temperature(self, temperature: float) -> Layers:
        """The same function with its logits divided by ``temperature``."""
        weights = (*self.weights[:-1], self.weights[-1] / temperature)
        return replace(self, weights=weights, biases=(*self.biases[:-1], self.biases[-1] / temperature))

    def parameter_count(self) -> int:
        """Numbers in all weights and biases."""
        return sum(array.size for array in (*self.weights, *self.biases))

    def to_bytes(self) -> bytes:
        """A safetensors file of ``layers.0.weight``, ``layers.0.bias`` and so on."""
        tensors = {}
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            tensors[f"layers.{number}.weight"] = np.ascontiguousarray(weight)
            tensors[f"layers.{number}.bias"] = np.ascontiguousarray(bias)
        return save_tensors(tensors)

    @classmethod
    def from_bytes(cls, data: bytes, *, classes: int, dropout: float) -> Layers:
        """What `to_bytes` wrote, for so many classes.

        Raises:
            SafetensorError, KeyError, ValueError: it is damaged, or its shapes do not fit together.
        """
        tensors = load_tensors(data)
        count = len(tensors) // 2
        weights = tuple(np.asarray(tensors[f"layers.{number}.weight"], dtype=np.float64) for number in range(count))
        biases = tuple(np.asarray(tensors[f"layers.{number}.bias"], dtype=np.float64) for number in range(count))
        widths = [weights[0].shape[1], *(weight.shape[0] for weight in weights)] if count else []
        shapes = [(outputs, inputs) for inputs, outputs in pairwise(widths)]
        fits = [weight.shape for weight in weights] == shapes and [len(bias) for bias in biases] == widths[1:]
        if not count or not fits or widths[-1] != classes:
            raise ValueError("the shapes of its layers do not fit together")
        return cls(weights, biases, dropout=dropout)


class LayersHead(Head):
    """A head that is a stack of linear layers once it is fitted; its families say how these are learnt."""

    file = "head.safetensors"
    layers: Layers | None = None

    def as_layers(self) -> Layers:
        """The fitted layers, on raw features.

        Raises:
            RuntimeError: the head is not fitted.
        """
        if self.layers is None:
            raise RuntimeError("the head is not fitted")
        return self.layers

    def logits(self, X: Features) -> Floats:
        """Logits (n, c)."""
        return self.as_layers().logits(X)

    def parameter_count(self) -> int:
        """Numbers in all layers."""
        return self.as_layers().parameter_count()

    def write(self, file: Path) -> dict[str, Any]:
        """Weights and biases in float64, as safetensors."""
        file.write_bytes(self.as_layers().to_bytes())
        return {"dropout": self.as_layers().dropout}

    def read(self, file: Path, record: Mapping[str, Any]) -> None:
        """Layers for the head's classes."""
        data = read_regular_file(file)
        self.layers = Layers.from_bytes(data, classes=len(self.classes_), dropout=float(record["dropout"]))
