"""Adam, AdamW and SGD with momentum, as torch defines them, without what importing torch's optimisers costs.

The first optimiser that torch makes imports its compiler, which takes seconds: longer than the heads it would train.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..params import NetworkParams

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class Optimizer:
    """Updates ``parameters`` from their gradients by the rule that ``network.optimizer`` names."""

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
