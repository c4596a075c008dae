"""Run folders are named readably, published whole, found again, and never overwritten."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline.artifacts import check_run_name, default_run_name, list_runs, publishing_run, resolve_run
from pipeline.errors import RunError

from .examples import make_run


def _dated(runs_dir: Path, name: str, day: int) -> Path:
    return make_run(runs_dir, name, [0, 1], [0, 1], created=datetime(2026, 1, day, tzinfo=UTC))


def test_default_name_says_when_what_and_how() -> None:
    moment = datetime(2026, 11, 21, 14, 30, 5)
    name = default_run_name(Path("/data/hymenoptera"), "mobilenet_v2", "logistic", now=moment)
    assert name == "20261121-143005-hymenoptera-mobilenet_v2-logistic"
    hostile = default_run_name(Path("/data/a b\n../\udcff" + "x" * 300), "timm/vit", "sklearn.svm.SVC", now=moment)
    assert os.sep not in hostile and hostile.isascii() and len(hostile) < 150 and "\n" not in hostile
    letters = default_run_name(Path("/Fotos für Äpfel & Cø/日本"), "b", "h", now=moment)
    assert letters == "20261121-143005-b-h"
    letters = default_run_name(Path("/Fotos für Äpfel & Crème"), "b", "h", now=moment)
    assert letters == "20261121-143005-Fotos_fuer_Aepfel_Creme-b-h"
    assert default_run_name(Path("/"), "b", "h", now=moment) == "20261121-143005-b-h"


def test_a_taken_name_gets_a_number_and_the_first_run_stays(tmp_path: Path) -> None:
    first = _dated(tmp_path, "run", 1)
    before = {file.name: file.read_bytes() for file in first.iterdir()}
    assert _dated(tmp_path, "run", 2).name == "run-2"
    assert _dated(tmp_path, "run", 3).name == "run-3"
    assert {file.name: file.read_bytes() for file in first.iterdir()} == before


def test_a_failed_run_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with publishing_run(tmp_path, "run") as (folder, _):
            (folder / "params.yaml").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == []


def test_an_unwritable_folder_is_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match="cannot be written"), publishing_run(tmp_path / "file" / "runs", "run"):
        pass


def test_chosen_names_are_checked_early(tmp_path: Path) -> None:
    _dated(tmp_path, "mine", 1)
    check_run_name(tmp_path, "other")
    with pytest.raises(RunError, match="exists already"):
        check_run_name(tmp_path, "mine")
    with pytest.raises(RunError, match="newest"):
        check_run_name(tmp_path, "latest")


def test_latest_goes_by_creation_and_skips_unfinished_and_damaged(tmp_path: Path) -> None:
    _dated(tmp_path, "a-old", 1)
    newest = _dated(tmp_path, "b-new", 9)
    _dated(tmp_path, "c-old", 2)
    os.utime(tmp_path / "a-old")
    damaged = _dated(tmp_path, "d-damaged", 20)
    (damaged / "model.json").write_text("{")
    _dated(tmp_path, "e", 21).rename(tmp_path / ".tmp-1-2-e")
    (tmp_path / "notes").mkdir()
    assert resolve_run(tmp_path, "latest") == newest
    entries = list_runs(tmp_path)
    assert [entry.name for entry in entries] == ["b-new", "c-old", "a-old", "d-damaged"]
    assert entries[-1].problem is not None and "damaged" in entries[-1].problem


def test_runs_are_found_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _dated(tmp_path / "runs", "mine", 1)
    elsewhere = _dated(tmp_path / "other", "far", 1)
    monkeypatch.chdir(tmp_path / "other")
    for text in ("mine", str(run), f"{run}/"):
        assert resolve_run(tmp_path / "runs", text) == run
    assert resolve_run(tmp_path / "runs", "far") == elsewhere
    assert resolve_run(tmp_path / "runs", "./far") == elsewhere


def test_a_name_that_is_not_there_lists_those_that_are(tmp_path: Path) -> None:
    for text in ("latest", "some"):
        with pytest.raises(RunError, match="train-head"):
            resolve_run(tmp_path / "none", text)
    _dated(tmp_path, "flowers-resnet18", 1)
    with pytest.raises(RunError, match="did you mean flowers-resnet18"):
        resolve_run(tmp_path, "flowers-resnet81")
    with pytest.raises(RunError, match="did you mean flowers-resnet18"):
        resolve_run(tmp_path, "flow")
    with pytest.raises(RunError, match=r"runs under .*: flowers-resnet18"):
        resolve_run(tmp_path, "zzz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"no model\.json"):
        resolve_run(tmp_path, "empty")
