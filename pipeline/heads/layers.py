"""A stack of linear layers with ReLU between them, in float64: what every torch head becomes once it is fitted.

A row's logits are computed by one matrix product per row. Libraries choose their summation order by the shape of
a product, so a product over a whole batch would let a row's last bits depend on how many rows stand beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .base import CHUNK_ROWS, Floats, one_library_thread, softmax


@dataclass(frozen=True)
class Layers:
    """``weights[i]`` is (out, in) and ``biases[i]`` (out,), float64; ``dropout`` only matters for `to_module`."""

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

    def probabilities(self, X: NDArray[Any]) -> Floats:
        """Softmax (n, c) of `logits`."""
        return softmax(self.logits(X))

    def fold_standardisation(self, mean: Floats, scale: Floats) -> Layers:
        """The same function of raw features, where this one takes ``(x - mean) / scale``; an infinite scale gives 0."""
        first = self.weights[0] / scale
        return Layers(
            (first, *self.weights[1:]), (self.biases[0] - first @ mean, *self.biases[1:]), dropout=self.dropout
        )

    def fold_temperature(self, temperature: float) -> Layers:
        """The same function with its logits divided by ``temperature``."""
        return Layers(
            (*self.weights[:-1], self.weights[-1] / temperature),
            (*self.biases[:-1], self.biases[-1] / temperature),
            dropout=self.dropout,
        )

    def parameter_count(self) -> int:
        """Numbers in all weights and biases."""
        return sum(array.size for array in (*self.weights, *self.biases))

    def to_module(self) -> nn.Sequential:
        """A trainable float32 module with these values, dropout before each layer, as fine-tuning starts from."""
        modules: list[nn.Module] = []
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            modules += [nn.ReLU()] if number else []
            modules += [nn.Dropout(self.dropout)] if self.dropout else []
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            with torch.no_grad():
                layer.weight.copy_(torch.from_numpy(weight))
                layer.bias.copy_(torch.from_numpy(bias))
            modules.append(layer)
        return nn.Sequential(*modules)


def standardisation(X: NDArray[np.float32], enabled: bool) -> tuple[Floats, Floats]:
    """Mean and scale (d,) in float64; a constant feature has infinite scale, so that its weight folds to 0.

    When not ``enabled`` the scale of the other features is 1: centring alone does not change a model with an
    unpenalised intercept.
    """
    mean = X.mean(axis=0, dtype=np.float64)
    constant = X.min(axis=0) == X.max(axis=0)
    scale = X.std(axis=0, dtype=np.float64, mean=mean[None]) if enabled else np.ones(X.shape[1])
    return mean, np.where(constant | (scale == 0), np.inf, scale)
