"""What to label next: unsure, different from one another, and typical where nothing is known."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from pipeline.features.rows import Rows
from pipeline.insight.labelling import label_next


def blobs(each: int = 60, classes: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    targets = np.repeat(np.arange(classes), each)
    centres = generator.normal(size=(classes, 30)) * 3
    return (centres[targets] + generator.normal(size=(len(targets), 30))).astype(np.float32), targets


def test_a_cold_start_takes_a_typical_image_of_each_cluster() -> None:
    features, targets = blobs()
    features[::60] += 20  # one odd image a class
    picks = label_next(features, None, (), 6)
    assert sorted(targets[[pick.row for pick in picks]]) == [0, 1, 2, 3, 4, 5]
    assert not {pick.row for pick in picks} & set(range(0, 360, 60))
    assert all("typical of" in pick.reason for pick in picks)


def test_it_takes_what_is_unsure_but_not_one_thing_many_times() -> None:
    features, targets = blobs()
    chances = np.full((360, 2), [0.99, 0.01])
    unsure = np.isin(targets, (1, 4))
    chances[unsure] = [0.52, 0.48]
    features[60:110] = features[60]  # fifty copies of an unsure image
    picks = label_next(features, chances, ("ant", "bee"), 8)
    rows = np.array([pick.row for pick in picks])
    assert len(rows) == 8 and unsure[rows].all() and set(targets[rows]) == {1, 4}
    assert ((rows >= 60) & (rows < 110)).sum() <= 1
    assert picks[0].reason.startswith("unsure: ant (52 %) or bee (48 %); stands for ")


def test_small_pools_are_taken_whole() -> None:
    features, _ = blobs(1, 3)
    assert {pick.row for pick in label_next(features, None, (), 20)} == {0, 1, 2}
    assert label_next(features[:0], None, (), 20) == []
    with warnings.catch_warnings(action="error"):
        assert [pick.row for pick in label_next(features[:1], None, (), 20)] == [0]


def test_the_same_pool_gives_the_same_picks() -> None:
    features, _ = blobs()
    assert label_next(features, None, (), 5) == label_next(features, None, (), 5)


def test_a_pool_in_a_file_gives_the_same_picks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "rows.npy", blobs()[0].astype(np.float16))
    rows = Rows(tmp_path / "rows.npy")
    picks = label_next(rows[:], None, (), 5)
    monkeypatch.setattr("pipeline.features.rows.BLOCK_BYTES", 4 * 30 * 50)
    assert label_next(rows, None, (), 5) == picks  # type: ignore[arg-type]
