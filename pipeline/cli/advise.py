"""`pipeline advise`: probe, fine-tune or train from scratch, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..params import Params
from .options import DEFAULT_FILE, Reporter, experiment_options, require_paths

if TYPE_CHECKING:
    from ..evaluate.advice import Domain


@click.command()
@click.option(
    "--domain",
    type=click.Choice(["similar", "different"]),
    help="How near the images are to ImageNet's photographs.  [default: what a probe's score says, or both]",
)
@experiment_options
def advise(params: Params, domain: Domain | None, reporter: Reporter) -> None:
    """Say from the images of data.root what pays (probe, fine-tune, train from scratch), why, and what to run."""
    require_paths(params)
    from ..evaluate.advice import TypedOptions
    from ..stages.advise import advise_on

    typed = click.get_current_context().params
    file = None if typed["file"] in (None, DEFAULT_FILE) else str(typed["file"])
    options = TypedOptions(file, tuple(typed["overrides"]))
    reporter.finish(advise_on(params, reporter.say, domain, options))
