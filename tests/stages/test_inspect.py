"""What `inspect` publishes, what it keeps, and what it leaves alone."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.artifacts import list_runs
from pipeline.backbones.backbone import Forward
from pipeline.cli import main
from pipeline.errors import MissingFeaturesError
from pipeline.params import Params
from pipeline.stages.extract import extract
from pipeline.stages.inspect import inspect
from pipeline.stages.run import load_run
from pipeline.stages.train_head import train_head

Make = Callable[..., Params]
QUICK = (
    "head.logistic.strengths=3",
    "head.logistic.c_min=0.01",
    "head.folds=3",
    "backbone.name=starter",
    "backbone.weights=DEFAULT",
)


def write_picture(path: Path, seed: int, tint: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 156, (5, 6, 3), np.uint8)
    noise[..., tint] += 100
    Image.fromarray(noise).resize((64, 48), Image.Resampling.BICUBIC).save(path, quality=95)


@pytest.fixture
def params(make_params: Make, tmp_path: Path) -> Params:
    """Reddish and bluish pictures: one leaks from train, resized; one has a wrong label."""
    root = tmp_path / "photos"
    for number in range(48):
        split, label = "val" if number % 3 == 0 else "train", ("red", "blue")[number % 2]
        write_picture(root / split / label / f"{number:02}.jpg", number, 2 * (number % 2))
    with Image.open(root / "train" / "red" / "02.jpg") as image:
        image.resize((32, 24)).save(root / "val" / "red" / "copy.png")
    shutil.move(root / "train" / "red" / "04.jpg", root / "train" / "blue" / "wrong.jpg")
    made = make_params(*QUICK, f"data.root={root}")
    extract(made, lambda _line: None, quiet=True)
    return made


def look(params: Params, **options: Any) -> dict[str, Any]:
    return inspect(params, lambda _line: None, quiet=True, **options)


def rows_of(summary: dict[str, Any]) -> list[dict[str, str]]:
    with open(summary["insights"], newline="") as file:
        return list(csv.DictReader(file))


def test_it_finds_what_was_planted_and_says_so(params: Params) -> None:
    summary = look(params)
    assert {"images", "near_duplicate_groups", "leaks", "doubted", "outliers", "insights", "report"} <= set(summary)
    assert (summary["images"], summary["leaks"]) == (49, 1)
    rows = rows_of(summary)
    assert list(rows[0]) == ["path", "digest", "split", "label", "finding", "score", "suggestion", "correction"]
    leaked = {row["path"]: row["suggestion"] for row in rows if row["finding"] == "leak"}
    assert leaked == {"train/red/02.jpg": "val/red/copy.png", "val/red/copy.png": "train/red/02.jpg"}
    doubted = {row["path"]: row["suggestion"] for row in rows if row["finding"] == "label"}
    assert doubted["train/blue/wrong.jpg"] == "red"
    assert {row["correction"] for row in rows} == {""}
    kinds = [row["finding"] for row in rows]
    order = ("near-duplicate", "leak", "label", "outlier", "quality")
    assert kinds == sorted(kinds, key=order.index)
    names = [share["name"] for share in summary["accuracy"]]
    assert names == ["all images", "without near-identical leaks"]
    assert [share["n"] for share in summary["accuracy"]] == [17, 16]


def test_features_in_a_file_show_the_same(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = rows_of(look(params))
    for file in params.cache.dir.glob("*/neighbours-*"):
        file.unlink()
    monkeypatch.setattr("pipeline.stages.open.COPIES", 10**12)
    monkeypatch.setattr("pipeline.features.rows.BLOCK_BYTES", 1 << 14)
    blocks = rows_of(look(params))
    assert list(params.cache.dir.glob("*/rows-*.npy"))
    assert [(row["path"], row["finding"]) for row in blocks] == [(row["path"], row["finding"]) for row in memory]


def test_it_stands_beside_the_runs_and_is_none(params: Params) -> None:
    summary = look(params)
    folder = Path(summary["report"]).parent
    assert folder.parent == params.runs.dir.resolve() and folder.name.endswith("starter-inspect")
    assert {file.name for file in folder.iterdir()} == {"insights.csv", "inspect.json", "report.html"}
    assert json.loads((folder / "inspect.json").read_text())["images"] == 49
    assert list_runs(params.runs.dir) == []


def test_the_backbone_runs_once_for_the_copies_and_not_again(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    forwarded: list[int] = []
    call = Forward.__call__
    monkeypatch.setattr(Forward, "__call__", lambda self, pixels: forwarded.append(len(pixels)) or call(self, pixels))
    first = look(params)
    assert 0 < sum(forwarded) <= 200
    again = look(params)
    assert len(forwarded) == 1
    assert rows_of(first) == rows_of(again)


def test_a_run_is_judged_by_its_own_head_and_does_not_change(params: Params) -> None:
    folder = Path(train_head(params, lambda _line: None)["run"])
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    summary = look(params, run=load_run(folder))
    metrics = json.loads(before["metrics.json"])
    assert summary["accuracy"][0]["accuracy"] == metrics["metrics"]["accuracy"]
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_without_labels_or_with_one_class_it_still_looks(make_params: Make, tmp_path: Path) -> None:
    for number in range(6):
        write_picture(tmp_path / "plain" / f"{number}.jpg", number)
        write_picture(tmp_path / "one" / "red" / f"{number}.jpg", number)
    for name in ("plain", "one"):
        params = make_params(*QUICK, f"data.root={tmp_path / name}")
        extract(params, lambda _line: None, quiet=True)
        summary = look(params)
        assert (summary["images"], summary["doubted"]) == (6, 0)
        assert "No label was judged" in Path(summary["report"]).read_text()


def test_missing_features_are_said(make_params: Make) -> None:
    with pytest.raises(MissingFeaturesError, match="no feature yet"):
        look(make_params(*QUICK))


def test_an_image_that_has_gone_shows_its_path(params: Params) -> None:
    look(params)
    shutil.rmtree(params.cache.dir / "thumbnails")
    (params.data.root / "train" / "blue" / "wrong.jpg").write_bytes(b"gone")
    with pytest.raises(MissingFeaturesError):
        look(params)


def test_hostile_names_stay_text(make_params: Make, tmp_path: Path) -> None:
    root = tmp_path / "hostile"
    for number in range(24):
        label = ("<script>alert(1)<", "\"><img onerror='x'>")[number % 2].replace("/", "")
        write_picture(root / label / f"'\"><b>{number}\udce9.jpg", number, 2 * (number % 2))
    params = make_params(*QUICK, f"data.root={root}")
    extract(params, lambda _line: None, quiet=True)
    summary = look(params)
    text = Path(summary["report"]).read_text(encoding="utf-8")
    assert "<script" not in text and "<img onerror" not in text and "url(http" not in text
    assert all(address.startswith(("data:image/", "#")) for address in _addresses(text))


def _addresses(text: str) -> list[str]:
    import re

    return re.findall(r"""(?:src|href)=["']([^"']*)""", text)


def next_rows(summary: dict[str, Any]) -> list[dict[str, str]]:
    with open(summary["next"], newline="") as file:
        return list(csv.DictReader(file))


def test_what_to_label_next_leaves_out_what_has_a_label(params: Params, tmp_path: Path) -> None:
    pool = tmp_path / "pool"
    for number in range(100, 130):
        write_picture(pool / f"{number}.jpg", number, number % 3)
    shutil.copy(params.data.root / "train" / "red" / "02.jpg", pool / "labelled.jpg")
    shutil.copy(pool / "100.jpg", pool / "twice.jpg")
    summary = look(params, unlabelled=str(pool), count=6)
    rows = next_rows(summary)
    assert list(rows[0]) == ["rank", "path", "reason"]
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert all(Path(row["path"]).parent == pool and row["reason"].startswith("unsure: ") for row in rows)
    assert str(pool / "labelled.jpg") not in {row["path"] for row in rows}
    everything = next_rows(look(params, unlabelled=str(pool), count=100))
    assert len(everything) == 30
    assert "Label these next" in Path(summary["report"]).read_text()


def test_what_to_label_first_without_any_label(make_params: Make, tmp_path: Path) -> None:
    for number in range(12):
        write_picture(tmp_path / "pool" / f"{number}.jpg", number, number % 3)
    params = make_params(*QUICK, f"data.root={tmp_path / 'pool'}")
    extract(params, lambda _line: None, quiet=True)
    rows = next_rows(look(params, unlabelled=str(tmp_path / "pool"), count=4))
    assert len(rows) == 4 and all(row["reason"].startswith("typical of ") for row in rows)


def test_the_verb_gives_one_json_object(params: Params, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(train_head(params, lambda _line: None)["run"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(folder), "--label-next", str(params.data.root / "val"), "--count", "3", "--json", "-q"])
    summary = json.loads(capsys.readouterr().out)
    assert not stop.value.code and summary["images"] == 49
    assert Path(summary["report"]).parent.parent == folder.parent and Path(summary["next"]).exists()
