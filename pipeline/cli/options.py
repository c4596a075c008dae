"""What verbs share: the params options, and where words and numbers are printed."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..errors import ParamsError, Problem, WeightsError
from ..params import Params, is_url, load_params
from ..params.load import WEIGHTS_SUFFIXES
from ..runtime.distributed import world_from_environment
from ..runtime.progress import print_above


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
            _echo(line, err=self.as_json)

    def warn(self, line: str) -> None:
        """Print a line for people where it mixes with no result: on standard error."""
        if self.is_main and not self.quiet:
            _echo(line, err=True)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Print the one JSON object of ``--json``."""
        if self.is_main and self.as_json:
            click.echo(json.dumps(summary))


def _echo(line: str, *, err: bool) -> None:
    """Print a line that any terminal takes; where its reader has gone (``| head``), work goes on without a word."""
    text = line.encode("utf-8", "backslashreplace").decode()
    if os.isatty(2 if err else 1) and print_above(text):
        return
    try:
        click.echo(text, err=err)
    except BrokenPipeError:
        hang_up(2 if err else 1)


def hang_up(stream: int) -> None:
    """Write to nowhere instead of to file descriptor ``stream``, whose reader has gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream)
    os.close(nowhere)


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
        verb(params=params_of(file, overrides), **arguments)

    return wrapped


def params_of(file: Path | None, overrides: Sequence[str]) -> Params:
    """The params of ``-p`` and ``-s``; without ``-p`` those of params.yaml, or every default where it is not there."""
    from ..heads import KINDS  # which brings neither torch nor scikit-learn

    return load_params(file or (DEFAULT_FILE if DEFAULT_FILE.exists() else None), overrides, kinds=KINDS)


def require_paths(params: Params) -> None:
    """Refuse params that name what is not there, before anything slow is imported.

    Raises:
        ParamsError, WeightsError: files and folders that do not exist, all of them at once.
        DataError: data.root is not there.
    """
    from ..data.images import require_place

    weights = params.backbone.weights
    named: dict[str, Path | str | None] = {
        "data.images": params.data.images,
        "data.corrections": params.data.corrections,
        "backbone.weights": weights if os.sep in weights or weights.endswith(WEIGHTS_SUFFIXES) else None,
        "head.prompts": params.head.prompts,
    }
    missing = [
        Problem(key, "must be the path of something that is there", str(place))
        for key, place in named.items()
        if place is not None and not is_url(place) and not Path(place).exists()
    ]
    if [problem.key for problem in missing] == ["backbone.weights"]:
        raise WeightsError("The weights file is not there.", where=weights, remedy="correct backbone.weights")
    if missing:
        raise ParamsError("the params, with what is given by -s", missing)
    require_place(params.data, params.cache.dir)


def lazy_options(verb: Verb) -> Verb:
    """As `experiment_options`, for verbs that do not always need params, or need several: the verb gets ``load``, which
    reads them with what further ``key.path=value`` it is given."""

    @_params_options
    @reporting_options
    @functools.wraps(verb)
    def wrapped(file: Path | None, overrides: tuple[str, ...], **arguments: Any) -> None:
        def load(*more: str) -> Params:
            return params_of(file, (*overrides, *more))

        verb(load=load, **arguments)

    return wrapped


def run_options(verb: Verb) -> Verb:
    """As `experiment_options`, for verbs on a finished run, which brings params of its own: ``-p`` says where runs are.

    The verb gets ``runs_dir``, the ``overrides`` of the run's params, and a ``reporter``.
    """

    @_params_options
    @click.option("--backbone", metavar="MODULE:FUNCTION", help="Import this network of your own, which the run names.")
    @reporting_options
    @functools.wraps(verb)
    def wrapped(file: Path | None, overrides: tuple[str, ...], backbone: str | None, **arguments: Any) -> None:
        overrides += (f"backbone.name={backbone}",) if backbone else ()
        verb(runs_dir=params_of(file, overrides).runs.dir, overrides=overrides, **arguments)

    return wrapped


def _params_options(verb: Verb) -> Verb:
    file = click.option(
        "-p", "--params", "file", type=click.Path(path_type=Path), help="The params file.  [default: params.yaml]"
    )
    overrides = click.option("-s", "--set", "overrides", multiple=True, metavar="KEY.PATH=VALUE", help="Set one key.")
    return file(overrides(verb))
