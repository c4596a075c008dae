from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import skops.io
from safetensors.numpy import save_file as save_tensors
from sklearn.neighbors import KNeighborsClassifier

from pipeline.errors import HeadError, RunError
from pipeline.heads import KINDS, load_head, make_head, sklearn_head
from pipeline.heads.sklearn_head import SklearnHead
from pipeline.params import HeadParams, SklearnParams

from .conftest import make_features

NAMES = [f"c{i}" for i in range(12)]
EVERY_KIND = [*KINDS, "sklearn.naive_bayes.GaussianNB", "sklearn.linear_model.LogisticRegression"]
SLOW = (
    "gradient_boosting",
    "random_forest",
)  # a tree a class and iteration; its rows are the same code for any classes


def fitted(kind: str, classes: int = 3, **params: object):  # type: ignore[no-untyped-def]
    X, y = make_features(60, 40, classes, spread=2.0)
    network = {"linear": {"epochs": 5}, "mlp": {"epochs": 5, "hidden": [100], "dropout": 0.3}}
    with tempfile.TemporaryDirectory() as folder:
        if kind == "prompts":
            params["prompts"] = Path(folder) / "texts.safetensors"
            save_tensors({"texts": np.random.default_rng(1).normal(size=(len(NAMES), X.shape[1]))}, params["prompts"])
        values = HeadParams(kind=kind, folds=2, **{**network, **params})  # type: ignore[arg-type]
        return make_head(kind, values, class_names=NAMES).fit(X, y), X


def saved(head, folder: Path):  # type: ignore[no-untyped-def]
    meta = json.loads(json.dumps(head.save(folder), allow_nan=False))
    return load_head(folder, meta), meta


@pytest.mark.parametrize(
    ("kind", "classes"), [(kind, 2) for kind in EVERY_KIND] + [(kind, 12) for kind in EVERY_KIND if kind not in SLOW]
)
def test_saved_is_loaded_and_a_row_does_not_see_its_neighbours(kind: str, classes: int, tmp_path: Path) -> None:
    head, X = fitted(kind, classes)
    loaded, meta = saved(head, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [meta["file"]]
    assert loaded.kind == kind and loaded.classes_.tolist() == head.classes_.tolist()
    predicted, probabilities = head.predict(X), head.predict_proba(X)
    assert loaded.predict(X).tobytes() == predicted.tobytes()
    assert loaded.predict_proba(X).tobytes() == probabilities.tobytes()
    for size in (1, 7):
        parts = [X[start : start + size] for start in range(0, len(X), size)]
        assert np.concatenate([loaded.predict(part) for part in parts]).tobytes() == predicted.tobytes()
        assert np.concatenate([loaded.predict_proba(part) for part in parts]).tobytes() == probabilities.tobytes()
    order = np.random.default_rng(0).permutation(len(X))
    assert loaded.predict_proba(X[order]).tobytes() == probabilities[order].tobytes()


@pytest.mark.parametrize(
    ("estimator", "params"),
    [
        ("knn", {"algorithm": "kd_tree"}),
        ("knn", {"algorithm": "ball_tree", "metric": "manhattan", "weights": "distance"}),
        ("knn", {"weights": "distance"}),
        ("mlp_sklearn", {"solver": "sgd", "max_iter": 5}),
        ("mlp_sklearn", {"solver": "lbfgs", "max_iter": 5}),
        ("lda", {"solver": "lsqr", "shrinkage": "auto"}),
        ("svm", {"kernel": "linear"}),
        ("ridge", {"alpha": 10.0}),
        ("nearest_centroid", {"shrink_threshold": 0.1}),
        ("gradient_boosting", {"max_iter": 3, "early_stopping": True}),
        ("sklearn.ensemble.ExtraTreesClassifier", {"n_estimators": 3}),
        ("sklearn.ensemble.AdaBoostClassifier", {"n_estimators": 3}),
        ("sklearn.linear_model.SGDClassifier", {"loss": "log_loss"}),
        ("sklearn.calibration.CalibratedClassifierCV", {"cv": 2}),
    ],
)
def test_other_settings_of_the_aliases_survive(estimator: str, params: dict[str, object], tmp_path: Path) -> None:
    head, X = fitted("sklearn", sklearn=SklearnParams(estimator=estimator, params=params))
    loaded, _ = saved(head, tmp_path)
    assert loaded.predict_proba(X).tobytes() == head.predict_proba(X).tobytes()
    assert loaded.predict_proba(X[5:6]).tobytes() == head.predict_proba(X)[5:6].tobytes()


class Evil:
    def __init__(self) -> None:
        self.command = "no"


def test_a_file_with_another_type_is_refused_by_name_without_importing_it(tmp_path: Path) -> None:
    head, _ = fitted("knn")
    meta = head.save(tmp_path)
    source = zipfile.ZipFile(tmp_path / SklearnHead.file)
    schema = json.loads(source.read("schema.json"))
    (tmp_path / "stranger_module.py").write_text("raise SystemExit('imported')")
    schema["content"]["content"]["steps"] = {
        "__class__": "Bomb",
        "__module__": "stranger_module",
        "__loader__": "ObjectNode",
        "content": {},
        "__id__": 999,
    }
    _rewrite(tmp_path / SklearnHead.file, source, schema)
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(RunError, match=r"stranger_module\.Bomb"):
            load_head(tmp_path, meta)
    finally:
        sys.path.remove(str(tmp_path))
    assert "stranger_module" not in sys.modules


def test_names_beside_the_file_are_never_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head, X = fitted("svm")
    record = {**head.save(tmp_path), "kind": "sklearn.stranger.Bomb", "estimator": "sklearn.stranger.Bomb"}
    looked_up: list[str] = []
    monkeypatch.setattr(sklearn_head, "resolve_estimator", looked_up.append)
    loaded = load_head(tmp_path, record)
    assert loaded.predict_proba(X).tobytes() == head.predict_proba(X).tobytes()
    assert not looked_up


@pytest.mark.parametrize(
    "node",
    [
        {"__class__": "system", "__module__": "os", "__loader__": "FunctionNode", "content": {}},
        {"__class__": "getattr", "__module__": "builtins", "__loader__": "TypeNode"},
        {"__class__": "Tree", "__module__": "sklearn.tree._tree", "__loader__": "TypeNode"},
        {"__class__": "dict", "__module__": "builtins", "__loader__": "MethodNode", "content": {}},
        {"__class__": "dict", "__loader__": "DictNode"},
        {"__class__": "SVC", "__module__": "sklearn.svm", "__loader__": "ObjectNode"},
    ],
)
def test_functions_methods_and_strange_nodes_are_refused(node: dict[str, object], tmp_path: Path) -> None:
    head, _ = fitted("svm")
    meta = head.save(tmp_path)
    source = zipfile.ZipFile(tmp_path / SklearnHead.file)
    schema = json.loads(source.read("schema.json"))
    schema["content"]["content"]["verbose"] = {**node, "__id__": 999}
    _rewrite(tmp_path / SklearnHead.file, source, schema)
    with pytest.raises(RunError, match="not allowed"):
        load_head(tmp_path, meta)


def _rewrite(file: Path, source: zipfile.ZipFile, schema: object) -> None:
    members = {name: source.read(name) for name in source.namelist() if name != "schema.json"}
    source.close()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("schema.json", json.dumps(schema))
        for name, data in members.items():
            archive.writestr(name, data)


def test_an_estimator_that_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    head, _ = fitted("knn")
    head.pipeline.steps[-1][1].metric = os.path.join  # a function in the place of a name
    with pytest.raises(HeadError, match="cannot be saved"):
        head.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_trees_that_point_outside_themselves_are_refused(tmp_path: Path) -> None:
    head, _ = fitted("sklearn.tree.DecisionTreeClassifier")
    tree = head.pipeline[-1].tree_
    state = tree.__getstate__()
    state["nodes"]["left_child"][0] = 10**6
    tree.__setstate__(state)
    meta = head.save(tmp_path)
    with pytest.raises(RunError, match="outside itself"):
        load_head(tmp_path, meta)


@pytest.mark.parametrize("kind", ["logistic", "knn"])
def test_damaged_and_missing_files_are_said(kind: str, tmp_path: Path) -> None:
    head, _ = fitted(kind)
    meta = head.save(tmp_path)
    file = tmp_path / meta["file"]
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(RunError):
        load_head(tmp_path, meta)
    file.unlink()
    with pytest.raises(RunError, match="cannot be loaded"):
        load_head(tmp_path, meta)
    with pytest.raises(RunError):
        load_head(tmp_path, {**meta, "file": "../../etc/passwd"})


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    head, _ = fitted("knn")
    meta = head.save(tmp_path)
    buffer = io.BytesIO()
    skops.io.dump(KNeighborsClassifier(), buffer)
    (tmp_path / SklearnHead.file).write_bytes(b"\x80\x04" + buffer.getvalue()[:10])
    with pytest.raises(RunError):
        load_head(tmp_path, meta)
