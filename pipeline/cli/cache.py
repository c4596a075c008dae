"""`pipeline cache`: look after the feature cache."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ..files import human_bytes
from ..params import Params
from .options import Reporter, experiment_options, require_paths

COLUMNS = ("backbone", "key", "weights", "precision", "dtype", "view", "rows", "size", "last used", "damaged")


@click.group()
def cache() -> None:
    """Look after the cached features: list, verify, explain, clean up, export, import."""


@cache.command("ls")
@experiment_options
def list_(params: Params, reporter: Reporter) -> None:
    """List what cache.dir holds, a line a key, the last used first."""
    from ..stages.cache import list_cache

    summary = list_cache(params)
    if not reporter.as_json and not reporter.quiet and summary["keys"]:
        _print_keys(summary["keys"])
    for key in summary["keys"]:
        for problem in key["problems"]:
            reporter.say(f"{key['backbone']}-{key['key']}: {problem}")
    for file in summary["temporary"]:
        reporter.say(f"temporary: {file['path']} ({human_bytes(file['bytes'])})")
    reporter.say(f"{len(summary['keys'])} key(s), {human_bytes(summary['bytes'])}: {summary['cache']}")
    reporter.finish(summary)


@cache.command()
@click.option("--sample", type=click.IntRange(0), default=8, show_default=True, help="Features to compute again.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the choice of these images.")
@experiment_options
def verify(params: Params, sample: int, seed: int, reporter: Reporter) -> None:
    """Read every byte of every part again, and compute a random sample of features again from data.root."""
    from ..stages.cache import verify_cache

    reporter.finish(verify_cache(params, reporter.say, sample=sample, seed=seed))


@cache.command()
@experiment_options
def why(params: Params, reporter: Reporter) -> None:
    """Say which images lack a feature and which field of the params made another key."""
    require_paths(params)
    from ..stages.cache import explain_cache

    reporter.finish(explain_cache(params, reporter.say))


@cache.command()
@click.option("--yes", is_flag=True, help="Remove without asking.")
@click.option(
    "--older-than", "days", type=click.FloatRange(0), default=30, show_default=True, metavar="DAYS",
    help="Propose keys unused for so many days.",
)  # fmt: skip
@experiment_options
def gc(params: Params, yes: bool, days: float, reporter: Reporter) -> None:
    """Propose unused keys that no run names, leftovers, damaged files and old indexes; remove them if you agree.

    With --json and without --yes it only proposes.
    """
    from ..stages.cache import collect_garbage

    def confirm(question: str) -> bool:
        if yes or reporter.as_json:
            return yes
        return click.confirm(question, default=False, err=True)

    reporter.finish(collect_garbage(params, reporter.say, confirm, days=days))


@cache.command()
@click.argument("target", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False))
@experiment_options
def export(params: Params, target: Path, reporter: Reporter) -> None:
    """Write the features of data.root with labels, paths, class_names and split to one HDF5 FILE."""
    require_paths(params)
    from ..stages.cache import export_features

    reporter.finish(export_features(params, target, reporter.say))


@cache.command("import")
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@experiment_options
def import_(params: Params, files: tuple[Path, ...], reporter: Reporter) -> None:
    """Take the features of Parquet files, or folders of them, that an Embedder's rows were written to.

    A file of which a bit has changed is refused whole.
    """
    from ..stages.cache import import_features

    reporter.finish(import_features(params, files, reporter.say))


def _print_keys(keys: list[Mapping[str, Any]]) -> None:
    from rich.table import Table

    from .tables import screen_for

    table = Table(*COLUMNS, box=None, header_style="bold")
    for key in keys:
        table.add_row(*_cells(key))
    screen_for(table).print(table)


def _cells(key: Mapping[str, Any]) -> list[str]:
    cells = {
        **key,
        "weights": (key["weights_digest"] or "?")[:8],
        "size": human_bytes(key["bytes"]),
        "last used": key["used"][:16].replace("T", " "),
        "damaged": str(len(key["damaged"]) or "-"),
    }
    return ["?" if cells[name] is None else str(cells[name]) for name in COLUMNS]
