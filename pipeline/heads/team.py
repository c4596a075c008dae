"""Solve a batch of logistic regressions in parts, one thread each."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from .design import Design
from .lbfgs import Problems
from .solver import Solutions, join, solve

PART_WORK = 1e7
PART_COLUMNS = 24


class Team:
    """Threads that each solve their own problems, and so never wait for each other within an iteration.

    Threads that share a product instead stand still wherever one of them does, as it does on a busy machine.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        # what a thread is left to share its products with, where products are large enough to be shared
        self.inner = max(1, torch.get_num_threads() // threads)
        self._pool: ThreadPoolExecutor | None = None

    def solve(self, design: Design, problems: Problems, start: Tensor, tolerance: float) -> Solutions:
        """As `solver.solve`."""
        parts = self._parts(design, start)
        if len(parts) == 1:
            return solve(design, problems, start, tolerance)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.threads, "solver")
        before = torch.get_num_threads()
        tasks = [self._pool.submit(self._solve, design, problems.take(part), start[part], tolerance) for part in parts]
        solutions = [task.result() for task in tasks]
        torch.set_num_threads(before)  # MKL keeps one number for the whole process
        return join(solutions)

    def _solve(self, design: Design, problems: Problems, start: Tensor, tolerance: float) -> Solutions:
        torch.set_num_threads(self.inner)
        return solve(design, problems, start, tolerance)

    def _parts(self, design: Design, start: Tensor) -> tuple[Tensor, ...]:
        """Positions of the problems of each part.

        A batch stays whole where its parts would be so small that Python takes turns more than it works, or so narrow
        that their products cost clearly more than one for all.
        """
        columns = len(start) * design.outputs
        count = min(self.threads, columns // PART_COLUMNS, int(design.exact.numel() * columns / PART_WORK))
        return torch.arange(len(start)).chunk(max(1, count))
