"""`pipeline inspect`: what the cached features know about the images."""

from __future__ import annotations

from collections.abc import Callable

import click

from ..params import Params
from .options import Reporter, lazy_options, require_paths

PLACES = click.Path(path_type=str)


@click.command()
@click.argument("run", required=False)
@click.option("--label-next", "unlabelled", type=PLACES, metavar="FOLDER", help="Which images of FOLDER to label next.")
@click.option("--count", type=click.IntRange(1), default=20, show_default=True, help="How many images to label next.")
@lazy_options
def inspect(
    run: str | None, unlabelled: str | None, count: int, load: Callable[[], Params], reporter: Reporter
) -> None:
    """Look at data.root, or at the images of RUN: near-duplicates, leaks, doubted labels, outliers; with pictures."""
    if run is None:
        require_paths(load())
    from ..artifacts import resolve_run
    from ..stages.inspect import inspect as stage
    from ..stages.run import load_run

    typed = click.get_current_context().params
    loaded = None
    if run is not None:
        loaded = load_run(resolve_run(load().runs.dir, run), typed["overrides"])
    params = load() if loaded is None else loaded.params
    reporter.finish(stage(params, reporter.say, run=loaded, unlabelled=unlabelled, count=count, quiet=reporter.quiet))
