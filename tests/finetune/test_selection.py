"""The selection set: which images it holds, and that their pixels are prepared once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data.source import TEST, TRAIN, VAL
from pipeline.errors import FinetuneError
from pipeline.features.cache import FeatureTable
from pipeline.finetune import Setup, hold_out_selection
from pipeline.finetune.selection import SelectionSet

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
