"""Torch heads trained by minibatches: a linear layer or an MLP with ReLU and dropout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ..errors import HeadError
from ..features.rows import take_rows
from ..params import NetworkParams
from .common import Features, Floats, Ints, near, standardisation
from .crossval import OutOfFold, Score
from .layers import LayersHead


class NetworkHead(LayersHead):
    """``linear`` or ``mlp``: early stopping on a held-out part of train, then a refit on all of it.

    The number of epochs is the one of lowest loss on the held-out part (stratified, groups kept together); the refit
    starts afresh and trains that many epochs on all rows. ``history`` holds both phases. All randomness comes from
    ``seed`` through generators of the head's own: the same thread count gives the same numbers. `Rows` are read from
    their file a batch at a time: the same rows in the same order as in memory.
    """

    by_blocks = True

    def configure(self) -> None:
        """The section ``head.linear`` or ``head.mlp``."""
        self.network: NetworkParams = self.params.linear if self.kind == "linear" else self.params.mlp

    def replace(self, values: Mapping[str, Any]) -> None:
        """Take over keys of the section ``head.linear`` or ``head.mlp``."""
        valid = [name for name in NetworkParams.model_fields if name != "hidden" or self.kind == "mlp"]
        for name in values:
            if name not in valid:
                raise HeadError(
                    f"{self.kind} has no parameter {name!r}.",
                    where="head.search",
                    remedy=f"{near(name, valid)}valid: {', '.join(valid)}",
                )
        try:
            self.network = NetworkParams.model_validate({**self.network.model_dump(), **values})
        except ValidationError as error:
            first = error.errors()[0]
            raise HeadError(
                "A value to search is impossible.",
                where=f"head.search.{first['loc'][0]}",
                why=f"{first['msg']}; got {first['input']!r}",
            ) from error

    def learn(self, X: Features, index: Ints, groups: Ints | None) -> None:
        """Find the number of epochs on a held-out part, refit on all rows, and fold the standardisation in."""
        from .minibatch import Trainer

        weights = self._class_weights(index)
        if self._found:
            self.selected = {"params": self._found, **self.selected}
        inside, held = self.held_out(index, groups, self.network.val_fraction)
        epochs = self._best_epoch(take_rows(X, inside), index[inside], take_rows(X, held), index[held], weights)
        mean, scale = standardisation(X, self.params.standardize)
        trainer = Trainer(self, X, index, weights, (mean, scale), "refit")
        for _ in range(epochs):
            self.history.append({"phase": "refit", **trainer.epoch()})
        self.layers = trainer.layers().fold_standardisation(mean, scale)
        self.selected |= {"epochs": epochs, "held_out": len(held)}

    def _best_epoch(self, X: Features, index: Ints, X_val: Features, index_val: Ints, weights: Floats) -> int:
        if not len(X_val):
            self.warnings += (
                f"no class has two independent images to hold one out: trained for all {self.network.epochs} epochs "
                "without early stopping",
            )
            return self.network.epochs
        from .minibatch import Trainer

        moments = standardisation(X, self.params.standardize)
        trainer = Trainer(self, X, index, weights, moments, "search")
        val = trainer.features(X_val), trainer.positions(index_val)
        best, best_loss = 1, float("inf")
        for epoch in range(1, self.network.epochs + 1):
            trained, judged = trainer.epoch(), trainer.evaluate(*val, "val")
            self.history.append({"phase": "search", **trained, **judged})
            if judged["val_loss"] < best_loss:
                best, best_loss = epoch, judged["val_loss"]
                self.selected |= judged
                self.held_score = Score(judged["val_accuracy"], judged["val_loss"])
            if epoch - best >= self.network.patience:
                break
        self._select("the number of epochs", "on a held-out part")
        if best == self.network.epochs:
            self.warnings += (f"{self.kind} was still improving after {best} epochs: raise head.{self.kind}.epochs",)
        return best

    def _cool(self, result: OutOfFold) -> None:
        super()._cool(result)
        self.layers = self.as_layers().fold_temperature(self.temperature)
        self.temperature = 1.0
