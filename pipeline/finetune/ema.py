"""An exponential moving average of the weights, usable in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverage:
    """Follows ``module``'s parameters and floating buffers: ``average += (1 - decay) * (value - average)``.

    Over the first steps the decay grows from 0.1 (``(1 + n) / (10 + n)``), lest the start weighs for thousands of them.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self._live = {name: value for name, value in module.state_dict().items() if value.is_floating_point()}
        self._average = {name: value.clone() for name, value in self._live.items()}

    def update(self) -> None:
        """Take one step towards the current values."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        torch._foreach_lerp_(list(self._average.values()), list(self._live.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the module holds the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state(self) -> dict[str, Tensor]:
        """The averages by name; with ``steps`` all that `restore` needs."""
        return self._average

    def restore(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Continue from a saved `state`."""
        self.steps = steps
        for name, value in self._average.items():
            value.copy_(state[name])

    def _swap(self) -> None:
        for name, value in self._live.items():
            kept = value.clone()
            value.copy_(self._average[name])
            self._average[name].copy_(kept)
