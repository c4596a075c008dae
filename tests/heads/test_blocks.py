"""A head that reads its features from a file finds what it finds in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.features import rows as rows_module
from pipeline.features.rows import Rows
from pipeline.heads import choose_head, learning_curve, make_head, standardisation
from pipeline.heads.solver import BlockDesign, Design
from pipeline.params import HeadParams

from .conftest import make_features


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some fifty rows a block."""
    monkeypatch.setattr(rows_module, "BLOCK_BYTES", 4 * 24 * 50)


def in_a_file(folder: Path, X: np.ndarray) -> Rows:
    np.save(folder / "rows.npy", X.astype(np.float16))
    return Rows(folder / "rows.npy")


def in_both(folder: Path, classes: int) -> tuple[np.ndarray, Rows, np.ndarray]:
    """Features with means far from 0 and a constant one, exact in float16."""
    X, y = make_features(330, 24, classes, spread=1.0)
    X = (X * np.linspace(0.1, 3, 24) + np.linspace(-5, 5, 24)).astype(np.float16).astype(np.float32)
    X[:, 7] = 0.5
    return X, in_a_file(folder, X), y


def test_the_standardisation_is_that_of_all_rows(tmp_path: Path) -> None:
    X, rows, _ = in_both(tmp_path, 3)
    for enabled in (True, False):
        for own, expected in zip(standardisation(rows, enabled), standardisation(X, enabled), strict=True):
            assert np.allclose(own, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_are_those_of_the_features_in_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    X, rows, y = in_both(tmp_path, 3)
    mean, scale = standardisation(X, True)
    target = torch.from_numpy(y)
    blocks = BlockDesign.open(rows.take(np.arange(len(X)) % 4 > 0), mean, scale, target[np.arange(len(X)) % 4 > 0], 3)
    scaled = torch.from_numpy(((X - mean) / scale)[np.arange(len(X)) % 4 > 0]).to(dtype)
    weights = torch.randn(2, 3, 25, generator=torch.Generator().manual_seed(1)).to(dtype)
    residuals = torch.randn(2, 3, len(scaled), generator=torch.Generator().manual_seed(2)).to(dtype)
    ones = torch.cat([scaled, scaled.new_ones(len(scaled), 1)], 1)
    assert torch.allclose(blocks.logits(weights), weights @ ones.T, rtol=1e-4, atol=1e-4)
    assert torch.allclose(blocks.backward(residuals), residuals @ ones, rtol=1e-4, atol=1e-3)
    assert blocks.shape == tuple(ones.shape)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("path", ["auto", "full"])
def test_the_same_strength_and_solution_as_in_memory(tmp_path: Path, classes: int, path: str) -> None:
    X, rows, y = in_both(tmp_path, classes)
    params = HeadParams.model_validate({"folds": 3, "logistic": {"strengths": 13, "path": path}})
    memory, blocks = (make_head("logistic", params, class_names=[]).fit(given, y) for given in (X, rows))
    assert blocks.selected["C"] == memory.selected["C"] and blocks.selected["certificate"]["gap"] < 1e-7
    assert blocks.selected["cv_log_loss"] == pytest.approx(memory.selected["cv_log_loss"], rel=1e-3)
    assert np.allclose(blocks.predict_proba(X), memory.predict_proba(X), atol=1e-3)
    assert (blocks.predict_proba(rows) == blocks.predict_proba(X)).all()


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_torch_heads_learn_the_same(tmp_path: Path, kind: str) -> None:
    X, rows, y = in_both(tmp_path, 3)
    params = HeadParams.model_validate({"kind": kind, kind: {"epochs": 4}, "calibrate": "temperature", "folds": 2})
    memory, blocks = (make_head(kind, params, class_names=[]).fit(given, y) for given in (X, rows))
    assert np.allclose(blocks.predict_proba(X), memory.predict_proba(X), atol=1e-6)
    assert blocks.selected["epochs"] == memory.selected["epochs"]


def test_the_leading_directions_are_found_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So wide that the features in memory are not rotated either."""
    X, y = make_features(600, 300, 3)
    X = X.astype(np.float16).astype(np.float32)
    monkeypatch.setattr(rows_module, "BLOCK_BYTES", 4 * 300 * 64)
    mean, scale = standardisation(X, True)
    target = torch.from_numpy(y)
    memory = Design.build(torch.from_numpy((X - mean) / scale), target, 3, rotate=False)
    blocks = BlockDesign.open(in_a_file(tmp_path, X), mean, scale, target, 3)
    assert memory.basis is None and len(blocks.leading) == len(memory.leading) == 64
    assert torch.allclose(blocks.leading_curvature, memory.leading_curvature.double(), rtol=1e-3)
    assert torch.allclose(blocks.curvature, memory.curvature.double(), rtol=1e-3)


def test_choosing_and_the_learning_curve_read_it_too(tmp_path: Path) -> None:
    X, rows, y = in_both(tmp_path, 3)
    params = HeadParams.model_validate({"kind": ["logistic", "ridge"], "folds": 3, "logistic": {"strengths": 9}})
    val = np.arange(len(y)) % 5 == 0
    choices = [
        choose_head(params, take(~val), y[~val], class_names=["a", "b", "c"], held_out=(take(val), y[val]))
        for take in (X.__getitem__, rows.take)
    ]
    memory, blocks = ({entry.kind: (entry.cv, entry.val) for entry in choice.entries} for choice in choices)
    assert blocks.keys() == memory.keys() == {"logistic", "ridge", "knn", "nearest_centroid"}
    for kind, (_, judged) in blocks.items():
        assert judged and memory[kind][1] and judged.accuracy == pytest.approx(memory[kind][1].accuracy, abs=0.02)
    curve = learning_curve(
        lambda: make_head("logistic", params, class_names=[]),
        rows,
        y,
        None,
        rows.take(val),
        y[val],
        fractions=(0.5, 1.0),
        repeats=1,
    )
    assert len(curve) == 2


@pytest.mark.parametrize("kind", ["ridge", "lda", "nearest_centroid"])
@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("classes", [2, 4])
def test_what_sums_determine_is_learnt_from_one_pass(
    tmp_path: Path, kind: str, standardize: bool, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    X, rows, y = in_both(tmp_path, classes)
    y[: len(y) // 3] = 0  # of unequal size
    params = HeadParams.model_validate({"kind": kind, "folds": 3, "standardize": standardize})
    memory = make_head(kind, params, class_names=[]).fit(X, y)
    longest: list[int] = []
    monkeypatch.setattr(Rows, "__getitem__", lambda self, where: looked(self, where, longest))
    head = make_head(kind, params, class_names=[])
    assert head.by_blocks
    blocks = head.fit(rows, y)  # type: ignore[arg-type]
    assert np.allclose(blocks.predict_proba(X), memory.predict_proba(X), atol=3e-4)  # of float32
    assert (blocks.predict(rows) == memory.predict(X)).all() and max(longest) <= 50  # type: ignore[arg-type]


def looked(rows: Rows, where: object, longest: list[int]) -> np.ndarray:
    """As `Rows` gives them; how many is noted."""
    found = rows.stored(where).astype(np.float32)
    longest.append(len(found))
    return found


def test_ridge_weights_classes_in_its_sums(tmp_path: Path) -> None:
    X, rows, y = in_both(tmp_path, 3)
    y[:200] = 0
    params = HeadParams.model_validate({"kind": "ridge", "folds": 3, "class_weight": "balanced"})
    memory, blocks = (make_head("ridge", params, class_names=[]).fit(given, y) for given in (X, rows))
    assert np.allclose(blocks.predict_proba(X), memory.predict_proba(X), atol=1e-4)


@pytest.mark.parametrize(
    ("estimator", "parameters", "by_blocks"),
    [
        ("ridge", {"alpha": 3.0}, True),
        ("ridge", {"class_weight": "balanced"}, False),
        ("lda", {"solver": "lsqr"}, False),
        ("nearest_centroid", {"shrink_threshold": 0.1}, False),
        ("svm", {}, False),
    ],
)
def test_parameters_that_need_every_row_are_known(
    estimator: str, parameters: dict[str, object], by_blocks: bool
) -> None:
    section = {"kind": "sklearn", "sklearn": {"estimator": estimator, "params": parameters}}
    assert make_head("sklearn", HeadParams.model_validate(section), class_names=[]).by_blocks == by_blocks


def test_a_search_may_try_what_needs_every_row(tmp_path: Path) -> None:
    X, rows, y = in_both(tmp_path, 3)
    params = HeadParams.model_validate({"kind": "lda", "folds": 2, "search": {"solver": ["svd", "lsqr"]}})
    memory, blocks = (make_head("lda", params, class_names=[]).fit(given, y) for given in (X, rows))
    assert [row["cv_accuracy"] for row in blocks.selected["search"]] == [
        row["cv_accuracy"] for row in memory.selected["search"]
    ]
