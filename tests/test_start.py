"""What a command imports before it begins: nothing that its work does not need, whatever the time that takes."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import extract, load_params, train_head

HEAVY = {"torch", "torchvision", "sklearn", "scipy", "joblib", "matplotlib", "pandas", "timm", "open_clip"}
COMPILERS = {"torch._dynamo", "torch._inductor", "sympy"}
PACKAGE = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where everything is extracted and a run is made."""
    folder = tmp_path_factory.mktemp("project")
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for number in range(2 * count):
            file = folder / "images" / split / ("dark", "light")[number % 2] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 100 + 155 * (number % 2), (40, 40, 3), np.uint8)).save(file)
    time.sleep(2.1)  # what was written a moment before it is read is read again
    (folder / "params.yaml").write_text("data: {root: images}\nextract: {device: cpu}\nhead: {folds: 2}\n")
    params = load_params(folder / "params.yaml")
    extract(params, lambda _line: None, quiet=True)
    train_head(params, lambda _line: None)
    return folder


def imported_by(folder: Path, *arguments: str) -> set[str]:
    """The modules that are loaded when ``pipeline ARGUMENTS`` has ended well in ``folder``."""
    script = f"""
import sys
sys.path.insert(0, {str(PACKAGE)!r})
from pipeline.cli import main
try:
    main({list(arguments)!r})
except SystemExit as end:
    assert not end.code, end.code
print("LOADED", *sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("LOADED")[2].split())


@pytest.mark.parametrize(
    "arguments",
    [
        ("extract",),
        ("predict", "latest", "images/val/dark/0.png"),
        ("compare",),
        ("cache", "ls"),
        ("extract", "-s", "extract.workers=1"),
    ],
)
def test_where_every_feature_is_there_nothing_that_computes_one_is_imported(
    project: Path, arguments: tuple[str, ...]
) -> None:
    loaded = imported_by(project, *arguments)
    assert "pipeline" in loaded
    assert sorted({name.partition(".")[0] for name in loaded} & HEAVY) == []


def test_a_head_is_trained_without_what_knows_networks_and_what_compiles_them(project: Path) -> None:
    loaded = imported_by(project, "train-head")
    assert "torch" in loaded
    assert sorted(loaded & {"torchvision", "sklearn", "scipy.stats", *COMPILERS}) == []


def test_other_weights_are_noticed(project: Path, tmp_path: Path) -> None:
    starter = PACKAGE / "pipeline" / "backbones" / "starter" / "weights.safetensors"
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(starter.read_bytes())
    setting = ("-s", "backbone.name=shufflenet_v2_x1_0", "-s", f"backbone.weights={weights}", "-q")
    assert "torch" in imported_by(project, "extract", *setting)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "torch" in imported_by(project, "extract", *setting)
    assert len(list((project / "cache").glob("shufflenet_v2_x1_0-*"))) == 2


def test_nothing_is_searched_for_garbage_at_the_exit() -> None:
    script = f"""
import atexit, gc, sys
sys.path.insert(0, {str(PACKAGE)!r})
atexit.register(lambda: print("FROZEN", gc.get_freeze_count(), gc.get_threshold()[0]))
from pipeline.cli import main
main(["--version"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    frozen, threshold = map(int, done.stdout.rpartition("FROZEN")[2].split())
    assert frozen > 10_000 and threshold > 10_000
