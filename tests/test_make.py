"""The Makefile: what reaches the verbs, and an environment that is set up once and never half."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from .conftest import PROJECT
from .lowest import lowest_versions

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
PARALLEL = ["-n", "auto", "--maxprocesses=4", "--dist=loadfile"]

# Stands for the interpreter: notes what it is asked, makes environments of itself, fails where FAIL says so.
FAKE = """#!/bin/sh
if [ "$1" = -V ]; then echo Python 3.11.7; exit; fi
for word; do printf '%s\\037' "$word"; done >> "$LOG"
echo >> "$LOG"
for word; do
    last=$word
    if [ "$word" = "$FAIL" ]; then echo 'ERROR: no route to the package index' >&2; exit 1; fi
done
case "$1 $2 $3" in
    "-m venv"*) mkdir -p "$last/bin" && touch "$last/pyvenv.cfg" && cp "$0" "$last/bin/python";;
    "-m pipeline demo-data") mkdir -p "$4";;
    -c*) PYTHONPATH="$PROJECT" exec "$REAL" "$@";;
esac
"""


class Clone:
    """A copy of what make reads, at a path with spaces, with the fake interpreter."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder / "my clone", folder / "log"
        self.folder.mkdir()
        for name in ("Makefile", "pyproject.toml", "params.yaml"):
            shutil.copy(PROJECT / name, self.folder)
        self.python = folder / "python"
        self.python.write_text(FAKE)
        self.python.chmod(0o755)

    def make(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run make with nothing of an outer make in the environment."""
        self.log.write_text("")
        own = {"LOG": str(self.log), "PROJECT": str(PROJECT), "PYTHON": str(self.python), "REAL": sys.executable}
        kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        command = ["make", *arguments]
        environment = {**kept, **own, **environment}
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)

    def asked(self, *start: str) -> list[list[str]]:
        """What the interpreter was asked in the last make, of what begins with ``start``."""
        calls = [line.split("\037") for line in self.log.read_text().split("\037\n")[:-1]]
        return [call[len(start) :] for call in calls if call[: len(start)] == list(start)]

    def verbs(self, *arguments: str) -> list[list[str]]:
        done = self.make(*arguments)
        assert done.returncode == 0, done.stderr
        return self.asked("-m", "pipeline")


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


@pytest.fixture
def ready(clone: Clone) -> Clone:
    """A clone that is set up, with its demo images."""
    (clone.folder / "data" / "demo").mkdir(parents=True)
    assert clone.make("setup").returncode == 0
    return clone


class TestSetup:
    def test_happens_once(self, clone: Clone) -> None:
        assert clone.make("test").returncode == 0
        assert len(clone.asked("-m", "pip", "install")) == 1
        assert clone.make("test").returncode == 0
        assert clone.asked("-m", "pip") == clone.asked("-m", "venv") == []
        assert clone.asked("-m", "pytest") == [PARALLEL]

    def test_happens_again_when_dependencies_change_and_only_then(self, ready: Clone) -> None:
        pyproject = ready.folder / "pyproject.toml"
        text = pyproject.read_text()
        pyproject.write_text(text.replace("line-length = 120", "line-length = 100"))
        ready.make("setup")
        assert ready.asked("-m", "pip", "install") == []
        pyproject.write_text(text.replace('"joblib>=', '"joblib>=1.'))
        ready.make("setup")
        assert len(ready.asked("-m", "pip", "install")) == 1
        assert ready.asked("-m", "venv") == []

    def test_happens_again_where_the_project_was_moved(self, ready: Clone) -> None:
        ready.folder = ready.folder.rename(ready.folder.parent / "moved")
        ready.make("setup")
        assert len(ready.asked("-m", "pip", "install")) == 1

    @pytest.mark.parametrize("step", ["venv", "install"])
    def test_that_fails_shows_why_and_is_tried_again(self, clone: Clone, step: str) -> None:
        done = clone.make("test", FAIL=step)
        assert done.returncode != 0
        assert "ERROR: no route to the package index" in done.stderr
        assert clone.asked("-m", "pytest") == []
        assert clone.make("test").returncode == 0
        assert len(clone.asked("-m", "pip", "install")) == 1

    def test_that_fails_after_a_change_is_tried_again_even_if_the_change_is_undone(self, ready: Clone) -> None:
        pyproject = ready.folder / "pyproject.toml"
        text = pyproject.read_text()
        pyproject.write_text(text.replace('"joblib>=', '"joblib>=1.'))
        assert ready.make("setup", FAIL="install").returncode != 0
        pyproject.write_text(text)
        ready.make("setup")
        assert len(ready.asked("-m", "pip", "install")) == 1

    def test_makes_a_broken_environment_anew_and_keeps_a_working_one(self, ready: Clone) -> None:
        (ready.folder / ".venv" / "bin" / "python").unlink()
        ready.make("setup")
        assert ready.asked("-m", "venv") == [["--clear", ".venv"]]

    def test_goes_where_venv_says(self, clone: Clone) -> None:
        assert clone.make("test", "VENV=../an environment").returncode == 0
        assert clone.asked("-m", "venv") == [["../an environment"]]
        assert not (clone.folder / ".venv").exists()

    def test_of_the_extras_installs_them_all(self, ready: Clone) -> None:
        assert ready.make("test-extras", "TESTS=tests/export").returncode == 0
        (install,) = ready.asked("-m", "pip", "install")
        extras = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        wanted = install[-1].removeprefix(".[").removesuffix("]").split(",")
        assert install[-2] == "-e" and set(wanted) == set(extras)
        assert ready.asked("-m", "pytest") == [[*PARALLEL, "tests/export"]]

    def test_of_the_lowest_versions_is_apart(self, ready: Clone) -> None:
        assert ready.make("test-lowest", "TESTS=tests/params").returncode == 0
        (install,) = ready.asked("-m", "pip", "install")
        assert install[-4:] == ["-c", ".venv-lowest/lowest.txt", "-e", ".[dev]"]
        assert ready.asked("-m", "venv") == [[".venv-lowest"]]
        assert ready.asked("tests/lowest.py") == [[]]
        assert ready.asked("-m", "pytest") == [[*PARALLEL, "tests/params"]]

    def test_help_needs_none(self, clone: Clone) -> None:
        done = clone.make()
        assert done.returncode == 0
        assert clone.asked() == []
        for target in ("setup", "extract", "train-head", "finetune", "predict", "demo", "test", "test-lowest", "lint"):
            assert f"  make {target} " in done.stdout
        assert max(map(len, done.stdout.split("\n"))) <= 100


def test_the_lowest_versions_are_those_of_pyproject() -> None:
    versions = lowest_versions()
    assert (versions["torch"], versions["torchvision"]) == ("2.11", "0.26")
    text = (PROJECT / "pyproject.toml").read_text()
    assert all(f'"{name}>={version}"' in text for name, version in versions.items())


class TestVerbs:
    def test_train_head_extracts_first_in_the_same_process(self, ready: Clone) -> None:
        assert ready.verbs("train-head") == [["train-head", "-p", "params.yaml", "--extract"]]

    def test_each_list_of_values_is_swept_over(self, ready: Clone) -> None:
        over = "OVER=head.kind=[logistic, svm] transform.crop=[160, 224]"
        values = ["--over", "head.kind=[logistic, svm]", "--over", "transform.crop=[160, 224]"]
        assert ready.verbs("sweep", over, "SET=head.folds=3") == [
            ["sweep", "-p", "params.yaml", "-s", "head.folds=3", *values]
        ]

    def test_advise_needs_no_features(self, ready: Clone) -> None:
        assert ready.verbs("advise", "ARGS=--domain similar") == [
            ["advise", "-p", "params.yaml", "--domain", "similar"]
        ]

    def test_further_options_are_for_the_verb_that_was_asked_for(self, ready: Clone) -> None:
        assert ready.verbs("finetune", "ARGS=--find-lr --json") == [
            ["train-head", "-p", "params.yaml", "--extract", "--json"],
            ["finetune", "-p", "params.yaml", "--find-lr", "--json"],
        ]

    def test_extract_is_not_repeated(self, ready: Clone) -> None:
        verbs = [call[0] for call in ready.verbs("extract", "train-head", "finetune")]
        assert verbs == ["extract", "train-head", "finetune"]

    def test_finetune_from_a_run_needs_no_new_head(self, ready: Clone) -> None:
        assert ready.verbs("finetune", "RUN=my run")[-1] == ["finetune", "-p", "params.yaml", "--from", "my run"]
        assert [call[0] for call in ready.verbs("finetune", "RUN=one")] == ["extract", "finetune"]

    @pytest.mark.parametrize(
        ("text", "settings"),
        [
            ("head.kind=svm", ["head.kind=svm"]),
            ("a.b=c  d.e=f ", ["a.b=c", "d.e=f"]),
            ("head.kind=[svm, knn] head.folds=3", ["head.kind=[svm, knn]", "head.folds=3"]),
            ("data.root=my photos/of 2024", ["data.root=my photos/of 2024"]),
            (r"data.group_pattern=^(\d+)_.*$ data.seed=1", [r"data.group_pattern=^(\d+)_.*$", "data.seed=1"]),
            ("head.search={C: [0.1, 1]}", ["head.search={C: [0.1, 1]}"]),
            ("data.root=a;b&c|d`e'f*", ["data.root=a;b&c|d`e'f*"]),
            ("data.root=$HOME", ["data.root=$HOME"]),
            ("nonsense", ["nonsense"]),
        ],
    )
    def test_each_setting_becomes_an_s(self, ready: Clone, text: str, settings: list[str]) -> None:
        wanted = [word for setting in settings for word in ("-s", setting)]
        assert ready.verbs("extract", f"SET={text}") == [["extract", "-p", "params.yaml", *wanted]]

    def test_params_may_have_spaces(self, ready: Clone) -> None:
        assert ready.verbs("evaluate", "PARAMS=my params.yaml", "RUN=runs/a b", "DATA=more images") == [
            ["evaluate", "-p", "my params.yaml", "runs/a b", "--data", "more images"]
        ]

    def test_predict_takes_a_path_with_spaces_or_several(self, ready: Clone) -> None:
        for name in ("a b", "one.png", "two.png"):
            (ready.folder / name).touch()
        assert ready.verbs("predict", "IMAGES=a b") == [["predict", "-p", "params.yaml", "latest", "a b"]]
        assert ready.verbs("predict", "IMAGES=*.png", "RUN=mine", "ARGS=--json -q") == [
            ["predict", "-p", "params.yaml", "mine", "one.png", "two.png", "--json", "-q"]
        ]

    def test_predict_without_images_says_how(self, ready: Clone) -> None:
        done = ready.make("predict")
        assert done.returncode != 0
        assert 'make predict IMAGES="PATH..."' in done.stderr

    def test_export_writes_the_latest_run_to_a_file(self, ready: Clone) -> None:
        assert ready.verbs("export") == [["export", "-p", "params.yaml", "latest", "model.onnx"]]
        assert ready.verbs("export", "RUN=a b", "FILE=my model.pt2", "DATA=more images", "ARGS=--batch") == [
            ["export", "-p", "params.yaml", "a b", "my model.pt2", "--data", "more images", "--batch"]
        ]

    def test_compare_takes_runs(self, ready: Clone) -> None:
        assert ready.verbs("compare") == [["compare", "-p", "params.yaml"]]
        assert ready.verbs("compare", "RUN=one two") == [["compare", "-p", "params.yaml", "one", "two"]]

    def test_a_failing_verb_stops_make(self, ready: Clone) -> None:
        assert ready.make("finetune", FAIL="train-head").returncode != 0
        assert [call[0] for call in ready.asked("-m", "pipeline")] == ["train-head"]

    def test_the_demo_is_one_verb_on_the_demo_images(self, clone: Clone) -> None:
        assert clone.verbs("demo") == [["demo", "-p", "params.yaml", "-s", "data.root=data/demo"]]


class TestDemoImages:
    def test_are_written_where_the_params_name_them(self, clone: Clone) -> None:
        assert [call[0] for call in clone.verbs("extract")] == ["demo-data", "extract"]
        assert [call[0] for call in clone.verbs("extract")] == ["extract"]

    def test_are_not_where_they_do_not(self, clone: Clone) -> None:
        assert [call[0] for call in clone.verbs("extract", "SET=data.root=photos")] == ["extract"]

    def test_wrong_params_are_left_to_the_verb(self, clone: Clone) -> None:
        assert [call[0] for call in clone.verbs("extract", "SET=data.rot=photos")] == ["extract"]
