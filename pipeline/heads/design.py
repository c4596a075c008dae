"""The features of a logistic regression, in the basis and with the preconditioner that make it quick to solve."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RANK_TOLERANCE = 1e-13
FEW_ROWS = 0.75
SKETCH_WIDTH = 64
SKETCH_SPARE = 16


@dataclass(frozen=True)
class Design:
    """Centred and scaled features, a column of ones last, and what is known of their Gram matrix.

    ``exact`` (n, r + 1) float64 and ``fast`` its float32 copy, ``curvature`` (r + 1,) the mean square of each column,
    ``basis`` (d, r) the rotation that the columns went through (None: they are the features themselves), ``leading``
    (m, r + 1) orthonormal directions along which the mean square is ``leading_curvature`` (m,) instead, ``target`` (n,)
    class positions, ``outputs`` weight vectors a problem (1 for two classes).
    """

    exact: Tensor
    fast: Tensor
    curvature: Tensor
    basis: Tensor | None
    leading: Tensor
    leading_curvature: Tensor
    target: Tensor
    outputs: int

    @classmethod
    def build(cls, X: Tensor, target: Tensor, classes: int, *, rotate: bool = True) -> Design:
        """From centred and scaled features (n, d) float64 and class positions (n,), on the device of ``X``.

        With ``rotate`` the columns become the eigenvectors of the Gram matrix: the fewest iterations, worth its
        seconds where many problems follow. Without, only the leading eigenvectors are found, roughly. Few rows are
        rotated always, since that is quick and leaves clearly fewer columns: one less than there are rows.
        """
        n, d = X.shape
        outputs = 1 if classes == 2 else classes
        if not (rotate or n <= FEW_ROWS * d or min(n, d) <= 4 * SKETCH_WIDTH):
            return cls._sketched(X, target, outputs)
        rotated, values, basis = _eigenbasis(X)
        exact = _with_ones(rotated)
        curvature = torch.cat([values / n, values.new_ones(1)])
        none = exact.new_zeros(0, exact.shape[1])
        return cls(exact, exact.float(), curvature, basis, none, none[:, 0], target, outputs)

    @classmethod
    def _sketched(cls, X: Tensor, target: Tensor, outputs: int) -> Design:
        n, d = X.shape
        exact = _with_ones(X)
        fast = exact.float()
        values, vectors = _leading_eigenvectors(fast[:, :-1])
        rest = (X.square().sum() - values.sum()).clamp_min(0) / (d - len(values))
        curvature = torch.cat([(rest / n).expand(d), X.new_ones(1)])
        leading = torch.cat([vectors.T, vectors.new_zeros(len(values), 1)], dim=1)
        return cls(exact, fast, curvature, None, leading, values / n, target, outputs)

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

    def feature_weights(self, weights: Tensor) -> Tensor:
        """Weights (..., d) of the features, without intercepts, from weights (..., r + 1) of the columns."""
        return weights[..., :-1] if self.basis is None else weights[..., :-1] @ self.basis.T


class Preconditioner:
    """The inverse of the mean Hessian ``spread * gram / n + penalty`` of each class, for weights (p, k, r + 1).

    The Hessian of a softmax has no data term along weights that are equal in all classes, so their mean is taken
    out: without that, steps leave the plane in which the weights of the classes sum to zero, where the optimum lies.

    Args:
        spread: what the mean squares of the features are to be multiplied by (p, k).
        present: 1 for classes that take part, else 0 (p, k).
    """

    def __init__(self, design: Design, spread: Tensor, penalty: Tensor, present: Tensor) -> None:
        self.present = present[:, :, None]
        self.share = self.present / self.present.sum(1, keepdim=True)
        diagonal = spread[:, :, None] * design.curvature.to(spread.dtype) + penalty
        self.inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)
        self.leading = design.leading.to(spread.dtype)
        if len(self.leading):
            leading = 1 / (spread[:, :, None] * design.leading_curvature.to(spread.dtype) + 1)
            self.correction = leading - self.inverse[:, :, :1]

    def __call__(self, vector: Tensor) -> Tensor:
        """The product with ``vector`` (p, k, r + 1), whose classes sum to zero; so do those of the result."""
        result = self.inverse * vector
        if len(self.leading):
            along = (vector.flatten(0, 1) @ self.leading.T).view_as(self.correction)
            result.flatten(0, 1).addmm_((along * self.correction).flatten(0, 1), self.leading)
        if vector.shape[1] == 1:
            return result
        return centred(result, self.present, self.share)


def centred(weights: Tensor, present: Tensor, share: Tensor) -> Tensor:
    """Weights (p, k, r + 1) less their mean over the classes that are ``present`` (p, k, 1)."""
    return weights - present * (share * weights).sum(1, keepdim=True)


def _with_ones(columns: Tensor) -> Tensor:
    return torch.cat([columns, columns.new_ones(len(columns), 1)], dim=1)


def _eigenbasis(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The columns of X (n, d) rotated (n, r), their squared norms (r,), and the rotation (d, r)."""
    n, d = X.shape
    values, vectors = torch.linalg.eigh(X.T @ X if n > d else X @ X.T)
    kept = values > RANK_TOLERANCE * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    values, vectors = values[kept], vectors[:, kept]
    if n > d:
        return X @ vectors, values, vectors
    return vectors * values.sqrt(), values, X.T @ (vectors / values.sqrt())


def _leading_eigenvectors(X: Tensor) -> tuple[Tensor, Tensor]:
    """About the largest eigenvalues (m,) of X'X for X (n, d), and eigenvectors (d, m): Halko et al. 2011, 4.4."""
    generator = torch.Generator().manual_seed(0)  # a fixed start: the same features give the same bits
    sample = torch.randn(X.shape[1], SKETCH_WIDTH + SKETCH_SPARE, generator=generator).to(X.device)
    for _ in range(2):
        sample = torch.linalg.qr(X.T @ (X @ sample)).Q
    image = X @ sample
    values, vectors = torch.linalg.eigh(image.T @ image)
    return values[-SKETCH_WIDTH:].clamp_min(0), sample @ vectors[:, -SKETCH_WIDTH:]
