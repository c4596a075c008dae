"""What a training run needs to know, whom it tells, how far it is and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..runtime.distributed import World
from ..runtime.interrupt import Interruption
from .batchnorm import BatchNormMode
from .history import EpochRow

State = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """Where and how a training runs; resolved, nothing ``auto``.

    Attributes:
        folder: of the checkpoints.
        fingerprint: of all that the result depends on (params, data, starting weights); a checkpoint with another
            one is refused.
        dtype: of mixed precision; float32 for none.
        class_weights: (c,), or None.
    """

    folder: Path
    fingerprint: str
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    batchnorm: BatchNormMode = "frozen"
    class_weights: NDArray[np.floating] | None = None
    world: World = field(default_factory=World)


@dataclass(frozen=True)
class Watch:
    """Who looks on: called after each epoch (row) and each batch (images done), and able to stop the training."""

    on_epoch: Callable[[EpochRow], None] = lambda row: None
    on_batch: Callable[[int], None] = lambda count: None
    interruption: Interruption = field(default_factory=Interruption)


@dataclass(frozen=True)
class Outcome:
    """States are on the CPU, by the classifier's parameter names.

    Attributes:
        start, tuned: the state before any step, and that of the best epoch after it.
        best_epoch: 0 where no epoch beats the start.
    """

    start: State
    tuned: State
    best_epoch: int
    tuned_epoch: int
    history: tuple[EpochRow, ...]
    warnings: tuple[str, ...]

    @property
    def best(self) -> State:
        """The better of the two on the selection set."""
        return self.tuned if self.best_epoch else self.start


@dataclass
class Position:
    """How far the training is; all of it goes into the checkpoint."""

    epoch: int = 1
    batch: int = 0
    step: int = 0
    seconds: float = 0.0
    sums: list[float] = field(default_factory=lambda: [0.0] * 4)  # loss, weights, correct, images of this epoch
    finished: bool = False
    warnings: list[str] = field(default_factory=list)
