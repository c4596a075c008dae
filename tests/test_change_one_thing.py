"""The README's "Change one thing": each noun gets one more kind from outside the package, and the pipeline runs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import load_run
from pipeline.backbones import ZOOS
from pipeline.data.images import SOURCES
from pipeline.data.source import Samples, Source, Stamp
from pipeline.evaluate import METRICS, Metric, Weighted
from pipeline.heads import KINDS
from pipeline.params import DataParams, Params
from pipeline.report.sections import SECTIONS, Content
from pipeline.stages.extract import extract
from pipeline.stages.train_head import train_head
from tests.backbones.test_zoo import NAME as TOY_BACKBONE
from tests.backbones.test_zoo import ToyZoo
from tests.heads.test_kinds import NearestMean


class Painted:
    """A source whose images lie nowhere: two classes of plain colours, painted when they are read."""

    def __init__(self, data: DataParams) -> None:
        self.name = str(data.root).encode()
        self.colours = {f"red/{n}": (200 + n, 0, 0) for n in range(20)} | {
            f"blue/{n}": (0, 0, 200 + n) for n in range(20)
        }

    @classmethod
    def at(cls, data: DataParams, _cache_dir: Path) -> Source | None:
        return cls(data) if str(data.root) == "paint" else None

    def list_samples(self) -> Samples:
        paths = sorted(self.colours)
        targets = np.array([path.startswith("red") for path in paths], np.int32)
        stamps = np.zeros((len(paths), 4), np.int64)
        return Samples(Path("paint"), ("blue", "red"), paths, targets, None, stamps)

    def read(self, path: str) -> tuple[bytes, Stamp]:
        buffer = io.BytesIO()
        Image.new("RGB", (20, 20), self.colours[path]).save(buffer, "PNG")
        return buffer.getvalue(), np.zeros(4, np.int64)


def gini(images: Weighted) -> Any:
    """The mean squared confidence, whatever the truth."""
    return images.mean((images.images.probabilities**2).sum(axis=1))


def motto(content: Content) -> str:
    return f"<p>{content.name} makes no promises.</p>"


@pytest.fixture
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    """Everything of the toys' own kind."""
    monkeypatch.setitem(ZOOS, "toys", ToyZoo(tmp_path))
    monkeypatch.setitem(KINDS, "nearest_mean", NearestMean)
    monkeypatch.setitem(METRICS, "gini", Metric("Gini", gini, is_share=True, needs_probabilities=True))
    monkeypatch.setitem(SECTIONS, "Motto", motto)
    monkeypatch.setattr("pipeline.data.images.SOURCES", [Painted.at, *SOURCES])
    return Params.model_validate(
        {
            "data": {"root": Path("paint")},
            "backbone": {"name": TOY_BACKBONE, "weights": "random"},
            "cache": {"dir": tmp_path / "cache"},
            "head": {"kind": "nearest_mean"},
            "runs": {"dir": tmp_path / "runs"},
        }
    )


def test_a_source_a_zoo_a_head_a_metric_and_a_section_from_outside_run_together(params: Params) -> None:
    first = extract(params, lambda _line: None, quiet=True)
    assert (first["images"], first["embedded"]) == (40, 40)
    assert extract(params, lambda _line: None, quiet=True)["forwarded"] == 0
    summary = train_head(params, lambda _line: None)
    low, high = summary["metrics"]["gini_ci95"]
    assert low <= summary["metrics"]["gini"] <= high
    run = load_run(summary["run"])
    assert f"{run.folder.name} makes no promises." in (run.folder / "report.html").read_text()
    red = np.full((20, 20, 3), (220, 0, 0), np.uint8)
    (prediction,) = run.predict(red)
    assert prediction.label in ("red", "blue") and prediction.error is None
    assert isinstance(run.head, NearestMean)
