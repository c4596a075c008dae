"""Choose the strength of a logistic regression by cross-validation, along a path that is solved all folds at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .common import Floats
from .solver import MAX_ITERATIONS, Design, Problems, Search, Solutions, parts_of_rows, residuals_and_losses, solve

COARSE_STEP = 4
ON_GPU_TOGETHER = 4
RISES_TO_STOP = 3
COARSE_TOLERANCE = 1e-2
LOOSE_TOLERANCE = 1e-4
CHOOSING_TOLERANCE = 1e-5
ROWS_AHEAD = 150
FLAT = 1e-4
WOBBLE = 1e-3
HOPELESS_LOSS = 1.5
HOPELESS_ITERATIONS = 20
NODES_A_SIDE = 3
BATCH_COLUMNS = {"cpu": 16, "cuda": 2048}
BATCH_WORK = {"cpu": 1.5e7, "cuda": 5e9}
BATCH_CELLS = 1.5e8
WIDE_COLUMNS = 128


@dataclass(frozen=True)
class Point:
    """One strength solved on every fold: its cross-validated mean log loss (or error rate) and what certifies it.

    ``tolerance`` is the gap that was asked for; ``gap``, the largest of the folds, tells whether it was reached.
    """

    loss: float
    weights: Tensor
    gap: float
    iterations: int
    tolerance: float


class StrengthPath:
    """Solves strengths of an ascending grid on demand, each from the nearest solutions.

    Args:
        row_weight: weights of the rows (n,), float64.
        train: which rows (f, n) each fold trains on; ``scored`` (f, n) the weights with which its held-out rows count.
        by_accuracy: the loss of a strength is its error rate. It says little of where the best lies beyond what was
            solved, so that no strength is passed over.
    """

    def __init__(
        self,
        design: Design,
        strengths: Floats,
        row_weight: Tensor,
        train: Tensor,
        scored: Tensor,
        tolerance: float,
        *,
        by_accuracy: bool = False,
    ) -> None:
        self.design, self.strengths, self.tolerance, self.by_accuracy = design, strengths, tolerance, by_accuracy
        self.row_weight, self.scored = row_weight * train, scored
        self.points: dict[int, Point] = {}
        self.ahead: dict[int, Point] = {}
        self.all_rows = row_weight
        self.whole: tuple[int, Tensor] | None = None
        self.solves = 0

    def solve_full(self) -> None:
        """Every strength: two a decade from the smallest up, then those in between.

        Solutions vary so smoothly with the logarithm of the strength that most of those in between need few iterations
        or none, only their certificate. Problems so small that several strengths fit into a batch are solved from the
        smallest up.

        A nearly unpenalised problem can take thousands of iterations. Where the loss has grown so much that the best
        hardly lies beyond, it is solved loosely, in at most `HOPELESS_ITERATIONS`, with a certificate that says how far
        they led: enough to see a second valley, whose strengths would then be solved to the tolerance.
        """
        last = len(self.strengths) - 1
        if self._strengths_per_batch() > 1:
            self.solve_at(range(last + 1), self.tolerance)
            return
        top = 0
        for number in [*range(0, last, max(1, self._decade() // 2)), last]:
            if self._hopeless(top):
                break
            self.solve_at([number], self.tolerance)
            top = number
        self.solve_at(range(0, top), self.tolerance, WIDE_COLUMNS)
        self.solve_at(range(top + 1, last + 1), LOOSE_TOLERANCE, iterations=HOPELESS_ITERATIONS)
        self._settle(self.tolerance)

    def solve_at(
        self, numbers: Iterable[int], tolerance: float, columns: int = 0, iterations: int = MAX_ITERATIONS
    ) -> None:
        """The strengths at ``numbers``, ascending, but those that were asked to be as exact before.

        In batches of at least ``columns`` weight vectors, where each has neighbours on both sides to start from.
        """
        wanted = [n for n in numbers if n not in self.points or self.points[n].tolerance > tolerance]
        size = self._strengths_per_batch(columns)
        for start in range(0, len(wanted), size):
            self._solve_batch(wanted[start : start + size], tolerance, iterations)

    def search(self) -> str:
        """Solve what is needed to know the best strength: ``coarse`` to fine, or ``full`` where losses have no valley.

        The first fold goes ahead and finds about where the valley lies; all folds do where it holds out so few rows
        that its own valley may lie elsewhere, or has none, and on a GPU. There all rows are solved, from which the
        folds have only to forget what they hold out: that is nearer than one fold is to another. The best is solved on
        every fold to `CHOOSING_TOLERANCE`, its neighbours to `LOOSE_TOLERANCE`: what that leaves open of a loss is some
        hundredths of its standard error.
        """
        tolerance = max(self.tolerance, CHOOSING_TOLERANCE)
        rows, one, scored = self.row_weight[0].float(), torch.ones_like(self.row_weight[:1]), self.scored[:1].float()
        ahead = StrengthPath(self.design, self.strengths, rows, one.float(), scored, tolerance)
        one_leads = not self.design.on_gpu and int((self.scored[0] > 0).sum()) >= ROWS_AHEAD
        for path in (ahead, self) if one_leads else (self,):
            if path.locate():
                best, self.ahead, self.points = path.best(), path.points, {}
                if path is ahead:
                    self.solves += path.solves
                    self.whole = best, self._on_all_rows(best, path.points[best].weights)
                self.solve_at(self._inside(best - 1, best, best + 1) if self.design.on_gpu else [best], tolerance)
                self._settle(tolerance, beside=LOOSE_TOLERANCE)
                if self._is_flat():
                    self._settle(self.tolerance)
                return "coarse"
        self.solve_full()
        return "full"

    def _is_flat(self) -> bool:
        """Whether the losses around the best differ so little that how exactly they are solved may decide."""
        best = self.best()
        losses = [self.points[number].loss for number in self._inside(best - 1, best, best + 1)]
        return max(losses) - min(losses) <= FLAT * min(losses)

    def locate(self) -> bool:
        """Find about where the loss is lowest; False where the losses have no valley, however exact they are.

        Every fourth strength is solved, until the loss has risen three times in a row or by half, then those around
        the lowest.
        """
        for tolerance in (COARSE_TOLERANCE, LOOSE_TOLERANCE):
            self._climb(tolerance)
            if is_valley([self.points[number].loss for number in sorted(self.points)]):
                for steps in ((-3, -2, -1, 1, 2, 3),) if self.design.on_gpu else ((-2, 2), (-1, 1)):
                    best = self.best()
                    self.solve_at(self._inside(*(best + step for step in steps)), tolerance)
                return True
        return False

    def _climb(self, tolerance: float) -> None:
        coarse = list(range(0, len(self.strengths), COARSE_STEP))
        if coarse[-1] != len(self.strengths) - 1:
            coarse.append(len(self.strengths) - 1)
        size = min(ON_GPU_TOGETHER, self._strengths_per_batch()) if self.design.on_gpu else 1
        for start in range(0, len(coarse), size):
            self.solve_at(coarse[start : start + size], tolerance)
            for last in range(start, min(start + size, len(coarse))):
                if self._rises(coarse[: last + 1]) >= RISES_TO_STOP or self._hopeless(coarse[last]):
                    self._forget(coarse[last + 1 : start + size])
                    return

    def _forget(self, numbers: Iterable[int]) -> None:
        """Strengths that were solved beside others and were not needed; far out losses wobble."""
        for number in numbers:
            del self.points[number]

    def _settle(self, tolerance: float, *, beside: float = 0.0) -> None:
        """Solve the best and its neighbours, these at most to ``beside``, until that changes the best no more."""
        best = None
        while best != (best := self.best()):
            self.solve_at(self._inside(best - 1, best, best + 1), max(tolerance, beside))
            self.solve_at([best], tolerance)

    def _hopeless(self, number: int) -> bool:
        """Whether the loss at ``number`` is so far above the lowest that a weaker penalty will hardly be the best."""
        if self.by_accuracy or number not in self.points or number <= (best := self.best()):
            return False
        return self.points[number].loss > HOPELESS_LOSS * self.points[best].loss

    def best(self) -> int:
        """The solved strength of lowest loss, the smallest of equals."""
        return min(self.points, key=lambda number: (self.points[number].loss, number))

    def refit_start(self, best: int) -> Tensor:
        """Where to start on all rows at the strength ``best``, (1, k, r + 1)."""
        mean = self.points[best].weights.mean(0, keepdim=True)
        if self.whole is None:
            return mean
        near, weights = self.whole
        return weights + mean - self.points[near].weights.mean(0, keepdim=True)

    def _on_all_rows(self, number: int, start: Tensor) -> Tensor:
        """About the solution (1, k, r + 1) on all rows."""
        strength = torch.full_like(self.all_rows[:1], self.strengths[number])
        problems = Problems.build(self.design, strength, self.all_rows[None])
        self.solves += 1
        return Search(self.design, problems.to(torch.float32), start).run(LOOSE_TOLERANCE)[0].double()

    def _inside(self, *numbers: int) -> list[int]:
        return [number for number in numbers if 0 <= number < len(self.strengths)]

    def _rises(self, coarse: list[int]) -> int:
        """How many coarse steps in a row the loss has been rising, up to the last one solved."""
        losses = [self.points[number].loss for number in coarse if number in self.points]
        rises = 0
        while rises + 1 < len(losses) and losses[-1 - rises] > losses[-2 - rises] * (1 + WOBBLE):
            rises += 1
        return rises

    def _decade(self) -> int:
        """How many strengths make a factor of ten."""
        if len(self.strengths) < 2:
            return 1
        return max(1, round(1 / math.log10(self.strengths[1] / self.strengths[0])))

    def _strengths_per_batch(self, least: int = 0) -> int:
        n, width = self.design.shape
        columns = len(self.row_weight) * self.design.outputs
        kind = "cuda" if self.design.on_gpu else "cpu"
        wanted = max(least, BATCH_COLUMNS[kind], BATCH_WORK[kind] / (n * width))
        return max(1, math.floor(min(wanted / columns + 0.5, BATCH_CELLS / (columns * n))))

    def _solve_batch(self, numbers: list[int], tolerance: float, limit: int) -> None:
        folds = len(self.row_weight)
        strength = torch.from_numpy(self.strengths[numbers]).to(self.row_weight).repeat_interleave(folds)
        problems = Problems.build(self.design, strength, self.row_weight.repeat(len(numbers), 1))
        start = torch.cat([self._start(number, tolerance) for number in numbers])
        solutions = solve(self.design, problems, start, tolerance, limit)
        self.solves += len(strength)
        for place, number in enumerate(numbers):
            self.points[number] = self._point(solutions, slice(place * folds, (place + 1) * folds), tolerance)

    def _point(self, solutions: Solutions, rows: slice, tolerance: float) -> Point:
        return Point(
            loss=self._held_out(solutions.logits[rows], self.design.target, self.scored),
            weights=solutions.weights[rows],
            gap=float(solutions.gap[rows].max()),
            iterations=int(solutions.iterations[rows].sum()),
            tolerance=tolerance,
        )

    @property
    def _held_out(self) -> Callable[[Tensor, Tensor, Tensor], float]:
        return held_out_error if self.by_accuracy else held_out_loss

    def _start(self, number: int, tolerance: float) -> Tensor:
        """The solution expected from the nearest: between them interpolated along the logarithm of the strength.

        Looser ones lead to where nothing better is known.
        """
        exact = {other for other, point in self.points.items() if point.gap <= tolerance}
        if nodes := self._around(number, exact):
            return self._interpolated(number, nodes)
        if number in self.ahead:
            return self._beside(number)
        if number in self.points:
            return self.points[number].weights
        if nodes := self._around(number, self.points):
            return self._interpolated(number, nodes)
        below = sorted(other for other in self.points if other < number)[-NODES_A_SIDE:]
        if not below:
            return self.row_weight.new_zeros(len(self.row_weight), self.design.outputs, self.design.shape[1])
        far = len(below) > 1 and number - below[-1] > below[-1] - below[-2]
        return self._interpolated(number, below[-1:] if far else below)

    def _beside(self, number: int) -> Tensor:
        """What went ahead, as far from it as it is at the nearest strengths solved; or what all rows gave."""
        shared = sorted(self.points.keys() & self.ahead.keys(), key=lambda other: abs(other - number))[:2]
        weights = self.ahead[number].weights
        if not shared:
            return (weights if self.whole is None else self.whole[1]).expand(len(self.row_weight), -1, -1)
        return weights + sum(
            factor * (self.points[node].weights - self.ahead[node].weights)
            for node, factor in zip(shared, lagrange(number, shared), strict=True)
        )

    def _around(self, number: int, solved: Collection[int]) -> list[int]:
        """The nearest on both sides of ``number``, or none."""
        below = sorted(other for other in solved if other < number)[-NODES_A_SIDE:]
        above = sorted(other for other in solved if other > number)[:NODES_A_SIDE]
        return [*below, *above] if below and above else []

    def _interpolated(self, number: float, nodes: list[int]) -> Tensor:
        """Lagrange's polynomial through the solutions at ``nodes``."""
        result = torch.zeros_like(self.points[nodes[0]].weights)
        for node, factor in zip(nodes, lagrange(number, nodes), strict=True):
            result.add_(self.points[node].weights, alpha=factor)
        return result


def lagrange(number: float, nodes: list[int]) -> list[float]:
    """What each of the ``nodes`` counts for at ``number`` in the polynomial through all of them."""
    return [math.prod((number - other) / (node - other) for other in nodes if other != node) for node in nodes]


def held_out_loss(logits: Tensor, target: Tensor, scored: Tensor) -> float:
    """Mean log loss over the held-out rows of all folds, weighted by ``scored`` (f, n)."""
    parts = parts_of_rows(logits)
    losses = [residuals_and_losses(logits[..., rows], target[rows], scored[:, rows])[1].sum() for rows in parts]
    return float(sum(losses) / scored.sum())


def held_out_error(logits: Tensor, target: Tensor, scored: Tensor) -> float:
    """Share of the held-out rows of all folds that are classified wrongly, weighted by ``scored`` (f, n)."""
    predicted = (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)
    return float(((predicted != target) * scored).sum() / scored.sum())


def is_valley(losses: list[float]) -> bool:
    """Whether losses fall to one minimum and rise from it, but for wobbles of a thousandth."""
    lowest = int(np.argmin(losses))
    falling = [losses[: lowest + 1][i + 1] <= losses[i] * (1 + WOBBLE) for i in range(lowest)]
    rising = [losses[i + 1] >= losses[i] * (1 - WOBBLE) for i in range(lowest, len(losses) - 1)]
    return all(falling) and all(rising)
