"""Logistic regression with L2 for many strengths and folds at once: a batched, preconditioned L-BFGS.

Each problem minimises scikit-learn's objective ``C * sum_i s_i loss_i + 0.5 * ||w||^2`` over weights and an
unpenalised intercept; with two classes over one weight vector (logistic loss), else over one a class (softmax).

What makes it fast:

- All problems of a batch share the two matrix products of an iteration, which run several times faster with fifty
  columns than with ten. A problem that has converged drops out.
- Features are rotated once into the eigenbasis of their Gram matrix, where the Hessian ``C X'DX + I`` is close to
  diagonal for every strength at once (Böhning 1992 bounds it by a multiple of the Gram matrix), so that the
  preconditioner of L-BFGS is one division. With fewer rows than features the rotation also shrinks the problem.
- A step along a direction needs no further product, since the logits along it are known: the line search is free.

What makes it exact: iterations run in float32, and each solution is then measured in float64. The penalty makes the
objective 1-strongly convex, so ``objective - optimum <= 0.5 * ||gradient||^2``: a bound that is proven, not
estimated. Solutions whose bound is above the tolerance are polished in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HISTORY = 10
MAX_ITERATIONS = 1000
MAX_TRIALS = 10
ABSENT = -1e30
RANK_TOLERANCE = 1e-13


@dataclass(frozen=True)
class Design:
    """Centred and scaled features in the eigenbasis of their Gram matrix, a column of ones last.

    ``exact`` (n, r + 1) float64 and ``fast`` its float32 copy, ``curvature`` (r + 1,) the mean square of each column,
    ``basis`` (d, r) the rotation, ``target`` (n,) class positions, ``outputs`` weight vectors a problem (1 for two
    classes).
    """

    exact: Tensor
    fast: Tensor
    curvature: Tensor
    basis: Tensor
    target: Tensor
    outputs: int

    @classmethod
    def build(cls, X: Tensor, target: Tensor, classes: int) -> Design:
        """From centred and scaled features (n, d) float64 and class positions (n,), on the device of ``X``."""
        n, d = X.shape
        gram = X.T @ X if n > d else X @ X.T
        values, vectors = torch.linalg.eigh(gram)
        kept = values > RANK_TOLERANCE * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
        values, vectors = values[kept], vectors[:, kept]
        if n > d:
            basis, rotated = vectors, X @ vectors
        else:
            rotated = vectors * values.sqrt()
            basis = X.T @ (vectors / values.sqrt())
        exact = torch.cat([rotated, torch.ones(n, 1, dtype=X.dtype, device=X.device)], dim=1)
        curvature = torch.cat([values / n, torch.ones(1, dtype=X.dtype, device=X.device)])
        return cls(exact, exact.float(), curvature, basis, target, 1 if classes == 2 else classes)

    def rows(self, dtype: torch.dtype) -> Tensor:
        """The features (n, r + 1) in float32 or float64."""
        return self.fast if dtype == torch.float32 else self.exact

    def logits(self, weights: Tensor) -> Tensor:
        """Logits (p, k, n) for weights (p, k, r + 1), in the precision of the weights."""
        problems, outputs, width = weights.shape
        product = weights.reshape(problems * outputs, width) @ self.rows(weights.dtype).T
        return product.view(problems, outputs, -1)

    def backward(self, residuals: Tensor) -> Tensor:
        """Sums (p, k, r + 1) over rows of features times residuals (p, k, n)."""
        problems, outputs, n = residuals.shape
        return (residuals.reshape(problems * outputs, n) @ self.rows(residuals.dtype)).view(problems, outputs, -1)


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

    def take(self, index: Tensor) -> Problems:
        """The problems at ``index``."""
        return Problems(self.strength[index], self.row_weight[index], self.offset[index])

    def to(self, dtype: torch.dtype) -> Problems:
        """The same in another precision."""
        return Problems(self.strength.to(dtype), self.row_weight.to(dtype), self.offset.to(dtype))


@dataclass(frozen=True)
class Solutions:
    """``weights`` (p, k, r + 1) and ``logits`` (p, k, n) in float64, with a certificate for each problem.

    ``objective``, ``gradient_norm`` (2-norm) and ``gap``, the proven bound on ``objective / optimum - 1``, are
    measured in float64; ``iterations`` (p,) counts both phases.
    """

    weights: Tensor
    logits: Tensor
    objective: Tensor
    gradient_norm: Tensor
    gap: Tensor
    iterations: Tensor


def solve(design: Design, problems: Problems, start: Tensor, tolerance: float) -> Solutions:
    """Solve a batch from ``start`` (p, k, r + 1) until each proven gap is at most ``tolerance`` (if float64 can)."""
    search = _Search(design, problems.to(torch.float32), start.float())
    weights, iterations = search.run(0.8 * tolerance)
    solutions = certify(design, problems, weights.double(), iterations)
    open_ = torch.nonzero(solutions.gap > tolerance).squeeze(1)
    if not len(open_):
        return solutions
    search = _Search(design, problems.take(open_), solutions.weights[open_])
    polished, more = search.run(0.8 * tolerance)
    solutions.weights[open_] = polished
    iterations[open_] += more
    return certify(design, problems, solutions.weights, iterations)


def certify(design: Design, problems: Problems, weights: Tensor, iterations: Tensor) -> Solutions:
    """Measure solutions in float64.

    The intercept is not penalised: its share of the gap is its squared gradient over twice its curvature.
    """
    logits = design.logits(weights) + problems.offset
    residuals, losses = residuals_and_losses(logits, design.target, problems.row_weight)
    penalised = weights[..., :-1]
    objective = problems.strength * losses + 0.5 * penalised.square().sum((1, 2))
    gradient = problems.strength[:, None, None] * design.backward(residuals)
    gradient[..., :-1] += penalised
    spread = problems.strength[:, None] * spreads(residuals, problems.row_weight)
    bound = 0.5 * gap_norm(gradient, spread)
    norm = gradient.square().sum((1, 2)).sqrt()
    return Solutions(weights, logits, objective, norm, bound / objective, iterations)


def residuals_and_losses(logits: Tensor, target: Tensor, row_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted derivatives of the loss (p, k, n), and the weighted sum of losses (p,) in float64.

    The derivative at a row's own class is minus the sum of the other probabilities, never ``probability - 1``: far
    down a path all but a rounding error of that difference cancels.
    """
    if logits.shape[1] == 1:
        sign = (2 * target - 1).to(logits.dtype)
        margin = logits[:, 0] * sign
        residuals = -sign * torch.sigmoid(-margin) * row_weight
        losses = torch.nn.functional.softplus(-margin) * row_weight
        return residuals[:, None], losses.sum(1, dtype=torch.float64)
    own = target.expand(len(logits), 1, -1)
    peak = logits.amax(1, keepdim=True)
    powers = (logits - peak).exp_()
    own_power = powers.gather(1, own)
    powers.scatter_(1, own, 0.0)
    others = powers.sum(1, keepdim=True)
    total = others + own_power
    scale = row_weight[:, None] / total
    residuals = powers.mul_(scale).scatter_(1, own, -others * scale)
    margin = torch.where(own_power == 1, torch.log1p(others), peak - logits.gather(1, own) + total.log())
    return residuals, (margin[:, 0] * row_weight).sum(1, dtype=torch.float64)


def spreads(residuals: Tensor, row_weight: Tensor) -> Tensor:
    """Weighted sums (p, k) of ``probability * (1 - probability)``, the intercepts' own curvature."""
    inverse = torch.where(row_weight > 0, 1 / row_weight, 0.0)
    squares = torch.bmm(residuals.square(), inverse[:, :, None])[:, :, 0]
    return (residuals.abs().sum(2) - squares).clamp_min(0)


def gap_norm(gradient: Tensor, intercept_curvature: Tensor) -> Tensor:
    """Squared norm (p,) of gradients in which twice the gap to the optimum is at most 1."""
    smallest = torch.finfo(gradient.dtype).tiny
    intercept = gradient[..., -1].square() / intercept_curvature.clamp_min(smallest)
    intercept = torch.where(gradient[..., -1] == 0, 0.0, intercept)
    return gradient[..., :-1].square().sum((1, 2)) + intercept.sum(1)


class _Search:
    """L-BFGS over a batch; problems that are done leave the batch when that makes it clearly smaller."""

    def __init__(self, design: Design, problems: Problems, start: Tensor) -> None:
        self.design, self.problems = design, problems
        self.curvature = design.curvature.to(start.dtype)
        self.penalty = torch.ones_like(self.curvature)
        self.penalty[-1] = 0
        self.result = start.clone()
        self.iterations = torch.zeros(len(start), dtype=torch.long, device=start.device)
        self.place = torch.arange(len(start), device=start.device)
        self.weights = start.clone()
        self.logits = design.logits(start) + problems.offset
        self.history: list[tuple[Tensor, Tensor, Tensor]] = []
        self.residuals, self.losses = residuals_and_losses(self.logits, design.target, problems.row_weight)
        self.gradient = self._gradient(self.residuals, self.weights)

    def _gradient(self, residuals: Tensor, weights: Tensor) -> Tensor:
        return self.problems.strength[:, None, None] * self.design.backward(residuals) + self.penalty * weights

    def run(self, tolerance: float) -> tuple[Tensor, Tensor]:
        """Weights (p, k, r + 1) and iterations (p,)."""
        for _ in range(MAX_ITERATIONS):
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
        """Minus the two-loop estimate of inverse Hessian times gradient, on top of the diagonal preconditioner."""
        diagonal = spread[:, :, None] * self.curvature + self.penalty
        inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)
        vector, factors = self.gradient.clone(), []
        for step, change, scale in reversed(self.history):
            factor = (scale * _dot(step, vector))[:, None, None]
            vector -= factor * change
            factors.append(factor)
        vector *= inverse
        if self.history:
            _, change, scale = self.history[-1]
            length = 1 / (scale * (change.square() * inverse).sum((1, 2)))
            vector *= torch.where(torch.isfinite(length) & (length > 0), length, 1.0)[:, None, None]
        for (step, change, scale), factor in zip(self.history, reversed(factors), strict=True):
            vector += (factor - (scale * _dot(change, vector))[:, None, None]) * step
        downhill = _dot(self.gradient, vector) > 0
        return -torch.where(downhill[:, None, None], vector, inverse * self.gradient)

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
