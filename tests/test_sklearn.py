"""The estimators under scikit-learn's own contract, and through the cache."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from pipeline.backbones import Forward
from pipeline.errors import DataError
from pipeline.sklearn import ImageFeatures, LogisticPath

from .stages.conftest import write_images

SMALL = ("transform.resize=32", "transform.crop=32", "extract.device=cpu", "extract.workers=1")


# scikit-learn's checks feed matrices of numbers, and these need images.
NEEDS_IMAGES = dict.fromkeys(
    [
        "check_fit_score_takes_y",
        "check_estimators_dtypes",
        "check_pipeline_consistency",
        "check_estimator_sparse_tag",
        "check_estimators_pickle",
        "check_f_contiguous_array_estimator",
        "check_transformer_general",
        "check_transformer_preserve_dtypes",
        "check_transformers_unfitted_stateless",
        "check_methods_sample_order_invariance",
        "check_methods_subset_invariance",
        "check_dict_unchanged",
        "check_fit_idempotent",
    ],
    "its input is a column of images; the check's is a matrix of numbers",
)


@parametrize_with_checks([LogisticPath(strengths=9)])
def test_the_classifier_keeps_the_contract(estimator: Any, check: Any) -> None:
    check(estimator)


@parametrize_with_checks(
    [ImageFeatures(cache="cache", settings=SMALL)],
    expected_failed_checks=lambda _estimator: NEEDS_IMAGES,
    xfail_strict=True,
)
def test_the_transformer_keeps_what_is_not_about_numbers(
    estimator: Any, check: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    check(estimator)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def paths(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*.jpg"))


@pytest.fixture
def features(tmp_path: Path) -> ImageFeatures:
    return ImageFeatures("starter", cache=tmp_path / "cache", settings=SMALL)


@pytest.fixture
def forwarded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of a network was given."""
    calls: list[int] = []
    call = Forward.__call__

    def counted(self: Forward, pixels: Any) -> Any:
        calls.append(len(pixels))
        return call(self, pixels)

    monkeypatch.setattr(Forward, "__call__", counted)
    return calls


def labels(paths: list[str]) -> list[str]:
    return [Path(path).parent.name for path in paths]


def test_nothing_is_computed_twice(features: ImageFeatures, paths: list[str], forwarded: list[int]) -> None:
    first = features.fit_transform(paths)
    assert (first.dtype, first.shape) == (np.float32, (24, features.n_features_out_))
    assert sum(forwarded) == 24
    again = clone(features).fit_transform([*paths[::-1], paths[3]])
    assert sum(forwarded) == 24
    np.testing.assert_array_equal(again, [*first[::-1], first[3]])


def test_images_are_taken_in_every_form(features: ImageFeatures, paths: list[str]) -> None:
    wanted = features.fit_transform(paths[:4])
    opened = [Image.open(path).convert("RGB") for path in paths[:4]]
    for form in (
        [Path(path) for path in paths[:4]],
        np.array(paths[:4]),
        np.array(paths[:4], dtype=object)[:, None],
        [Path(path).read_bytes() for path in paths[:4]],
        opened,
        [np.asarray(image) for image in opened],
        np.stack([np.asarray(image) for image in opened]),
        [paths[0], opened[1], Path(paths[2]).read_bytes(), np.asarray(opened[3])],
    ):
        np.testing.assert_array_equal(features.transform(form), wanted)
    assert features.transform([]).shape == (0, features.n_features_out_)


def test_columns_of_tables_are_taken(features: ImageFeatures, paths: list[str]) -> None:
    wanted = features.fit_transform(paths[:4])
    for library in ("pandas", "polars"):
        module = pytest.importorskip(library)
        table = module.DataFrame({"path": paths[:4]})
        np.testing.assert_array_equal(features.transform(table["path"]), wanted)
        np.testing.assert_array_equal(features.transform(table[["path"]]), wanted)
        framed = clone(features).set_output(transform=library).fit_transform(table["path"])
        assert list(framed.columns)[:2] == ["imagefeatures0", "imagefeatures1"]


def test_they_work_in_pipelines_and_folds(features: ImageFeatures, paths: list[str]) -> None:
    whole = make_pipeline(features, LogisticPath(strengths=3, folds=2)).fit(paths, labels(paths))
    assert set(whole.predict(paths[:2])) <= {"cat", "dog"}
    again = pickle.loads(pickle.dumps(whole))
    np.testing.assert_array_equal(again.predict_proba(paths[:2]), whole.predict_proba(paths[:2]))
    assert len(cross_val_score(whole, paths, labels(paths), cv=2)) == 2


@pytest.mark.slow
def test_they_work_in_searches_across_processes(features: ImageFeatures, paths: list[str]) -> None:
    whole = make_pipeline(features, LogisticPath(strengths=3, folds=2))
    grid = {"imagefeatures__settings": [SMALL, (*SMALL, "backbone.layer=stage2")]}
    search = GridSearchCV(whole, grid, cv=2, n_jobs=2).fit(paths, labels(paths))
    assert 0 <= search.best_score_ <= 1


def test_a_bad_image_is_named_and_never_left_out(features: ImageFeatures, paths: list[str], tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="1 of 3 images cannot be embedded") as caught:
        features.fit_transform([paths[0], str(tmp_path / "bad.jpg"), b"".join([Path(paths[1]).read_bytes()])])
    assert "bad.jpg: not an image" in str(caught.value.why)
    with pytest.raises(DataError, match="cannot be embedded"):
        features.fit_transform([str(Path(paths[0]).parent)])
    for strange in (paths[0], [3.5], np.zeros((2, 3)), np.zeros((2, 3, 3), np.uint8)):
        with pytest.raises(TypeError):
            features.fit(paths).transform(strange)


def test_the_classifier_is_the_logistic_head() -> None:
    rng = np.random.default_rng(0)
    y = np.array(["a", "b"])[np.arange(60) % 2]
    X = rng.normal(size=(60, 5)) + (y == "b")[:, None]
    fitted = LogisticPath().fit(X, y, groups=np.arange(60) // 2)
    assert fitted.selected_["C"] == fitted.C_ and fitted.selected_["folds"] == 5
    assert (fitted.coef_.shape, fitted.intercept_.shape) == ((1, 5), (1,))
    decisions = fitted.decision_function(X)
    np.testing.assert_allclose(decisions, (X.astype(np.float32) @ fitted.coef_.T + fitted.intercept_)[:, 0], atol=1e-5)
    np.testing.assert_allclose(fitted.predict_proba(X)[:, 1], 1 / (1 + np.exp(-decisions)), atol=1e-6)
    heavy = LogisticPath(class_weight={"b": 50.0}).fit(X, y)
    assert (heavy.predict(X) == "b").mean() > (fitted.predict(X) == "b").mean()
