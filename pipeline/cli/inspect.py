"""`pipeline inspect`: what the cached features know about the images."""

from __future__ import annotations

import click

from ..params import Params
from .options import Reporter, experiment_options


@click.command()
@click.argument("run", required=False)
@experiment_options
def inspect(params: Params, run: str | None, reporter: Reporter) -> None:
    """Look at data.root, or at the images of RUN: near-duplicates, leaks, doubted labels, outliers; with pictures."""
    from ..artifacts import resolve_run
    from ..stages.inspect import inspect as stage
    from ..stages.run import load_run

    typed = click.get_current_context().params
    loaded = None if run is None else load_run(resolve_run(params.runs.dir, run), typed["overrides"])
    reporter.finish(stage(params, reporter.say, run=loaded, quiet=reporter.quiet))
