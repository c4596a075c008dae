"""Torch heads trained by minibatches: a linear layer or an MLP with ReLU and dropout."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Self

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ..errors import HeadError
from ..params import HeadParams, NetworkParams
from ..runtime.seeds import derive_seed
from .base import Features, Floats, Ints, check_training_data, class_weights, near, softmax
from .calibration import calibrate
from .crossval import OutOfFold, Scores, align, best_candidate, candidates, out_of_fold
from .folds import Fold, hold_out, stratified_group_folds
from .layers import Layers, standardisation
from .optimizer import Optimizer

BATCH_OF_EVALUATION = 8192


class NetworkHead:
    """``linear`` or ``mlp``: early stopping on a held-out part of train, then a refit on all of it.

    The number of epochs is the one of lowest loss on the held-out part (stratified, groups kept together); the refit
    starts afresh and trains that many epochs on all rows. ``history`` holds both phases. All randomness comes from
    ``seed`` through generators of the head's own: the same thread count gives the same numbers.
    """

    has_probabilities = True
    why_no_probabilities: str | None = None

    def __init__(
        self,
        kind: str,
        network: NetworkParams,
        params: HeadParams,
        *,
        class_names: Sequence[str],
        device: str = "cpu",
        jobs: int = 1,
    ) -> None:
        self.kind, self.network, self.params, self.jobs = kind, network, params, jobs
        self.class_names, self.device = tuple(class_names), torch.device(device)
        self.classes_: Ints = np.empty(0, dtype=np.int64)
        self.layers: Layers | None = None
        self.selected: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.warnings: tuple[str, ...] = ()
        self.out_of_fold: Floats | None = None
        self._candidates = candidates(params.search, kind, params.kinds)
        for values in self._candidates:
            self._replaced(values)

    def _replaced(self, values: dict[str, Any]) -> NetworkParams:
        valid = [name for name in NetworkParams.model_fields if name != "hidden" or self.kind == "mlp"]
        for name in values:
            if name not in valid:
                raise HeadError(
                    f"{self.kind} has no parameter {name!r}.",
                    where="head.search",
                    remedy=f"{near(name, valid)}valid: {', '.join(valid)}",
                )
        try:
            return NetworkParams.model_validate({**self.network.model_dump(), **values})
        except ValidationError as error:
            first = error.errors()[0]
            raise HeadError(
                "A value to search is impossible.",
                where=f"head.search.{first['loc'][0]}",
                why=f"{first['msg']}; got {first['input']!r}",
            ) from error

    def configured(self, values: dict[str, Any]) -> NetworkHead:
        """An unfitted head with some parameters replaced and nothing left to search."""
        params = self.params.model_copy(update={"search": {}})
        head = NetworkHead(
            self.kind, self._replaced(values), params, class_names=self.class_names, device=str(self.device)
        )
        head.classes_ = self.classes_
        return head

    def fit(self, X: Features, y: Ints, groups: Ints | None = None) -> Self:
        """Find the number of epochs on a held-out part, refit on all rows, and fold the standardisation in."""
        started = time.perf_counter()
        X, self.classes_, index = check_training_data(X, y)
        weights = class_weights(self.params.class_weight, self.classes_, index, self.class_names)
        self.history, self.warnings, self.selected = [], (), {}
        if self._candidates:
            self._search(X, index, groups)
        inside, held = hold_out(index, groups, self.network.val_fraction, self.params.seed)
        epochs = self._best_epoch(X[inside], index[inside], X[held], index[held], weights)
        mean, scale = standardisation(X, self.params.standardize)
        trainer = _Trainer(self, X, index, weights, (mean, scale), "refit")
        for _ in range(epochs):
            self.history.append({"phase": "refit", **trainer.epoch()})
        self.layers = trainer.layers(self.network.dropout).fold_standardisation(mean, scale)
        if self.params.calibrate == "temperature":
            self._calibrate(self.cross_validate(X, self.classes_[index], groups), index)
        self.selected |= {"epochs": epochs, "held_out": len(held), "seconds": time.perf_counter() - started}
        return self

    def _best_epoch(self, X: Features, index: Ints, X_val: Features, index_val: Ints, weights: Floats) -> int:
        if not len(X_val):
            self.warnings += (
                f"no class has two independent images to hold one out: trained for all {self.network.epochs} epochs "
                "without early stopping",
            )
            return self.network.epochs
        moments = standardisation(X, self.params.standardize)
        trainer = _Trainer(self, X, index, weights, moments, "search")
        val = trainer.batch(X_val), torch.from_numpy(index_val).to(self.device)
        best, best_loss = 1, float("inf")
        for epoch in range(1, self.network.epochs + 1):
            trained, judged = trainer.epoch(), trainer.evaluate(*val, "val")
            self.history.append({"phase": "search", **trained, **judged})
            if judged["val_loss"] < best_loss:
                best, best_loss = epoch, judged["val_loss"]
                self.selected |= judged
            if epoch - best >= self.network.patience:
                break
        if best == self.network.epochs:
            self.warnings += (f"{self.kind} was still improving after {best} epochs: raise head.{self.kind}.epochs",)
        return best

    def _search(self, X: Features, index: Ints, groups: Ints | None) -> None:
        models = [self.configured(values) for values in self._candidates]
        folds = stratified_group_folds(index, groups, self.params.folds, self.params.seed)
        best, rows = best_candidate(models, self._candidates, X, index, groups, folds, jobs=self.jobs)
        self.network = self._replaced(self._candidates[best])
        self.selected |= {"params": self._candidates[best], "search": rows}

    def _calibrate(self, result: OutOfFold, index: Ints) -> None:
        assert self.layers is not None and result.logits is not None
        temperature, record = calibrate(result.logits, index, result.known)
        self.layers = self.layers.fold_temperature(temperature)
        self.selected |= {
            **record,
            "cv_accuracy": result.accuracy(index),
            "cv_log_loss": result.log_loss(index, temperature),
        }
        self.out_of_fold = softmax(result.logits / temperature)

    def cross_validate(self, X: Features, y: Ints, groups: Ints | None = None) -> OutOfFold:
        """Out-of-fold predictions and logits of the present parameters, on the folds of ``head.folds``."""
        X, self.classes_, index = check_training_data(X, y)
        folds = stratified_group_folds(index, groups, self.params.folds, self.params.seed)
        return out_of_fold([self.configured({})], X, index, groups, folds, jobs=self.jobs)[0]

    def fit_fold(self, X: Features, index: Ints, groups: Ints | None, fold: Fold) -> Scores:
        """Class positions and logits of a fold's held-out rows; early stopping looks at the train part only."""
        train, test = fold
        classes = np.unique(index[train])
        if len(classes) < 2:
            return np.full(len(test), classes[0]), align(np.zeros((len(test), 1)), classes, len(self.classes_))
        head = self.configured({})
        head.params = head.params.model_copy(update={"calibrate": "none"})
        head.fit(X[train], self.classes_[index[train]], None if groups is None else groups[train])
        logits = head._fitted().logits(X[test])
        return classes[logits.argmax(axis=1)], align(logits, classes, len(self.classes_))

    def predict(self, X: Features) -> Ints:
        """The class (n,) of the largest logit."""
        return np.asarray(self.classes_[self._fitted().logits(X).argmax(axis=1)])

    def predict_proba(self, X: Features) -> Floats:
        """Softmax of the logits (n, c)."""
        return self._fitted().probabilities(X)

    def parameter_count(self) -> int | None:
        """Numbers in all layers."""
        return self._fitted().parameter_count()

    def _fitted(self) -> Layers:
        if self.layers is None:
            raise RuntimeError("the head is not fitted")
        return self.layers


class _Trainer:
    """One training run: a module, its optimiser, and a generator for initial weights, batches and dropout."""

    def __init__(
        self,
        head: NetworkHead,
        X: Features,
        index: Ints,
        weights: Floats,
        moments: tuple[Floats, Floats],
        phase: str,
    ) -> None:
        self.network, self.device, self.moments = head.network, head.device, moments
        seed = derive_seed("network", head.kind, phase, head.params.seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.X, self.index = self.batch(X), torch.from_numpy(index).to(self.device)
        self.weights = torch.from_numpy(weights).float().to(self.device)
        sizes = [X.shape[1], *self.network.hidden, len(head.classes_)]
        self.linears = [self._linear(*pair) for pair in pairwise(sizes)]
        self.parameters = [value for layer in self.linears for value in layer.parameters()]
        self.optimizer = Optimizer(self.parameters, self.network)
        self.epochs = 0

    def batch(self, X: Features) -> Tensor:
        """Standardised float32 features on the device."""
        mean, scale = self.moments
        return torch.from_numpy(((X - mean) / scale).astype(np.float32)).to(self.device)

    def _linear(self, inputs: int, outputs: int) -> nn.Linear:
        """torch's own initial values, drawn from this run's generator."""
        layer = nn.Linear(inputs, outputs)
        bound = inputs**-0.5
        with torch.no_grad():
            for value in (layer.weight, layer.bias):
                value.copy_(torch.empty(value.shape).uniform_(-bound, bound, generator=self.generator))
        layer.to(self.device)
        return layer

    def epoch(self) -> dict[str, float]:
        """One pass over all rows in random batches; the mean loss and accuracy while training."""
        order = torch.randperm(len(self.X), generator=self.generator).to(self.device)
        loss_sum = weight_sum = hits = 0.0
        for rows in torch.split(order, self.network.batch_size):
            target = self.index[rows]
            logits = self._forward(self.X[rows], training=True)
            loss = nn.functional.cross_entropy(logits, target, self.weights)
            self.optimizer.clear()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            weight = float(self.weights[target].sum())
            loss_sum, weight_sum = loss_sum + float(loss.detach()) * weight, weight_sum + weight
            hits += float((logits.detach().argmax(1) == target).sum())
        self.epochs += 1
        return {"epoch": self.epochs, "train_loss": loss_sum / weight_sum, "train_accuracy": hits / len(self.X)}

    @torch.no_grad()
    def evaluate(self, X: Tensor, target: Tensor, prefix: str) -> dict[str, float]:
        """Mean loss (weighted as in training) and accuracy, without dropout."""
        logits = torch.cat([self._forward(rows, training=False) for rows in torch.split(X, BATCH_OF_EVALUATION)])
        loss = float(nn.functional.cross_entropy(logits, target, self.weights))
        return {f"{prefix}_loss": loss, f"{prefix}_accuracy": float((logits.argmax(1) == target).float().mean())}

    def _forward(self, X: Tensor, *, training: bool) -> Tensor:
        keep = 1 - self.network.dropout
        for number, layer in enumerate(self.linears):
            X = torch.relu(X) if number else X
            if training and keep < 1:
                kept = torch.empty(X.shape).bernoulli_(keep, generator=self.generator).to(self.device)
                X = X * kept / keep
            X = layer(X)
        return X

    def layers(self, dropout: float) -> Layers:
        """The present values in float64."""
        values = copy.deepcopy([(layer.weight, layer.bias) for layer in self.linears])
        arrays = [tuple(value.detach().cpu().double().numpy() for value in pair) for pair in values]
        return Layers(tuple(pair[0] for pair in arrays), tuple(pair[1] for pair in arrays), dropout=dropout)
