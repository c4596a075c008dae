"""The notebook runs from its first cell to its last, in a folder of its own, and shows the report."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .conftest import PROJECT

NOTEBOOK = PROJECT / "recipes" / "notebook.ipynb"


def test_it_is_kept_without_outputs_and_names_only_what_is_public() -> None:
    import json

    import pipeline

    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") for cell in cells)
    lines = [line for cell in cells for line in "".join(cell["source"]).splitlines()]
    (imported,) = [line for line in lines if line.startswith("from pipeline import ")]
    assert set(imported.removeprefix("from pipeline import ").split(", ")) <= set(pipeline.__all__)


def test_it_runs_from_a_folder_to_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    shown = "".join(str(cell.get("outputs")) for cell in notebook.cells)
    assert "1797 embedded, 0 reused" in shown and "<iframe srcdoc=" in shown and "better than" in shown
    assert (tmp_path / "cache").is_dir() and len(list((tmp_path / "runs").glob("*/report.html"))) == 2
