"""The verbs. Each turns its arguments into one call of a stage."""

from __future__ import annotations

from pathlib import Path

import click

from .options import Params, Reporter, experiment_options, reporting_options


@click.command()
@experiment_options
def extract(params: Params, reporter: Reporter) -> None:
    """Embed the images of data.root that the cache does not hold yet."""
    from ..stages.extract import extract as stage

    reporter.finish(stage(params, reporter.say, quiet=reporter.quiet))


@click.command("demo-data")
@click.argument("folder", type=click.Path(path_type=Path))
@reporting_options
def demo_data(folder: Path, reporter: Reporter) -> None:
    """Write the digits of scikit-learn to FOLDER as train, val and test folders of images."""
    from ..data.demo import write_demo_data

    count = write_demo_data(folder)
    reporter.say(f"{count} images under {folder.resolve()}")
    reporter.finish({"images": count, "root": str(folder.resolve())})


VERBS: dict[str, click.Command] = {"extract": extract, "demo-data": demo_data}
