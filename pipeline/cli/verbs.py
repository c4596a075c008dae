"""The verbs. Each turns its arguments into one call of a stage; torch is imported only inside."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from ..params import Params
from .advise import advise
from .cache import cache
from .compare import compare
from .inspect import inspect
from .options import Count, Reporter, experiment_options, lazy_options, reporting_options, require_paths, run_options
from .sweep import sweep
from .tables import print_backbones, print_predictions, print_ranking, write_predictions_csv

if TYPE_CHECKING:
    from ..stages.export import ExportedRun
    from ..stages.run import Prediction, Run

EXPORTED = (".onnx", ".pt2")
PATHS = click.Path(path_type=Path)
SHOWN = 60
PLACES = click.Path(path_type=str)  # which may be URLs


@click.command()
@click.option("--retry", is_flag=True, help="Try images again that are known to be unreadable.")
@experiment_options
def extract(params: Params, retry: bool, reporter: Reporter) -> None:
    """Embed the images of data.root that the cache does not hold yet."""
    require_paths(params)
    from ..stages.extract import extract as stage

    reporter.finish(stage(params, reporter.say, retry=retry, quiet=reporter.quiet))


@click.command("train-head")
@click.option("--curve", is_flag=True, help="Also fit on growing parts of train: would more labels help?")
@click.option("--extract", "extracts", is_flag=True, help="Embed first what the cache does not hold yet.")
@experiment_options
def train_head(params: Params, curve: bool, extracts: bool, reporter: Reporter) -> None:
    """Train a head on the cached features, score it and publish a run."""
    require_paths(params)
    from ..stages.train_head import train_head as stage

    reporter.finish(stage(params, reporter.say, curve=curve, extracts=extracts, quiet=reporter.quiet))


@click.command()
@click.option("--from", "from_run", metavar="RUN", help="Stage-two run to start from (default: the latest).")
@click.option(
    "--resume", is_flag=False, flag_value="latest", metavar="[RUN]",
    help="Go on with a training that was stopped or killed, the latest or RUN.",
)  # fmt: skip
@click.option("--find-lr", "find", is_flag=True, help="Only draw loss against learning rate and suggest both rates.")
@experiment_options
def finetune(params: Params, from_run: str | None, resume: str | None, find: bool, reporter: Reporter) -> None:
    """Train backbone and head together, starting from the probe."""
    if resume is None:
        require_paths(params)
    from ..stages.finetune import find_lr
    from ..stages.finetune import finetune as stage

    if find:
        reporter.finish(find_lr(params, reporter.say, from_run=from_run))
    else:
        reporter.finish(stage(params, reporter.say, from_run=from_run, resume=resume, quiet=reporter.quiet))


@click.command()
@click.argument("run")
@click.option(
    "--data",
    "root",
    type=PLACES,
    help="Score on these labelled images (as data.root) instead of the run's.",
)
@run_options
def evaluate(runs_dir: Path, overrides: tuple[str, ...], run: str, root: str | None, reporter: Reporter) -> None:
    """Score RUN (a path, a name or `latest`) again, or on another folder."""
    from ..artifacts import resolve_run

    folder = resolve_run(runs_dir, run)
    from ..evaluate import metric_lines
    from ..stages.evaluate import evaluate_run
    from ..stages.run import load_run

    loaded = load_run(folder, overrides)
    metrics = evaluate_run(loaded, root, quiet=reporter.quiet)
    for line in metric_lines(metrics):
        reporter.say(line)
    reporter.finish(metrics.summary(str(loaded.folder)))


@click.command()
@click.argument("run")
@click.argument("paths", nargs=-1, required=True, type=PLACES)
@click.option("--top", type=click.IntRange(1), default=1, show_default=True, help="Classes to list for each image.")
@click.option("-o", "--output", type=PATHS, help="Write CSV to this file.")
@run_options
def predict(
    runs_dir: Path,
    overrides: tuple[str, ...],
    run: str,
    paths: tuple[str, ...],
    top: int,
    output: Path | None,
    reporter: Reporter,
) -> None:
    """Classify images at PATHS (files, folders, tables, shards, URLs) with RUN (path, name, `latest`, exported)."""
    loaded = _open_run(runs_dir, run, overrides)
    predictions = loaded.predict(paths, top=top, say=reporter.warn, quiet=reporter.quiet)
    _finish_predictions(predictions, top, output, reporter, run=str(loaded.folder))


def _open_run(runs_dir: Path, run: str, overrides: tuple[str, ...]) -> Run | ExportedRun:
    """What predicts: a run, or an exported file, whose libraries no run needs."""
    from ..artifacts import resolve_run
    from ..stages.run import load_run

    if run.endswith(EXPORTED) and Path(run).is_file():
        from ..stages.export import load_exported

        return load_exported(run)
    return load_run(resolve_run(runs_dir, run), overrides)


@click.command()
@click.argument("run")
@click.argument("target", metavar="FILE", type=PATHS)
@click.option("--probabilities/--features", default=True, help="What the file gives: classes, or features.")
@click.option(
    "--precision",
    type=click.Choice(["float32", "float16", "int8"]),
    default="float32",
    show_default=True,
    help="Of the backbone; int8 states the accuracy that it costs.",
)
@click.option("--batch", is_flag=True, help="Take n images of one size instead of one.")
@click.option("--data", type=PATHS, help="Images to prove it on, where those that the run was reported on are gone.")
@run_options
def export(
    runs_dir: Path,
    overrides: tuple[str, ...],
    run: str,
    target: Path,
    probabilities: bool,
    precision: Literal["float32", "float16", "int8"],
    batch: bool,
    data: Path | None,
    reporter: Reporter,
) -> None:
    """Write RUN as FILE.onnx (or FILE.pt2), published only once it gives what the run gave.

    The file takes an RGB image, uint8 (height, width, 3), of any size: all preprocessing is inside.
    """
    from ..artifacts import resolve_run

    folder = resolve_run(runs_dir, run)
    from ..stages.export import export_run
    from ..stages.run import load_run

    loaded = load_run(folder, overrides)
    reporter.finish(
        export_run(
            loaded,
            target,
            reporter.say,
            data=data,
            features=not probabilities,
            precision=precision,
            batch=batch,
            quiet=reporter.quiet,
        )
    )


@click.command()
@click.argument("paths", nargs=-1, required=True, type=PLACES)
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="Classes to list for each image.")
@click.option("-o", "--output", type=PATHS, help="Write CSV to this file.")
@experiment_options
def classify(
    params: Params,
    paths: tuple[str, ...],
    top: int,
    output: Path | None,
    reporter: Reporter,
) -> None:
    """Name what the images at PATHS show with the pretrained 1000-class model of the params."""
    from ..stages.classify import classify as stage

    predictions = stage(params, paths, top=top, quiet=reporter.quiet)
    _finish_predictions(predictions, top, output, reporter, run=None)


def _finish_predictions(
    predictions: Sequence[Prediction], top: int, output: Path | None, reporter: Reporter, run: str | None
) -> None:
    bad = [prediction for prediction in predictions if prediction.error is not None]
    good = len(predictions) - len(bad)
    counts = f"{good:,} {'image' if good == 1 else 'images'} classified" + (f", {len(bad):,} not" if bad else "")
    if output:
        write_predictions_csv(predictions, top, output)
        reporter.say(f"{counts}: {output.resolve()}")
    elif not reporter.as_json and sys.stdout.isatty():
        print_predictions(predictions, top)
    elif not reporter.as_json:
        write_predictions_csv(predictions, top, None)
    for prediction in bad:
        click.echo(f"not classified: {prediction.path!r}: {prediction.error}", err=True)
    if bad and not output:
        reporter.warn(counts)
    rows = [prediction.as_dict() for prediction in predictions]
    reporter.finish({"run": run, "n": len(predictions), "errors": len(bad), "predictions": rows})
    if len(bad) == len(predictions):
        raise click.exceptions.Exit(1)


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--rank", is_flag=True, help="Probe the backbones NAME[=WEIGHTS]... on a sample of data.root.")
@click.option("--images", type=click.IntRange(2), default=1000, show_default=True, help="Training images to rank on.")
@click.option("--parameters", type=Count(), help="List those with at most so many, e.g. 30M.")
@click.option("--width", type=Count(), help="List those with at most so many features.")
@click.option("--licence", help="List those whose library states such a licence, e.g. apache.")
@click.option("--all", "everything", is_flag=True, help=f"List more than {SHOWN}.")
@lazy_options
def backbones(
    names: tuple[str, ...],
    rank: bool,
    images: int,
    parameters: int | None,
    width: int | None,
    licence: str | None,
    everything: bool,
    load: Callable[[], Params],
    reporter: Reporter,
) -> None:
    """List backbones with published accuracy and cost (NAME: a part of names, or a pattern with *), or rank some.

    Without NAME those of torchvision that are more accurate than all that compute less; --all lists every one.
    """
    if rank:
        if not names:
            raise click.UsageError("--rank needs the names of backbones: backbones --rank NAME NAME")
        params = load()
        require_paths(params)
        from ..stages.rank import rank_backbones

        summary = rank_backbones(params, names, reporter.say, size=images, quiet=reporter.quiet)
        if not reporter.as_json:
            print_ranking(summary)
        reporter.finish(summary)
        return
    from ..backbones import ZOOS, first_worth_a_look, list_backbones

    sizes = {name: len(zoo.names()) for name, zoo in ZOOS.items()}
    unasked = not (names or everything or licence or parameters or width or reporter.as_json)
    listed = first_worth_a_look(ZOOS["torchvision"], ZOOS["torchvision"].names()) if unasked else names
    found = list_backbones(listed, licence=licence, parameters=parameters, width=width)
    rows = list(islice(found, SHOWN if names and not everything else None))
    more = next(found, None) is not None
    if not reporter.as_json:
        print_backbones(rows, more=more, first=unasked, sizes={} if names else sizes)
    reporter.finish({"backbones": [vars(row) for row in rows], "more": more, "zoos": sizes})


@click.command("demo-data")
@click.argument("folder", type=PATHS)
@reporting_options
def demo_data(folder: Path, reporter: Reporter) -> None:
    """Write the digits of scikit-learn to FOLDER as train, val and test folders of images."""
    from ..data.demo import write_demo_data

    count = write_demo_data(folder)
    reporter.say(f"{count} images under {folder.resolve()}")
    reporter.finish({"images": count, "root": str(folder.resolve())})


@click.command()
@experiment_options
def demo(params: Params, reporter: Reporter) -> None:
    """Run every stage on the demo images (written to data.root) and sum up."""
    from ..stages.demo import demo as stage

    reporter.finish(stage(params, reporter.say, quiet=reporter.quiet))


VERBS: dict[str, click.Command] = {
    "advise": advise,
    "extract": extract,
    "train-head": train_head,
    "sweep": sweep,
    "finetune": finetune,
    "inspect": inspect,
    "evaluate": evaluate,
    "compare": compare,
    "predict": predict,
    "export": export,
    "classify": classify,
    "backbones": backbones,
    "demo": demo,
    "demo-data": demo_data,
    "cache": cache,
}
