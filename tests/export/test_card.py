"""The card says what the run's records say, number by number, and hides no limit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.artifacts import read_metrics, read_model, read_predictions
from pipeline.evaluate.metrics import METRICS
from pipeline.export.card import CARD_FILE, licence_of, render_card
from pipeline.params import Params, load_params
from pipeline.stages.extract import extract
from pipeline.stages.train_head import train_head

from ..artifacts.examples import model_values
from ..stages.conftest import FAST, write_images
from .conftest import CONTRACTS

KINDS = ["logistic", "mlp", "svm", "tuned"]


def quiet(_line: str) -> None:
    pass


def card_of(kind: str, **changes: Any) -> str:
    """The card of one of the runs that are in the repository."""
    folder = CONTRACTS / "runs" / kind
    params = load_params(folder / "params.yaml")
    metrics = read_metrics(folder).model_copy(update=changes)
    return render_card(kind, read_model(folder), metrics, read_predictions(folder), params)


def parse(card: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The front matter, and the sections of the text by title."""
    _, front, text = card.split("---\n", 2)
    parts = re.split(r"^## (.*)\n\n", text, flags=re.MULTILINE)
    return yaml.safe_load(front), {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_that_of_metrics_json(kind: str) -> None:
    recorded = json.loads((CONTRACTS / "runs" / kind / "metrics.json").read_text())
    front, sections = parse(card_of(kind))
    (result,) = front["model-index"][0]["results"]
    found = {metric["type"]: metric for metric in result["metrics"]}
    assert (
        set(found) == {name for name in METRICS if recorded["metrics"].get(name) is not None} == set(front["metrics"])
    )
    for name, metric in found.items():
        assert metric["value"] == recorded["metrics"][name]
        assert metric["args"].get("ci95") == recorded["metrics"][f"{name}_ci95"]
        assert metric["args"]["n"] == recorded["n"]
    rows = re.findall(r"^\| (.*) \| (.*) \| (.*) \|$", sections["Scores"], re.MULTILINE)[2:]
    assert [title for title, *_ in rows] == [METRICS[name].title for name in METRICS if name in recorded["metrics"]]
    for title, value, interval in rows:
        name = next(name for name, metric in METRICS.items() if metric.title == title)
        scale, digits = (100, 0.05) if METRICS[name].is_share else (1, 0.0005)
        shown = [float(number) for number in re.findall(r"[\d.]+", f"{value} {interval}")]
        wanted = [recorded["metrics"][name], *(recorded["metrics"][f"{name}_ci95"] or [])]
        assert shown == pytest.approx([scale * number for number in wanted], abs=1.001 * digits)
    shares = [float(share) for share in re.findall(r"right for ([\d.]+) %", sections["Scores"])]
    assert shares == pytest.approx([100 * recorded["baseline_accuracy"]], abs=0.051)
    assert f"{recorded['n']} images" in sections["Scores"]


def test_it_names_base_model_data_and_protocol() -> None:
    model, metrics = read_model(CONTRACTS / "runs" / "tuned"), read_metrics(CONTRACTS / "runs" / "tuned")
    front, sections = parse(card_of("tuned"))
    assert (front["base_model"], front["base_model_relation"], front["license"]) == ("starter", "finetune", "mit")
    dataset = front["model-index"][0]["results"][0]["dataset"]
    assert (dataset["revision"], dataset["split"], dataset["name"]) == (model.data.digest, metrics.split, "photos")
    assert model.data.digest in sections["Made from"] and model.backbone.digest in sections["Made from"]
    assert metrics.protocol in sections["Scores"].replace("\\", "")
    assert "pipeline predict PATH/TO/tuned" in sections["How to predict"]


def test_the_limits_are_the_runs_own() -> None:
    leak = {"leaked": 2, "n": 7, "accuracy": 0.5, "accuracy_ci95": [0.2, 0.8]}
    metrics = read_metrics(CONTRACTS / "runs" / "logistic")
    leaking = type(metrics).model_validate({**metrics.model_dump(), "leak": leak, "warnings": ["a *warning*"]})
    limits = parse(card_of("logistic", leak=leaking.leak, warnings=leaking.warnings))[1]["Limits"]
    assert "3 classes have fewer than 20 images in train: `ants` (8), `bees` (8), `cats` (8)." in limits
    assert "Groups were not declared" in limits
    assert "2 of the 9 images of val are also in train" in limits and "50.0 %" in limits
    assert "rest on 9 images" in limits and r"a \*warning\*" in limits


@pytest.mark.parametrize(
    ("name", "weights", "licence"),
    [
        ("vit_h_14", "IMAGENET1K_SWAG_E2E_V1", "cc-by-nc-4.0"),
        ("resnet50", "IMAGENET1K_V2", "other"),
        ("resnet50", "file", "unknown"),
        ("resnet50", "random-0", "unknown"),
        ("starter", "DEFAULT", "mit"),
        ("new", "laion2b", "unknown"),
    ],
)
def test_the_licence_of_the_weights_as_far_as_it_is_known(name: str, weights: str, licence: str) -> None:
    from pipeline.artifacts import RunModel

    values = model_values()
    model = RunModel.model_validate(values | {"backbone": values["backbone"] | {"name": name, "weights": weights}})
    identifier, sentence = licence_of(model, Params())
    assert identifier == licence and sentence.endswith(".")


def test_a_run_folder_has_its_card_whatever_its_classes_are_called(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    for split in ("train", "val"):
        (images / split / "cat").rename(images / split / "a|b`<script>\udcff")
    (tmp_path / "params.yaml").write_text("")
    places = [f"data.root={images}", f"cache.dir={tmp_path / 'cache'}", f"runs.dir={tmp_path / 'runs'}"]
    params = load_params(tmp_path / "params.yaml", [*FAST, *places, "head.logistic.strengths=3", "head.folds=2"])
    extract(params, quiet, quiet=True)
    folder = Path(train_head(params, quiet)["run"])
    front, sections = parse((folder / CARD_FILE).read_text(encoding="utf-8"))
    assert front["model-index"][0]["name"] == folder.name
    assert "<script>" not in re.sub(r"`[^`]*`", "", sections[""])
    assert "`a|b'<script>\\udcff`" in sections[""]
