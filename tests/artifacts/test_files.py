"""model.json and metrics.json read back as they were written; everything else is an error that names the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.artifacts import RunMetrics, RunModel, current_versions, read_metrics, read_model
from pipeline.errors import RunError

from .examples import make_run, metrics_values, model_values

HOSTILE = ("<b>\"&'", "caf\udce9", "a,b\r\n", "日本")


def test_model_survives_with_hostile_class_names(tmp_path: Path) -> None:
    model = RunModel.model_validate(model_values(class_names=list(HOSTILE), head={"kind": "svm", "more": {"x": 1}}))
    (tmp_path / "model.json").write_bytes(model.to_json())
    assert read_model(tmp_path) == model
    assert tuple(read_model(tmp_path).class_names) == HOSTILE
    assert read_model(tmp_path).head.model_dump()["more"] == {"x": 1}
    assert model.to_json().isascii() and json.loads(model.to_json())["created"].endswith("+00:00")


def test_metrics_survive_and_give_the_summary(tmp_path: Path) -> None:
    metrics = RunMetrics.model_validate(
        metrics_values([0, 1, 2, 3], [0, 1, 2, 2], HOSTILE, selected={"C": 0.1}, leak=None, history=[{"epoch": 1}])
    )
    (tmp_path / "metrics.json").write_bytes(metrics.to_json())
    assert read_metrics(tmp_path) == metrics
    summary = metrics.summary("/runs/x")
    assert {"run", "split", "n", "metrics", "baseline_accuracy", "selected"} <= set(summary)
    assert summary["metrics"]["accuracy"] == 0.75 and len(summary["metrics"]["accuracy_ci95"]) == 2
    assert summary["metrics"]["log_loss"] is None and summary["reasons"]["log_loss"]
    json.dumps(summary, allow_nan=False)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"class_names": ["a", "a"]}, "class_names"),
        ({"class_names": []}, "class_names"),
        ({"class_names": [1, 2]}, "class_names"),
        ({"created": "2026-11-21T14:30:05"}, "created"),
        ({"created": 5}, "created"),
        ({"storage_dtype": "int8"}, "storage_dtype"),
        ({"forward_shape": [32]}, "forward_shape"),
        ({"feature_dim": 0}, "feature_dim"),
        ({"seconds": float("nan")}, "seconds"),
        ({"head": {"file": "x"}}, "head.kind"),
        ({"backbone": None}, "backbone"),
        ({"format_version": "1"}, "format_version"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    value = json.loads(RunModel.model_validate(model_values()).to_json()) | change
    (tmp_path / "model.json").write_text(json.dumps(value))
    with pytest.raises(RunError, match=named) as caught:
        read_model(tmp_path)
    assert str(tmp_path / "model.json") in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"a": 1}', "[" * 100_000, "\x00\xff", '{"program": "other"}'])
def test_damaged_and_foreign_files_are_run_errors(tmp_path: Path, text: str) -> None:
    for name, read in (("model.json", read_model), ("metrics.json", read_metrics)):
        (tmp_path / name).write_text(text, encoding="latin-1")
        with pytest.raises(RunError) as caught:
            read(tmp_path)
        assert str(tmp_path / name) in str(caught.value)


def test_newer_versions_say_so(tmp_path: Path) -> None:
    value = json.loads(RunModel.model_validate(model_values()).to_json()) | {"format_version": 2}
    (tmp_path / "model.json").write_text(json.dumps(value))
    with pytest.raises(RunError, match="newer version"):
        read_model(tmp_path)


def test_odd_files_are_run_errors(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="not a run folder"):
        read_model(tmp_path)
    with pytest.raises(RunError, match="not a run folder"):
        read_model(tmp_path / "nowhere" / "else")
    os.mkfifo(tmp_path / "model.json")
    with pytest.raises(RunError, match="regular file"):
        read_model(tmp_path)
    with open(tmp_path / "metrics.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(RunError, match="bytes"):
        read_metrics(tmp_path)


def test_keys_of_later_minor_versions_are_ignored(tmp_path: Path) -> None:
    value = json.loads(RunModel.model_validate(model_values()).to_json()) | {"mood": "good"}
    (tmp_path / "model.json").write_text(json.dumps(value))
    assert read_model(tmp_path) == RunModel.model_validate(model_values())


def test_tables_of_the_wrong_size_are_refused() -> None:
    values = metrics_values([0, 1], [0, 1])
    with pytest.raises(ValidationError, match="confusion"):
        RunMetrics.model_validate({**values, "confusion": [[1, 0]]})
    with pytest.raises(ValidationError, match="per_class"):
        RunMetrics.model_validate({**values, "per_class": values["per_class"][:1]})


def test_nothing_a_run_names_is_imported(tmp_path: Path) -> None:
    run = make_run(tmp_path, "run", [0, 1], [0, 1], head={"kind": "antigravity", "type": "this.s"})
    assert read_model(run).head.kind == "antigravity"
    import sys

    assert "antigravity" not in sys.modules


def test_versions_are_read_without_importing() -> None:
    versions = current_versions()
    assert {"python", "torch", "torchvision", "numpy", "scikit-learn", "pillow"} <= set(versions)
    assert versions["numpy"] == np.__version__
