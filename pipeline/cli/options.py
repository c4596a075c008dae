"""What verbs share: the params options, and where words and numbers are printed."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..params import Params, load_params
from ..runtime.distributed import world_from_environment


@dataclass(frozen=True)
class Reporter:
    """Lines for people on standard output, or on standard error when standard output holds the JSON summary.

    Of several processes started by torchrun only the main one speaks.
    """

    as_json: bool = False
    verbose: bool = False
    quiet: bool = False
    is_main: bool = True

    def say(self, line: str) -> None:
        """Print a line for people."""
        if self.is_main and not self.quiet:
            click.echo(line.encode("utf-8", "backslashreplace").decode(), err=self.as_json)

    def warn(self, line: str) -> None:
        """Print a line for people where it mixes with no result: on standard error."""
        if self.is_main and not self.quiet:
            click.echo(line.encode("utf-8", "backslashreplace").decode(), err=True)

    def finish(self, summary: dict[str, Any]) -> None:
        """Print the one JSON object of ``--json``."""
        if self.is_main and self.as_json:
            click.echo(json.dumps(summary))


class Count(click.ParamType):  # type: ignore[type-arg]
    """A whole number, also written 300k or 30M."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number.

        Raises:
            click.BadParameter: it is none.
        """
        text = str(value).replace(",", "")
        try:
            return round(float(text.rstrip("kMG")) * {"k": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:], 1))
        except ValueError:
            self.fail(f"{value!r} is no number such as 300k or 30M", param, ctx)


Verb = Callable[..., None]
DEFAULT_FILE = Path("params.yaml")


def reporting_options(verb: Verb) -> Verb:
    """Add ``--json``, ``-v`` and ``-q``; the verb gets a ``reporter``."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output, words elsewhere.")
    @click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
    @click.option("-q", "--quiet", is_flag=True, help="Print only errors.")
    @functools.wraps(verb)
    def wrapped(as_json: bool, verbose: bool, quiet: bool, **arguments: Any) -> None:
        verb(reporter=Reporter(as_json, verbose, quiet, world_from_environment().is_main), **arguments)

    return wrapped


def experiment_options(verb: Verb) -> Verb:
    """Add ``-p`` and ``-s`` and the reporting options; the verb gets ``params`` and a ``reporter``."""

    @_params_options
    @reporting_options
    @functools.wraps(verb)
    def wrapped(file: Path | None, overrides: tuple[str, ...], **arguments: Any) -> None:
        verb(params=load_params(file or DEFAULT_FILE, overrides), **arguments)

    return wrapped


def lazy_options(verb: Verb) -> Verb:
    """As `experiment_options`, for verbs that do not always need params, or need several: the verb gets ``load``, which
    reads them with what further ``key.path=value`` it is given."""

    @_params_options
    @reporting_options
    @functools.wraps(verb)
    def wrapped(file: Path | None, overrides: tuple[str, ...], **arguments: Any) -> None:
        def load(*more: str) -> Params:
            return load_params(file or DEFAULT_FILE, (*overrides, *more))

        verb(load=load, **arguments)

    return wrapped


def run_options(verb: Verb) -> Verb:
    """As `experiment_options`, for verbs on a finished run, which brings params of its own: ``-p`` says where runs are.

    The verb gets ``runs_dir``, the ``overrides`` of the run's params, and a ``reporter``. Without ``-p`` the file
    need not exist.
    """

    @_params_options
    @click.option("--backbone", metavar="MODULE:FUNCTION", help="Import this network of your own, which the run names.")
    @reporting_options
    @functools.wraps(verb)
    def wrapped(file: Path | None, overrides: tuple[str, ...], backbone: str | None, **arguments: Any) -> None:
        overrides += (f"backbone.name={backbone}",) if backbone else ()
        there = file is not None or DEFAULT_FILE.exists()
        runs_dir = load_params(file or DEFAULT_FILE, overrides).runs.dir if there else Path("runs")
        verb(runs_dir=runs_dir, overrides=overrides, **arguments)

    return wrapped


def _params_options(verb: Verb) -> Verb:
    file = click.option(
        "-p", "--params", "file", type=click.Path(path_type=Path), help="The params file.  [default: params.yaml]"
    )
    overrides = click.option("-s", "--set", "overrides", multiple=True, metavar="KEY.PATH=VALUE", help="Set one key.")
    return file(overrides(verb))
