"""`pipeline compare` as typed, on two real runs of one tiny folder."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from rich.table import Table

from pipeline.cli import main
from pipeline.evaluate.compare import _cut
from pipeline.params import load_params
from pipeline.stages.extract import extract
from pipeline.stages.train_head import train_head

from ..stages.conftest import FAST, write_images

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with params.yaml, a cache and the runs ``one`` (logistic) and ``two`` (knn)."""
    folder = tmp_path_factory.mktemp("project")
    write_images(folder / "images")
    (folder / "params.yaml").write_text("")
    places = (f"data.root={folder / 'images'}", f"cache.dir={folder / 'cache'}", f"runs.dir={folder / 'runs'}")
    common = (*FAST, *places, "head.folds=2", "head.logistic.strengths=5")
    extract(load_params(folder / "params.yaml", common), lambda _line: None, quiet=True)
    for name, kind in (("one", "logistic"), ("two", "knn")):
        params = load_params(folder / "params.yaml", (*common, f"head.kind={kind}", f"runs.name={name}"))
        train_head(params, lambda _line: None)
    return folder


@pytest.fixture
def run(project: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str, runs: Path = project / "runs") -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(["compare", *arguments, "-p", str(project / "params.yaml"), "-s", f"runs.dir={runs}"])
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


def test_without_arguments_all_runs_are_compared(run: Run) -> None:
    code, out, _ = run("--json")
    assert code == 0 and out.count("\n") == 1
    compared = json.loads(out)
    assert {row["run"]: row["head"] for row in compared["runs"]} == {"one": "logistic", "two": "knn"}
    assert [row["n"] for row in compared["runs"]] == [8, 8]
    assert [pair["same_set"] for pair in compared["pairs"]] == [True]
    accuracies = [row["metrics"]["accuracy"] for row in compared["runs"]]
    assert accuracies == sorted(accuracies, reverse=True)


def test_named_runs_are_sorted_by_the_column_asked_for(run: Run) -> None:
    def order(*arguments: str) -> list[str]:
        return [row["run"] for row in json.loads(run(*arguments, "--json")[1])["runs"]]

    assert order("latest", "one", "--sort", "run") == ["one", "two"]
    assert order("one", "two", "--sort", "-run") == ["two", "one"]
    assert order("two") == ["two"]


def test_text_and_markdown_show_every_run_whole_through_a_pipe(run: Run) -> None:
    text, markdown = run("--sort", "run")[1], run("--sort", "run", "--markdown")[1]
    for shown in (text, markdown):
        assert shown.index("logistic") < shown.index("knn")
        assert "not shown to differ" in shown and "mobilenet_v3_small" in shown
    assert "beats" in text and markdown.startswith("| # |") and "|" not in text.splitlines()[1]


def test_what_cannot_be_compared_is_said_with_a_remedy(run: Run, tmp_path: Path) -> None:
    code, _, err = run("--sort", "colour")
    assert code == 2 and "colour" in err and "accuracy" in err
    code, _, err = run("oen")
    assert code == 1 and "did you mean one" in err
    code, _, err = run(runs=tmp_path / "nothing")
    assert code == 1 and "train-head" in err


def test_ids_name_runs_and_reruns_share_a_line(run: Run, project: Path, tmp_path: Path) -> None:
    rows = {row["run"]: row for row in json.loads(run("--json")[1])["runs"]}
    assert all(len(row["id"]) == 7 for row in rows.values())
    assert json.loads(run(rows["one"]["id"][:5], "--json")[1])["runs"][0]["run"] == "one"
    for name in ("20260101-000000-a", "20260102-000000-b"):
        shutil.copytree(project / "runs" / "two", tmp_path / name)
        model = json.loads((tmp_path / name / "model.json").read_text())
        (tmp_path / name / "model.json").write_text(json.dumps({**model, "seconds": int(name[7])}))
    shutil.copytree(project / "runs" / "one", tmp_path / "one")
    lines = run(runs=tmp_path)[1].splitlines()
    assert lines[0].endswith("(val, n = 8), backbone mobilenet_v3_small")
    assert len([line for line in lines[2:] if line[:1].isdigit()]) == 2
    (joined,) = (line for line in lines if "×2" in line)
    assert "knn" in joined and "logistic" not in joined
    assert any("*" in line for line in lines[2:4])

    other = tmp_path / "20260102-000000-b" / "params.yaml"
    params = yaml.safe_load(other.read_text())
    params["head"]["folds"] = 7
    other.write_text(yaml.safe_dump(params))
    apart = run(runs=tmp_path)[1]
    assert "×2" not in apart and "folds=7" in apart and "settings" in apart.splitlines()[1]
    model = json.loads((other.parent / "model.json").read_text())
    (other.parent / "model.json").write_text(json.dumps({**model, "verb": "finetune"}))
    (tuned,) = (line for line in run(runs=tmp_path)[1].splitlines() if "fine-tuned" in line)
    assert "folds" not in tuned  # of none of its kind does it differ
    assert "macro" not in lines[1].lower() and "macro" in run("--wide", runs=tmp_path)[1].lower()


def test_names_are_cut_to_the_width_and_never_folded() -> None:
    table = Table(*"abc", box=None, padding=(0, 1), pad_edge=False)
    table.add_row("1" * 10, "n" * 40, "m" * 12)
    for column in table.columns:
        column.no_wrap = True
    _cut(table, 40, range(1, 3))
    stream = io.StringIO()
    Console(file=stream, width=40).print(table)
    _, row = stream.getvalue().splitlines()
    assert "1" * 10 in row and "…" in row and len(row) <= 40
