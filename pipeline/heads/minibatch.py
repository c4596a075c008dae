"""Train linear layers with ReLU and dropout between them by minibatches: the module, its optimiser, its epochs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..features.rows import Rows
from ..params import NetworkParams
from ..runtime.seeds import derive_seed
from .common import Features, Floats, Ints
from .layers import Layers

if TYPE_CHECKING:
    from .network import NetworkHead

BATCH_OF_EVALUATION = 8192
BETAS = (0.9, 0.999)
EPSILON = 1e-8


class Trainer:
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
        self.X, self.index = self.features(X), self.positions(index)
        self.weights = torch.from_numpy(weights).float().to(self.device)
        sizes = [X.shape[1], *self.network.hidden, len(head.classes_)]
        self.linears = [self._linear(*pair) for pair in pairwise(sizes)]
        self.parameters = [value for layer in self.linears for value in layer.parameters()]
        self.optimizer = Optimizer(self.parameters, self.network)
        self.epochs = 0

    def features(self, X: Features) -> Tensor | Rows:
        """Standardised float32 features on the device; those in a file stay there."""
        return X if isinstance(X, Rows) else self._standardised(X)

    def _standardised(self, X: Features) -> Tensor:
        mean, scale = self.moments
        return torch.from_numpy(((X - mean) / scale).astype(np.float32)).to(self.device)

    def _batch(self, X: Tensor | Rows, rows: Tensor) -> Tensor:
        return self._standardised(X[rows.numpy()]) if isinstance(X, Rows) else X[rows.to(self.device)]

    def positions(self, index: Ints) -> Tensor:
        """Class positions on the device."""
        return torch.from_numpy(index).to(self.device)

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
        order = torch.randperm(len(self.X), generator=self.generator)
        loss_sum = weight_sum = hits = 0.0
        for rows in torch.split(order, self.network.batch_size):
            target = self.index[rows.to(self.device)]
            logits = self._forward(self._batch(self.X, rows), training=True)
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
    def evaluate(self, X: Tensor | Rows, target: Tensor, prefix: str) -> dict[str, float]:
        """Mean loss (weighted as in training) and accuracy, without dropout."""
        parts = torch.split(torch.arange(len(X)), BATCH_OF_EVALUATION)
        logits = torch.cat([self._forward(self._batch(X, rows), training=False) for rows in parts])
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

    def layers(self) -> Layers:
        """The present values in float64."""
        values = copy.deepcopy([(layer.weight, layer.bias) for layer in self.linears])
        arrays = [tuple(value.detach().cpu().double().numpy() for value in pair) for pair in values]
        weights, biases = zip(*arrays, strict=True)
        return Layers(weights, biases, dropout=self.network.dropout)


class Optimizer:
    """Adam, AdamW or SGD with momentum, as torch defines them, by the rule that ``network.optimizer`` names.

    The first optimiser that torch makes imports its compiler, which takes seconds: longer than these heads train.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], network: NetworkParams) -> None:
        self.parameters, self.network = list(parameters), network
        self.steps = 0
        self.first = [torch.zeros_like(value) for value in self.parameters]
        self.second = [torch.zeros_like(value) for value in self.parameters]

    def clear(self) -> None:
        """Forget the gradients."""
        for value in self.parameters:
            value.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """One update."""
        self.steps += 1
        update = self._sgd if self.network.optimizer == "sgd" else self._adam
        for value, first, second in zip(self.parameters, self.first, self.second, strict=True):
            assert value.grad is not None
            update(value, value.grad, first, second)

    def _sgd(self, value: Tensor, gradient: Tensor, velocity: Tensor, _: Tensor) -> None:
        gradient = gradient.add(value, alpha=self.network.weight_decay)
        if self.steps == 1:
            velocity.copy_(gradient)
        else:
            velocity.mul_(self.network.momentum).add_(gradient)
        value.sub_(velocity, alpha=self.network.lr)

    def _adam(self, value: Tensor, gradient: Tensor, mean: Tensor, square: Tensor) -> None:
        """Kingma and Ba 2015; AdamW decays the weights apart from the gradient (Loshchilov and Hutter 2019)."""
        lr, decay = self.network.lr, self.network.weight_decay
        if self.network.optimizer == "adamw":
            value.mul_(1 - lr * decay)
        else:
            gradient = gradient.add(value, alpha=decay)
        mean.lerp_(gradient, 1 - BETAS[0])
        square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        corrected = (square.sqrt() / (1 - BETAS[1] ** self.steps) ** 0.5).add_(EPSILON)
        value.addcdiv_(mean, corrected, value=-lr / (1 - BETAS[0] ** self.steps))
