"""`pipeline sweep`: every combination once, resumed where it was stopped, the best named by what is not reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts import read_metrics, read_model
from pipeline.cli import main
from pipeline.features.store import FeatureStore

from ..stages.conftest import FAST, write_images

Sweep = Callable[..., dict[str, Any]]
HEADS = ("--over", "head.kind=[logistic, knn]")
CROPS = ("--over", "transform.crop=[32, 48]")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    write_images(tmp_path / "images")
    places = "\n".join(f"{section}: {{dir: {section}}}" for section in ("cache", "runs"))
    (tmp_path / "params.yaml").write_text(f"data: {{root: images}}\n{places}\n")
    return tmp_path


@pytest.fixture
def sweep(project: Path, capsys: pytest.CaptureFixture[str]) -> Sweep:
    """The summary, and what was said under ``said``."""
    common = [f"-s{setting}" for setting in (*FAST, "head.folds=2", "head.logistic.strengths=5")]

    def run(*arguments: str, code: int = 0) -> dict[str, Any]:
        with pytest.raises(SystemExit) as stop:
            main(["sweep", "-p", str(project / "params.yaml"), *common, *arguments, "--json"])
        captured = capsys.readouterr()
        assert int(stop.value.code or 0) == code, captured.err
        return {**json.loads(captured.out), "said": captured.err}

    return run


def test_every_combination_is_made_once_and_features_are_read_once(
    sweep: Sweep, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = sweep(*HEADS, *CROPS)
    settings = [(row["settings"]["head.kind"], row["settings"]["transform.crop"]) for row in summary["runs"]]
    assert sorted(settings) == [("knn", 32), ("knn", 48), ("logistic", 32), ("logistic", 48)]
    assert all(row["made"] for row in summary["runs"])
    for row in summary["runs"]:
        model = read_model(Path(row["run"]))
        assert model.head.kind == row["settings"]["head.kind"]
        assert model.transform["crop"] == row["settings"]["transform.crop"]
    assert len({row["run"] for row in summary["comparison"]["runs"]}) == len(list((project / "cache").glob("*-*"))) * 2

    read: list[str] = []
    whole = FeatureStore.read
    monkeypatch.setattr(FeatureStore, "read", lambda self, digests: read.append("") or whole(self, digests))  # type: ignore[func-returns-value]
    again = sweep(*HEADS, *CROPS)
    assert len(read) == 2  # once for each crop
    assert not any(row["made"] for row in again["runs"])
    assert [row["run"] for row in again["runs"]] == [row["run"] for row in summary["runs"]]
    assert again["winner"] == summary["winner"] and "there already" in again["said"]


def test_what_was_stopped_goes_on(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    first = sweep("--over", "head.kind=[logistic]")
    second = sweep(*HEADS)
    assert [row["made"] for row in second["runs"] if row["settings"]["head.kind"] == "logistic"] == [False]
    assert first["winner"] in {row["run"] for row in second["runs"]}
    monkeypatch.setattr("pipeline.stages.sweep.current_versions", lambda: {"image-transfer-pipeline": "99"})
    assert all(row["made"] for row in sweep(*HEADS)["runs"])  # another program may do other things


def test_other_labels_make_other_runs(sweep: Sweep, project: Path) -> None:
    sweep(*HEADS)
    image = next((project / "images").rglob("*.jpg"))
    image.rename(next(folder for folder in image.parent.parent.iterdir() if folder != image.parent) / "moved.jpg")
    assert all(row["made"] for row in sweep(*HEADS)["runs"])


def test_the_best_is_named_by_what_is_not_reported(sweep: Sweep) -> None:
    summary = sweep("--over", "head.kind=[knn, nearest_centroid]")
    assert summary["judge"] == "cv"
    for row in summary["runs"]:
        (chosen,) = [entry for entry in read_metrics(Path(row["run"])).leaderboard if entry["selected"]]
        assert row["accuracy"] == chosen["cv_accuracy"]
    accuracies = [row["accuracy"] for row in summary["runs"]]
    assert accuracies == sorted(accuracies, reverse=True) and summary["winner"] == summary["runs"][0]["run"]


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ("head.kind=svm", "no list"),
        ("head.kind=[]", "no list"),
        ("head.kind=[", "no list"),
        ("data.seed=[1, 2]", "cannot be swept"),
        ("head.kin=[svm]", "head.kind"),
        ("head.folds=[2, none]", "head.folds"),
    ],
)
def test_what_cannot_be_swept_is_said_before_anything_is_done(
    sweep: Sweep, project: Path, over: str, said: str
) -> None:
    summary = sweep("--over", over, code=2)
    assert said in json.dumps(summary)
    assert not (project / "cache").exists()


def test_a_mistake_in_the_last_combination_is_found_before_the_first_is_paid_for(sweep: Sweep, project: Path) -> None:
    summary = sweep("--over", "head.kind=[logistic, sklearn.linear_model.Nothing]", code=1)
    assert "Nothing" in summary["error"]["what"]
    assert not (project / "runs").exists()
