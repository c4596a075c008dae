"""Stage two end to end on a tiny folder: fit, score, publish, load, predict the same."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import load_run
from pipeline.artifacts import Leak
from pipeline.errors import DataError, HeadError, MissingFeaturesError, RunError
from pipeline.features.cache import FeatureTable
from pipeline.finetune import Setup, probe_start
from pipeline.params import HeadParams, Params
from pipeline.stages.cache import list_cache
from pipeline.stages.evaluate import evaluate_run
from pipeline.stages.train_head import _jobs, _learning_curve, train_head

from .conftest import write_image

Extract = Callable[..., dict[str, Any]]
MakeParams = Callable[..., Params]
KINDS = (
    "logistic",
    "linear",
    "mlp",
    "svm",
    "knn",
    "nearest_centroid",
    "ridge",
    "lda",
    "random_forest",
    "gradient_boosting",
    "mlp_sklearn",
    "sklearn.naive_bayes.GaussianNB",
)
QUICK = ("head.linear.epochs=3", "head.mlp.epochs=3", "head.logistic.strengths=5", "head.folds=2")


def rows_of(run: Path) -> list[dict[str, str]]:
    with open(run / "predictions.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_features_are_extracted_on_demand_and_only_for_what_can_be_trained(
    make_params: MakeParams, tmp_path: Path
) -> None:
    with pytest.raises(HeadError, match="no parameter"):
        train_head(make_params("head.kind=sklearn", "head.sklearn.params={kernl: x}"), extracts=True, quiet=True)
    write_image(tmp_path / "plain" / "a.jpg", 1)
    with pytest.raises(DataError, match="two"):
        train_head(make_params(f"data.root={tmp_path / 'plain'}"), extracts=True, quiet=True)
    lines: list[str] = []
    with pytest.raises(MissingFeaturesError):
        train_head(make_params(*QUICK), lines.append)
    assert train_head(make_params(*QUICK), lines.append, extracts=True, quiet=True)["n"] == 8
    assert any("embedded" in line for line in lines)


def test_a_run_is_published_before_its_scores_are_told(run_extract: Extract, make_params: MakeParams) -> None:
    run_extract()
    params = make_params(*QUICK)

    def say(line: str) -> None:
        if line.startswith("Scores"):
            assert len(list(params.runs.dir.glob("*/model.json"))) == 1
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        train_head(params, say)
    assert len(list(params.runs.dir.glob("*/report.html"))) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_run_predicts_live_what_it_reported(
    kind: str, run_extract: Extract, make_params: MakeParams, root: Path, tmp_path: Path
) -> None:
    run_extract()
    summary = train_head(make_params(*QUICK, f"head.kind={kind}"), lambda _line: None)
    run = load_run(summary["run"], [f"cache.dir={tmp_path / 'live'}"])
    reported = {str(root / row["path"]): row for row in rows_of(Path(summary["run"])) if row["split"] == "val"}
    predictions = run.predict([root / "val"], top=2)
    assert len(predictions) == len(reported) == 8
    for prediction in predictions:
        row = reported[prediction.path]
        assert prediction.label == row["predicted"]
        for label, probability in prediction.top:
            assert (repr(probability) if probability is not None else "") == row[f"p_{label}"]
    alone = run.predict([Path(predictions[0].path)], top=2)
    assert alone == predictions[:1]


def test_the_summary_has_every_promised_key(run_extract: Extract, make_params: MakeParams) -> None:
    run_extract()
    lines: list[str] = []
    summary = train_head(make_params(*QUICK), lines.append)
    assert {"run", "split", "n", "metrics", "baseline_accuracy", "selected"} <= set(summary)
    promised = {"accuracy", "accuracy_ci95", "balanced_accuracy", "macro_f1", "log_loss", "ece"}
    assert promised <= set(summary["metrics"])
    assert (summary["split"], summary["n"], summary["baseline_accuracy"]) == ("val", 8, 0.5)
    assert any(line.startswith("Trainable: 2,050 / ") for line in lines)
    json.dumps(summary)


def test_the_run_folder_is_complete_and_never_overwritten(run_extract: Extract, make_params: MakeParams) -> None:
    run_extract()
    params = make_params(*QUICK, "runs.name=mine")
    run = Path(train_head(params, lambda _line: None)["run"])
    names = {"params.yaml", "metrics.json", "model.json", "predictions.csv", "report.html"}
    assert names < {file.name for file in run.iterdir()}
    with pytest.raises(RunError, match="mine"):
        train_head(params, lambda _line: None)


def test_scores_do_not_depend_on_the_reported_set(run_extract: Extract, make_params: MakeParams, root: Path) -> None:
    """What was chosen stays chosen when the reported images change."""
    run_extract()
    before = train_head(make_params(*QUICK), lambda _line: None)
    for image in sorted((root / "val").rglob("*.jpg"))[:4]:
        image.unlink()
    after = train_head(make_params(*QUICK), lambda _line: None)
    assert after["n"] == 4
    seconds = {"seconds"}
    assert {k: v for k, v in before["selected"].items() if k not in seconds} == {
        k: v for k, v in after["selected"].items() if k not in seconds
    }


def test_val_chooses_and_is_then_learnt_from_where_a_test_split_is_reported(
    run_extract: Extract, make_params: MakeParams, root: Path
) -> None:
    for number, name in enumerate(("cat", "dog")):
        for again in range(4):
            write_image(root / "test" / name / f"{again}.jpg", 200 + 10 * again + number)
    run_extract()
    settings = (*QUICK, "head.logistic.choose_by=val_accuracy")
    summary = train_head(make_params(*settings), lambda _line: None)
    assert (summary["split"], summary["n"]) == ("test", 8)
    assert "The strength C was chosen by accuracy on val and the logistic head was fitted" in summary["protocol"]
    assert "24 images of train and val; reported are 8 images of test, on which nothing" in summary["protocol"]
    leaked = sorted((root / "val" / "cat").iterdir())[0]
    (root / "test" / "cat" / "leak.jpg").write_bytes(leaked.read_bytes())
    run_extract()
    assert train_head(make_params(*settings), lambda _line: None)["leak"]["leaked"] == 1


def test_several_kinds_make_a_leaderboard_and_one_winner(run_extract: Extract, make_params: MakeParams) -> None:
    run_extract()
    lines: list[str] = []
    summary = train_head(make_params(*QUICK, "head.kind=[nearest_centroid, knn]"), lines.append)
    metrics = json.loads((Path(summary["run"]) / "metrics.json").read_text())
    assert sum(row["selected"] for row in metrics["leaderboard"]) == 1
    assert "kind of head was chosen" in metrics["protocol"]
    assert "on which nothing was chosen" in metrics["protocol"]
    too_good = "a little too good"
    assert any(line.startswith("Heads") and too_good in line for line in lines)
    assert too_good in (Path(summary["run"]) / "report.html").read_text()


def test_a_head_that_nothing_was_chosen_for_is_not_called_too_good(
    run_extract: Extract, make_params: MakeParams
) -> None:
    run_extract()
    lines: list[str] = []
    train_head(make_params(*QUICK, "head.kind=nearest_centroid"), lines.append)
    assert "Heads:" in lines


def test_a_leak_of_train_into_val_is_reported(run_extract: Extract, make_params: MakeParams, root: Path) -> None:
    leaked = sorted((root / "train" / "cat").iterdir())[0]
    (root / "val" / "cat" / "leak.jpg").write_bytes(leaked.read_bytes())
    run_extract()
    summary = train_head(make_params(*QUICK), lambda _line: None)
    assert summary["leak"]["leaked"] == 1
    assert summary["leak"]["n"] == 8


def test_a_flat_folder_is_split_by_content(run_extract: Extract, make_params: MakeParams, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    for number in range(40):
        write_image(flat / ("a", "b")[number % 2] / f"{number}.jpg", number)
    over = (f"data.root={flat}", "data.val_fraction=0.3", "data.test_fraction=0.2", *QUICK)
    run_extract(*over)
    summary = train_head(make_params(*over), lambda _line: None)
    assert summary["split"] == "test"
    assert 2 <= summary["n"] <= 16


def test_views_are_embedded_once_and_trained_on(run_extract: Extract, make_params: MakeParams) -> None:
    first = run_extract("extract.views=2")
    assert (first["forwarded"], [view["forwarded"] for view in first["views"]]) == (24 + 32, [16, 16])
    assert run_extract("extract.views=2")["forwarded"] == 0
    summary = train_head(make_params(*QUICK, "extract.views=2"), lambda _line: None)
    assert summary["n"] == 8
    plain = train_head(make_params(*QUICK), lambda _line: None)
    assert plain["metrics"]["log_loss"] != summary["metrics"]["log_loss"]


def test_a_learning_curve_counts_images_not_their_views(run_extract: Extract, make_params: MakeParams) -> None:
    run_extract("extract.views=2")
    run = Path(train_head(make_params(*QUICK, "extract.views=2"), lambda _line: None, curve=True)["run"])
    curve = json.loads((run / "metrics.json").read_text())["curve"]
    assert curve[-1]["images"] == 16 and all(point["images"] <= 16 for point in curve)
    assert "95 % band" not in (run / "report.html").read_text()


def test_groups_that_cross_the_users_splits_are_leaks_and_the_score_is_given_without(
    run_extract: Extract, make_params: MakeParams, root: Path
) -> None:
    """Images of val are named after patients of whom the cats 00 and 06 have images in train."""
    run_extract()
    for number, patient in ((0, "P1"), (6, "P2"), (12, "P9"), (18, "P9")):
        (root / "val" / "cat" / f"{number:02}.jpg").rename(root / "val" / "cat" / f"{patient}-{number}.jpg")
    for number, patient in ((2, "P1"), (4, "P2")):
        (root / "train" / "cat" / f"{number:02}.jpg").rename(root / "train" / "cat" / f"{patient}-{number}.jpg")
    params = make_params(*QUICK, r"data.group_pattern=(P\d)-")
    lines: list[str] = []
    summary = train_head(params, lines.append)
    assert {key: summary["leak"][key] for key in ("leaked", "by_group", "n")} == {"leaked": 2, "by_group": 2, "n": 6}
    assert any("2 of the 8 images of val are of groups that train has too" in line for line in lines)
    assert "7 groups of these images" in summary["protocol"]
    again = evaluate_run(load_run(summary["run"]), quiet=True)
    assert (again.leak, again.metrics["accuracy_ci95"]) == (
        Leak.model_validate(summary["leak"]),
        summary["metrics"]["accuracy_ci95"],
    )


def test_one_class_says_why_training_cannot_go_on(
    run_extract: Extract, make_params: MakeParams, tmp_path: Path
) -> None:
    write_image(tmp_path / "one" / "only" / "a.jpg", 1)
    over = (f"data.root={tmp_path / 'one'}",)
    run_extract(*over)
    with pytest.raises(DataError, match="cannot be trained") as caught:
        train_head(make_params(*over), lambda _line: None)
    assert "1 class folder" in str(caught.value)


def test_training_before_extracting_names_the_remedy(make_params: MakeParams) -> None:
    with pytest.raises(MissingFeaturesError) as caught:
        train_head(make_params(), lambda _line: None)
    assert "pipeline extract" in str(caught.value)


def test_an_unknown_kind_names_near_ones(run_extract: Extract, make_params: MakeParams) -> None:
    run_extract()
    with pytest.raises(HeadError) as caught:
        train_head(make_params("head.kind=logstic"), lambda _line: None)
    assert "logistic" in str(caught.value)


def test_evaluate_repeats_the_report_and_scores_other_folders(
    run_extract: Extract, make_params: MakeParams, root: Path, tmp_path: Path
) -> None:
    run_extract()
    summary = train_head(make_params(*QUICK), lambda _line: None)
    run = load_run(summary["run"])
    assert evaluate_run(run, quiet=True).metrics == summary["metrics"]
    for number in range(6):
        write_image(tmp_path / "other" / ("cat", "dog")[number % 2] / f"{number}.jpg", 50 + number)
    elsewhere = evaluate_run(run, tmp_path / "other", quiet=True)
    assert (elsewhere.split, elsewhere.n) == ("all", 6)
    write_image(tmp_path / "other" / "bird" / "x.jpg", 99)
    with pytest.raises(DataError, match="classes"):
        evaluate_run(run, tmp_path / "other", quiet=True)


def test_bad_files_are_listed_beside_good_predictions(
    run_extract: Extract, make_params: MakeParams, root: Path, tmp_path: Path
) -> None:
    run_extract()
    run = load_run(train_head(make_params(*QUICK), lambda _line: None)["run"])
    folder = tmp_path / "new"
    write_image(folder / "good.jpg", 1)
    (folder / "bad.jpg").write_bytes(b"nothing")
    bad, good = run.predict([folder])
    assert bad.error is not None and "not an image" in bad.error
    assert good.error is None and good.label in {"cat", "dog"}


def test_other_weights_than_the_run_was_made_with_are_refused(
    run_extract: Extract, make_params: MakeParams, root: Path, tmp_path: Path
) -> None:
    run_extract()
    summary = train_head(make_params(*QUICK), lambda _line: None)
    run = load_run(summary["run"], ["backbone.seed=1", f"cache.dir={tmp_path / 'live'}"])
    with pytest.raises(RunError, match="other weights"):
        run.predict([root / "val"])


def test_the_same_params_give_the_same_numbers(run_extract: Extract, make_params: MakeParams) -> None:
    run_extract()
    for kind in ("logistic", "mlp"):
        first, second = (train_head(make_params(*QUICK, f"head.kind={kind}"), lambda _line: None) for _ in range(2))
        assert first["metrics"] == second["metrics"]
        np.testing.assert_equal(rows_of(Path(first["run"])), rows_of(Path(second["run"])))


def test_learning_curve_and_start_of_a_fine_tuning_are_fitted_where_the_backbone_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    devices: list[str] = []

    def make(*_a: object, device: str = "cpu", **_k: object) -> None:
        devices.append(device)
        raise HeadError("enough")

    monkeypatch.setattr("pipeline.stages.train_head.make_head", make)
    monkeypatch.setattr(sys.modules["pipeline.finetune.start"], "make_head", make)
    y = np.arange(12) % 2
    features = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    table = FeatureTable(
        Path("."),
        ("a", "b"),
        features,
        y,
        [""] * 12,
        np.zeros(12, np.int8),
        np.zeros((12, 16), np.uint8),
        np.arange(12),
    )
    gpu, rows = torch.device("cuda:1"), np.arange(12)
    with pytest.raises(HeadError):
        _learning_curve(HeadParams(), table, table.train, "logistic", 0, gpu)
    with pytest.raises(HeadError):
        probe_start(table, rows, rows, HeadParams(), "logistic", Setup(gpu), dropout=0.0)
    assert set(devices) == {"cuda:1"} and len(devices) > 1


def test_a_sample_is_learnt_from_and_said_everywhere(run_extract: Extract, make_params: MakeParams) -> None:
    run_extract()
    lines: list[str] = []
    whole = train_head(make_params(*QUICK), lines.append)
    assert "sample" not in whole["selected"]
    images = int(next(line for line in lines if " train, " in line).split("(")[1].split()[0])
    lines.clear()
    summary = train_head(make_params(*QUICK, f"head.sample={images // 2}"), lines.append)
    sample = summary["selected"]["sample"]
    assert sample["of"] == images and images // 2 <= sample["images"] < images
    assert any(f"learn from {sample['images']} of the {images} images of train" in line for line in lines)
    record = json.loads((Path(summary["run"]) / "model.json").read_text())
    assert record["head"]["selected"]["sample"] == sample
    protocol = json.loads((Path(summary["run"]) / "metrics.json").read_text())["protocol"]
    assert f"fitted on {sample['images']} images of train (a stratified sample of the {images} of train)" in protocol
    assert summary["n"] == whole["n"]


def test_what_is_too_large_for_memory_is_offered_as_a_sample(
    run_extract: Extract, make_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_extract()
    monkeypatch.setattr("pipeline.stages.open.COPIES", 10**6)
    monkeypatch.setattr("pipeline.stages.train_head.COPIES_OF_OTHERS", 40)
    params = (*QUICK, "head.memory_mb=1", "head.kind=svm", "head.folds=2")
    with pytest.raises(HeadError) as caught:
        train_head(make_params(*params), lambda _line: None)
    offered = re.search(r"head.sample=\d+", str(caught.value))
    assert offered
    lines: list[str] = []
    summary = train_head(make_params(*params, offered[0]), lines.append)
    assert summary["selected"]["sample"]["images"] < summary["selected"]["sample"]["of"]
    assert any(line.startswith("svm holds all of them in memory") for line in lines)


def test_features_beyond_the_budget_stay_in_a_file(
    run_extract: Extract, make_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_extract()
    params = make_params(*QUICK, "head.memory_mb=1")
    memory = train_head(params, lambda _line: None)
    monkeypatch.setattr("pipeline.stages.open.COPIES", 10**6)
    lines: list[str] = []
    blocks = train_head(params, lines.append)
    (file,) = params.cache.dir.glob("*/rows-*.npy")
    (key,) = list_cache(params)["keys"]
    assert key["row_order"] == [{"path": str(file.absolute()), "bytes": file.stat().st_size}]
    assert any(file.name in line and "block by block" in line for line in lines)
    assert blocks["metrics"]["accuracy"] == memory["metrics"]["accuracy"]
    assert blocks["metrics"]["log_loss"] == pytest.approx(memory["metrics"]["log_loss"], rel=1e-3)
    assert blocks["selected"]["C"] == memory["selected"]["C"]
    assert load_run(blocks["run"]).head.predict(np.load(file).astype(np.float32)).shape == (len(np.load(file)),)
    lines.clear()
    train_head(make_params(*QUICK, "head.memory_mb=1", "head.kind=svm"), lines.append)
    assert any(line.startswith("svm holds all of them in memory: at least") for line in lines)
    monkeypatch.setattr("pipeline.stages.train_head.COPIES_OF_OTHERS", 10**6)
    with pytest.raises(HeadError, match="svm holds all features that it learns from in memory"):
        train_head(make_params(*QUICK, "head.memory_mb=1", "head.kind=[logistic, svm]"), lines.append)


def test_folds_that_are_fitted_at_once_share_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.stages.train_head.usable_cores", lambda: 16)
    features = np.zeros((1000, 250), np.float32)  # 1 MB
    assert [_jobs(HeadParams(memory_mb=megabytes), features) for megabytes in (7, 21, 1000)] == [3, 10, 16]
    assert _jobs(HeadParams(memory_mb=1), features) == 16  # heads that read blocks
