"""What all heads share below them: checked training data, class weights, threads, and sums of a row's own."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]  # scikit-learn brings it

from ..errors import HeadError
from ..features.rows import Rows

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Features = NDArray[np.float32]
ClassWeight = Literal["balanced"] | dict[str, float] | None

CHUNK_ROWS = 128
FEW_PRODUCTS = 1e9
LOG_FLOOR = float(np.finfo(np.float64).tiny)


def check_training_data(X: NDArray[Any], y: NDArray[Any]) -> tuple[Features, Ints, Ints]:
    """Features as float32 (v, n, d), the sorted classes (c,), and each image's position among them (n,).

    Args:
        X: (n, d), or (v, n, d) for v views of the images.

    Raises:
        HeadError: shapes that do not fit, values that are not finite, or fewer than two classes.
    """
    X = np.ascontiguousarray(X, dtype=np.float32)
    X = X[None] if X.ndim == 2 else X
    y = np.asarray(y)
    if X.ndim != 3 or y.shape != X.shape[1:2] or not X.size:
        raise HeadError(
            "Features and targets do not fit together.",
            why=f"features have shape {X.shape}, targets {y.shape}",
            remedy="give one row of features and one target per image",
        )
    if not np.isfinite(X).all():
        rows = np.flatnonzero(~np.isfinite(X).all(axis=(0, 2)))
        raise HeadError(
            f"{len(rows)} rows of features hold NaN or infinity.",
            where=f"first at row {rows[0]}",
            remedy="extract again with cache.dtype=float32 or extract.precision=float32",
        )
    return X, *class_positions(y)


def class_positions(y: NDArray[Any]) -> tuple[Ints, Ints]:
    """The sorted classes (c,) of targets (n,), and each one's position among them (n,).

    Raises:
        HeadError: fewer than two classes.
    """
    classes, index = np.unique(np.asarray(y).astype(np.int64), return_inverse=True)
    if len(classes) < 2:
        raise HeadError(
            "A head needs at least two classes.",
            why=f"all {len(y)} rows of train have the same class",
            remedy="check that the folder has one folder per class and that train holds several of them",
        )
    return classes, index.astype(np.int64)


def standardisation(X: NDArray[np.float32], enabled: bool) -> tuple[Floats, Floats]:
    """Mean and scale (d,) in float64 of features (n, d): the standard deviation, or what one row more may make of it.

    A feature that hardly varies in these rows may well do so in others, which would then stand thousands of deviations
    away. One more row that is as far from the mean as features usually are, by their median deviation, makes the
    deviation at least that over the root of n: the least that is believed. A constant feature says nothing: its scale
    is infinite, so that its weight folds to 0.

    When not ``enabled`` the scale of the other features is 1: centring alone does not change a model with an
    unpenalised intercept.
    """
    mean, varies, scale = _moments(X, enabled)
    if not enabled:
        return mean, np.where(varies, 1.0, np.inf)
    least = np.median(scale[varies]) / len(X) ** 0.5 if varies.any() else 0.0
    return mean, np.where(varies, np.maximum(scale, least), np.inf)


def _moments(X: NDArray[np.float32], deviation: bool) -> tuple[Floats, NDArray[np.bool_], Floats]:
    """Mean, whether it varies and, if asked for, standard deviation of each feature (d,)."""
    if not isinstance(X, Rows):
        mean = X.mean(axis=0, dtype=np.float64)
        varies = X.min(axis=0) != X.max(axis=0)
        return mean, varies, X.std(axis=0, dtype=np.float64, mean=mean[None]) if deviation else np.ones_like(mean)
    mean, squares = np.zeros((2, X.shape[1]))
    low, high = np.full((2, X.shape[1]), [[np.inf], [-np.inf]])
    for block in map(X.__getitem__, X.blocks()):
        mean += block.sum(axis=0, dtype=np.float64) / len(X)
        low, high = np.minimum(low, block.min(axis=0)), np.maximum(high, block.max(axis=0))
    for block in map(X.__getitem__, X.blocks() if deviation else ()):
        squares += np.square(block - mean).sum(axis=0)
    return mean, low != high, np.sqrt(squares / len(X))


def class_weights(setting: ClassWeight, classes: Ints, index: Ints, class_names: Sequence[str]) -> Floats:
    """The weight (c,) of each class's rows: 1, ``n / (c * count)`` for "balanced", or as given by name (others 1).

    Raises:
        HeadError: a name that is not a class.
    """
    counts = np.bincount(index, minlength=len(classes)).astype(np.float64)
    if setting is None:
        return np.ones(len(classes))
    if setting == "balanced":
        return np.asarray(counts.sum() / (len(classes) * counts))
    for name in setting:
        if name not in class_names:
            raise HeadError(
                f"There is no class called {name!r}.",
                where="head.class_weight",
                remedy=near(name, class_names) + "use the names of the class folders",
            )
    return np.array([setting.get(class_names[target], 1.0) for target in classes])


def weighted_accuracy(right: NDArray[np.bool_], y: Ints, setting: ClassWeight, class_names: Sequence[str]) -> float:
    """Share of rows that are ``right`` (n,), each with the weight of its class (of the targets ``y``)."""
    classes, index = np.unique(y, return_inverse=True)
    return float(np.average(right, weights=class_weights(setting, classes, index, class_names)[index]))


def near(name: str, valid: Sequence[str], limit: int = 5) -> str:
    """``did you mean a, b? `` or nothing, for the remedy of an unknown name."""
    close = difflib.get_close_matches(name, valid, n=limit, cutoff=0.5)
    return f"did you mean {', '.join(close)}? " if close else ""


@cache
def _libraries() -> ThreadpoolController:
    """The thread pools of this process; looking for them takes longer than predicting a row."""
    return ThreadpoolController()


@contextmanager
def one_library_thread() -> Iterator[None]:
    """Predict with one BLAS and OpenMP thread: a row's bits must not depend on how many cores there are.

    Calls for single rows are also faster so, as there is too little in them to share.
    """
    with _libraries().limit(limits=1):
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for BLAS, OpenMP and torch, so that a fold's numbers do not depend on how many run beside it."""
    if "torch" not in sys.modules:
        with _libraries().limit(limits=1):
            yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _libraries().limit(limits=1):
            yield
    finally:
        torch.set_num_threads(threads)


def few_threads(X: NDArray[Any]) -> AbstractContextManager[None]:
    """One thread for sums over features (n, d) so few that a second one saves next to nothing.

    Threads that share a matrix product wait for each other in a loop. On a machine that is busy with something else,
    one waits for the other to be scheduled at every product: small heads were measured to take forty times as long.
    """
    return one_thread() if len(X) * X.shape[1] * min(X.shape) < FEW_PRODUCTS else nullcontext()


def softmax(logits: Floats) -> Floats:
    """Probabilities (n, c) of logits (n, c), row by row."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def log_losses(probabilities: Floats, index: Ints) -> Floats:
    """Minus the logarithm of each row's probability of its own class (n,); a zero counts as the smallest normal."""
    own = probabilities[np.arange(len(index)), index]
    return np.asarray(-np.log(np.maximum(own, LOG_FLOOR)))
