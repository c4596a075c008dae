"""What `make gpu` calls takes the arguments that it is called with, and runs: on a CPU, and tiny."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from . import gpu

SCRIPTS = [(name, command) for name, command in gpu.STEPS if command[0].endswith(".py")]


def load(script: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"benchmark_{Path(script).stem}", gpu.PROJECT / script)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize(("name", "command"), SCRIPTS, ids=[name for name, _ in SCRIPTS])
def test_every_benchmark_takes_its_arguments(
    name: str, command: tuple[str, ...], tiny: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", [*command, *gpu.arguments_of(name, "cuda", tmp_path, tiny=tiny)])
    arguments = load(command[0])._arguments()
    assert arguments.device == "cuda"
    assert name in gpu.WITHOUT_IMAGES or arguments.data == tmp_path


def test_scikit_learn_runs_on_tensors_of_the_device_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    command = dict(SCRIPTS)["heads"]
    for device, tensors, jobs in (("cuda", True, []), ("cpu", False, [1, 2])):
        monkeypatch.setattr(sys, "argv", [*command, "--device", device])
        arguments = load(command[0])._arguments()
        assert (arguments.tensors, arguments.jobs) == (tensors, jobs)


def test_without_a_gpu_it_says_so() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run([sys.executable, gpu.__file__], capture_output=True, text=True)
    assert done.returncode == 1 and "nothing was measured" in done.stderr


@pytest.mark.slow
def test_all_of_it_runs() -> None:
    command = [sys.executable, gpu.__file__, "--device", "cpu", "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    results = [line for line in done.stdout.splitlines() if line.endswith("| done |")]
    assert len(results) == len(gpu.STEPS)
    assert "scikit-learn on tensors, cpu" in done.stdout
