"""A head from outside the package is a kind like any other: one class, one entry in the table."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import HeadError, RunError
from pipeline.heads import KINDS, Head, Layers, Selection, choose_head, kinds_of_layers, load_head, make_head
from pipeline.heads.common import Features, Floats, Ints
from pipeline.params import HeadParams

from .conftest import make_features

NAMES = ["a", "b", "c"]


class NearestMean(Head):
    """The class of the nearest mean; ``shrink`` pulls the means towards that of all rows."""

    file = "head.json"

    def configure(self) -> None:
        self.shrink = 0.0

    def replace(self, values: Mapping[str, Any]) -> None:
        if set(values) - {"shrink"}:
            super().replace(values)
        self.shrink = values.get("shrink", self.shrink)

    def learn(self, X: Features, index: Ints, groups: Ints | None) -> None:
        means = np.stack([X[index == number].mean(axis=0, dtype=np.float64) for number in range(index.max() + 1)])
        self.means = means + self.shrink * (means.mean(axis=0) - means)

    def logits(self, X: Features) -> Floats:
        return -np.stack([((row - self.means) ** 2).sum(axis=1) for row in X.astype(np.float64)])

    def write(self, file: Path) -> dict[str, Any]:
        file.write_text(json.dumps(self.means.tolist()))
        return {"shrink": self.shrink}

    def read(self, file: Path, record: Mapping[str, Any]) -> None:
        self.means, self.shrink = np.array(json.loads(file.read_text())), float(record["shrink"])

    def as_layers(self) -> Layers:
        return Layers((2 * self.means,), (-(self.means**2).sum(axis=1),))


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "toy", NearestMean)


def saved(head: Head, folder: Path) -> tuple[Head, dict[str, Any]]:
    record = json.loads(json.dumps(head.save(folder), allow_nan=False))
    return load_head(folder, record), record


def test_it_stands_on_the_leaderboard_and_is_saved_and_loaded(tmp_path: Path) -> None:
    X, y = make_features(120, 12, 3, spread=2.0)
    choice = choose_head(HeadParams(kind=["toy", "logistic"], folds=3), X, y, class_names=NAMES)
    rows = {row["kind"]: row for row in choice.leaderboard}
    assert rows["toy"]["cv_accuracy"] > 0.5 and rows["toy"]["cv_log_loss"] > 0
    toy = next(entry.head for entry in choice.entries if entry.kind == "toy")
    assert isinstance(toy, NearestMean) and toy.selected["seconds"] >= 0
    loaded, record = saved(toy, tmp_path)
    assert isinstance(loaded, NearestMean) and loaded.kind == record["kind"] == "toy"
    assert loaded.predict(X).tobytes() == toy.predict(X).tobytes()
    assert loaded.predict_proba(X).tobytes() == toy.predict_proba(X).tobytes()
    assert pickle.loads(pickle.dumps(toy)).predict(X).tobytes() == toy.predict(X).tobytes()


def test_its_parameters_are_searched_and_its_temperature_survives(tmp_path: Path) -> None:
    X, y = make_features(120, 12, 3, spread=0.5)
    params = HeadParams(kind="toy", folds=3, search={"shrink": [1.0, 0.0]}, calibrate="temperature")
    toy = make_head("toy", params, class_names=NAMES).fit(X, y)
    assert isinstance(toy, NearestMean) and toy.shrink == 0
    assert [row["params"] for row in toy.selected["search"]] == [{"shrink": 1.0}, {"shrink": 0.0}]
    assert toy.selections == (
        Selection("the parameters of toy", "by 3-fold cross-validation", "train"),
        Selection("the temperature", "out of fold", "train"),
    )
    loaded, record = saved(toy, tmp_path)
    assert record["temperature"] == toy.selected["temperature"] != 1
    assert loaded.predict_proba(X).tobytes() == toy.predict_proba(X).tobytes()
    with pytest.raises(HeadError, match="no parameter to search"):
        make_head("toy", HeadParams(kind="toy", search={"depth": [1]}), class_names=NAMES)


def test_its_layers_are_offered_to_finetuning() -> None:
    X, y = make_features(120, 12, 3, spread=2.0)
    toy = make_head("toy", HeadParams(), class_names=NAMES).fit(X, y)
    layers = toy.as_layers()
    assert layers is not None and (layers.logits(X).argmax(axis=1) == toy.predict(X)).all()
    assert kinds_of_layers() == ("logistic", "linear", "mlp", "toy")


def test_a_kind_that_is_not_known_where_it_is_loaded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = make_features(60, 6, 3)
    record = make_head("toy", HeadParams(), class_names=NAMES).fit(X, y).save(tmp_path)
    monkeypatch.delitem(KINDS, "toy")
    with pytest.raises(RunError, match="kind toy"):
        load_head(tmp_path, record)
    with pytest.raises(HeadError, match="no classifier 'toy'"):
        make_head("toy", HeadParams(), class_names=NAMES)


def test_it_knows_nothing_of_views_and_learns_from_them() -> None:
    X, y = make_features(60, 6, 3, spread=2.0)
    toy = make_head("toy", HeadParams(folds=3), class_names=NAMES).fit(np.stack([X, 2 * X]), y)
    assert isinstance(toy, NearestMean)
    assert np.allclose(toy.means, 1.5 * np.stack([X[y == number].mean(axis=0) for number in range(3)]), rtol=1e-3)
    assert toy.cross_validate(np.stack([X, 2 * X]), y).predicted.shape == (60,)


def test_a_fold_that_lacks_a_class_is_judged_all_the_same() -> None:
    X, y = make_features(60, 6, 2)
    toy = make_head("toy", HeadParams(folds=3), class_names=NAMES)
    seen = toy.cross_validate(np.r_[X, X[:1]], np.r_[y, 2])
    assert seen.logits is not None and seen.logits.shape == (61, 3)
    assert np.flatnonzero(~seen.known).tolist() == [60]
