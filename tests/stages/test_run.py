"""A run takes all that determines a feature from its own folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import load_run
from pipeline.errors import RunError
from pipeline.params import Params
from pipeline.stages.train_head import train_head

from .conftest import write_image

Extract = Callable[..., dict[str, Any]]
MakeParams = Callable[..., Params]
QUICK = ("head.logistic.strengths=3", "head.folds=2")


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """Images that no run has seen, so large that draft decoding gives other pixels."""
    for number in range(4):
        write_image(tmp_path / "others" / "some" / f"{number}.jpg", 200 + number, (300, 300))
    return tmp_path / "others"


@pytest.fixture
def draft_run(run_extract: Extract, make_params: MakeParams) -> Path:
    """A run whose images were decoded in draft mode."""
    run_extract("extract.decoder=draft")
    return Path(train_head(make_params(*QUICK, "extract.decoder=draft"), lambda _line: None)["run"])


def change_model(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    model = json.loads((run / "model.json").read_text())
    change(model)
    (run / "model.json").write_text(json.dumps(model))


def test_what_predict_computes_lies_under_the_runs_own_key(
    draft_run: Path, others: Path, run_extract: Extract, make_params: MakeParams
) -> None:
    load_run(draft_run).predict([others])
    plain = run_extract(f"data.root={others}")
    assert plain["embedded"] == 4 and plain["reused"] == 0
    draft = run_extract(f"data.root={others}", "extract.decoder=draft")
    assert draft["reused"] == 4 and draft["forwarded"] == 0


def test_a_run_from_before_the_decoder_was_recorded_has_it_in_its_params(draft_run: Path) -> None:
    recorded = load_run(draft_run).backbone.decoder
    assert recorded.draft_size == (32, 32)
    change_model(draft_run, lambda model: model.pop("decoder"))
    assert load_run(draft_run).backbone.decoder == recorded


def test_a_decoder_of_another_version_is_refused(draft_run: Path, others: Path) -> None:
    change_model(draft_run, lambda model: model.update(decoder="pillow-rgb-9"))
    with pytest.raises(RunError, match="pillow-rgb-9"):
        load_run(draft_run).predict([others])


def test_predict_takes_what_a_program_has(run_extract: Extract, make_params: MakeParams, root: Path) -> None:
    run_extract()
    run = load_run(train_head(make_params(*QUICK), lambda _line: None)["run"])
    file = root / "val" / "cat" / "00.jpg"
    (from_path,) = run.predict(str(file))
    assert from_path == run.predict([file])[0] and len(run.predict(str(root / "val"))) == 8
    image = Image.open(file)
    found = run.predict([file.read_bytes(), np.asarray(image), image, file])
    assert [each.label for each in found] == [from_path.label] * 4
    assert [each.probability for each in found] == [from_path.probability] * 4
    assert [each.path for each in found] == ["image 0", "image 1", "image 2", str(file)]
    with pytest.raises(TypeError, match="a list of them"):
        run.predict(7)  # type: ignore[arg-type]


def test_a_run_of_another_kind_of_device_has_the_batches_of_this_one(
    run_extract: Extract, make_params: MakeParams
) -> None:
    run_extract("extract.batch_size=4")
    run = load_run(train_head(make_params("extract.batch_size=4", *QUICK), lambda _line: None)["run"])
    assert run.model.device is not None and run.model.device.startswith("cpu") and run.backbone.batch_size == 4
    changes = {"device": "cuda NVIDIA H100 80GB HBM3", "forward_shape": [1024, 3, 32, 32]}
    elsewhere = replace(run, model=run.model.model_copy(update=changes))
    assert elsewhere.backbone.batch_size == 8
