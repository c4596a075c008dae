"""`pipeline compare`: the runs side by side, with marks for the differences that are real."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import RunError
from .options import Reporter, run_options

if TYPE_CHECKING:
    from ..evaluate import Comparison


@click.command()
@click.argument("runs", nargs=-1, metavar="[RUN]...")
@click.option(
    "--sort",
    default="accuracy",
    show_default=True,
    metavar="COLUMN",
    help="Sort by this column, best first; -COLUMN for the other way round.",
)
@click.option("--markdown", is_flag=True, help="Print a Markdown table.")
@run_options
def compare(
    runs_dir: Path, overrides: tuple[str, ...], runs: tuple[str, ...], sort: str, markdown: bool, reporter: Reporter
) -> None:
    """Compare RUNs (paths, names or `latest`), or all of runs.dir, image by image."""
    del overrides  # they say where runs are; a finished run's scores stand
    from ..artifacts import resolve_run
    from ..evaluate import compare_runs, comparison_markdown

    folders = [resolve_run(runs_dir, run) for run in runs] if runs else _all_runs(runs_dir)
    comparison = compare_runs(folders, sort=sort, skip_damaged=not runs)
    if markdown and not reporter.as_json:
        click.echo(comparison_markdown(comparison), nl=False)
    elif not reporter.as_json:
        print_comparison(comparison)
    reporter.finish(comparison.as_dict())


def _all_runs(runs_dir: Path) -> list[Path]:
    from ..artifacts import list_runs

    folders = [entry.path for entry in list_runs(runs_dir)]
    if not folders:
        raise RunError("There is no run to compare yet.", where=runs_dir, remedy="make some with train-head")
    return folders


def print_comparison(comparison: Comparison) -> None:
    """The table of `compare` on standard output, and what a reader must know besides."""
    from rich.console import Console

    from ..evaluate import comparison_notes, comparison_table

    console = Console(highlight=False, markup=False)
    table = comparison_table(comparison)
    if not console.is_terminal:
        # A pipe has no width; on a terminal the table folds its names to fit.
        wide = console.options.update_width(10_000)
        console.width = max(console.width, console.measure(table, options=wide).maximum)
    console.print(table)
    for note in comparison_notes(comparison):
        click.echo(note)
