"""The logistic head against scikit-learn's grid search, on the same standardised features, in the same run.

    pipeline cache export features.h5 && python benchmarks/heads.py --features features.h5 --rows 1500

Prints a Markdown table: wall seconds and CPU-seconds (worker processes included) for the full path (45 strengths, 5
folds, refit), for the choice of the same strength by the default search, and for single fits; and the largest relative
gap of the objectives to their optimum. The gap of ours is the bound proven in float64, for the full path of all
strengths, for the choice of those that it came down to; that of scikit-learn is its objective, in float64, over that
of solutions of ours (proven to 1e-9 wherever a few thousand iterations can).

The baseline is `GridSearchCV` over `LogisticRegression` (lbfgs, float32, tol 1e-4, max_iter 1000) with the same folds,
strengths and objective, in one process and in two whose start and imports are not counted; ratios are to the faster of
them, and to the one with fewer CPU-seconds. With ``--tensors``, the default where the device is not the CPU,
scikit-learn works on tensors on that same device (the array API of its lbfgs), and in single fits too. Without
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import sklearn
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from pipeline.heads import make_head, standardisation, stratified_group_folds
from pipeline.heads.solver import Design, Problems, residuals_and_losses, solve
from pipeline.params import HeadParams, LogisticParams

REFERENCE_TOLERANCE = 1e-9
TIGHTER = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
SINGLE = 5
GAP = 1e-6


@dataclass(frozen=True)
class Task:
    """Standardised float32 features (n, d), class positions (n,), and the head's params."""

    X: NDArray[np.float32]
    y: NDArray[np.int64]
    params: HeadParams
    device: str
    tensors: bool

    @property
    def theirs(self) -> tuple[Any, Any]:
        """Features and targets as scikit-learn gets them: tensors on the device, or arrays."""
        if not self.tensors:
            return self.X, self.y
        return torch.from_numpy(self.X).to(self.device), torch.from_numpy(self.y).to(self.device)

    @property
    def strengths(self) -> NDArray[np.float64]:
        logistic = self.params.logistic
        return np.geomspace(logistic.c_min, logistic.c_max, logistic.strengths)


@dataclass(frozen=True)
class Run:
    """Seconds of wall clock and of CPU, the largest gap (None: not measured), and the strength."""

    wall: float
    cpu: float
    gap: float | None
    strength: float


def main() -> None:
    arguments = _arguments()
    if arguments.tensors and os.environ.get("SCIPY_ARRAY_API") != "1":  # SciPy reads it when it is imported
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "SCIPY_ARRAY_API": "1"})
    task = _task(arguments)
    if task.tensors and (refusal := _refusal(task)):
        _progress(f"scikit-learn stays on the CPU, as on tensors it fails: {refusal}")
        task = replace(task, tensors=False)
    _header(arguments, task)
    _ours(task, "full")  # whoever comes first loads the kernels
    full, search, grids = [], [], []
    rivals = [*arguments.jobs, *([0] if task.tensors else [])]
    for jobs in (*rivals, None):
        for _ in range(arguments.rounds):
            full.append(_ours(task, "full"))
            search.append(_ours(task, "auto"))
        if jobs is not None:
            grids.append(_grid(task, jobs))
            _progress(f"{_rival(task, jobs)}: {grids[-1].wall:.1f} s, {grids[-1].cpu:.1f} CPU-seconds")
    gap = _grid_gap(task, arguments.gap_stride) if arguments.gap_stride else None
    for jobs, grid in zip(rivals, grids, strict=True):
        _row(f"{_rival(task, jobs)}, grid search", Run(grid.wall, grid.cpu, gap, grid.strength), [])
    _row("the full path", _median(full), grids)
    _row("the choice of C (default)", _median(search), grids)
    for strength in dict.fromkeys((_median(search).strength, 1.0)):
        _single_rows(task, strength)


def _refusal(task: Task) -> str | None:
    """Why scikit-learn cannot search on tensors here; None where it can."""
    try:
        _grid(replace(task, X=task.X[:60], y=np.arange(60) % 2, params=HeadParams(folds=2)), 0)
    except Exception as error:  # noqa: BLE001 - one rival less is no reason to measure nothing
        return f"{type(error).__name__}: {error}"
    return None


def _rival(task: Task, jobs: int) -> str:
    """scikit-learn in so many processes; 0: on tensors."""
    return f"scikit-learn, n_jobs={jobs}" if jobs else f"scikit-learn on tensors, {task.device}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=Path, help="a file written by `pipeline cache export`")
    parser.add_argument("--rows", type=int, default=1500, help="use a seeded part of the rows")
    parser.add_argument("--classes", type=int, help="use the first so many classes (synthetic features: 5)")
    parser.add_argument("--device", default="cpu", help="where ours runs, and scikit-learn on tensors")
    parser.add_argument("--tensors", action="store_true", help="scikit-learn on tensors, too")
    parser.add_argument("--threads", type=int, default=2, help="of ours")
    parser.add_argument("--strengths", type=int, default=45)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2, help="of ours around each run of scikit-learn")
    parser.add_argument("--jobs", type=int, nargs="*", help="n_jobs of scikit-learn, a run each (1 2; none on a GPU)")
    parser.add_argument(
        "--gap-stride", type=int, default=4, help="measure scikit-learn's gap at every so many strengths; 0: not"
    )
    arguments = parser.parse_args()
    on_cpu = arguments.device == "cpu"
    arguments.tensors |= not on_cpu
    arguments.jobs = ([1, 2] if on_cpu else []) if arguments.jobs is None else arguments.jobs
    return arguments


def _task(arguments: argparse.Namespace) -> Task:
    generator = np.random.default_rng(0)
    if arguments.features:
        X, y = _read(arguments.features)
        kept = np.isin(y, np.unique(y)[: arguments.classes])
        X, y = X[kept], y[kept]
    else:
        classes = arguments.classes or 5
        y = generator.integers(classes, size=arguments.rows)
        X = generator.normal(size=(classes, 1280))[y] + 3 * generator.normal(size=(len(y), 1280))
    if arguments.rows < len(X):
        part = np.sort(generator.choice(len(X), arguments.rows, replace=False))
        X, y = X[part], y[part]
    y = np.unique(y, return_inverse=True)[1].astype(np.int64)
    mean, scale = standardisation(X.astype(np.float32), True)
    logistic = LogisticParams(strengths=arguments.strengths)
    params = HeadParams(folds=arguments.folds, standardize=False, logistic=logistic)
    return Task(((X - mean) / scale).astype(np.float32), y, params, arguments.device, arguments.tensors)


def _read(file: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    if file.suffix == ".npz":
        arrays = np.load(file)
        return arrays["X"], arrays["y"]
    with h5py.File(file) as source:
        X, y = source["features"][:], source["labels"][:]
        train = source["split"][:] == b"train"
    return X[train & (y >= 0)], y[train & (y >= 0)]


def _ours(task: Task, path: str) -> Run:
    """The head itself; the refit on all rows is part of it."""
    logistic = task.params.logistic.model_copy(update={"path": path})
    params = task.params.model_copy(update={"logistic": logistic})
    names = [str(number) for number in range(int(task.y.max()) + 1)]
    wall, cpu = time.perf_counter(), _cpu()
    head = make_head("logistic", params, class_names=names, device=task.device).fit(task.X, task.y)
    wall, cpu = time.perf_counter() - wall, _cpu() - cpu
    certified = head.selected["loosest_gap" if path == "full" else "largest_gap"]
    return Run(wall, cpu, max(certified, head.selected["certificate"]["gap"]), head.selected["C"])


def _grid(task: Task, jobs: int) -> Run:
    folds = stratified_group_folds(task.y, None, task.params.folds, task.params.seed)
    X, y = (task if jobs == 0 else replace(task, tensors=False)).theirs
    strengths = [float(strength) for strength in task.strengths]
    few = np.concatenate([np.flatnonzero(task.y == target)[:30] for target in (0, 1)])
    with _quiet(), threadpool_limits(1), sklearn.config_context(array_api_dispatch=jobs == 0):
        # One process keeps to one thread too: these products are too small to be shared.
        starting = GridSearchCV(_estimator(1.0), {"C": [0.1, 1.0]}, n_jobs=jobs or 1)
        starting.fit(X[few], y[few])  # loads kernels, starts the workers
        grid = GridSearchCV(
            _estimator(1.0), {"C": strengths}, cv=folds, scoring="neg_log_loss", n_jobs=jobs or 1, refit=True
        )
        wall, cpu = time.perf_counter(), _cpu()
        grid.fit(X, y)
        return Run(time.perf_counter() - wall, _cpu() - cpu, None, float(grid.best_params_["C"]))


def _fit(task: Task, strength: float, tolerance: float = 1e-4) -> LogisticRegression:
    with _quiet(), sklearn.config_context(array_api_dispatch=task.tensors):
        return _estimator(strength, tolerance).fit(*task.theirs)


def _estimator(strength: float, tolerance: float = 1e-4) -> LogisticRegression:
    return LogisticRegression(C=strength, solver="lbfgs", tol=tolerance, max_iter=1000)


class _quiet(warnings.catch_warnings):  # noqa: N801 - used as a function
    """Without warnings of solutions that are not exact: their gap is what is measured."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.simplefilter("ignore", ConvergenceWarning)
        os.environ["PYTHONWARNINGS"] = "ignore"
        return entered


def _grid_gap(task: Task, stride: int) -> float:
    """The largest relative gap of scikit-learn's objectives, on the first fold."""
    inside = stratified_group_folds(task.y, None, task.params.folds, task.params.seed)[0][0]
    part = replace(task, X=task.X[inside], y=task.y[inside])
    fits = [_fit(part, float(strength)) for strength in part.strengths[::stride]]
    return max(_gaps(part, fits))


def _gaps(task: Task, fits: list[LogisticRegression]) -> list[float]:
    """The relative gaps of the objectives of fits at ascending strengths to those of solutions of ours."""
    X, y = (torch.from_numpy(part).to(task.device) for part in (task.X, task.y))
    design = Design.build(X.double(), y, int(task.y.max()) + 1)
    ones = torch.ones(1, len(y), dtype=torch.float64, device=task.device)
    weights = ones.new_zeros(1, design.outputs, design.exact.shape[1])
    gaps = []
    for model in fits:
        problems = Problems.build(design, ones.new_tensor([float(model.C)]), ones)
        optimum = solve(design, problems, weights, REFERENCE_TOLERANCE)
        weights = optimum.weights
        coefficients = torch.as_tensor(model.coef_).to(ones)
        columns = coefficients if design.basis is None else coefficients @ design.basis
        bias = torch.as_tensor(model.intercept_).to(ones)[:, None]
        logits = design.logits(torch.cat([columns, bias], 1)[None])
        losses = residuals_and_losses(logits, design.target, problems.row_weight)[1]
        objective = problems.strength * losses + 0.5 * coefficients.square().sum()
        gaps.append(float(objective[0] / optimum.objective[0]) - 1)
    return gaps


def _single_rows(task: Task, strength: float) -> None:
    """One fit of ours, of scikit-learn, and of scikit-learn where its tolerance is tight enough for the same gap."""

    def ours() -> float:
        X, y = (torch.from_numpy(part).to(task.device) for part in (task.X, task.y))
        design = Design.build(X.double(), y, int(task.y.max()) + 1, rotate=False)
        ones = torch.ones(1, len(y), dtype=torch.float64, device=task.device)
        problems = Problems.build(design, torch.full_like(ones[:, 0], strength), ones)
        zero = ones.new_zeros(1, design.outputs, design.exact.shape[1])
        return float(solve(design, problems, zero, task.params.logistic.tolerance**2).gap[0])

    def theirs(tolerance: float) -> LogisticRegression:
        return _fit(task, strength, tolerance)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        exact = next((tol for tol in TIGHTER if _gaps(task, [theirs(tol)])[0] <= GAP), TIGHTER[-1])
        tolerances = list(dict.fromkeys((TIGHTER[0], exact)))
        timed = [
            (_timed(ours, strength), *(_timed(lambda tol=tol: theirs(tol), strength) for tol in tolerances))  # type: ignore[misc]
            for _ in range(SINGLE)
        ]
        gaps = [_gaps(task, [theirs(tol)])[0] for tol in tolerances]
    torch.set_num_threads(threads)
    mine, *others = (_median(list(runs)) for runs in zip(*timed, strict=True))
    others = [Run(run.wall, run.cpu, gap, strength) for run, gap in zip(others, gaps, strict=True)]
    for tolerance, other in zip(tolerances, others, strict=True):
        _row(f"scikit-learn, one fit, tol={tolerance:.0e}", other, [])
    for tolerance, other in zip(tolerances, others, strict=True):
        _row(f"one fit, ratio to tol={tolerance:.0e}", mine, [other])


def _timed(function: Callable[[], Any], strength: float) -> Run:
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    gap = result if isinstance(result, float) else None
    return Run(time.perf_counter() - wall, time.process_time() - cpu, gap, strength)


def _median(runs: list[Run]) -> Run:
    walls, cpus = (statistics.median(getattr(run, name) for run in runs) for name in ("wall", "cpu"))
    gaps = [run.gap for run in runs if run.gap is not None]
    return Run(walls, cpus, max(gaps, default=None), runs[0].strength)


def _cpu() -> float:
    """CPU-seconds of this process and its living children (where the system tells)."""
    total, me = time.process_time(), str(os.getpid())
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = file.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if fields[1] == me:
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def _row(what: str, run: Run, baselines: list[Run]) -> None:
    ratios = [f"{min(getattr(b, name) for b in baselines) / getattr(run, name):.1f} x" if baselines else "" for name in
              ("wall", "cpu")]  # fmt: skip
    gap = "" if run.gap is None else f"{run.gap:.1e}"
    cells = [what, f"{run.wall:.2f}", f"{run.cpu:.2f}", *ratios, gap, f"{run.strength:.3g}"]
    print(f"| {' | '.join(cells)} |", flush=True)


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _header(arguments: argparse.Namespace, task: Task) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f", ours on {torch.cuda.get_device_name()}" if task.device.startswith("cuda") else ""
    print(f"{datetime.date.today()}, {platform.machine()}, {cores} cores{gpu}, load {os.getloadavg()[0]:.1f},", end=" ")
    print(f"torch {torch.__version__}, scikit-learn {sklearn.__version__}, Python {platform.python_version()}\n")
    n, d = task.X.shape
    print(f"{n} x {d} features of {arguments.features or 'a synthetic mixture'}, {int(task.y.max()) + 1} classes,")
    print(f"{len(task.strengths)} strengths from 1e-6 to 1e5, {task.params.folds} folds; threads of ours: ", end="")
    print(f"{torch.get_num_threads()}\n")
    print("| what | wall s | CPU s | wall, ratio | CPU, ratio | largest gap | C |")
    print("| :-- | --: | --: | --: | --: | --: | --: |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(_arguments().threads)
    main()
