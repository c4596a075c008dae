"""The Python interface: what `from pipeline import ...` has."""

from __future__ import annotations

import inspect
import shlex
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pipeline
from pipeline.cli.verbs import VERBS
from pipeline.errors import RunError
from pipeline.params import Params

from .conftest import PROJECT
from .stages.conftest import make_params, root

__all__ = ["make_params", "root"]  # fixtures


def test_names_are_the_public_ones_and_come_when_they_are_used() -> None:
    assert dir(pipeline) == sorted(pipeline.__all__)
    assert all(callable(getattr(pipeline, name)) for name in pipeline.__all__)
    code = "import sys, pipeline; dir(pipeline); print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


def test_the_names_of_folders_are_functions_whatever_was_imported_before() -> None:
    import pipeline.evaluate.compare
    from pipeline import evaluate, finetune
    from pipeline.finetune import averaging

    assert inspect.isfunction(evaluate) and inspect.isfunction(finetune) and inspect.ismodule(averaging)
    hints = typing.get_type_hints(evaluate)["return"], typing.get_type_hints(finetune)["return"]
    assert hints == (typing.get_type_hints(pipeline.train_head)["return"],) * 2 and typing.is_typeddict(hints[0])


def test_from_a_folder_to_scores_and_a_comparison(
    make_params: Callable[..., Params], root: Path, tmp_path: Path
) -> None:
    params = make_params("head.folds=2", "head.logistic.strengths=5")
    with pytest.raises(RunError, match="no run to compare"):
        pipeline.compare(runs_dir=params.runs.dir)
    lines: list[str] = []
    summary = pipeline.train_head(params, lines.append, extracts=True, quiet=True)
    run = pipeline.load_run(summary["run"])
    again: Any = run.evaluate(root)
    assert again["metrics"]["accuracy"] == summary["metrics"]["accuracy"] and set(again) == set(summary)
    assert [each.path for each in pipeline.compare(runs_dir=params.runs.dir).runs] == [run.folder]
    assert pipeline.evaluate(summary["run"], root)["metrics"] == again["metrics"]
    assert len(pipeline.predict(summary["run"], root / "val")) == summary["n"]
    assert pipeline.advise(params, lines.append)["root"] == str(root)


def test_what_comes_after_the_demo_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a clone by make, elsewhere by the command; each line is one that the verbs take."""
    from pipeline.stages.demo import _next_commands

    monkeypatch.chdir(PROJECT)
    assert [line.split()[:2] for line in _next_commands()] == [["make", "train-head"], ["make", "predict"]]
    monkeypatch.chdir(tmp_path)
    for line in _next_commands():
        verb, *arguments = shlex.split(line)[1:]
        VERBS[verb].make_context(verb, arguments, resilient_parsing=True)
        assert line.startswith("pipeline ")
