"""Stage three: backbone and head trained together from the probe, and whether that was worth it."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from ..artifacts import PARAMS_FILE, check_run_name, default_run_name
from ..errors import FinetuneError
from ..files import publish_file
from ..finetune import find_learning_rates, process_group, sweeps_plot
from ..params import Params, load_params
from ..runtime.device import resolve_device
from ..runtime.distributed import World, world_from_environment
from .tuned_run import publish_tuned
from .tuning import START_FILE, Say, prepare_job, train_job

TRAINING_FOLDER = ".training"


def finetune(
    params: Params,
    say: Say = print,
    *,
    from_run: str | None = None,
    resume: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train backbone and head together, keep the best epoch, compare with the probe, publish a run.

    Args:
        from_run: the stage-two run to start from; by default the latest that fits.
        resume: name of a training that was interrupted or killed (or ``latest``); its own params are used.

    Returns:
        the summary of ``--json``; in processes other than torchrun's first an empty one.

    Raises:
        FinetuneError: there is nothing to start or go on from.
        Interrupted: Ctrl-C; ``resume`` goes on.
    """
    started = time.perf_counter()
    world = world_from_environment()
    if resume is not None:
        params, from_run, folder = _resumed(params, resume)
    else:
        folder = params.runs.dir / TRAINING_FOLDER / _name(params)
    device = resolve_device(params.finetune.device, world)
    with process_group(world, device):
        job = prepare_job(params, world, device, folder, say, from_run=from_run, quiet=quiet)
        outcome = train_job(job)
        if not world.is_main:
            return {}
        summary = publish_tuned(job, outcome, started)
    shutil.rmtree(folder, ignore_errors=True)
    return summary


def find_lr(params: Params, say: Say = print, *, from_run: str | None = None) -> dict[str, Any]:
    """Draw loss against learning rate for head and backbone and suggest both rates; nothing is trained for good."""
    name = default_run_name(params.data.root, params.backbone.name, "find-lr")
    device = resolve_device(params.finetune.device)
    job = prepare_job(params, World(), device, params.runs.dir / TRAINING_FOLDER / name, say, from_run=from_run)
    sweeps = find_learning_rates(job.classifier, job.train_images, job.transform, params.finetune, job.setting)
    plot = params.runs.dir / f"{name}.svg"
    publish_file(plot, sweeps_plot(sweeps))
    shutil.rmtree(job.folder, ignore_errors=True)
    suggested = {sweep.name: sweep.suggestion for sweep in sweeps}
    settings = " ".join(f"finetune.{key}={value:g}" for key, value in suggested.items())
    say(f"Suggested: {settings}")
    say(f"Curves: {plot.resolve()}")
    return {"suggested": suggested, "plot": str(plot.resolve())}


def _name(params: Params) -> str:
    """The name of the run to be.

    Raises:
        RunError: the chosen one is taken.
    """
    if params.runs.name:
        check_run_name(params.runs.dir, params.runs.name)
    return params.runs.name or default_run_name(params.data.root, params.backbone.name, "finetuned")


def _resumed(params: Params, resume: str) -> tuple[Params, str | None, Path]:
    """The params, the starting run and the folder of a training that did not end."""
    parent = params.runs.dir / TRAINING_FOLDER
    names = sorted((folder for folder in parent.glob("*") if (folder / START_FILE).exists()), key=_age)
    wanted = names[-1] if resume == "latest" and names else parent / Path(resume).name
    if wanted not in names:
        there = ", ".join(folder.name for folder in names) or "none"
        raise FinetuneError(
            f"There is no unfinished training {resume!r}.",
            where=parent,
            why=f"unfinished are: {there}",
            remedy="start one with `pipeline finetune`",
        )
    start = json.loads((wanted / START_FILE).read_text())
    return load_params(wanted / PARAMS_FILE), start["from"], wanted


def _age(folder: Path) -> float:
    return (folder / START_FILE).stat().st_mtime
