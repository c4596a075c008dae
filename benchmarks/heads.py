"""The logistic head against scikit-learn's grid search, on the same standardised features, in the same run.

    pipeline cache export features.h5 && python benchmarks/heads.py --features features.h5 --rows 4000

Prints a Markdown table: seconds for the full path (45 strengths, 5 folds), for the choice of the same C by the default
search, and for one single fit; the ratio to scikit-learn (`GridSearchCV(n_jobs=2)` over `LogisticRegression`, lbfgs,
float32, tol 1e-4, max_iter 1000, the same folds and objective); and the largest relative gap of each objective to the
optimum. The gap of ours is the bound proven in float64; that of scikit-learn is its objective, in float64, against
solutions of ours whose proven gap is below 1e-9. Where there is a GPU, our rows are repeated on it. Without
``--features`` the features are synthetic.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import joblib
import numpy as np
import sklearn
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from pipeline.heads import stratified_group_folds
from pipeline.heads.folds import Fold
from pipeline.heads.layers import standardisation
from pipeline.heads.logistic import masks
from pipeline.heads.path import StrengthPath
from pipeline.heads.solver import Design, Problems, certify, solve

REFERENCE_TOLERANCE = 1e-9
JOBS = 2


@dataclass(frozen=True)
class Task:
    """Standardised features (n, d) float64, class positions (n,), the folds and the strengths."""

    X: NDArray[np.float64]
    y: NDArray[np.int64]
    folds: list[Fold]
    strengths: NDArray[np.float64]
    tolerance: float

    @property
    def classes(self) -> int:
        return int(self.y.max()) + 1


def main() -> None:
    arguments = _arguments()
    task = _task(arguments)
    n, d = task.X.shape
    print(
        f"{_machine()}\n\n{n} x {d} features of {arguments.features or 'a synthetic mixture'}, {task.classes} classes,"
    )
    print(f"{len(task.strengths)} strengths from 1e-6 to 1e5, {len(task.folds)} folds\n")
    print("| what | on | seconds | scikit-learn | ratio | largest gap | scikit-learn's | chosen C | scikit-learn's |")
    print("|:--|:--|--:|--:|--:|--:|--:|--:|--:|")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    warmed = [_ours(task, device, "search") for device in devices]  # kernels are loaded once, by whoever comes first
    del warmed
    _progress("warmed up")
    grid_seconds, grid = _grid(task)
    _progress(f"grid search of scikit-learn: {grid_seconds:.1f} s")
    theirs_gap = _first_fold_gap(task, arguments.gap_stride) if arguments.gap_stride else None
    _progress("measured the gap of scikit-learn")
    for device in devices:
        for what in ("full", "search"):
            runs = [_ours(task, device, what) for _ in range(arguments.rounds)]
            seconds = statistics.median(run[0] for run in runs)
            _, gap, chosen = runs[0]
            name = "full path" if what == "full" else "choice of C (default)"
            _row(name, device, seconds, grid_seconds, gap, theirs_gap, chosen, float(grid.best_params_["C"]))
        _single_row(task, device, float(grid.best_params_["C"]), arguments.rounds)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=Path, help="a file written by `pipeline cache export`")
    parser.add_argument("--rows", type=int, help="use a seeded part of the rows")
    parser.add_argument("--classes", type=int, default=10, help="of the synthetic features")
    parser.add_argument("--strengths", type=int, default=45)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--tolerance", type=float, default=3e-4, help="head.logistic.tolerance")
    parser.add_argument("--rounds", type=int, default=3, help="of ours; the median counts")
    parser.add_argument(
        "--gap-stride", type=int, default=4, help="measure scikit-learn's gap at every so many strengths"
    )
    return parser.parse_args()


def _task(arguments: argparse.Namespace) -> Task:
    generator = np.random.default_rng(0)
    if arguments.features:
        X, y = _read(arguments.features)
    else:
        y = generator.integers(arguments.classes, size=arguments.rows or 1500)
        X = generator.normal(size=(arguments.classes, 1280))[y] + 3 * generator.normal(size=(len(y), 1280))
    if arguments.rows and arguments.rows < len(X):
        part = np.sort(generator.choice(len(X), arguments.rows, replace=False))
        X, y = X[part], y[part]
    y = np.unique(y, return_inverse=True)[1].astype(np.int64)
    X = X.astype(np.float32)
    mean, scale = standardisation(X, True)
    # The rounding of scikit-learn's float32 input is part of the problem, so that both minimise one objective.
    rounded = ((X - mean) / scale).astype(np.float32).astype(np.float64)
    folds = stratified_group_folds(y, None, arguments.folds, 0)
    return Task(rounded, y, folds, np.geomspace(1e-6, 1e5, arguments.strengths), arguments.tolerance**2)


def _read(file: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    if file.suffix == ".npz":
        arrays = np.load(file)
        return arrays["X"], arrays["y"]
    with h5py.File(file) as source:
        X, y = source["features"][:], source["labels"][:]
        train = source["split"][:] == b"train"
    return X[train & (y >= 0)], y[train & (y >= 0)]


def _tensors(task: Task, device: str) -> tuple[Design, torch.Tensor, torch.Tensor]:
    X, y = torch.from_numpy(task.X).to(device), torch.from_numpy(task.y).to(device)
    train, held = masks(task.folds, np.ones(len(task.y), bool), torch.device(device))
    return Design.build(X, y, task.classes), train, held


def _ours(task: Task, device: str, what: str) -> tuple[float, float, float]:
    """Seconds, the largest proven gap, and the chosen strength; the refit on all rows is part of it."""
    started = time.perf_counter()
    design, train, held = _tensors(task, device)
    ones = torch.ones(len(task.y), dtype=torch.float64, device=device)
    path = StrengthPath(design, task.strengths, ones, train, held, task.tolerance)
    if what == "full":
        path.solve_full()
    else:
        path.search()
    best = path.best()
    problems = Problems.build(design, torch.tensor(task.strengths[[best]], device=device), ones[None])
    final = solve(design, problems, path.points[best].weights.mean(0, keepdim=True), task.tolerance)
    gaps = [point.gap for point in path.points.values() if point.tolerance <= task.tolerance]
    largest = max(*gaps, float(final.gap[0]))
    return time.perf_counter() - started, largest, float(task.strengths[best])


def _grid(task: Task) -> tuple[float, GridSearchCV]:
    grid = GridSearchCV(
        _estimator(1.0), {"C": task.strengths}, cv=task.folds, scoring="neg_log_loss", n_jobs=JOBS, refit=True
    )
    X = task.X.astype(np.float32)
    with _quiet():
        # Starting the worker processes and their imports is no part of the fits.
        joblib.Parallel(n_jobs=JOBS)(joblib.delayed(_small_fit)(X[:50]) for _ in range(4 * JOBS))
        started = time.perf_counter()
        grid.fit(X, task.y)
    return time.perf_counter() - started, grid


def _small_fit(X: NDArray[np.float32]) -> float:
    return float(_estimator(1.0).fit(X, np.arange(len(X)) % 2).intercept_[0])


def _estimator(strength: float) -> LogisticRegression:
    return LogisticRegression(C=strength, solver="lbfgs", tol=1e-4, max_iter=1000)


class _quiet(warnings.catch_warnings):  # noqa: N801 - used as a function
    """Without warnings of solutions that are not exact: their gap is what is measured."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.simplefilter("ignore", ConvergenceWarning)
        os.environ["PYTHONWARNINGS"] = "ignore"
        return entered


def _first_fold_gap(task: Task, stride: int) -> float:
    inside = task.folds[0][0]
    part = Task(task.X[inside], task.y[inside], [], task.strengths, task.tolerance)
    return _gap_of_scikit_learn(part, task.strengths[::stride])


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _gap_of_scikit_learn(task: Task, strengths: NDArray[np.float64]) -> float:
    """The largest relative gap of its objectives at ascending ``strengths``, fitted to all rows of ``task``."""
    design = Design.build(torch.from_numpy(task.X), torch.from_numpy(task.y), task.classes)
    ones = torch.ones(1, len(task.y), dtype=torch.float64)
    weights = torch.zeros(1, design.outputs, design.exact.shape[1], dtype=torch.float64)
    largest = 0.0
    for strength in strengths:
        problems = Problems.build(design, torch.tensor([strength]), ones)
        optimum = solve(design, problems, weights, REFERENCE_TOLERANCE)
        weights = optimum.weights
        with _quiet():
            model = _estimator(float(strength)).fit(task.X.astype(np.float32), task.y)
        rotated = torch.from_numpy(model.coef_.astype(np.float64)) @ design.basis
        bias = torch.from_numpy(model.intercept_.astype(np.float64))[:, None]
        theirs = certify(design, problems, torch.cat([rotated, bias], 1)[None], torch.zeros(1, dtype=torch.long))
        largest = max(largest, float(theirs.objective[0] / optimum.objective[0]) - 1)
    return largest


def _single_row(task: Task, device: str, strength: float, rounds: int) -> None:
    X = task.X.astype(np.float32)

    def ours() -> float:
        design, _, _ = _tensors(task, device)
        ones = torch.ones(1, len(task.y), dtype=torch.float64, device=device)
        problems = Problems.build(design, torch.tensor([strength], device=device).double(), ones)
        zero = torch.zeros(1, design.outputs, design.exact.shape[1], dtype=torch.float64, device=device)
        return float(solve(design, problems, zero, task.tolerance).gap[0])

    def theirs() -> float:
        with _quiet():
            _estimator(strength).fit(X, task.y)
        return 0.0

    (seconds, gap), (other, _) = _median(ours, rounds), _median(theirs, rounds)
    _row(
        f"one fit at C = {strength:.2g}",
        device,
        seconds,
        other,
        gap,
        _gap_of_scikit_learn(task, np.array([strength])),
        None,
        None,
    )


def _median(function: Callable[[], float], rounds: int) -> tuple[float, float]:
    seconds, result = [], 0.0
    for _ in range(rounds):
        started = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), result


def _row(
    what: str,
    device: str,
    seconds: float,
    other: float,
    gap: float,
    other_gap: float | None,
    chosen: float | None,
    other_chosen: float | None,
) -> None:
    gaps = [f"{gap:.1e}", "" if other_gap is None else f"{other_gap:.1e}"]
    strengths = ["" if value is None else f"{value:.3g}" for value in (chosen, other_chosen)]
    cells = [what, device, f"{seconds:.2f}", f"{other:.2f}", f"{other / seconds:.1f} x", *gaps, *strengths]
    print(f"| {' | '.join(cells)} |", flush=True)


def _machine() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    versions = f"torch {torch.__version__}, scikit-learn {sklearn.__version__}, Python {platform.python_version()}"
    return (
        f"{datetime.date.today()}, {platform.machine()}, {cores} cores{gpu}, load {os.getloadavg()[0]:.1f}, {versions}"
    )


if __name__ == "__main__":
    with threadpool_limits(JOBS):
        torch.set_num_threads(JOBS)
        main()
