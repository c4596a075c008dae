"""The whole way on the demo images, timed, and one screen about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..artifacts import REPORT_FILE
from ..data.demo import write_demo_data
from ..params import Params
from .extract import extract
from .finetune import finetune
from .train_head import train_head

Say = Callable[[str], None]
Result = TypeVar("Result")


def demo(params: Params, say: Say = print, *, quiet: bool = False) -> dict[str, Any]:
    """Demo data, extract, train-head, finetune, extract again; ends with a summary for people.

    Returns:
        ``seconds`` of each step, and the summaries of the stages.
    """
    seconds: dict[str, float] = {}

    def timed(name: str, step: Callable[[], Result]) -> Result:
        say(f"\n== {name}")
        started = time.perf_counter()
        result = step()
        seconds[name] = time.perf_counter() - started
        return result

    root = Path(params.data.root)
    timed("demo data", lambda: write_demo_data(root))
    first = timed("extract", lambda: extract(params, say, quiet=quiet))
    probe = timed("train-head", lambda: train_head(params, say, quiet=quiet))
    tuned = timed("finetune", lambda: finetune(params, say, from_run=probe["run"], quiet=quiet))
    again = timed("extract again", lambda: extract(params, say, quiet=quiet))
    for line in _screen(params, seconds, first, probe, tuned, again):
        say(line)
    return {"seconds": seconds, "extract": first, "train-head": probe, "finetune": tuned, "extract again": again}


def _screen(
    params: Params,
    seconds: dict[str, float],
    first: Mapping[str, Any],
    probe: Mapping[str, Any],
    tuned: Mapping[str, Any],
    again: Mapping[str, Any],
) -> list[str]:
    width = 78
    images = f"{first['images']:,} images of handwritten digits in ten classes"
    return [
        "",
        "=" * width,
        f"{images}, {params.backbone.name} backbone",
        "",
        f"{'step':<16}{'seconds':>8}  result",
        f"{'extract':<16}{seconds['extract']:>8.1f}  {first['forwarded']:,} images embedded and cached",
        f"{'train-head':<16}{seconds['train-head']:>8.1f}  {_score(probe)}",
        f"{'finetune':<16}{seconds['finetune']:>8.1f}  {_score(tuned)}",
        f"{'extract again':<16}{seconds['extract again']:>8.1f}  {again['forwarded']} images forwarded: all is cached",
        f"{'':<26}the largest class alone would score {100 * probe['baseline_accuracy']:.1f} %",
        "",
        f"probe run     {probe['run']}",
        f"tuned run     {tuned['run']}",
        f"report        {Path(tuned['run']) / REPORT_FILE}",
        "",
        "Next, on your own photographs: one folder of images a class in PHOTOS",
        "(98 MB of weights are downloaded once):",
        *(f"  {line}" for line in _next_commands()),
        "=" * width,
    ]


def _next_commands() -> list[str]:
    """For who came by make, in a clone, or by pip."""
    settings = ("data.root=PHOTOS", "backbone.name=resnet50", "backbone.weights=DEFAULT")
    if Path("Makefile").is_file() and Path("pipeline").is_dir():
        return [f'make train-head SET="{" ".join(settings)}"', 'make predict IMAGES="NEW_PHOTOS"']
    return [f"pipeline train-head --extract -s {' -s '.join(settings)}", "pipeline predict latest NEW_PHOTOS"]


def _score(summary: Mapping[str, Any]) -> str:
    low, high = (100 * bound for bound in summary["metrics"]["accuracy_ci95"])
    accuracy = 100 * summary["metrics"]["accuracy"]
    return f"{accuracy:.1f} % on {summary['split']} (95 % interval {low:.1f} to {high:.1f}, n = {summary['n']})"
