"""The training loss as sums that add up across accumulated batches and processes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .mixing import Mix


@dataclass(frozen=True)
class Objective:
    """Cross-entropy with label smoothing and a weight per class (c,), or None for equal weights."""

    label_smoothing: float
    class_weights: Tensor | None

    def loss_sum(self, logits: Tensor, targets: Tensor, mix: Mix | None) -> Tensor:
        """The sum of the images' weighted losses; divided by `weight_sum` of a step it is that step's loss."""
        loss = self._sum(logits, targets)
        if mix is None:
            return loss
        return mix.share * loss + (1 - mix.share) * self._sum(logits, targets[mix.partners])

    def weight_sum(self, targets: NDArray[np.int64]) -> float:
        """The weights of all images of a step. Mixing permutes targets within a batch and so leaves it as it is."""
        if self.class_weights is None:
            return float(len(targets))
        return float(self.class_weights.cpu().double().numpy()[targets].sum())

    def _sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(
            logits, targets, self.class_weights, label_smoothing=self.label_smoothing, reduction="sum"
        )


def correct_sum(logits: Tensor, targets: Tensor, mix: Mix | None) -> Tensor:
    """How many images are classified correctly; a mixed one counts by its shares."""
    predicted = logits.detach().argmax(1)
    correct = (predicted == targets).sum()
    if mix is None:
        return correct
    return mix.share * correct + (1 - mix.share) * (predicted == targets[mix.partners]).sum()


def balanced_weights(targets: NDArray[np.int64], classes: int) -> NDArray[np.float64]:
    """``n / (classes * count)`` for each class, as scikit-learn's ``balanced``; 1 for a class without images."""
    counts = np.bincount(targets, minlength=classes)
    weights: NDArray[np.float64] = np.where(counts > 0, len(targets) / (classes * np.maximum(counts, 1)), 1.0)
    return weights


def make_objective(label_smoothing: float, weights: NDArray[np.floating] | None, device: torch.device) -> Objective:
    """The objective with its class weights on ``device``."""
    tensor = None if weights is None else torch.as_tensor(np.asarray(weights, dtype=np.float32), device=device)
    return Objective(label_smoothing, tensor)
