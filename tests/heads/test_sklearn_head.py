from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pipeline.errors import HeadError
from pipeline.heads import crossval, make_head
from pipeline.heads.sklearn_head import ALIASES, SklearnHead
from pipeline.params import HeadParams, SklearnParams

from .conftest import make_features

NAMES = ["a", "b", "c"]


def sklearn_head(kind: str, params: dict[str, object] | None = None, jobs: int = 1, **rest: object) -> SklearnHead:
    if params is not None:
        rest["sklearn"] = SklearnParams(estimator=kind, params=params)
        kind = "sklearn"
    made = make_head(kind, HeadParams(kind=kind, folds=3, **rest), class_names=NAMES, jobs=jobs)  # type: ignore[arg-type]
    assert isinstance(made, SklearnHead)
    return made


@pytest.mark.parametrize("kind", [*ALIASES, "sklearn.naive_bayes.GaussianNB", "sklearn.linear_model.Perceptron"])
def test_every_alias_learns_and_gives_probabilities(kind: str) -> None:
    X, y = make_features(90, 12, 3, spread=2.0)
    fitted = sklearn_head(kind).fit(X, y)
    assert (fitted.predict(X) == y).mean() > 0.8
    probabilities = fitted.predict_proba(X)
    assert probabilities.shape == (90, 3) and np.allclose(probabilities.sum(axis=1), 1)
    assert (probabilities >= 0).all()


def test_predict_is_the_estimators_own() -> None:
    X, y = make_features(90, 12, 3)
    fitted = sklearn_head("ridge").fit(X, y)
    own = make_pipeline(StandardScaler(), RidgeClassifier(random_state=0)).fit(X, y)
    assert (fitted.predict(X) == own.predict(X)).all()


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("kind", ["svm", "ridge"])
def test_missing_probabilities_are_calibrated_out_of_fold(kind: str, classes: int) -> None:
    X, y = make_features(150, 12, classes, spread=0.8)
    fitted = sklearn_head(kind).fit(X, y)
    assert fitted.source == "decision_function" and fitted.temperature != 1
    assert fitted.selected["ece_after"] < fitted.selected["ece_before"]
    # ranks follow the decision function, so that probabilities never contradict the prediction
    assert (fitted.classes_[fitted.predict_proba(X).argmax(axis=1)] == fitted.predict(X)).mean() > 0.98
    # over-fitted on its own rows, it must not claim more than it could show out of fold
    assert fitted.out_of_fold is not None and fitted.out_of_fold.probabilities().shape == (150, classes)  # type: ignore[union-attr]


def test_an_estimator_with_neither_says_so() -> None:
    X, y = make_features(60, 6, 3)
    fitted = sklearn_head("sklearn.svm.SVC", {"decision_function_shape": "ovo", "kernel": "linear"}).fit(X, y)
    X4, y4 = make_features(90, 6, 4)
    fitted = sklearn_head("sklearn.svm.SVC", {"decision_function_shape": "ovo"}).fit(X4, y4)
    assert not fitted.has_probabilities and "neither" in str(fitted.why_no_probabilities)
    assert fitted.predict(X4).shape == (90,)
    with pytest.raises(HeadError, match="no probabilities"):
        fitted.predict_proba(X4)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("svn", "svm"),
        ("random_forrest", "random_forest"),
        ("sklearn.svm.SVCC", "sklearn.svm.SVC"),
        ("LogisticRegresion", "sklearn.linear_model.LogisticRegression"),
        ("sklearn.svm.SVR", "aliases"),
        ("sklearn.base.clone", "aliases"),
        ("os.system", "aliases"),
        ("sklearn.utils.os.system", "aliases"),
        ("sklearn..svm", "aliases"),
    ],
)
def test_unknown_names_are_refused_with_near_ones(name: str, hint: str) -> None:
    with pytest.raises(HeadError) as caught:
        sklearn_head(name)
    assert hint in str(caught.value)


def test_parameters_are_checked_against_the_signature() -> None:
    with pytest.raises(HeadError) as caught:
        sklearn_head("svm", {"gama": 1.0})
    assert "gamma" in str(caught.value) and "kernel" in str(caught.value)
    X, y = make_features(60, 6, 3)
    with pytest.raises(HeadError, match="cannot be fitted"):
        sklearn_head("svm", {"C": -1.0}).fit(X, y)


def test_random_estimators_are_seeded() -> None:
    X, y = make_features(60, 6, 3)
    first, second = (sklearn_head("random_forest").fit(X, y).predict_proba(X) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert sklearn_head("random_forest", seed=1).fit(X, y).predict_proba(X).tobytes() != first.tobytes()


def test_class_weights_go_where_they_can() -> None:
    X, y = make_features(200, 8, 2, spread=0.2)
    for kind in ("svm", "sklearn.naive_bayes.GaussianNB"):  # by class_weight, by sample_weight
        plain = sklearn_head(kind).fit(X, y)
        weighted = sklearn_head(kind, class_weight={"b": 20.0}).fit(X, y)
        assert (weighted.predict(X) == 1).sum() > (plain.predict(X) == 1).sum()
    with pytest.raises(HeadError, match="cannot weight classes"):
        sklearn_head("knn", class_weight="balanced").fit(X, y)


def test_search_finds_the_better_value_whatever_the_number_of_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossval, "SECONDS_FOR_WORKERS", 0.0)
    X, y = make_features(90, 12, 3)
    rows = []
    for jobs in (1, 2):
        fitted = sklearn_head("svm", {"kernel": "rbf"}, jobs, search={"C": [1e-4, 1.0]}).fit(X, y)
        assert fitted.selected["params"] == {"kernel": "rbf", "C": 1.0}
        rows.append(fitted.selected["search"])
        assert fitted.selected["edges"] == {"C": "largest"}
        assert any("widen head.search.C to look beyond it" in warning for warning in fitted.warnings)
    assert rows[0] == rows[1] and rows[0][1]["cv_accuracy"] > rows[0][0]["cv_accuracy"]


def test_search_with_several_kinds_names_the_kind() -> None:
    kinds = {"kind": ["svm", "sklearn.naive_bayes.GaussianNB"], "folds": 3}
    search = {"svm.C": [1.0, 2.0], "sklearn.naive_bayes.GaussianNB.var_smoothing": [1e-9]}
    params = HeadParams(**kinds, search=search)  # type: ignore[arg-type]
    heads = [make_head(kind, params, class_names=NAMES) for kind in params.kinds]
    assert [len(made._candidates) for made in heads] == [2, 1]  # type: ignore[attr-defined]
    for wrong in ({"C": [1.0]}, {"svn.C": [1.0]}, {"svm.CC": [1.0]}):
        with pytest.raises(HeadError):
            make_head("svm", HeadParams(**kinds, search=wrong), class_names=NAMES)  # type: ignore[arg-type]


def test_temperature_for_an_estimator_with_probabilities_of_its_own() -> None:
    X, y = make_features(150, 12, 3, spread=0.5)
    fitted = sklearn_head("sklearn.naive_bayes.GaussianNB", calibrate="temperature").fit(X, y)
    assert fitted.temperature > 1 and fitted.selected["ece_after"] < fitted.selected["ece_before"]


def test_one_row_for_each_class_still_fits() -> None:
    X, y = np.eye(3, 8, dtype=np.float32), np.arange(3)
    assert sklearn_head("knn", {"n_neighbors": 1}).fit(X, y).predict(X).tolist() == [0, 1, 2]
    assert sklearn_head("nearest_centroid").fit(X, y).predict(X).tolist() == [0, 1, 2]
