"""The default head: logistic regression at the strength that cross-validation on train chooses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import HeadError
from ..features.rows import Rows
from ..runtime.device import is_out_of_memory
from .base import Selection
from .common import Features, Floats, Ints, few_threads, standardisation
from .crossval import Fold, OutOfFold, missing_rows
from .layers import Layers, LayersHead

if TYPE_CHECKING:
    from torch import Tensor

    from .path import StrengthPath
    from .solver import Design, Solutions

DEFAULT_STRENGTH = 1.0
FEW_ROWS = 5


class LogisticHead(LayersHead):
    """Logistic regression with L2, the whole path of strengths solved together.

    The strength is the one of lowest mean log loss over all held-out rows of stratified, group-wise folds of train
    (smallest of equals), weighted by ``class_weight``. A held-out row whose class has no row in its fold's train part
    could not have been known: it counts the same at every strength, which is to say that it is left out. Features are
    standardised once, on train; nothing but train is looked at. `Rows` are read from their file, block by block.

    With ``choose_by: val_accuracy`` it is the strength of highest accuracy on val instead (`fit_with_val`).
    """

    by_blocks = True
    _val_rows = 0

    def replace(self, values: Mapping[str, Any]) -> None:
        """Nothing can be searched: the strength is chosen anyway."""
        if values:
            raise HeadError(
                "logistic has no parameter to search: it chooses its strength itself.",
                where=f"head.search.{next(iter(values))}",
                remedy="remove the key; head.logistic.strengths, c_min and c_max set the strengths that are tried",
            )

    def fit_with_val(self, X: Features, y: Ints, X_val: Features, y_val: Ints) -> Self:
        """Choose the strength by accuracy on val (smallest of equals), and refit on train and val together.

        All strengths are solved: the linear probe of Kornblith et al. 2019 (arXiv 1805.08974, A.4) and of what has
        been published after it.

        Raises:
            HeadError: there are augmented views, which val has not; or as `fit`.
        """
        if X.ndim == 3 and len(X) > 1:
            raise HeadError(
                "Augmented views cannot be learnt from where val chooses.",
                where="head.logistic.choose_by",
                remedy="set extract.views=0, or head.logistic.choose_by=log_loss",
            )
        self._val_rows = len(y_val)
        try:
            return self.fit(
                np.concatenate([np.asarray(X_val), np.asarray(X).reshape(-1, X.shape[-1])]), np.concatenate([y_val, y])
            )
        finally:
            self._val_rows = 0

    def folds(self, index: Ints, groups: Ints | None) -> list[Fold]:
        """As `Head.folds`; where val chooses, train and val."""
        if not self._val_rows:
            return super().folds(index, groups)
        rows = np.arange(len(index))
        return [(rows[self._val_rows :], rows[: self._val_rows])]

    def learn(self, X: Features, index: Ints, groups: Ints | None) -> None:
        """Choose the strength by cross-validation, refit on all rows, and fold the standardisation in.

        On the CPU where the device has too little memory.
        """
        with few_threads(X):
            try:
                self._learn(X, index, groups)
                return
            except RuntimeError as error:
                if self.device == "cpu" or not is_out_of_memory(error):
                    raise
            self._forget()  # and outside the handler, whose traceback holds what fills the device's memory
            device, self.device = self.device, "cpu"
            self._learn(X, index, groups)
            self.warnings += (f"{device} has too little memory for these features: the CPU fitted the head",)

    def calibrate(self, X: Features, index: Ints, groups: Ints | None) -> None:
        """Nothing is left to do: `learn` has chosen the temperature on the folds that it had at hand."""

    def _learn(self, X: Features, index: Ints, groups: Ints | None) -> None:
        import torch

        weights = self._class_weights(index)
        mean, scale = standardisation(X, self.params.standardize)
        target = torch.from_numpy(index).to(self.device)
        design = self._design(X, mean, scale, target)
        row_weight = torch.from_numpy(weights[index]).to(self.device)
        folds = self.folds(index, groups)
        strength, start = self._choose(design, row_weight, index, folds)
        solution = self._refit(design, row_weight, strength, start)
        layer = linear_layer(design, solution.weights[0])
        self.layers = layer.fold_standardisation(mean, scale).fold_temperature(self.temperature)
        self.temperature = 1.0

    def _design(self, X: Features, mean: Floats, scale: Floats, target: Tensor) -> Design:
        from .solver import BlockDesign, Design

        if isinstance(X, Rows):
            return BlockDesign.open(X, mean, scale, target, len(self.classes_))
        import torch

        scaled = torch.from_numpy((X - mean) / scale).to(self.device)
        return Design.build(scaled, target, len(self.classes_), rotate=self.params.logistic.path == "full")

    def _choose(self, design: Design, row_weight: Tensor, index: Ints, folds: list[Fold]) -> tuple[float, Tensor]:
        """The strength, and weights (1, k, r + 1) to start the refit from."""
        import torch

        from .path import StrengthPath

        logistic = self.params.logistic
        strengths = np.geomspace(logistic.c_min, logistic.c_max, logistic.strengths)
        known = ~missing_rows(index, folds)
        self.warnings = self._data_warnings(np.bincount(self._plain(index, None)[0]), folds, known)
        zero = torch.zeros(1, design.outputs, design.shape[1], dtype=torch.float64, device=row_weight.device)
        if not folds or not any(known[test].any() for _, test in folds):
            self.selected |= {"C": float(DEFAULT_STRENGTH if len(strengths) > 1 else strengths[0]), "folds": 0}
            return self.selected["C"], zero
        train, held = masks(folds, known, row_weight)
        scored, tolerance = held * row_weight, logistic.tolerance**2
        on_val = self._val_rows > 0
        path = StrengthPath(design, strengths, row_weight, train, scored, tolerance, by_accuracy=on_val)
        if logistic.path == "full" or on_val:
            path.solve_full()
            found = "full"
        else:
            found = path.search()
        best = path.best()
        self._record(path, found, best)
        if on_val:
            return float(strengths[best]), path.refit_start(best)
        logits = self._out_of_fold_logits(design, path.points[best].weights, row_weight, train, folds)
        self.out_of_fold = OutOfFold(logits.argmax(axis=1), logits, index[: len(known)], known)
        self.selected["cv_accuracy"] = self.out_of_fold.accuracy
        if self.params.calibrate == "temperature":
            self.temperature = self._choose_temperature(self.out_of_fold)
            self.selected["cv_log_loss_calibrated"] = self.out_of_fold.log_loss
        return float(strengths[best]), path.refit_start(best)

    def _record(self, path: StrengthPath, found: str, best: int) -> None:
        strengths, points = path.strengths, path.points
        exact = min(point.tolerance for point in points.values())
        self.selected |= {
            "C": float(strengths[best]),
            "path": found,
            **self._judged(path, best),
            "solves": path.solves,
            "iterations": sum(point.iterations for point in points.values()),
            "largest_gap": max(point.gap for point in points.values() if point.tolerance <= exact),
            "loosest_gap": max(p.gap for p in points.values()),
        }
        if len(strengths) > 1 and best in (0, len(strengths) - 1):
            side, key = ("smallest", "c_min") if best == 0 else ("largest", "c_max")
            self.selected["edges"] = {"C": side}
            self.warnings += (
                f"the best strength C={strengths[best]:.3g} is the {side} of those tried: "
                f"move head.logistic.{key} to look beyond it",
            )

    def _judged(self, path: StrengthPath, best: int) -> dict[str, Any]:
        """What chose, as the run records it."""
        curve = [[float(path.strengths[number]), path.points[number].loss] for number in sorted(path.points)]
        if self._val_rows:
            self.selections += (Selection("the strength C", "by accuracy", "val"),)
            accuracies = [[strength, 1 - error] for strength, error in curve]
            return {"val_accuracy": 1 - path.points[best].loss, "curve": accuracies}
        self._select("the strength C", f"by {len(path.scored)}-fold cross-validation")
        return {"folds": len(path.scored), "cv_log_loss": path.points[best].loss, "curve": curve}

    def _out_of_fold_logits(
        self, design: Design, weights: Tensor, row_weight: Tensor, train: Tensor, folds: list[Fold]
    ) -> Floats:
        import torch

        from .solver import Problems

        strength = torch.ones(len(folds), dtype=torch.float64, device=row_weight.device)
        offset = Problems.build(design, strength, row_weight * train).offset
        logits = design.logits(weights).add_(offset).cpu().numpy()
        result = np.empty((sum(len(test) for _, test in folds), max(logits.shape[1], 2)))
        for number, (_, test) in enumerate(folds):
            result[test] = two_sided(logits[number][:, test].T)
        return result

    def _refit(self, design: Design, row_weight: Tensor, strength: float, start: Tensor) -> Solutions:
        import torch

        from .solver import Problems, solve

        chosen = torch.tensor([strength], dtype=torch.float64, device=row_weight.device)
        problems = Problems.build(design, chosen, row_weight[None])
        tolerance = self.params.logistic.tolerance**2
        solution = solve(design, problems, start, tolerance)
        gap = float(solution.gap[0])
        self.selected["certificate"] = {
            "objective": float(solution.objective[0]),
            "gradient_norm": float(solution.gradient_norm[0]),
            "gap": gap,
            "iterations": int(solution.iterations[0]),
        }
        if not gap <= tolerance:
            self.warnings += (
                f"the solver stopped at a proven relative gap of {gap:.1e}; head.logistic.tolerance asks for "
                f"{tolerance:.1e}",
            )
        return solution

    def _data_warnings(self, counts: Ints, folds: list[Fold], known: NDArray[np.bool_]) -> tuple[str, ...]:
        if not folds or not known.any():
            return (
                f"no class has two independent images, so the strength cannot be chosen: C={DEFAULT_STRENGTH:g} is "
                "used; add images",
            )
        warnings: tuple[str, ...] = ()
        if not known.all():
            warnings += (
                f"{int((~known).sum())} images have a class that their fold's train part lacks; they did not take "
                "part in choosing the strength",
            )
        if counts.min() < FEW_ROWS:
            small = int((counts < FEW_ROWS).sum())
            warnings += (
                f"{small} of {len(counts)} classes have fewer than {FEW_ROWS} images: the choice of the strength is "
                "uncertain",
            )
        if len(folds) < self.params.folds and not self._val_rows:
            warnings += (f"the classes are so small that only {len(folds)} folds were made",)
        return warnings


def masks(folds: list[Fold], known: NDArray[np.bool_], rows: Tensor) -> tuple[Tensor, Tensor]:
    """1 or 0 (f, n) for each of ``rows`` (n,): whether a fold trains on it; whether it is held out there and counts."""
    train, held = (rows.new_zeros(len(folds), len(rows)) for _ in range(2))
    for number, (inside, outside) in enumerate(folds):
        train[number, inside] = 1
        held[number, outside[known[outside]]] = 1
    return train, held


def two_sided(logits: Floats) -> Floats:
    """Logits (n, c) from (n, k): a single logit becomes minus and plus its half, the same probabilities."""
    return np.concatenate([-0.5 * logits, 0.5 * logits], axis=1) if logits.shape[1] == 1 else logits


def linear_layer(design: Design, weights: Tensor) -> Layers:
    """One linear layer (c, d) of standardised features from a solution (k, r + 1) in the columns of the design."""
    weight = two_sided(design.feature_weights(weights).cpu().numpy().T).T
    bias = two_sided(weights[:, -1:].cpu().numpy().T).T[:, 0]
    return Layers((np.ascontiguousarray(weight),), (np.ascontiguousarray(bias),))
