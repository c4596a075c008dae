"""The README says what is true: its blocks and commands run, and the verbs and targets it names are there."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.cli.verbs import VERBS
from pipeline.data.demo import write_demo_data

from .conftest import PROJECT
from .stages.conftest import write_image, write_images

README = (PROJECT / "README.md").read_text(encoding="utf-8")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELLS = ("sh", "bash", "console")
# What begins with one of these words is a command, in a block of the shell, an indented line or between backticks.
COMMAND = re.compile(r"(pipeline|make|pip|git|python|torchrun|srun|sbatch) ")

# Commands that no test can run as they stand, and why.
NOT_RUN = {
    "make demo": "every stage at full size, a minute; tests/stages run the stages",
    "make test": "would run itself",
    "make lint": "needs the tools, not the pipeline; run beside the tests",
    "make bench": "takes minutes",
    "make gpu": "needs a GPU, and the tests",
    "make torture": "takes ten minutes",
    "make test-lowest": "needs a package index",
    "pip install .": "needs a package index",
    "pip install '.[timm]'": "needs a package index",
    "pip install 'image-transfer-pipeline[export]'": "needs a package index",
    "pipeline export latest model.onnx": "needs the extra; tests/export runs it",
    "make export": "needs the extra; tests/export runs the verb",
    "pipeline predict model.onnx PATH...": "needs the extra; tests/export runs it",
    "pipeline cache import ROWS": "needs the extra; tests/stages run it",
    "make test-extras": "needs a package index",
    "git lfs pull": "needs a remote repository",
    'make train-head SET="data.root=... backbone.name=..."': "a form to fill in; under `Your own images` it is run",
    "torchrun --nproc-per-node 4 -m pipeline extract -s data.root=/data/photos": "needs four GPUs",
    "torchrun --nproc-per-node 4 -m pipeline finetune -s data.root=/data/photos": "needs four GPUs",
    "srun --array=0-7 sh -c 'pipeline extract -s extract.shard=$SLURM_ARRAY_TASK_ID/8'": "needs a cluster",
}
# Commands with places to fill in, as somebody might fill them.
FILLED_IN = {
    "pipeline evaluate RUN --data FOLDER": ["pipeline evaluate latest --data photos"],
    "pipeline classify -s backbone.name=resnet50 PATH...": [
        "pipeline classify -s backbone.name=squeezenet1_1 -s backbone.weights=squeezenet.pth new_photos/a.jpg"
    ],
    "pipeline predict RUN --backbone module:function PATH...": [
        "pipeline predict latest --backbone starter new_photos/a.jpg"
    ],
    "pipeline backbones NAME": ["pipeline backbones starter"],
    "pipeline cache ls | verify | why | gc | export FILE | import FILE": [
        *("pipeline cache ls", "pipeline cache verify", "pipeline cache gc"),
        "pipeline cache export features.h5",
    ],
}
# Without a network there are no weights to download: random ones take the same way. One epoch shows what five would.
CHEAPER = {
    "backbone.weights=DEFAULT": "backbone.weights=random",
    "finetune.epochs=5": "finetune.epochs=1",
    "[160, 224]": "[24, 32]",
}
CHEAP = """
data: {root: photos}
transform: {resize: 32, crop: 32}
extract: {device: cpu, workers: 1}
head: {folds: 2, logistic: {strengths: 3}}
finetune: {device: cpu, workers: 1, batch_size: 8}
"""
# Stands for the environment that make sets up: there, and with everything installed.
PYTHON = """#!/bin/sh
[ "$1 $2" = "-m pip" ] || exec "$REAL" "$@"
"""


def commands() -> list[str]:
    """Every command that the README shows, once, in its order."""
    found = []
    for part in re.split(r"(^```.*?^```$)", README, flags=re.MULTILINE | re.DOTALL):
        if block := FENCED.fullmatch(part):
            lines = block[2].splitlines() if block[1] in SHELLS else []
            found += [line.removeprefix("$ ").strip() for line in lines]
        else:
            spans = re.findall(r"`([^`]+)`|^ {4}(\S.*)$", part, re.MULTILINE)
            found += [" ".join((inline or indented).split()) for inline, indented in spans]
    return [line for line in dict.fromkeys(found) if COMMAND.match(line)]


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a user has: the project's files, images of their own, an environment; with params that cost little."""
    import torch
    import torchvision

    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(PROJECT / name, tmp_path)
    (tmp_path / "params.yaml").write_text(CHEAP)
    write_images(tmp_path / "photos")
    write_image(tmp_path / "new_photos" / "a.jpg", 99)
    write_image(tmp_path / "unlabelled_photos" / "a.jpg", 98)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "squeezenet.pth")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    monkeypatch.setenv("REAL", sys.executable)
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    # What the make that runs these tests was told is not meant for those of the README.
    for name in ("MAKEFLAGS", "ARGS", "SET", "OVER", "RUN", "DATA", "IMAGES", "PARAMS", "DEMO_DATA", "VENV"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def failure(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command in the working directory; how it failed, or nothing."""
    words = shlex.split(command)
    if words[0] == "pipeline":  # in this process, which has imported what takes longest
        with pytest.raises(SystemExit) as stop:
            main(words[1:])
        code, said = stop.value.code, capsys.readouterr().err
    else:
        done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=300)
        code, said = done.returncode, done.stderr
    return f"{command}\n  exit code {code}\n{said[-2000:]}" if code else ""


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_every_command_runs(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = []
    for shown in commands():
        for command in [] if shown in NOT_RUN else FILLED_IN.get(shown, [shown]):
            for dear, cheap in CHEAPER.items():
                command = command.replace(dear, cheap)
            assert not failure(command, capsys)
            ran.append(command.split()[:2])
    assert ["make", "train-head"] in ran and ["pipeline", "compare"] in ran
    assert len(list((working_folder / "runs").glob("*/model.json"))) >= 3


def test_what_is_not_run_or_filled_in_is_in_the_readme() -> None:
    assert {*NOT_RUN, *FILLED_IN} <= set(commands())


def test_blocks_of_the_shell_are_marked_as_such() -> None:
    for language, text in FENCED.findall(README):
        assert language in (*SHELLS, "python")
        assert language not in SHELLS or all(COMMAND.match(line) for line in text.splitlines())


def test_the_command_is_installed() -> None:
    (entry,) = entry_points(group="console_scripts", name="pipeline")
    assert entry.value == "pipeline.cli:main"


def python_blocks(word: str) -> list[str]:
    """The Python of the README that has the word in it."""
    return [text for language, text in FENCED.findall(README) if language == "python" and word in text]


def test_the_block_of_estimators_runs(tmp_path: Path) -> None:
    write_demo_data(tmp_path / "data" / "demo")
    (block,) = python_blocks("pipeline.sklearn")
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert min(map(float, done.stdout.strip("[]\n").split())) > 0.8


def test_the_block_of_batches_runs(tmp_path: Path) -> None:
    write_demo_data(tmp_path / "data" / "demo")
    (tmp_path / "params.yaml").write_text("transform: {resize: 36, crop: 32}")
    (block,) = python_blocks("Embedder")
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "(64, 1024)" in done.stdout, done.stderr


def test_the_python_block_runs(tmp_path: Path) -> None:
    write_demo_data(tmp_path / "data" / "demo")
    (tmp_path / "params.yaml").write_text("transform: {resize: 36, crop: 32}\nhead: {kind: nearest_centroid}\n")
    (block,) = python_blocks("load_run")
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "(1797, 1024)" in done.stdout
    assert "test/zero" in done.stdout


def test_the_verbs_and_targets_it_names_exist() -> None:
    verbs = set(re.findall(r"`?pipeline ([a-z][a-z-]+)", README)) - {"import"}
    assert {"extract", "train-head", "compare", "cache", "backbones"} <= verbs
    assert verbs <= set(VERBS)
    makefile = (PROJECT / "Makefile").read_text()
    targets = set(re.findall(r"(?:^|`)make ([a-z][a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test", "train-head"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
