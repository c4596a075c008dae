"""The log losses of a batch of logistic regressions, and what their derivatives prove about the optimum."""

from __future__ import annotations

import torch
from torch import Tensor


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
    return (residuals.abs().sum(2) - squares).clamp_min_(0)


def gap_norm(gradient: Tensor, intercept_curvature: Tensor) -> Tensor:
    """Squared norm (p,) of gradients in which twice the gap to the optimum is at most 1."""
    smallest = torch.finfo(gradient.dtype).tiny
    intercept = gradient[..., -1].square() / intercept_curvature.clamp_min(smallest)
    intercept = torch.where(gradient[..., -1] == 0, 0.0, intercept)
    return gradient[..., :-1].square().sum((1, 2)) + intercept.sum(1)
