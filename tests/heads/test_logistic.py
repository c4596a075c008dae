from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from pipeline.errors import HeadError
from pipeline.heads import choose_head, make_head, path, standardisation, stratified_group_folds
from pipeline.heads.logistic import LogisticHead
from pipeline.heads.path import StrengthPath, is_valley
from pipeline.params import HeadParams, LogisticParams

from .conftest import make_features


def head(classes: int = 3, **params: object) -> LogisticHead:
    made = make_head("logistic", HeadParams(**params), class_names=[f"c{i}" for i in range(classes)])  # type: ignore[arg-type]
    assert isinstance(made, LogisticHead)
    return made


def sklearn_curve(X: np.ndarray, y: np.ndarray, strengths: np.ndarray, folds: int) -> np.ndarray:
    """Mean log loss over all held-out rows, one scikit-learn fit at a time."""
    mean, scale = standardisation(X, True)
    X, losses = (X - mean) / scale, []
    for C in strengths:
        total = 0.0
        for train, test in stratified_group_folds(y, None, folds, 0):
            model = LogisticRegression(C=C, tol=1e-10, max_iter=20_000).fit(X[train], y[train])
            total -= model.predict_log_proba(X[test])[np.arange(len(test)), y[test]].sum()
        losses.append(total / len(y))
    return np.array(losses)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_path_is_the_one_that_scikit_learn_walks(classes: int) -> None:
    X, y = make_features(120, 16, classes)
    strengths = np.geomspace(1e-4, 1e2, 7)
    expected = sklearn_curve(X, y, strengths, 3)
    fitted = head(classes, folds=3, logistic=LogisticParams(strengths=7, c_min=1e-4, c_max=1e2, path="full")).fit(X, y)
    curve = np.array(fitted.selected["curve"])
    assert np.allclose(curve[:, 0], strengths)
    assert np.allclose(curve[:, 1], expected, rtol=2e-3)
    assert fitted.selected["C"] == pytest.approx(strengths[expected.argmin()])
    assert fitted.selected["largest_gap"] < 1e-6 and fitted.selected["certificate"]["gap"] < 1e-6


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("classes", [2, 5])
def test_the_linear_probe_of_published_tables_is_that_of_scikit_learn(classes: int) -> None:
    """Kornblith et al. 2019: not standardised, 45 strengths, by accuracy on val, refitted to train and val."""
    X, y = make_features(240, 12, classes)
    X = 0.3 * X + 0.1
    train, val, exact = np.arange(160), np.arange(160, 240), X.astype(np.float64)
    strengths = np.geomspace(1e-6, 1e5, 45)

    def model(C: float) -> LogisticRegression:
        return LogisticRegression(C=C, tol=1e-8, max_iter=20_000)

    accuracies = [model(C).fit(exact[train], y[train]).score(exact[val], y[val]) for C in strengths]
    params = HeadParams(standardize=False, logistic=LogisticParams(choose_by="val_accuracy"))
    names = [f"c{number}" for number in range(classes)]
    choice = choose_head(params, X[train], y[train], class_names=names, held_out=(X[val], y[val]))
    assert choice.head.selected["C"] == pytest.approx(strengths[np.argmax(accuracies)])
    assert choice.head.selected["val_accuracy"] == pytest.approx(max(accuracies))
    # Where two classes are equally probable, an image or two may fall to either side.
    assert np.allclose([accuracy for _, accuracy in choice.head.selected["curve"]], accuracies, atol=2.1 / len(val))
    expected = model(choice.head.selected["C"]).fit(exact, y).predict_proba(exact)
    assert np.allclose(choice.head.predict_proba(X), expected, atol=2e-3)
    assert [(selection.how, selection.on) for selection in choice.selections] == [("by accuracy", "val")]
    with pytest.raises(HeadError, match="no val"):
        choose_head(params, X[train], y[train], class_names=names)


def test_coarse_to_fine_finds_the_strength_of_the_full_path_with_fewer_solves() -> None:
    X, y = make_features(160, 30, 3)
    coarse = head().fit(X, y)
    full = head(logistic=LogisticParams(path="full")).fit(X, y)
    assert coarse.selected["path"] == "coarse" and full.selected["path"] == "full"
    assert coarse.selected["C"] == full.selected["C"]
    assert coarse.selected["solves"] < full.selected["solves"] / 2 == 45 * 5 / 2


def test_folded_logits_are_those_of_standardised_features() -> None:
    X, y = make_features(120, 16, 3)
    fitted = head().fit(X, y)
    model = LogisticRegression(C=fitted.selected["C"], tol=1e-12, max_iter=20_000)
    mean, scale = standardisation(X, True)
    scaled = (X - mean) / scale
    model.fit(scaled, y)
    assert np.allclose(fitted.predict_proba(X), model.predict_proba(scaled), atol=2e-3)
    assert (fitted.predict(X) == model.predict(scaled)).mean() > 0.99


def test_constant_features_have_no_weight() -> None:
    X, y = make_features(classes=3)
    X[:, 5], X[:, 9] = 0.1, 0.0
    fitted = head().fit(X, y)
    assert fitted.layers is not None and not fitted.layers.weights[0][:, [5, 9]].any()
    X[:, 5] = 1000.0
    assert np.isfinite(fitted.predict_proba(X)).all()


@pytest.mark.parametrize("kind", ["logistic", "linear", "svm", "knn"])
def test_a_feature_that_hardly_varies_on_train_may_vary_elsewhere(kind: str) -> None:
    X, y = make_features(200, 24, 3, spread=2.0)
    X[:, 5] = 0
    X[[3, 50, 90], 5] = 1e-6, 2e-6, 1e-6  # a unit that hardly ever fires
    other = X.copy()
    other[:, 5] = np.where(np.arange(200) % 2, 0.02, 0.0)  # and does so on other images
    fitted = make_head(kind, HeadParams(kind=kind), class_names=["a", "b", "c"]).fit(X, y)
    assert (fitted.predict(other) == fitted.predict(X)).mean() > 0.95
    assert np.allclose(fitted.predict_proba(other), fitted.predict_proba(X), atol=0.25)


def test_what_varies_is_scaled_by_its_deviation() -> None:
    X, _ = make_features(200, 24, 3)
    mean, scale = standardisation(X, True)
    least = np.median(X.std(axis=0)) / np.sqrt(200)
    assert np.allclose(scale, np.maximum(X.std(axis=0), least)) and (scale > X.std(axis=0) * 1.01).any()
    z = (np.concatenate([X, X[:1] + 10]) - mean) / scale
    assert z[:200].std(axis=0).max() < 1.001


@pytest.mark.parametrize("shots", [1, 2, 3, 5])
def test_few_shots_choose_something_sane_and_warn(shots: int) -> None:
    rng = np.random.default_rng(shots)
    y = np.repeat(np.arange(6), shots)
    X = (rng.normal(size=(len(y), 40)) + 2 * np.eye(6, 40)[y] * 3).astype(np.float32)
    fitted = head(6).fit(X, y)
    assert fitted.predict(X).tolist() == y.tolist()
    assert np.isfinite(fitted.predict_proba(X)).all()
    if shots < 5:
        assert fitted.warnings
    if shots == 1:
        assert fitted.selected["C"] == 1.0 and "cannot be chosen" in fitted.warnings[0]


def test_a_row_that_nobody_could_know_does_not_move_the_choice() -> None:
    X, y = make_features(120, 16, 2)
    alone = head(3).fit(X, y)
    odd = (X.mean(axis=0) + 3 * X.std(axis=0))[None]
    lonely = head(3).fit(np.concatenate([X, odd]), np.r_[y, 2])
    assert "did not take part" in lonely.warnings[0]
    ratio = lonely.selected["C"] / alone.selected["C"]
    assert 0.05 < ratio < 20
    assert lonely.predict(odd).tolist() == [2]


def test_two_hundred_classes() -> None:
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(200), 3)
    X = (rng.normal(size=(200, 24))[y] * 2 + rng.normal(size=(600, 24))).astype(np.float32)
    fitted = head(200, logistic=LogisticParams(strengths=9), folds=3).fit(X, y)
    assert fitted.predict_proba(X).shape == (600, 200)
    assert (fitted.predict(X) == y).mean() > 0.8
    assert fitted.selected["largest_gap"] < 1e-5 and fitted.selected["certificate"]["gap"] < 1e-7


def test_groups_stay_together_so_copies_do_not_flatter() -> None:
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(60, 10)).astype(np.float32), rng.integers(0, 2, 60)
    X, y, groups = np.repeat(X, 4, axis=0), np.repeat(y, 4), np.repeat(np.arange(60), 4)
    torn, kept = head(2).fit(X, y), head(2).fit(X, y, groups)
    assert kept.selected["C"] < torn.selected["C"]
    assert kept.selected["cv_log_loss"] > torn.selected["cv_log_loss"]


def test_class_weights_move_the_prediction() -> None:
    X, y = make_features(200, 8, 2, spread=0.3)
    keep = np.flatnonzero((y == 0) | (np.arange(200) % 5 == 0))
    X, y = X[keep], y[keep]
    plain = head(2).fit(X, y)
    balanced = head(2, class_weight="balanced").fit(X, y)
    named = head(2, class_weight={"c1": 50.0}).fit(X, y)
    counts = [int((fitted.predict(X) == 1).sum()) for fitted in (plain, balanced, named)]
    assert counts[0] < counts[1] < counts[2]
    with pytest.raises(HeadError, match="no class called 'c9'"):
        head(2, class_weight={"c9": 2.0}).fit(X, y)


def test_temperature_is_folded_in_and_lowers_the_loss() -> None:
    X, y = make_features(150, 60, 3, spread=0.15)
    params = LogisticParams(strengths=1, c_min=1e3, c_max=1e3)  # far too weak a penalty: over-confident
    plain, cooled = head(logistic=params).fit(X, y), head(logistic=params, calibrate="temperature").fit(X, y)
    selected = cooled.selected
    assert selected["temperature"] > 2
    assert selected["ece_after"] < selected["ece_before"]
    assert selected["cv_log_loss_calibrated"] < selected["cv_log_loss"]
    assert plain.layers is not None and cooled.layers is not None
    expected = plain.layers.weights[0] / selected["temperature"]
    assert np.allclose(cooled.layers.weights[0], expected)
    assert (plain.predict(X) == cooled.predict(X)).all()


def test_an_edge_of_the_grid_is_said() -> None:
    X, y = make_features()
    fitted = head(logistic=LogisticParams(strengths=5, c_min=1e-9, c_max=1e-7)).fit(X, y)
    assert any("head.logistic.c_max" in warning for warning in fitted.warnings)


def test_targets_need_not_begin_at_zero() -> None:
    X, y = make_features(classes=3)
    fitted = head(9).fit(X, y * 3 + 1)
    assert fitted.classes_.tolist() == [1, 4, 7]
    assert set(fitted.predict(X)) <= {1, 4, 7}


def test_bad_input_is_refused() -> None:
    X, y = make_features()
    X[3, 2] = np.nan
    with pytest.raises(HeadError, match="NaN"):
        head().fit(X, y)
    with pytest.raises(HeadError, match="two classes"):
        head().fit(X[:5, :1] * 0, np.zeros(5, dtype=np.int64))
    with pytest.raises(HeadError, match="no parameter to search"):
        head(search={"C": [1.0]})


def test_the_same_data_give_the_same_bits() -> None:
    X, y = make_features()
    first, second = head().fit(X, y), head().fit(X, y)
    assert first.predict_proba(X).tobytes() == second.predict_proba(X).tobytes()


def test_fit_draws_nothing_from_the_global_generators() -> None:
    X, y = make_features()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    head().fit(X, y)
    assert torch.equal(before, torch.get_rng_state())


def test_valleys() -> None:
    assert is_valley([3, 2, 1, 2, 3]) and is_valley([3, 2, 1]) and is_valley([1, 2, 3]) and is_valley([1, 1, 1])
    assert not is_valley([3, 1, 2, 1.5, 3])


@pytest.mark.parametrize("strengths", [1, 2, 3, 13, 45])
def test_the_full_path_of_large_problems_is_certified_at_every_strength(
    strengths: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    X, y = make_features(150, 40, 3)
    params = LogisticParams(strengths=strengths, c_min=1e-6, c_max=1e5 if strengths > 1 else 1e-6, path="full")
    ascending = head(logistic=params).fit(X, y)
    monkeypatch.setattr(StrengthPath, "_strengths_per_batch", lambda self, least=0: 3 if least else 1)
    halving = head(logistic=params).fit(X, y)
    assert halving.selected["largest_gap"] < 1e-6
    assert np.allclose(np.array(halving.selected["curve"]), np.array(ascending.selected["curve"]), rtol=2e-3)
    assert halving.selected["C"] == ascending.selected["C"]


def test_hopeless_strengths_are_solved_loosely_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    X, y = make_features(150, 40, 3, spread=0.3)
    X, y = np.r_[X, X[:20]], np.r_[y, (y[:20] + 1) % 3]  # twins that disagree: the classes cannot be separated
    params = LogisticParams(path="full", c_max=1e3)
    exact = head(logistic=params).fit(X, y)
    assert exact.selected["largest_gap"] == exact.selected["loosest_gap"] < 1e-7
    monkeypatch.setattr(StrengthPath, "_strengths_per_batch", lambda self, least=0: 1)
    monkeypatch.setattr(path, "HOPELESS_ITERATIONS", 1)
    loose = head(logistic=params).fit(X, y)
    assert loose.selected["largest_gap"] < 1e-7 < loose.selected["loosest_gap"]
    assert len(loose.selected["curve"]) == params.strengths
    assert loose.selected["C"] == exact.selected["C"]
    assert loose.selected["cv_log_loss"] == pytest.approx(exact.selected["cv_log_loss"], rel=1e-4)
