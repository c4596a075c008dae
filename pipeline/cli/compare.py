"""`pipeline compare`: the runs side by side, with marks for the differences that are real."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

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
@click.option("--wide", is_flag=True, help="Show all metrics of a run, as wide as that needs.")
@click.option("--markdown", is_flag=True, help="Print a Markdown table.")
@run_options
def compare(
    runs_dir: Path,
    overrides: tuple[str, ...],
    runs: tuple[str, ...],
    sort: str,
    wide: bool,
    markdown: bool,
    reporter: Reporter,
) -> None:
    """Compare RUNs (paths, names, ids or `latest`), or all of runs.dir, image by image."""
    del overrides  # they say where runs are; a finished run's scores stand
    from ..evaluate import comparison_markdown
    from ..stages.compare import compare as stage

    comparison = stage(runs, runs_dir=runs_dir, sort=sort)
    if markdown and not reporter.as_json:
        click.echo(comparison_markdown(comparison), nl=False)
    elif not reporter.as_json:
        print_comparison(comparison, sort, wide=wide)
    reporter.finish(comparison.as_dict())


def print_comparison(comparison: Comparison, sort: str = "accuracy", *, wide: bool = False) -> None:
    """The tables of `compare` on standard output, and what a reader must know besides."""
    from ..evaluate import METRICS, comparison_groups, comparison_notes, comparison_table
    from .tables import screen_for

    column = sort.removeprefix("-")
    if wide:
        table = comparison_table(comparison)
        screen_for(table).print(table)
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        for title, table in comparison_groups(comparison, column if column in METRICS else "accuracy", width):
            click.echo(title)
            screen_for(table).print(table)
            click.echo()
    for note in comparison_notes(comparison):
        click.echo(note)
