"""Logistic regression with L2 for many strengths and folds at once: a batched, preconditioned L-BFGS.

Each problem minimises scikit-learn's objective ``C * sum_i s_i loss_i + 0.5 * ||w||^2`` over weights and an
unpenalised intercept; with two classes over one weight vector (logistic loss), else over one a class (softmax).

What makes it fast:

- All problems of a batch share the two matrix products of an iteration (`lbfgs`), which run several times faster with
  fifty columns than with five. A problem that has converged drops out.
- The Hessian ``C X'DX + I`` is bounded by a multiple of the Gram matrix (Böhning 1992), at every strength and fold:
  its eigenvectors, found once, precondition them all (`design`).
- A step along a direction needs no further product, since the logits along it are known: the line search is free.

What makes it exact: iterations run in float32, and each solution is then measured in float64. The penalty makes the
objective 1-strongly convex, so ``objective - optimum <= 0.5 * ||gradient||^2``: a bound that is proven, not
estimated. Solutions whose bound is above the tolerance are polished in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .design import Design
from .lbfgs import MAX_ITERATIONS, Problems, Search
from .losses import gap_norm, residuals_and_losses, spreads


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


def solve(
    design: Design, problems: Problems, start: Tensor, tolerance: float, limit: int = MAX_ITERATIONS
) -> Solutions:
    """Solve a batch from ``start`` (p, k, r + 1) until each proven gap is at most ``tolerance`` (if float64 can).

    Below `MAX_ITERATIONS`, ``limit`` ends the iterations in float32, and none follow in float64.
    """
    search = Search(design, problems.to(torch.float32), start.float())
    weights, iterations = search.run(0.8 * tolerance, limit)
    solutions = certify(design, problems, weights.double(), iterations)
    open_ = torch.nonzero(solutions.gap > tolerance).squeeze(1)
    if not len(open_) or limit < MAX_ITERATIONS:
        return solutions
    search = Search(design, problems.take(open_), solutions.weights[open_])
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
