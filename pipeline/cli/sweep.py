"""`pipeline sweep`: several heads, backbones and transforms on the same images, one table at the end."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..params import Params
from ..params.parse import NotYamlError, parse_yaml
from .options import Reporter, lazy_options

SWEPT = ("backbone.", "transform.", "extract.", "head.")


class Values(click.ParamType):  # type: ignore[type-arg]
    """``KEY=[V1, V2]``: a key of the params and the values to try, in YAML."""

    name = "values"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, list[Any]]:
        """The key and its values.

        Raises:
            click.BadParameter: there is no list of values, or the key is not one that makes another head or features.
        """
        key, _, text = str(value).partition("=")
        try:
            values, _ = parse_yaml(text)
        except NotYamlError:
            values = None
        if not key.startswith(SWEPT):
            self.fail(f"{key!r} cannot be swept: use a key of {', '.join(SWEPT)}", param, ctx)
        if not isinstance(values, list) or not values:
            self.fail(f"{text!r} is no list of values: write {key}='[V1, V2]'", param, ctx)
        return key, values


@click.command()
@click.option(
    "--over",
    type=Values(),
    multiple=True,
    required=True,
    metavar="KEY='[V1, V2]'",
    help="Try these values of a key; given several times, all combinations.",
)
@lazy_options
def sweep(over: tuple[tuple[str, list[Any]], ...], load: Callable[..., Params], reporter: Reporter) -> None:
    """Extract and train a head for every combination of values, and compare them.

    What was made before from the same images, params and program is not made again.
    """
    from ..evaluate import compare_runs
    from ..stages.sweep import Candidate
    from ..stages.sweep import sweep as stage
    from .compare import print_comparison

    keys = [key for key, _ in over]
    settings = [dict(zip(keys, values, strict=True)) for values in itertools.product(*(values for _, values in over))]
    candidates = [
        Candidate(each, load(*(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in each.items())))
        for each in settings
    ]
    summary = stage(candidates, reporter.say, quiet=reporter.quiet)
    comparison = compare_runs([Path(row["run"]) for row in summary["runs"]])
    if not reporter.as_json:
        print_comparison(comparison)
    reporter.finish({**summary, "comparison": comparison.as_dict()})
