"""Ranking backbones: one sample for all, through the cache, with a recommendation that respects the intervals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.cli import main
from pipeline.errors import BackboneError
from pipeline.evaluate import wilson
from pipeline.evaluate.intervals import share_interval
from pipeline.heads import make_head
from pipeline.heads.crossval import stratified_group_folds
from pipeline.params import Params
from pipeline.stages.open import load_features
from pipeline.stages.rank import Ranked, rank_backbones, recommend, stratified_sample

Extract = Callable[..., dict[str, Any]]
MakeParams = Callable[..., Params]
ROW = Ranked("a", "a", "random-0", 100, 0.9, [0.85, 0.95], 8, 1000, 5.0, 0, 0.0, 0.1)


def quietly(params: Params, *names: str, images: int = 1000) -> dict[str, Any]:
    return rank_backbones(params, names, lambda _line: None, size=images, quiet=True)


def test_backbones_are_ranked_on_the_same_images_of_train(make_params: MakeParams) -> None:
    params = make_params("head.folds=2")
    summary = quietly(params, "mobilenet_v3_small=random", "squeezenet1_1=random", images=10)
    rows = summary["backbones"]
    assert {row["name"]: row["n"] for row in rows} == {"mobilenet_v3_small": 10, "squeezenet1_1": 10}
    assert [row["forwarded"] for row in rows] == [10, 10]
    assert all(row["interval"][0] <= row["accuracy"] <= row["interval"][1] and row["milliseconds"] > 0 for row in rows)
    assert summary["recommended"] in {row["label"] for row in rows}
    json.dumps(summary)
    again = quietly(params, "squeezenet1_1=random", images=10)["backbones"]
    assert [row["forwarded"] for row in again] == [0]
    assert again[0]["accuracy"] == next(row["accuracy"] for row in rows if row["name"] == "squeezenet1_1")


def test_the_accuracy_is_not_that_of_the_folds_that_chose(run_extract: Extract, make_params: MakeParams) -> None:
    """Each fold is predicted by a head whose strength was chosen within the other folds, whole groups apart."""
    run_extract()
    params = make_params("head.folds=4", r"data.group_pattern=/(\d)")
    table = load_features(params)
    X, y, groups = table.training_rows()
    right = np.zeros(len(y), bool)
    for train, test in stratified_group_folds(y, groups, 4, params.head.seed):
        head = make_head("logistic", params.head, class_names=table.class_names).fit(X[train], y[train], groups[train])
        right[test] = head.predict(X[test]) == y[test]
    (row,) = quietly(params, "mobilenet_v3_small")["backbones"]
    assert row["accuracy"] == right.mean()
    assert row["interval"] == share_interval(right, groups) != wilson(int(right.sum()), len(right))


def test_features_of_extract_are_used_again(run_extract: Extract, make_params: MakeParams) -> None:
    run_extract()
    (row,) = quietly(make_params("head.folds=2"), "mobilenet_v3_small")["backbones"]
    assert (row["forwarded"], row["n"], row["weights"]) == (0, 16, "random-0")


def test_an_unknown_name_costs_no_forward_pass(make_params: MakeParams, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="mobilenet_v3_smal"):
        quietly(make_params(), "mobilenet_v3_small=random", "mobilenet_v3_smal=random")
    assert not list(tmp_path.glob("cache/*/part-*"))


def test_a_sample_keeps_small_classes_and_proportions() -> None:
    targets = np.repeat([0, 1, 2], [600, 300, 3])
    counts = np.bincount(targets[stratified_sample(targets, 93, 5, 0)])
    assert counts[2] == 3 and sum(counts) == 93 and abs(counts[0] - 2 * counts[1]) <= 6
    assert np.array_equal(stratified_sample(targets, 5000, 5, 0), np.arange(903))


def test_the_fastest_within_the_best_interval_is_recommended() -> None:
    best = replace(ROW, label="big", accuracy=0.93, interval=[0.88, 0.97], milliseconds=20.0)
    poor = replace(ROW, label="poor", accuracy=0.5, interval=[0.4, 0.6], milliseconds=1.0)
    choice, reason = recommend([best, ROW, poor])
    assert choice is ROW and "big" in reason and "not shown" in reason
    assert recommend([best, poor])[0] is best
    assert recommend([replace(best, milliseconds=2.0), ROW, poor])[0].label == "big"


def test_the_verb_prints_a_table_and_asks_for_names(
    make_params: MakeParams, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_params()
    places = (f"data.root={root}", f"cache.dir={tmp_path / 'cache'}", "transform.crop=32", "transform.resize=32")
    options = ["-p", str(tmp_path / "params.yaml"), *(word for place in places for word in ("-s", place))]
    with pytest.raises(SystemExit) as stop:
        main(["backbones", "--rank", "squeezenet1_1=random", "--images", "8", "-s", "head.folds=2", "-q", *options])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "squeezenet1_1=random" in out and "Recommended:" in out
    with pytest.raises(SystemExit) as stop:
        main(["backbones", "--rank", *options])
    assert stop.value.code == 2
