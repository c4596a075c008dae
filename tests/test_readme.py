"""The README says what is true: its Python block runs, and the verbs and targets it names are there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from pipeline.cli.verbs import VERBS
from pipeline.data.demo import write_demo_data

PROJECT = Path(__file__).resolve().parent.parent
README = (PROJECT / "README.md").read_text(encoding="utf-8")


def test_the_python_block_runs(tmp_path: Path) -> None:
    write_demo_data(tmp_path / "data" / "demo")
    (tmp_path / "params.yaml").write_text("transform: {resize: 36, crop: 32}\nhead: {kind: nearest_centroid}\n")
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
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
