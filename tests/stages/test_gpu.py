"""On a GPU: features are those of a CPU within the tolerance, and a run repeats what it reported."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import load_run
from pipeline.features.verify import TOLERANCES, compare_features
from pipeline.params import Params
from pipeline.stages.finetune import finetune
from pipeline.stages.open import load_features
from pipeline.stages.train_head import train_head

pytestmark = pytest.mark.gpu
Extract = Callable[..., dict[str, Any]]
MakeParams = Callable[..., Params]
CUDA = ("extract.device=cuda", "extract.batch_size=auto")
QUICK = ("head.logistic.strengths=5", "head.folds=2")


def silent(_line: str) -> None:
    """Say nothing."""


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16", "float16"])
def test_features_are_those_of_a_cpu(
    run_extract: Extract, make_params: MakeParams, cuda: torch.device, precision: str
) -> None:
    starter = ("backbone.name=starter", "backbone.weights=DEFAULT")  # random weights underflow in float16
    plain = (*starter, "extract.precision=float32")
    run_extract(*plain)
    expected = load_features(make_params(*plain)).features
    there = (*starter, *CUDA, f"extract.precision={precision}", f"cache.dir={make_params().cache.dir}-cuda")
    run_extract(*there)
    features = load_features(make_params(*there)).features
    assert compare_features(expected, features, expected).within(TOLERANCES[precision]).all()


def test_a_run_predicts_what_it_reported(
    run_extract: Extract, make_params: MakeParams, root: Path, cuda: torch.device
) -> None:
    run_extract(*CUDA)
    run = load_run(train_head(make_params(*CUDA, *QUICK), silent, curve=True)["run"])
    with open(run.folder / "predictions.csv", newline="") as file:
        reported = {Path(row["path"]).name: row for row in csv.DictReader(file) if row["split"] == "val"}
    predicted = run.predict([root / "val"])
    assert len(predicted) == len(reported) > 0
    for prediction in predicted:
        row = reported[Path(prediction.path).name]
        assert prediction.label == row["predicted"]
        assert np.isclose(prediction.probability, float(row[f"p_{prediction.label}"]), atol=1e-6)


def test_it_fine_tunes(run_extract: Extract, make_params: MakeParams, cuda: torch.device) -> None:
    run_extract(*CUDA)
    train_head(make_params(*CUDA, *QUICK), silent)
    short = ("finetune.epochs=2", "finetune.batch_size=8", "finetune.device=cuda")
    assert finetune(make_params(*CUDA, *QUICK, *short), silent)["n"] > 0
