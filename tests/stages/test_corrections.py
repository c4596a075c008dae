"""A correction reaches the head and the scores, and neither the features nor the splits."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.params import Params
from pipeline.stages.evaluate import evaluate_run
from pipeline.stages.inspect import inspect
from pipeline.stages.open import load_features
from pipeline.stages.run import load_run
from pipeline.stages.train_head import train_head

Make = Callable[..., Params]
QUICK = ("head.logistic.strengths=2", "head.folds=2")


@pytest.fixture
def corrected(make_params: Make, run_extract: Callable[..., Any], tmp_path: Path) -> Callable[..., Params]:
    """Params with corrections: path -> label."""
    run_extract()

    def make(corrections: dict[str, str], *overrides: str) -> Params:
        file = tmp_path / "mine.csv"
        with open(file, "w", newline="") as target:
            csv.writer(target).writerows([("path", "correction"), *corrections.items()])
        return make_params(*QUICK, f"data.corrections={file}", *overrides)

    return make


def test_labels_change_and_nothing_else(make_params: Make, corrected: Callable[..., Params]) -> None:
    before = load_features(make_params(*QUICK))
    table = load_features(corrected({"train/cat/02.jpg": "dog", "val/dog/03.jpg": "-", "gone.jpg": "cat"}))
    for name in ("features", "splits", "digests", "groups"):
        assert np.array_equal(getattr(table, name), getattr(before, name))
    assert table.found is not None and np.array_equal(table.found, before.targets)
    changed = {table.paths[row]: int(table.targets[row]) for row in np.flatnonzero(table.targets != before.targets)}
    assert changed == {"train/cat/02.jpg": 1, "val/dog/03.jpg": -1}


def test_splits_are_drawn_before_corrections(
    make_params: Make, corrected: Callable[..., Params], root: Path, run_extract: Callable[..., Any]
) -> None:
    flat = ("data.layout=flat", "data.root=" + str(root / "train"))
    run_extract(*flat)
    before = load_features(make_params(*QUICK, *flat))
    left = dict.fromkeys(before.paths[:6], "-")
    assert np.array_equal(load_features(corrected(left, *flat)).splits, before.splits)


def test_a_run_says_what_was_corrected_and_both_scores(corrected: Callable[..., Params]) -> None:
    lines: list[str] = []
    params = corrected({"train/cat/02.jpg": "-", "val/dog/03.jpg": "cat", "val/cat/00.jpg": "-", "gone.jpg": "cat"})
    summary = train_head(params, lines.append)
    assert summary["n"] == 7 and summary["uncorrected"]["n"] == 8 and summary["uncorrected"]["corrected"] == 2
    assert "1 of 4 corrections match no image." in summary["warnings"]
    folder = Path(summary["run"])
    record = json.loads((folder / "model.json").read_text())["data"]["corrections"]
    assert (record["relabelled"], record["left_out"]) == (1, 2) and len(record["digest"]) == 32
    text = (folder / "report.html").read_text()
    assert 0 < text.index("By the labels as found") < text.index('class="card main"')
    found, corrected_line = (
        next(n for n, line in enumerate(lines) if word in line) for word in ("as found", "Scores on")
    )
    assert found < corrected_line
    lines_of_csv = (folder / "predictions.csv").read_text().splitlines()
    rows = {row["path"]: row["label"] for row in csv.DictReader(lines_of_csv)}
    assert (rows["val/dog/03.jpg"], rows["val/cat/00.jpg"], rows["train/cat/02.jpg"]) == ("cat", "", "")
    again = evaluate_run(load_run(folder), quiet=True)
    assert again.uncorrected is not None and again.uncorrected.accuracy == summary["uncorrected"]["accuracy"]
    assert again.metrics["accuracy"] == summary["metrics"]["accuracy"]


def test_without_corrections_nothing_is_said(make_params: Make, corrected: Callable[..., Params]) -> None:
    corrected({})
    summary = train_head(make_params(*QUICK), lambda _line: None)
    assert summary["uncorrected"] is None
    assert "as found" not in (Path(summary["run"]) / "report.html").read_text()


def test_what_is_left_out_is_not_inspected(corrected: Callable[..., Params]) -> None:
    summary = inspect(corrected({"train/cat/02.jpg": "-"}), lambda _line: None, quiet=True)
    assert summary["images"] == 23
    assert "train/cat/02.jpg" not in Path(summary["insights"]).read_text()
