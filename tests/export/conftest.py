"""Runs that are in the repository, over their images, with a cache of the test's own."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pipeline import load_run
from pipeline.stages.export import export_run
from pipeline.stages.run import Run

CONTRACTS = Path(__file__).resolve().parent.parent / "contracts"
IMAGES = CONTRACTS / "images"
LoadRun = Callable[..., Run]
Exported = Callable[..., tuple[Run, Path, dict[str, Any]]]


def copy_run(folder: Path, name: str, *overrides: str) -> Run:
    """A copy of ``contracts/runs/NAME`` below ``folder``, whose images are there."""
    shutil.copytree(CONTRACTS / "runs" / name, folder / name)
    places = (f"data.root={IMAGES}", f"cache.dir={folder / 'cache'}", "extract.workers=1")
    return load_run(folder / name, (*places, *overrides))


@pytest.fixture
def run_of(tmp_path: Path) -> LoadRun:
    """`copy_run` into a folder that the test may change."""
    return lambda name, *overrides: copy_run(tmp_path, name, *overrides)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A run, its file and the summary of the export, made once: to export takes seconds."""
    folder = tmp_path_factory.mktemp("exported")
    run = cache(lambda name: copy_run(folder, name))

    @cache
    def export(name: str, suffix: str = ".onnx", **options: Any) -> tuple[Run, Path, dict[str, Any]]:
        file = folder / f"{'-'.join([name, *options])}{suffix}"
        return run(name), file, export_run(run(name), file, lambda _line: None, quiet=True, **options)

    return export


@pytest.fixture(autouse=True, scope="session")
def _quiet_torch() -> None:
    """torch tells of each step of tracing, and pytest would keep all of it."""
    logging.getLogger("torch").setLevel(logging.WARNING)
    logging.getLogger("torch.__trace").propagate = False
