"""Zero-shot prompts from the command line's stages: a text tower once, then as cheap as any head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline import extract, load_params, load_run, train_head
from pipeline.backbones import openclip
from pipeline.errors import HeadError
from pipeline.params import Params

IMAGES = Path(__file__).resolve().parent.parent / "contracts" / "images"
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture
def params(tmp_path: Path) -> Params:
    open_clip = pytest.importorskip("open_clip")
    (tmp_path / "tiny-prompts.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path / "tiny-prompts.json")
    torch.save(open_clip.create_model("tiny-prompts").state_dict(), tmp_path / "tiny.pt")
    settings = {
        "data.root": IMAGES,
        "cache.dir": tmp_path / "cache",
        "runs.dir": tmp_path / "runs",
        "backbone.name": "openclip/tiny-prompts",
        "backbone.weights": tmp_path / "tiny.pt",
        "extract.device": "cpu",
        "extract.workers": 1,
        "head.kind": "prompts",
        "head.folds": 2,
    }
    (tmp_path / "params.yaml").write_text("")
    return load_params(tmp_path / "params.yaml", [f"{key}={value}" for key, value in settings.items()])


def quiet(_line: str) -> None:
    """Say nothing."""


def test_a_run_of_prompts_predicts_and_reads_its_texts_once(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    extract(params, quiet, quiet=True)
    summary = train_head(params, quiet)
    assert "probe_beats_prompts_from" in summary["selected"]
    folder = Path(summary["run"])
    assert "A probe alone is better from" in (folder / "report.html").read_text()
    predictions = load_run(folder).predict([IMAGES / "val"])
    assert {prediction.label for prediction in predictions} <= {"ants", "bees", "cats"}
    monkeypatch.setattr(openclip, "text_features", lambda *_: pytest.fail("the text tower was loaded again"))
    train_head(params, quiet)
    assert len(list((params.cache.dir / "prompts").iterdir())) == 1


def test_backbones_without_texts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("")
    places = [f"data.root={IMAGES}", f"cache.dir={tmp_path / 'cache'}", f"runs.dir={tmp_path / 'runs'}"]
    plain = load_params(tmp_path / "params.yaml", [*places, "head.kind=prompts", "extract.workers=1"])
    extract(plain, quiet, quiet=True)
    with pytest.raises(HeadError, match="one space with texts"):
        train_head(plain, quiet)
