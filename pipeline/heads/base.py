"""The contract of every head, and the checks and small sums that all of them share."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]  # scikit-learn brings it

from ..errors import HeadError
from ..params import HeadParams

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Features = NDArray[np.float32]
ClassWeight = Literal["balanced"] | dict[str, float] | None

OWN_KINDS = ("logistic", "linear", "mlp", "sklearn")
CHUNK_ROWS = 128
FEW_PRODUCTS = 1e9
LOG_FLOOR = float(np.finfo(np.float64).tiny)


class Head(Protocol):
    """A classifier on features: fitted once, then the same answer for a row whatever stands beside it.

    ``classes_`` (c,) are the sorted target values seen in `fit`; the columns of `predict_proba` follow them.
    ``selected`` says what was chosen and how, ``history`` holds one row an epoch (empty where there are none),
    ``warnings`` are sentences for the user. ``out_of_fold`` (n, c) holds the probabilities that cross-validation
    gave the rows of train, where fitting needed them anyway.
    """

    kind: str
    params: HeadParams
    classes_: Ints
    selected: dict[str, Any]
    history: list[dict[str, Any]]
    warnings: tuple[str, ...]
    has_probabilities: bool
    why_no_probabilities: str | None
    out_of_fold: Floats | None

    def fit(self, X: Features, y: Ints, groups: Ints | None = None) -> Self:
        """Learn from features (n, d) and targets (n,); rows with one id in ``groups`` stay on one side of any split.

        Raises:
            HeadError: the features or targets cannot be learnt from, or the head cannot be configured so.
        """
        ...

    def cross_validate(self, X: Features, y: Ints, groups: Ints | None = None) -> Any:
        """Out-of-fold predictions and logits of train (`crossval.OutOfFold`), from `fit` where it made them."""
        ...

    def predict(self, X: Features) -> Ints:
        """Targets (n,) for features (n, d)."""
        ...

    def predict_proba(self, X: Features) -> Floats:
        """Probabilities (n, c); only where ``has_probabilities``."""
        ...

    def parameter_count(self) -> int | None:
        """Trained numbers, or None where that is no meaningful count."""
        ...


def check_training_data(X: NDArray[Any], y: NDArray[Any]) -> tuple[Features, Ints, Ints]:
    """Features as float32 (n, d), the sorted classes (c,), and each row's position among them (n,).

    Raises:
        HeadError: shapes that do not fit, values that are not finite, or fewer than two classes.
    """
    X = np.ascontiguousarray(X, dtype=np.float32)
    y = np.asarray(y)
    if X.ndim != 2 or y.shape != X.shape[:1] or not X.size:
        raise HeadError(
            "Features and targets do not fit together.",
            why=f"features have shape {X.shape}, targets {y.shape}",
            remedy="give one row of features and one target per image",
        )
    if not np.isfinite(X).all():
        rows = np.flatnonzero(~np.isfinite(X).all(axis=1))
        raise HeadError(
            f"{len(rows)} rows of features hold NaN or infinity.",
            where=f"first at row {rows[0]}",
            remedy="extract again with cache.dtype=float32 or extract.precision=float32",
        )
    classes, index = np.unique(y.astype(np.int64), return_inverse=True)
    if len(classes) < 2:
        raise HeadError(
            "A head needs at least two classes.",
            why=f"all {len(y)} rows of train have the same class",
            remedy="check that the folder has one folder per class and that train holds several of them",
        )
    return X, classes, index.astype(np.int64)


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


def near(name: str, valid: Sequence[str], limit: int = 5) -> str:
    """``did you mean a, b? `` or nothing, for the remedy of an unknown name."""
    close = difflib.get_close_matches(name, valid, n=limit, cutoff=0.5)
    return f"did you mean {', '.join(close)}? " if close else ""


def in_chunks(function: Callable[[NDArray[Any]], NDArray[Any]], X: NDArray[Any], rows: int) -> NDArray[Any]:
    """``function`` over ``X`` in chunks of exactly ``rows`` rows, the last one padded with copies of its last row.

    Libraries pick their arithmetic by the shape of a call; one shape for all calls keeps a row's result free of
    how many rows stand beside it.
    """
    if not len(X):
        return np.asarray(function(np.zeros((rows, X.shape[1]), dtype=X.dtype))[:0])
    results = []
    for start in range(0, len(X), rows):
        chunk = X[start : start + rows]
        if len(chunk) < rows:
            chunk = np.concatenate([chunk, np.repeat(chunk[-1:], rows - len(chunk), axis=0)])
        results.append(function(np.ascontiguousarray(chunk))[: len(X) - start])
    return np.concatenate(results)


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
