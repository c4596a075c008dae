"""`pipeline advise` as typed: before anything was extracted, after a probe, and without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import main
from pipeline.params import Params
from pipeline.stages.train_head import train_head

from ..stages.conftest import make_params, root, run_extract, write_image

__all__ = ["make_params", "root", "run_extract"]
Advise = Callable[..., tuple[int, str, str]]


@pytest.fixture
def advise(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Advise:
    file = tmp_path / "params.yaml"
    file.write_text("")
    places = (f"data.root={root}", f"cache.dir={tmp_path / 'cache'}", f"runs.dir={tmp_path / 'runs'}")
    options = ["-p", str(file), *(word for place in places for word in ("-s", place))]

    def advise(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(["advise", *options, *arguments])
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return advise


def read(advise: Advise, *arguments: str) -> dict[str, Any]:
    code, out, _ = advise("--json", *arguments)
    assert code == 0 and out.count("\n") == 1
    values: dict[str, Any] = json.loads(out)
    return values


def test_a_newcomer_reads_facts_both_answers_and_commands(advise: Advise, root: Path) -> None:
    code, out, _ = advise()
    assert code == 0
    assert "16 training images, 8 val, in 2 classes" in out
    assert "Say which with --domain similar or --domain different" in out.replace("\n", " ")
    assert f"-s data.root={root}" in out and "make train-head" in out
    _, one, _ = advise("--domain", "similar")
    assert "Domain similar, as you say. Probe only" in one and "If your images" not in one


def test_json_is_one_object(advise: Advise) -> None:
    values = read(advise, "--domain", "different")
    assert (values["train"], values["val"], values["classes"], values["domain"]) == (16, 8, 2, "different")
    assert values["smallest"]["n"] == values["largest"]["n"] == 8
    assert [each["strategy"] for each in values["recommendations"]] == ["probe"]
    assert values["duplicates"] is None


def test_an_imbalanced_flat_folder_is_estimated_and_warned_of(advise: Advise, tmp_path: Path) -> None:
    for number in range(60):
        write_image(tmp_path / "flat" / ("few" if number < 4 else "many") / f"{number}.png", number, (8, 8))
    values = read(advise, "-s", f"data.root={tmp_path / 'flat'}")
    assert values["train_is_estimated"] and values["train"] == 48
    assert any("'few' 3" in warning for warning in values["warnings"])
    assert any("balanced accuracy" in warning for warning in values["warnings"])


def test_after_extract_and_a_curve_it_knows_more(
    advise: Advise,
    root: Path,
    make_params: Callable[..., Params],
    run_extract: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.data.index.SAFE_NS", 0)  # the index trusts files this young
    shutil.copy(root / "train" / "cat" / "02.jpg", root / "val" / "cat" / "again.jpg")
    run_extract("backbone.name=starter", "backbone.weights=DEFAULT")
    starter = ("backbone.name=starter", "backbone.weights=DEFAULT", "head.folds=2", "head.logistic.strengths=3")
    run = Path(train_head(make_params(*starter), lambda _line: None, curve=True)["run"])
    values = read(advise)
    assert values["probe"]["run"] == run.name and values["probe"]["n"] == 9
    assert values["curve"][-1]["images"] == 16
    assert any("learning curve" in text for text in values["evidence"])
    assert (values["duplicates"], values["leaked"]) == (1, 1)


def test_one_class_is_nothing_to_advise_on(advise: Advise, tmp_path: Path) -> None:
    write_image(tmp_path / "one" / "cat" / "1.png", 1)
    code, out, _ = advise("--json", "-s", f"data.root={tmp_path / 'one'}")
    assert code == 1 and json.loads(out)["error"]["type"] == "DataError"


def test_torch_is_not_imported(root: Path, tmp_path: Path) -> None:
    script = (
        "import runpy, sys, contextlib\n"
        f"sys.argv = ['pipeline', 'advise', '-s', 'data.root={root}', '-p', '{tmp_path}/p']\n"
        "with contextlib.suppress(SystemExit): runpy.run_module('pipeline', run_name='__main__')\n"
        "print({m.partition('.')[0] for m in sys.modules} & {'torch', 'sklearn', 'h5py', 'matplotlib'})"
    )
    (tmp_path / "p").write_text("")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "training images" in done.stdout and done.stdout.endswith("set()\n"), done.stderr


def test_groups_that_cross_the_users_splits_count_as_leaks(
    advise: Advise, root: Path, run_extract: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.data.index.SAFE_NS", 0)  # the index trusts files this young
    run_extract("backbone.name=starter", "backbone.weights=DEFAULT")
    assert read(advise)["leaked"] == 0
    values = read(advise, "-s", r"data.group_pattern=cat/0?(\d)")
    assert values["leaked"] > 0 and any("by their group" in warning for warning in values["warnings"])
