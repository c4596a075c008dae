"""Logistic regression with L2 for many strengths and folds at once: a batched, preconditioned Newton method.

Each problem minimises scikit-learn's objective ``C * sum_i s_i loss_i + 0.5 * ||w||^2`` over weights and an
unpenalised intercept; with two classes over one weight vector (logistic loss), else over one a class (softmax).

What makes it fast:

- All problems of a batch share the two matrix products of an iteration (`Search`), which run several times faster with
  fifty columns than with five. A problem that has converged drops out.
- A Newton step is found by conjugate gradients, only as exactly as it is worth (Dembo, Eisenstat and Steihaug 1982,
  "Inexact Newton methods"). Their products may be rounded: that makes a step a little longer or shorter, no more. They
  run in whatever the device is fastest at, several times as fast as plain float32.
- The Hessian ``C X'DX + I`` is bounded by a multiple of the Gram matrix (Böhning 1992), at every strength and fold:
  its eigenvectors, found once, precondition them all (`Design`).
- A step along a direction needs no further product, since the logits along it are known: the line search is free.

What makes it exact: gradients are of float32, and each solution is then measured in float64, its intercepts solved to
rounding first. What is left is a function of the weights alone, least over the intercepts, which the penalty makes
1-strongly convex: ``objective - optimum <= 0.5 * ||gradient of the weights||^2``, a bound that is proven, no estimate.
Solutions whose bound is above the tolerance are polished with gradients of float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..features.rows import Rows
from ..runtime.device import bfloat16_is_fast, fast_products
from .crossval import ABSENT

RANK_TOLERANCE = 1e-13
FEW_ROWS = 0.75
MANY_OUTPUTS = 50
SKETCH_WIDTH = 64
SKETCH_SPARE = 16
MAX_ITERATIONS = 1000
MAX_POLISHES = 5
# A Newton step is solved until its residual is this part of the gradient: the less, the nearer the optimum is; or until
# it is this part of the gap that is asked for.
FORCING = (0.1, 0.5)
ENOUGH = 0.5
MAX_TRIALS = 20
INTERCEPT_FACTOR = 15
ROUNDING_OF_OBJECTIVE = 1e-6
SMALLEST_SPREAD = 1e-3
NEWTON_STEPS = 100
NEWTON_TOLERANCE = 1e-12
RIDGE = 1e-10
# Logits that are worked on at once: what is made of them on the way stays in the processor's cache, and small.
CELLS = {"cpu": 1 << 19, "cuda": 1 << 26}
FEWEST_AT_ONCE = 64


# -- the features, and what preconditions them ----------------------------------------------------------------------


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
        few = n <= (1 if outputs >= MANY_OUTPUTS else FEW_ROWS) * d
        if not (rotate or few or min(n, d) <= 4 * SKETCH_WIDTH):
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

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns (n, r + 1)."""
        return len(self.exact), self.exact.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the features are, or are brought to."""
        return self.exact.device

    @property
    def on_gpu(self) -> bool:
        """Whether TF32 makes products faster, and a batch takes hardly longer than one of its problems."""
        return self.device.type == "cuda"

    def rows(self, dtype: torch.dtype) -> Tensor:
        """The features (n, r + 1) in float32 or float64."""
        return self.fast if dtype == torch.float32 else self.exact

    @cached_property
    def rough(self) -> Tensor | None:
        """The features (n, r + 1) in bfloat16, where the processor multiplies that faster than float32."""
        return self.fast.bfloat16() if bfloat16_is_fast(self.device) else None

    def logits(self, weights: Tensor, *, rounded: bool = False) -> Tensor:
        """Logits (p, k, n) for weights (p, k, r + 1), in the precision of the weights; of factors that may be
        ``rounded`` where that is faster.
        """
        return self._times(weights, lambda rows: rows.T, rounded)

    def backward(self, residuals: Tensor, *, rounded: bool = False) -> Tensor:
        """Sums (p, k, r + 1) over rows of features times residuals (p, k, n), as `logits`."""
        return self._times(residuals, lambda rows: rows, rounded)

    def _times(self, factor: Tensor, side: Callable[[Tensor], Tensor], rounded: bool) -> Tensor:
        flat = factor.flatten(0, 1)
        if rounded and self.rough is not None:
            product = (flat.bfloat16() @ side(self.rough)).float()
        else:
            with fast_products(self.device, rounded=rounded):
                product = flat @ side(self.rows(flat.dtype))
        return product.view(*factor.shape[:2], -1)

    def feature_weights(self, weights: Tensor) -> Tensor:
        """Weights (..., d) of the features, without intercepts, from weights (..., r + 1) of the columns."""
        return weights[..., :-1] if self.basis is None else weights[..., :-1] @ self.basis.T


@dataclass(frozen=True)
class BlockDesign(Design):
    """A `Design` whose features stay in a file, which each product reads once, by blocks, for all problems of a batch.

    ``source`` (n, d) are the features; centred in each block, which is in the processor's cache by then, and scaled in
    the weights. ``exact`` and ``fast`` are empty.
    """

    source: Rows
    mean: Tensor
    inverse_scale: Tensor

    @classmethod
    def open(
        cls, source: Rows, mean: NDArray[np.float64], scale: NDArray[np.float64], target: Tensor, classes: int
    ) -> BlockDesign:
        """From features (n, d) and their standardisation (d,); the leading eigenvectors are found as in `Design`."""
        (n, d), device = source.shape, target.device
        none, centre = torch.zeros(0, d + 1, dtype=torch.float64, device=device), torch.from_numpy(mean).to(device)
        inverse = torch.from_numpy(1 / scale).to(device)
        outputs = 1 if classes == 2 else classes
        plain = cls(none, none.float(), none[:, 0], None, none, none[:, 0], target, outputs, source, centre, inverse)
        squares, values, vectors = plain._sketch()
        values, vectors = values.double(), vectors.double()
        rest = (squares - values.sum()).clamp_min(0) / max(d - len(values), 1)
        curvature = torch.cat([(rest / n).expand(d), none.new_ones(1)])
        leading = torch.cat([vectors.T, none.new_zeros(len(values), 1)], dim=1)
        return replace(plain, curvature=curvature, leading=leading, leading_curvature=values / n)

    def _sketch(self) -> tuple[Tensor, Tensor, Tensor]:
        """The sum of all squares, and as `_leading_eigenvectors`."""
        generator, width = torch.Generator().manual_seed(0), self.source.shape[1]
        sample = torch.randn(width, min(SKETCH_WIDTH + SKETCH_SPARE, width), generator=generator).to(self.device)
        squares = torch.zeros((), dtype=torch.float64, device=self.device)
        scaled = self.inverse_scale.float()[:, None]
        for turn in range(2):
            sums = torch.zeros_like(sample)
            for _, block in self._blocks(torch.float32):
                sums.addmm_(block.T, block @ (scaled * sample))
                if turn == 0:
                    squares += (block * scaled[:, 0]).square().sum(dtype=torch.float64)
            sample = torch.linalg.qr(scaled * sums).Q
        gram = torch.zeros(sample.shape[1], sample.shape[1], device=self.device)
        for _, block in self._blocks(torch.float32):
            image = block @ (scaled * sample)
            gram.addmm_(image.T, image)
        values, vectors = torch.linalg.eigh(gram)
        return squares, values[-SKETCH_WIDTH:].clamp_min(0), sample @ vectors[:, -SKETCH_WIDTH:]

    @property
    def shape(self) -> tuple[int, int]:
        """As in `Design`."""
        return self.source.shape[0], self.source.shape[1] + 1

    def _blocks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and their features (b, d) less the mean."""
        mean = self.mean.to(dtype)
        for rows in self.source.blocks():
            yield rows, torch.from_numpy(self.source.stored(rows)).to(self.device).to(dtype).sub_(mean)

    def logits(self, weights: Tensor, *, rounded: bool = False) -> Tensor:
        """As in `Design`."""
        flat = weights.flatten(0, 1)
        scaled = flat[:, :-1] * self.inverse_scale.to(flat.dtype)
        product = flat.new_empty(len(flat), self.shape[0])
        with fast_products(self.device, rounded=rounded):
            for rows, block in self._blocks(flat.dtype):
                product[:, rows] = scaled @ block.T
        return product.add_(flat[:, -1:]).view(*weights.shape[:2], -1)

    def backward(self, residuals: Tensor, *, rounded: bool = False) -> Tensor:
        """As in `Design`."""
        flat = residuals.flatten(0, 1)
        sums = flat.new_zeros(len(flat), self.source.shape[1])
        with fast_products(self.device, rounded=rounded):
            for rows, block in self._blocks(flat.dtype):
                sums.addmm_(flat[:, rows], block)
        return torch.cat([sums * self.inverse_scale.to(flat.dtype), flat.sum(1)[:, None]], dim=1).view(
            *residuals.shape[:2], -1
        )


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


# -- losses ---------------------------------------------------------------------------------------------------------


def parts_of_rows(logits: Tensor) -> Iterator[slice]:
    """Slices that cover the rows of logits (p, k, n), each of some `CELLS`."""
    problems, outputs, n = logits.shape
    step = max(CELLS.get(logits.device.type, CELLS["cpu"]) // (problems * outputs), FEWEST_AT_ONCE)
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


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
    inverse = torch.where(row_weight > 0, 1 / row_weight, 0.0)[:, :, None]
    result = torch.zeros_like(residuals[:, :, 0])
    for rows in parts_of_rows(residuals):
        part = residuals[..., rows]
        result += part.abs().sum(2) - torch.bmm(part.square(), inverse[:, rows])[:, :, 0]
    return result.clamp_min_(0)


def solve_intercepts(logits: Tensor, target: Tensor, row_weight: Tensor) -> Tensor:
    """What to add to the intercepts (p, k, 1) for the least loss at the present weights, to rounding: Newton's method.

    A step moves no two logits apart by more than 1, so that none can raise the loss (Bach 2010, "Self-concordant
    analysis for logistic regression", proposition 1).
    """
    shift = torch.zeros_like(logits[:, :, :1])
    for _ in range(NEWTON_STEPS):
        gradient, hessian, losses = _by_intercepts(logits, shift, target, row_weight)
        step = _newton_step(gradient, hessian)
        reach = step.amax(1) - step.amin(1) if step.shape[1] > 1 else step.abs()[:, 0]
        shift -= (step / reach.clamp_min(1)[:, None])[:, :, None]
        if not ((gradient * step).sum(1) > NEWTON_TOLERANCE * losses).any():
            break
    return shift


def _by_intercepts(logits: Tensor, shift: Tensor, target: Tensor, row_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First (p, k) and second (p, k, k) derivatives of the weighted loss by the intercepts, and that loss (p,).

    They are zero for a class that does not take part.
    """
    gradient, losses = torch.zeros_like(shift[:, :, 0]), torch.zeros_like(shift[:, 0, 0], dtype=torch.float64)
    hessian = shift.new_zeros(*shift.shape[:2], shift.shape[1])
    for rows in parts_of_rows(logits):
        weight = row_weight[:, rows]
        residuals, loss = residuals_and_losses(logits[..., rows] + shift, target[rows], weight)
        gradient += residuals.sum(2)
        losses += loss
        if shift.shape[1] == 1:
            hessian += spreads(residuals, weight)[:, :, None]
            continue
        own = target[rows].expand(len(residuals), 1, -1)
        mass = residuals.scatter_add_(1, own, weight[:, None])  # row weight times probability
        hessian -= torch.bmm(mass * torch.where(weight > 0, 1 / weight, 0.0)[:, None], mass.mT)
    if shift.shape[1] > 1:
        diagonal = torch.diagonal(hessian, dim1=1, dim2=2)
        diagonal.zero_()
        diagonal.copy_(-hessian.sum(2))  # a Laplacian: rows sum to zero
    return gradient, hessian, losses


def _newton_step(gradient: Tensor, hessian: Tensor) -> Tensor:
    """``hessian ** -1 @ gradient`` (p, k), where adding the same to all classes changes nothing."""
    root = torch.diagonal(hessian, dim1=1, dim2=2).sqrt()
    inverse = torch.where(root > 0, 1 / root, 0.0)
    scaled = hessian * inverse[:, :, None] * inverse[:, None, :] + torch.diag_embed((root == 0) + RIDGE)
    if gradient.shape[1] > 1:
        null = torch.nn.functional.normalize(root, dim=1)
        scaled += null[:, :, None] * null[:, None, :]
    # By Cholesky: the LU of a batch fails from 151 columns on where several threads share it (torch issue 142815).
    factor = torch.linalg.cholesky_ex(scaled)[0]
    solution = torch.cholesky_solve((inverse * gradient)[:, :, None], factor)[:, :, 0]
    return inverse * solution


# -- the iterations -------------------------------------------------------------------------------------------------


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
        """Offsets from the rows that take part; ``strength`` (p,) and ``row_weight`` (p, n) are of one precision."""
        offset = strength.new_zeros(len(strength), design.outputs, 1)
        if design.outputs > 1:
            taking_part = row_weight.new_zeros(offset.shape[:2]).index_add_(1, design.target, row_weight)
            offset[taking_part <= 0] = ABSENT
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
        mean = torch.bmm((present / present.sum(1, keepdim=True)).mT, weights)
        return torch.addcmul(weights, present, mean, value=-1)

    def take(self, index: Tensor) -> Problems:
        """The problems at ``index``."""
        return Problems(self.strength[index], self.row_weight[index], self.offset[index])

    def to(self, dtype: torch.dtype) -> Problems:
        """The same in another precision."""
        return Problems(self.strength.to(dtype), self.row_weight.to(dtype), self.offset.to(dtype))


@dataclass(frozen=True)
class Model:
    """The quadratic model of each problem where it stands, in float32: its least point is Newton's step away.

    ``gradient`` (p, k, r + 1), ``spread`` (p, k) the mean curvature of each class, ``mass`` (p, k, n) strength times
    row weight times probability (of two classes: times its complement, too), ``inverse_weight`` (p, 1, n) one over
    strength times row weight, or 0; and what preconditions: ``inverse_diagonal`` (p, k, r + 1) and ``correction``
    (p, k, m) of the inverse of ``spread * gram / n + penalty`` of each class.
    """

    design: Design
    problems: Problems
    gradient: Tensor
    spread: Tensor
    mass: Tensor
    inverse_weight: Tensor
    inverse_diagonal: Tensor
    correction: Tensor

    @classmethod
    def build(cls, design: Design, problems: Problems, gradient: Tensor, spread: Tensor, residuals: Tensor) -> Model:
        """From what `Search` knows of the problems, in its precision; ``residuals`` (p, k, n) become the mass."""
        strength, spread = problems.strength[:, None, None], spread.float()
        weight = strength * problems.row_weight[:, None]
        inverse_weight = torch.where(weight > 0, 1 / weight, 0.0)
        mass = residuals.mul_(strength)
        if residuals.shape[1] == 1:
            mass.abs_().mul_(1 - mass * inverse_weight)
        else:
            mass.scatter_add_(1, design.target.expand_as(weight), weight)
        diagonal = spread[:, :, None] * design.curvature.float()
        diagonal[..., :-1] += 1
        inverse_diagonal = diagonal.reciprocal_()
        along = spread[:, :, None] * design.leading_curvature.float() + 1
        return cls(
            design,
            problems.to(torch.float32),
            gradient.float(),
            spread,
            mass.float(),
            inverse_weight.float(),
            inverse_diagonal,
            1 / along - inverse_diagonal[:, :, :1],
        )

    def take(self, index: Tensor) -> Model:
        """The problems at ``index``."""
        parts: dict[str, Any] = {name: part[index] for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, problems=self.problems.take(index), **parts)

    def hessian(self, vector: Tensor) -> Tensor:
        """The product with ``vector`` (p, k, r + 1) of the second derivative ``C X'DX + penalty``."""
        logits = self.design.logits(vector, rounded=True)
        if vector.shape[1] == 1:
            logits *= self.mass
        else:
            own = self.design.target.expand_as(self.inverse_weight)
            for rows in parts_of_rows(logits):
                part, mass = logits[..., rows], self.mass[..., rows]
                # From a row's own class on: where it is all but certain the others' share does not drown in it.
                part -= part.gather(1, own[..., rows])
                mean = torch.linalg.vecdot(mass, part, dim=1)[:, None] * self.inverse_weight[..., rows]
                part.sub_(mean).mul_(mass)
        result = self.design.backward(logits, rounded=True)
        result[..., :-1] += vector[..., :-1]
        return result

    def precondition(self, vector: Tensor) -> Tensor:
        """The product with ``vector`` (p, k, r + 1) of about the inverse of the second derivative.

        The Hessian of a softmax has no data term along weights that are equal in all classes, so their mean is taken
        out: without that, steps leave the plane in which the weights of the classes sum to zero, where the optimum is.
        """
        result = vector * self.inverse_diagonal
        if len(self.design.leading):
            leading = self.design.leading.float()
            along = (vector.flatten(0, 1) @ leading.T).mul_(self.correction.flatten(0, 1))
            result.flatten(0, 1).addmm_(along, leading)
        return self.problems.centred(result)


def conjugate_gradients(model: Model, forcing: Tensor, goal: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """About the inverse Hessian times the gradient (p, k, r + 1), and how many iterations it took (p,).

    They end where the residual is ``forcing`` (p,) of the gradient, or leaves a gap of at most ``goal`` (p,). Problems
    that are done leave the batch when that makes it clearly smaller.
    """
    result, iterations = torch.zeros_like(model.gradient), torch.zeros_like(goal, dtype=torch.long)
    place, active = torch.arange(len(goal), device=goal.device), torch.ones_like(goal, dtype=torch.bool)
    step, residual, conjugate = result.clone(), model.gradient.clone(), model.precondition(model.gradient)
    slope = _dot(residual, conjugate)
    smallest = forcing**2 * slope
    for _ in range(limit):
        product = model.hessian(conjugate)
        iterations[place] += active
        curvature = _dot(conjugate, product)
        active &= curvature > 0
        length = torch.where(active, slope / curvature, 0.0)[:, None, None]
        step.addcmul_(length, conjugate)
        residual.addcmul_(length, product, value=-1)
        vector = model.precondition(residual)
        before, slope = slope, _dot(residual, vector)
        active &= (slope > smallest) & (gap(residual, model.spread) > goal)
        kept = torch.nonzero(active).squeeze(1)
        if not len(kept):
            break
        conjugate = vector.addcmul_(torch.where(active, slope / before, 0.0)[:, None, None], conjugate)
        if len(kept) <= 0.75 * len(active):
            result[place] = step
            model, place, active, step, residual, conjugate, slope, smallest, goal = (
                model.take(kept),
                *(v[kept] for v in (place, active, step, residual, conjugate, slope, smallest, goal)),
            )
    result[place] = step
    return result, iterations


class Search:
    """Newton's method over a batch; problems that are done or stuck leave it when that makes it clearly smaller.

    An iteration is two products with the features: one of the conjugate gradients, or a step and the gradient there.
    """

    def __init__(self, design: Design, problems: Problems, start: Tensor) -> None:
        self.design, self.problems = design, problems
        self.penalty = torch.ones_like(start[0, 0])
        self.penalty[-1] = 0
        start = problems.centred(start)
        self.result = start.clone()
        self.iterations = torch.zeros(len(start), dtype=torch.long, device=start.device)
        self.place = torch.arange(len(start), device=start.device)
        self.weights = start.clone()
        self.logits = design.logits(start).add_(problems.offset)
        self.stuck = torch.zeros_like(self.place, dtype=torch.bool)
        self.residuals = torch.empty_like(self.logits)
        self.losses, _ = self._look(self.logits, torch.zeros_like(start[:, 0, 0]))
        self.gradient = self._gradient()

    @property
    def objective(self) -> Tensor:
        """The objective (p,), in float64."""
        penalised = self.weights[..., :-1].square().sum((1, 2), dtype=torch.float64)
        return self.problems.strength * self.losses + 0.5 * penalised

    def _gradient(self) -> Tensor:
        gradient = self.design.backward(self.residuals).mul_(self.problems.strength[:, None, None])
        return gradient.addcmul_(self.penalty, self.weights)

    def run(self, tolerance: float, limit: int = MAX_ITERATIONS) -> tuple[Tensor, Tensor]:
        """Weights (p, k, r + 1) and iterations (p,), after about ``limit`` of them at most."""
        while limit > 0:
            objective = self.objective
            spread = self._spread(objective)
            distance = gap(self.gradient, spread)
            active = torch.nonzero(~((distance <= tolerance * objective) | self.stuck)).squeeze(1)
            if not len(active):
                break
            if len(active) <= 0.75 * len(self.place):
                self._retire(active)
                continue
            forcing = (distance / objective).float().pow(0.25).clamp(*FORCING)
            direction, iterations = self._newton_step(spread, forcing, ENOUGH * tolerance * objective, limit)
            self._step(direction, spread, distance, objective)
            self.iterations[self.place] += iterations + 1
            limit -= int(iterations.max()) + 1
        self.result[self.place] = self.weights
        return self.result, self.iterations

    def _spread(self, objective: Tensor) -> Tensor:
        """The mean curvature of each class (p, k), as far as the preconditioner can rely on it.

        It vanishes where all rows are surely right or surely wrong, which hides how it grows along a step. Near the
        optimum it is about the objective over the number of classes: a small part of that is the least it counts for.
        """
        spread = self.problems.strength[:, None] * spreads(self.residuals, self.problems.row_weight)
        return spread.maximum((SMALLEST_SPREAD / spread.shape[1] * objective)[:, None].to(spread.dtype))

    def _retire(self, active: Tensor) -> None:
        self.result[self.place] = self.weights
        self.place, self.problems = self.place[active], self.problems.take(active)
        for name in ("weights", "logits", "residuals", "losses", "gradient", "stuck"):
            setattr(self, name, getattr(self, name)[active])

    def _newton_step(self, spread: Tensor, forcing: Tensor, goal: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """A direction downhill (p, k, r + 1): about Newton's step; and the iterations it took (p,)."""
        model = Model.build(self.design, self.problems, self.gradient, spread, self.residuals)
        step, iterations = conjugate_gradients(model, forcing, goal, limit)
        step = step.to(self.gradient.dtype)
        downhill = _dot(self.gradient, step) > 0
        if not downhill.all():
            steepest = model.precondition(model.gradient).to(step.dtype)
            step = torch.where(downhill[:, None, None], step, steepest)
        return step.neg_(), iterations

    def _step(self, direction: Tensor, spread: Tensor, distance: Tensor, objective: Tensor) -> None:
        """Along a direction; ``distance`` (p,) and ``objective`` (p,) are those of now.

        A problem whose objective falls no more, and its gradient hardly, has met rounding.
        """
        along = self.design.logits(direction)
        length, self.losses = self._line_search(direction, along)
        self.logits.addcmul_(along, length[:, None, None])
        del along
        self.weights = self.weights + length[:, None, None] * direction
        self.gradient = self._gradient()
        at_rounding = objective - self.objective <= 10 * torch.finfo(direction.dtype).eps * objective
        self.stuck = (length == 0) | (at_rounding & (gap(self.gradient, spread) > 0.5 * distance))

    def _line_search(self, direction: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
        """Step lengths (p,) where the slope has fallen enough, and the losses there, as are the residuals then.

        The objective is convex along a line, so its slope tells where the minimum lies, accurately even where
        differences of objectives have drowned in rounding; a rise above that is refused all the same, as is what is
        not finite (Hager and Zhang 2005, the approximate Wolfe conditions). A length that is not found is 0.
        """
        strength = self.problems.strength
        linear = _dot(self.weights * self.penalty, direction)
        quadratic = _dot(direction * self.penalty, direction)
        first = _dot(self.gradient, direction)
        rounding = ROUNDING_OF_OBJECTIVE * self.objective
        length, low, high = torch.ones_like(first), torch.zeros_like(first), torch.full_like(first, torch.inf)
        slope_low = first
        for _ in range(MAX_TRIALS):
            losses, slope = self._look(along, length)
            slope = strength * slope + linear + length * quadratic
            rise = strength * (losses - self.losses) + length * (linear + 0.5 * length * quadratic)
            over = ~((slope <= -0.5 * first) & (rise <= rounding))
            under = ~over & (slope < 0.9 * first)
            if not (over | under).any():
                return length, losses
            share = torch.nan_to_num(slope_low / (slope_low - slope)).clamp(0.05, 0.7)
            inside = low + (length - low) * share
            beyond = length * (first / (first - slope)).clamp(1.5, 10)
            outside = torch.where(torch.isinf(high), beyond, (length + high) / 2)
            high = torch.where(over, length, high)
            low, slope_low = torch.where(over, low, length), torch.where(over, slope_low, slope)
            length = torch.where(over, inside, torch.where(under, outside, length))
        return low, self._look(along, low)[0]

    def _look(self, along: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (p,) and their slopes ``length`` (p,) further along the logits ``along``; `residuals` become those.

        Nothing else of the size of the logits is made.
        """
        losses, slope = torch.zeros_like(length, dtype=torch.float64), torch.zeros_like(length)
        for rows in parts_of_rows(along):
            logits = torch.addcmul(self.logits[..., rows], along[..., rows], length[:, None, None])
            row_weight = self.problems.row_weight[:, rows]
            residuals, loss = residuals_and_losses(logits, self.design.target[rows], row_weight)
            self.residuals[..., rows] = residuals
            losses += loss
            slope += _dot(residuals, along[..., rows])
        return losses, slope


def gap(gradient: Tensor, spread: Tensor) -> Tensor:
    """About how far an objective of this gradient (p, k, r + 1) lies above its optimum (p,).

    The intercepts count for more than if they moved alone, since the weights will move with them.
    """
    weights, intercepts = gradient[..., :-1], gradient[..., -1]
    return 0.5 * weights.square().sum((1, 2)) + INTERCEPT_FACTOR * (intercepts.square() / spread).sum(1)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    product: Tensor = torch.linalg.vecdot(left.flatten(1), right.flatten(1))
    return product


# -- solve and prove ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solutions:
    """``weights`` (p, k, r + 1) and ``logits`` (p, k, n) in float64, with a certificate for each problem.

    ``objective``, ``gradient_norm`` (2-norm) and ``gap``, the proven bound on ``1 - optimum / objective``, are measured
    in float64; ``iterations`` (p,) counts those of all phases.
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
    weights, iterations = Search(design, problems.to(torch.float32), start.float()).run(0.8 * tolerance, limit)
    solutions = certify(design, problems, weights.to(problems.strength.dtype), iterations)
    for _ in range(MAX_POLISHES if limit >= MAX_ITERATIONS else 0):
        open_ = torch.nonzero(~(solutions.gap <= tolerance)).squeeze(1)
        if not len(open_):
            break
        part = problems.take(open_)
        weights, more = Search(design, part, solutions.weights[open_]).run(0.8 * tolerance)
        polished = certify(design, part, weights, solutions.iterations[open_] + more)
        for value, better in zip(vars(solutions).values(), vars(polished).values(), strict=True):
            value[open_] = better
    return solutions


def certify(design: Design, problems: Problems, weights: Tensor, iterations: Tensor) -> Solutions:
    """Solve the intercepts for ``weights`` (p, k, r + 1), and measure in float64 how far the objective is from optimal.

    The least objective over the intercepts is a 1-strongly convex function of the weights alone.
    """
    row_weight, target = problems.row_weight, design.target
    logits = design.logits(weights).add_(problems.offset)
    shift = solve_intercepts(logits, target, row_weight)
    logits += shift
    residuals, losses = torch.empty_like(logits), torch.zeros_like(problems.strength)
    for rows in parts_of_rows(logits):
        residuals[..., rows], loss = residuals_and_losses(logits[..., rows], target[rows], row_weight[:, rows])
        losses += loss
    penalised = weights[..., :-1]
    objective = problems.strength * losses + 0.5 * penalised.square().sum((1, 2))
    gradient = problems.strength[:, None, None] * design.backward(residuals)[..., :-1] + penalised
    squared = gradient.square().sum((1, 2))
    weights = problems.centred(torch.cat([penalised, weights[..., -1:] + shift], dim=2))
    proven = (0.5 * squared / objective).clamp(max=1)  # no objective is below 0
    return Solutions(weights, logits, objective, squared.sqrt(), proven, iterations)
