"""The selection set: which images it holds, and that their pixels are prepared once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data.source import TEST, TRAIN, VAL
from pipeline.errors import FinetuneError
from pipeline.features.cache import FeatureTable
from pipeline.finetune import SelectionScore, SelectionSet, Setup, hold_out_selection, repeats
from pipeline.finetune.images import plan_epoch
from pipeline.finetune.selection import selection_score, selection_temperature
from pipeline.runtime.distributed import World

from ..conftest import PROJECT
from .support import TRANSFORM, Pictures, labelled, tiny_classifier, tiny_params


def test_selection_pixels_are_prepared_once() -> None:
    pictures = Pictures(9)
    images = labelled(9)
    object.__setattr__(images, "source", pictures)
    selection = SelectionSet(images, TRANSFORM, tiny_params(batch_size=4), Setup())
    classifier = tiny_classifier()
    first, second = selection.score(classifier), selection.score(classifier)
    assert first == second and pictures.decoded == 9
    assert not torch.is_inference_mode_enabled()


def table(splits: list[int], groups: list[int] | None = None) -> FeatureTable:
    """Two classes in turn."""
    count = len(splits)
    return FeatureTable(
        root=Path("photos"),
        class_names=("a", "b"),
        features=np.zeros((count, 2), np.float32),
        targets=np.arange(count) % 2,
        paths=[f"{row}.jpg" for row in range(count)],
        splits=np.array(splits, np.int8),
        digests=np.zeros((count, 16), np.uint8),
        groups=np.array(groups or range(count)),
    )


def test_val_selects_where_test_is_reported() -> None:
    holdout = hold_out_selection(table([TRAIN, TRAIN, VAL, TEST, VAL]), tiny_params(), reported=TEST)
    assert holdout.train.tolist() == [0, 1] and holdout.selection.tolist() == [2, 4] and holdout.name == "val"


def test_else_a_part_of_train_selects_with_groups_on_one_side() -> None:
    groups = [row // 4 for row in range(40)]
    holdout = hold_out_selection(table([TRAIN] * 40 + [VAL] * 2, [*groups, 98, 99]), tiny_params(), reported=VAL)
    assert sorted([*holdout.train, *holdout.selection]) == list(range(40))
    assert not {groups[row] for row in holdout.train} & {groups[row] for row in holdout.selection}
    assert {row % 2 for row in holdout.selection.tolist()} == {0, 1}


def test_without_an_independent_image_there_is_nothing_to_select_on() -> None:
    with pytest.raises(FinetuneError, match="set aside"):
        hold_out_selection(table([TRAIN, TRAIN, VAL]), tiny_params(), reported=VAL)


def test_classes_weigh_in_the_choice_as_they_do_in_training() -> None:
    """Always the common class: right on nine of ten images, and on half of the classes."""
    logits = np.tile([2.0, 0.0], (10, 1))
    targets = np.array([0] * 9 + [1])
    assert selection_score(logits, targets).accuracy == pytest.approx(0.9)
    balanced = selection_score(logits, targets, np.array([10 / 18, 5.0]))
    assert balanced.accuracy == pytest.approx(0.5)
    assert balanced.loss == pytest.approx(np.log1p(np.exp(-2)) / 2 + np.log1p(np.exp(2)) / 2)


def test_the_selection_set_weighs_classes() -> None:
    plain, weighted = (
        SelectionSet(labelled(9), TRANSFORM, tiny_params(), Setup(class_weights=weights)).score(tiny_classifier())
        for weights in (None, np.array([1.0, 2.0, 50.0]))
    )
    assert plain != weighted


@pytest.mark.parametrize(
    ("differ", "precision", "healthy"), [(20, "bfloat16", True), (8, "float32", True), (200, "bfloat16", False)]
)
def test_a_start_may_differ_by_what_rounding_moves(differ: int, precision: str, healthy: bool) -> None:
    """Of 2,000 images some lie so near the border that rounding moves them to its other side."""
    live, cached = SelectionScore(0.31, 0.9), SelectionScore(0.3, 0.9 - differ / 2000)
    assert repeats(live, cached, 2000, precision=precision, dtype=torch.float32) is healthy


def test_batch_size_is_that_of_one_process() -> None:
    (first, *_) = plan_epoch(40, tiny_params(batch_size=8), epoch=1, world=World(rank=0, size=2))
    assert (len(first.rows), len(first.step_rows)) == (8, 16)
    line = next(line for line in (PROJECT / "params.yaml").read_text().splitlines() if "  batch_size: 32" in line)
    assert "process" in line


def test_the_temperature_cools_what_is_too_sure_and_does_not_trust_a_few_right_answers() -> None:
    random = np.random.default_rng(0)
    honest = random.normal(size=(300, 3))
    targets = (honest + random.gumbel(size=honest.shape)).argmax(axis=1)  # drawn from the softmax
    assert selection_temperature(honest, targets) == pytest.approx(1.0, abs=0.25)
    assert selection_temperature(3 * honest, targets) == pytest.approx(3.0, rel=0.25)
    assert selection_temperature(np.eye(3)[[0, 1, 2]], np.array([0, 1, 2])) > 0.5


def test_a_cooled_score_does_not_punish_for_being_too_sure() -> None:
    targets = np.array([0, 1] * 10)
    right = np.eye(2)[targets]
    sure = 20 * np.where(np.arange(20)[:, None] < 2, 1 - right, right)  # two mistakes, all certain
    unsure = 0.1 * np.where(np.arange(20)[:, None] < 4, 1 - right, right)
    first, second = (selection_score(logits, targets, cool=True) for logits in (sure, unsure))
    assert first.beats(second, "log_loss") and first.loss > second.loss
