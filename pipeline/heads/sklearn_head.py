"""Any scikit-learn classifier as a head."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn import config_context
from sklearn.base import BaseEstimator
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import has_fit_parameter

from ..errors import HeadError
from ..params import HeadParams
from ..runtime.seeds import derive_seed
from .base import (
    CHUNK_ROWS,
    Features,
    Floats,
    Ints,
    check_training_data,
    class_weights,
    in_chunks,
    one_library_thread,
    softmax,
)
from .calibration import calibrate
from .crossval import OutOfFold, Scores, align, best_candidate, candidates, out_of_fold
from .estimators import check_parameters, resolve_estimator
from .folds import Fold, stratified_group_folds

INDEPENDENT = frozenset(
    {
        "DecisionTreeClassifier",
        "ExtraTreeClassifier",
        "ExtraTreesClassifier",
        "GradientBoostingClassifier",
        "HistGradientBoostingClassifier",
        "KNeighborsClassifier",
        "NearestCentroid",
        "NuSVC",
        "RandomForestClassifier",
        "SVC",
    }
)
NO_PROBABILITIES = "{} has neither predict_proba nor a decision function with one value a class"


class SklearnHead:
    """A scikit-learn classifier behind `StandardScaler` in a `Pipeline`.

    `predict` is the estimator's own. Where it has no ``predict_proba``, probabilities are a softmax of its decision
    function at a temperature fitted on out-of-fold decisions of train. Where it has neither, ``has_probabilities`` is
    False. Rows are predicted in chunks of one fixed size, so that a row's answer does not depend on its neighbours.
    """

    def __init__(
        self,
        kind: str,
        estimator: str,
        estimator_params: dict[str, Any],
        params: HeadParams,
        *,
        class_names: Sequence[str],
        jobs: int = 1,
    ) -> None:
        self.kind, self.estimator, self.estimator_params = kind, estimator, dict(estimator_params)
        self.params, self.class_names, self.jobs = params, tuple(class_names), jobs
        check_parameters(resolve_estimator(estimator), estimator_params, "head.sklearn.params")
        self._candidates = candidates(params.search, kind, params.kinds)
        for values in self._candidates:
            check_parameters(resolve_estimator(estimator), values, "head.search")
        self.classes_: Ints = np.empty(0, dtype=np.int64)
        self.pipeline: Pipeline | None = None
        self.temperature = 1.0
        self.source: str | None = None
        self.has_probabilities = True
        self.why_no_probabilities: str | None = None
        self.selected: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.warnings: tuple[str, ...] = ()
        self.out_of_fold: Floats | None = None

    def fit(self, X: Features, y: Ints, groups: Ints | None = None) -> Self:
        """Search parameters where asked, fit on all rows, and calibrate on out-of-fold scores where needed."""
        started = time.perf_counter()
        X, self.classes_, index = check_training_data(X, y)
        self.selected, self.warnings = {"estimator": self.estimator}, ()
        if self._candidates:
            self._search(X, index, groups)
        self.selected["params"] = dict(self.estimator_params)
        self.pipeline = self._fitted_pipeline(X, index, self.jobs)
        self._find_probabilities(X, index, groups)
        self.selected["seconds"] = time.perf_counter() - started
        return self

    def _search(self, X: Features, index: Ints, groups: Ints | None) -> None:
        models = [self.configured(values) for values in self._candidates]
        folds = stratified_group_folds(index, groups, self.params.folds, self.params.seed)
        best, rows = best_candidate(models, self._candidates, X, index, groups, folds, jobs=self.jobs)
        self.selected["search"] = rows
        self.estimator_params |= self._candidates[best]

    def configured(self, values: dict[str, Any]) -> SklearnHead:
        """An unfitted head with some parameters replaced and nothing left to search."""
        params = self.params.model_copy(update={"search": {}})
        merged = {**self.estimator_params, **values}
        head = SklearnHead(self.kind, self.estimator, merged, params, class_names=self.class_names)
        head.classes_ = self.classes_
        return head

    def _fitted_pipeline(self, X: Features, index: Ints, jobs: int) -> Pipeline:
        pipeline, arguments = self._make_pipeline(index, jobs)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                pipeline.fit(X, index, **arguments)
        except (ValueError, TypeError, AttributeError, np.linalg.LinAlgError) as error:
            raise HeadError(
                f"{self.estimator} cannot be fitted.",
                where=f"{len(X)} rows, {len(np.unique(index))} classes",
                why=str(error).strip(),
                remedy="correct head.sklearn.params or choose another head",
            ) from error
        texts = dict.fromkeys(str(item.message).strip().splitlines()[0] for item in caught)
        self.warnings += tuple(f"{self.estimator}: {text}" for text in texts)
        if "n_jobs" in pipeline[-1].get_params():
            pipeline[-1].set_params(n_jobs=1)
        return pipeline

    def _make_pipeline(self, index: Ints, jobs: int) -> tuple[Pipeline, dict[str, Any]]:
        """An unfitted pipeline, and the arguments for its `fit`."""
        kind = resolve_estimator(self.estimator)
        names = kind._get_param_names()
        values = dict(self.estimator_params)
        if "random_state" in names:
            values.setdefault("random_state", derive_seed("sklearn", self.estimator, self.params.seed) % 2**31)
        if "n_jobs" in names:
            values.setdefault("n_jobs", jobs)
        if self.estimator in ("knn", "sklearn.neighbors.KNeighborsClassifier"):
            values.setdefault("n_neighbors", min(5, len(index)))
        arguments = self._class_weight(kind, values, index)
        try:
            estimator = kind(**values)
        except TypeError as error:
            raise HeadError(f"{self.estimator} cannot be made.", why=str(error)) from error
        steps = [("scale", StandardScaler())] if self.params.standardize else []
        return Pipeline([*steps, ("classify", estimator)]), arguments

    def _class_weight(self, kind: type[BaseEstimator], values: dict[str, Any], index: Ints) -> dict[str, Any]:
        setting = self.params.class_weight
        if setting is None:
            return {}
        weights = class_weights(setting, self.classes_[np.unique(index)], _compact(index), self.class_names)
        if "class_weight" in kind._get_param_names():
            values.setdefault("class_weight", dict(zip(np.unique(index).tolist(), weights.tolist(), strict=True)))
            return {}
        if has_fit_parameter(kind, "sample_weight"):
            return {"classify__sample_weight": weights[_compact(index)]}
        raise HeadError(
            f"{self.estimator} cannot weight classes.",
            where="head.class_weight",
            remedy="remove head.class_weight, or choose logistic, linear, mlp, svm, ridge or random_forest",
        )

    def _find_probabilities(self, X: Features, index: Ints, groups: Ints | None) -> None:
        """Where probabilities come from, and their temperature."""
        assert self.pipeline is not None
        self.source = _source(self.pipeline, X, len(self.classes_))
        self.has_probabilities = self.source is not None
        self.why_no_probabilities = None if self.source else NO_PROBABILITIES.format(self.estimator)
        wanted = self.params.calibrate == "temperature" and self.source is not None
        if self.source == "decision_function" or wanted:
            self._calibrate(self.cross_validate(X, self.classes_[index], groups), index)

    def _calibrate(self, result: OutOfFold, index: Ints) -> None:
        if result.logits is None or not result.known.any():
            self.has_probabilities = self.source == "predict_proba"
            self.why_no_probabilities = "too few images to calibrate the decision function out of fold"
            return
        self.temperature, record = calibrate(result.logits, index, result.known)
        self.selected |= record
        self.selected |= {
            "cv_accuracy": result.accuracy(index),
            "cv_log_loss": result.log_loss(index, self.temperature),
        }
        self.out_of_fold = softmax(result.logits / self.temperature)

    def cross_validate(self, X: Features, y: Ints, groups: Ints | None = None) -> OutOfFold:
        """Out-of-fold predictions and logits of the present parameters, on the folds of ``head.folds``."""
        X, self.classes_, index = check_training_data(X, y)
        folds = stratified_group_folds(index, groups, self.params.folds, self.params.seed)
        return out_of_fold([self.configured({})], X, index, groups, folds, jobs=self.jobs)[0]

    def fit_fold(self, X: Features, index: Ints, groups: Ints | None, fold: Fold) -> Scores:
        """Class positions and logits of a fold's held-out rows."""
        train, test = fold
        classes = len(self.classes_)
        if len(np.unique(index[train])) < 2:
            only = index[train][0]
            return np.full(len(test), only), align(np.zeros((len(test), 1)), np.array([only]), classes)
        pipeline = self._fitted_pipeline(X[train], index[train], 1)
        predicted = by_rows(pipeline, "predict", X[test]).astype(np.int64)
        source = _source(pipeline, X, len(pipeline.classes_))
        if source is None:
            return predicted, None
        return predicted, align(_logits(pipeline, source, X[test]), pipeline.classes_, classes)

    def predict(self, X: Features) -> Ints:
        """The estimator's own prediction (n,)."""
        with one_library_thread(), config_context(assume_finite=True):
            return np.asarray(self.classes_[by_rows(self._fitted(), "predict", X).astype(np.int64)])

    def predict_proba(self, X: Features) -> Floats:
        """The estimator's own probabilities (n, c), or those calibrated from its decision function.

        Raises:
            HeadError: the estimator has neither.
        """
        if self.source is None or not self.has_probabilities:
            raise HeadError("This head gives no probabilities.", why=self.why_no_probabilities)
        pipeline, source = self._fitted(), self.source
        with one_library_thread(), config_context(assume_finite=True):
            if source == "predict_proba" and self.temperature == 1.0:
                return by_rows(pipeline, source, X).astype(np.float64)
            return softmax(_logits(pipeline, source, X) / self.temperature)

    def parameter_count(self) -> int | None:
        """Size of the linear layer, or of the layers of an MLP; None for other estimators."""
        last = self._fitted()[-1]
        if hasattr(last, "coefs_"):
            return int(sum(array.size for array in (*last.coefs_, *last.intercepts_)))
        if isinstance(getattr(last, "coef_", None), np.ndarray) and hasattr(last, "intercept_"):
            return int(last.coef_.size + np.size(last.intercept_))
        return None

    def _fitted(self) -> Pipeline:
        if self.pipeline is None:
            raise RuntimeError("the head is not fitted")
        return self.pipeline


def _compact(index: Ints) -> Ints:
    return np.asarray(np.unique(index, return_inverse=True)[1], dtype=np.int64)


def by_rows(pipeline: Pipeline, method: str, X: NDArray[Any]) -> NDArray[Any]:
    """A method of the last step over rows (n, d), such that a row's result depends on that row alone.

    Estimators in `INDEPENDENT` compute each row by itself, or with products in float64 whose rows do not depend on
    their place: they get chunks of one shape. The rest get one row at a time, since the last bits of a float32
    product depend on the row's place in the batch.
    """
    X = np.ascontiguousarray(X, dtype=np.float32)
    for _, step in pipeline.steps[:-1]:
        X = step.transform(X) if len(X) else X
    call = getattr(pipeline[-1], method)
    independent = type(pipeline[-1]).__name__ in INDEPENDENT
    return in_chunks(call, X, CHUNK_ROWS if independent else 1)


def _source(pipeline: Pipeline, X: Features, classes: int) -> str | None:
    """The method that probabilities can be made of, if there is one."""
    if hasattr(pipeline, "predict_proba"):
        return "predict_proba"
    if not hasattr(pipeline, "decision_function"):
        return None
    shape = np.shape(pipeline.decision_function(X[:1]))
    return "decision_function" if shape == ((1,) if classes == 2 else (1, classes)) else None


def _logits(pipeline: Pipeline, source: str, X: Features) -> Floats:
    """Logits (n, c): logarithms of probabilities, or decision values; one value becomes minus and plus its half."""
    values = by_rows(pipeline, source, X).astype(np.float64)
    if source == "predict_proba":
        return np.asarray(np.log(np.maximum(values, np.finfo(np.float64).tiny)))
    return np.stack([-0.5 * values, 0.5 * values], axis=1) if values.ndim == 1 else values
