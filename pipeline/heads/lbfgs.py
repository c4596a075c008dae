"""A batched L-BFGS for logistic regressions: all problems of a batch share the two matrix products of an iteration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .design import Design, Preconditioner, centred
from .losses import gap_norm, residuals_and_losses, spreads

HISTORY = 20
MAX_ITERATIONS = 1000
MAX_TRIALS = 10
ABSENT = -1e30


@dataclass(frozen=True)
class Problems:
    """A batch: inverse regularisation ``strength`` (p,), ``row_weight`` (p, n), ``offset`` (p, k, 1).

    A row of weight 0 does not take part. The offset is 0, or `ABSENT` for a class without any row that does, which
    takes the class out of the softmax (its intercept would otherwise run away to minus infinity).
    """

    strength: Tensor
    row_weight: Tensor
    offset: Tensor

    @classmethod
    def build(cls, design: Design, strength: Tensor, row_weight: Tensor) -> Problems:
        """Offsets from the rows that take part; ``strength`` (p,) and ``row_weight`` (p, n) are float64."""
        offset = torch.zeros(len(strength), design.outputs, 1, dtype=torch.float64, device=strength.device)
        if design.outputs > 1:
            one_hot = torch.nn.functional.one_hot(design.target, design.outputs).to(row_weight.dtype)
            offset[(row_weight @ one_hot) <= 0] = ABSENT
        return cls(strength, row_weight, offset)

    @property
    def present(self) -> Tensor:
        """1 for the classes that take part, else 0 (p, k)."""
        return (self.offset[:, :, 0] == 0).to(self.offset.dtype)

    def centred(self, weights: Tensor) -> Tensor:
        """Weights (p, k, r + 1) less their mean over classes, which no probability feels but the penalty does."""
        if weights.shape[1] == 1:
            return weights
        present = self.present[:, :, None]
        return centred(weights, present, present / present.sum(1, keepdim=True))

    def take(self, index: Tensor) -> Problems:
        """The problems at ``index``."""
        return Problems(self.strength[index], self.row_weight[index], self.offset[index])

    def to(self, dtype: torch.dtype) -> Problems:
        """The same in another precision."""
        return Problems(self.strength.to(dtype), self.row_weight.to(dtype), self.offset.to(dtype))


class Search:
    """L-BFGS over a batch; problems that are done leave the batch when that makes it clearly smaller."""

    def __init__(self, design: Design, problems: Problems, start: Tensor) -> None:
        self.design, self.problems = design, problems
        self.penalty = torch.ones_like(start[0, 0])
        self.penalty[-1] = 0
        start = problems.centred(start)
        self.result = start.clone()
        self.iterations = torch.zeros(len(start), dtype=torch.long, device=start.device)
        self.place = torch.arange(len(start), device=start.device)
        self.weights = start.clone()
        self.logits = design.logits(start) + problems.offset
        self.history: list[tuple[Tensor, Tensor, Tensor]] = []
        self.residuals, self.losses = residuals_and_losses(self.logits, design.target, problems.row_weight)
        self.gradient = self._gradient(self.residuals, self.weights)

    def _gradient(self, residuals: Tensor, weights: Tensor) -> Tensor:
        gradient = self.design.backward(residuals).mul_(self.problems.strength[:, None, None])
        return gradient.addcmul_(self.penalty, weights)

    def run(self, tolerance: float, limit: int = MAX_ITERATIONS) -> tuple[Tensor, Tensor]:
        """Weights (p, k, r + 1) and iterations (p,), after at most ``limit`` of them."""
        for _ in range(limit):
            spread = self.problems.strength[:, None] * spreads(self.residuals, self.problems.row_weight)
            active = torch.nonzero(self._open(spread, tolerance)).squeeze(1)
            if len(active) <= 0.75 * len(self.place):
                self._retire(active)
                spread = spread[active]
            if not len(active):
                return self.result, self.iterations
            self._step(spread)
            self.iterations[self.place] += 1
        self._retire(torch.empty(0, dtype=torch.long, device=self.place.device))
        return self.result, self.iterations

    def _open(self, spread: Tensor, tolerance: float) -> Tensor:
        penalty = 0.5 * self.weights[..., :-1].square().sum((1, 2))
        objective = self.problems.strength * self.losses + penalty
        return 0.5 * gap_norm(self.gradient, spread) > tolerance * objective

    def _retire(self, active: Tensor) -> None:
        self.result[self.place] = self.weights
        self.place, self.problems = self.place[active], self.problems.take(active)
        for name in ("weights", "logits", "residuals", "losses", "gradient"):
            setattr(self, name, getattr(self, name)[active])
        self.history = [(step[active], change[active], scale[active]) for step, change, scale in self.history]

    def _step(self, spread: Tensor) -> None:
        direction = self._direction(spread)
        along = self.design.logits(direction)
        length, logits, residuals, losses = self._line_search(direction, along)
        step = length[:, None, None] * direction
        weights = self.weights + step
        gradient = self._gradient(residuals, weights)
        change = gradient - self.gradient
        product = _dot(step, change)
        scale = torch.where(product > 0, 1 / product, 0.0)
        self.history = [*self.history[-(HISTORY - 1) :], (step, change, scale)]
        self.weights, self.logits, self.residuals, self.losses = weights, logits, residuals, losses
        self.gradient = gradient

    def _direction(self, spread: Tensor) -> Tensor:
        """Minus the two-loop estimate of inverse Hessian times gradient, on top of the preconditioner."""
        precondition = Preconditioner(self.design, spread, self.penalty, self.problems.present)
        vector, factors = self.gradient.clone(), []
        for step, change, scale in reversed(self.history):
            factor = (scale * _dot(step, vector))[:, None, None]
            vector.addcmul_(factor, change, value=-1)
            factors.append(factor)
        vector = precondition(vector)
        if self.history:
            _, change, scale = self.history[-1]
            length = 1 / (scale * _dot(change, precondition(change)))
            vector *= torch.where(torch.isfinite(length) & (length > 0), length, 1.0)[:, None, None]
        for (step, change, scale), factor in zip(self.history, reversed(factors), strict=True):
            vector.addcmul_(factor - (scale * _dot(change, vector))[:, None, None], step)
        downhill = _dot(self.gradient, vector) > 0
        if not downhill.all():
            vector = torch.where(downhill[:, None, None], vector, precondition(self.gradient))
        return vector.neg_()

    def _line_search(self, direction: Tensor, along: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Step lengths (p,) where the slope has fallen enough, with logits, residuals and losses there.

        The objective is convex along a line, so its slope alone tells where the minimum lies; slopes stay accurate
        where differences of objectives have drowned in rounding.
        """
        problems, target = self.problems, self.design.target
        linear = _dot(self.weights * self.penalty, direction)
        quadratic = _dot(direction * self.penalty, direction)
        first = _dot(self.gradient, direction)
        length, low, high = torch.ones_like(first), torch.zeros_like(first), torch.full_like(first, torch.inf)
        slope_low = first.clone()
        for trial in range(MAX_TRIALS):
            logits = torch.addcmul(self.logits, along, length[:, None, None])
            residuals, losses = residuals_and_losses(logits, target, problems.row_weight)
            slope = problems.strength * _dot(residuals, along) + linear + length * quadratic
            over, under = slope > -0.5 * first, slope < 0.9 * first
            if trial == MAX_TRIALS - 1 or not (over | under).any():
                break
            inside = low + (length - low) * (slope_low / (slope_low - slope)).clamp(0.05, 0.95)
            outside = torch.where(
                torch.isinf(high), length * (first / (first - slope)).clamp(1.5, 10), (length + high) / 2
            )
            high = torch.where(over, length, high)
            low, slope_low = torch.where(under, length, low), torch.where(under, slope, slope_low)
            length = torch.where(over, inside, torch.where(under, outside, length))
        return length, logits, residuals, losses


def _dot(left: Tensor, right: Tensor) -> Tensor:
    product: Tensor = torch.linalg.vecdot(left.flatten(1), right.flatten(1))
    return product
