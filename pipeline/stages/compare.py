"""Runs beside each other; see `pipeline.evaluate.compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..artifacts import list_runs, resolve_run
from ..errors import RunError
from ..evaluate import Comparison, compare_runs


def compare(runs: Sequence[Path | str] = (), *, runs_dir: Path | str = "runs", sort: str = "accuracy") -> Comparison:
    """Compare runs image by image; `Comparison.as_dict` has it all as plain values.

    Args:
        runs: paths, names, ids or ``latest``; none: all runs of ``runs_dir``, but for damaged ones.
        sort: a metric, or another column of `sort_columns`.

    Raises:
        RunError: there is no such run, or none at all, or one that cannot be read.
        UsageError: no such column.
    """
    runs_dir = Path(runs_dir)
    folders = [resolve_run(runs_dir, str(run)) for run in runs] or [entry.path for entry in list_runs(runs_dir)]
    if not folders:
        raise RunError("There is no run to compare yet.", where=runs_dir, remedy="make some with train-head")
    return compare_runs(folders, sort=sort, skip_damaged=not runs)
