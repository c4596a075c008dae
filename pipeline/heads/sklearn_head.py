"""Any scikit-learn classifier as a head, by alias or dotted path.

scikit-learn is imported where it is used: that takes longer than to train the default head.
"""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import HeadError
from ..features.rows import Rows
from ..files import read_regular_file
from ..runtime.seeds import derive_seed
from .base import Head
from .common import CHUNK_ROWS, LOG_FLOOR, Features, Floats, Ints, near, one_library_thread, standardisation
from .sums import fit_to_sums, learns_from_sums

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator
    from sklearn.pipeline import Pipeline

ALIASES = {
    "svm": "sklearn.svm.SVC",
    "knn": "sklearn.neighbors.KNeighborsClassifier",
    "nearest_centroid": "sklearn.neighbors.NearestCentroid",
    "ridge": "sklearn.linear_model.RidgeClassifier",
    "lda": "sklearn.discriminant_analysis.LinearDiscriminantAnalysis",
    "random_forest": "sklearn.ensemble.RandomForestClassifier",
    "gradient_boosting": "sklearn.ensemble.HistGradientBoostingClassifier",
    "mlp_sklearn": "sklearn.neural_network.MLPClassifier",
}
DOTTED = re.compile(r"sklearn(\.[A-Za-z]\w*)+")
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


class SklearnHead(Head):
    """A scikit-learn classifier behind `StandardScaler` in a `Pipeline`.

    `predict` is the estimator's own. Where it has no ``predict_proba``, probabilities are a softmax of its decision
    function at a temperature fitted on out-of-fold decisions of train. Where it has neither, ``has_probabilities`` is
    False. Rows are predicted in chunks of one fixed size, so that a row's answer does not depend on its neighbours.
    Those of a file are read by blocks where the estimator learns from sums (``by_blocks``), else held in memory.
    """

    file = "head.skops"

    def configure(self) -> None:
        """An estimator and its parameters from ``head.sklearn``, or the one that the kind names."""
        named = self.kind == "sklearn"
        self.estimator = self.params.sklearn.estimator if named else self.kind
        self.estimator_params = dict(self.params.sklearn.params) if named else {}
        self.pipeline: Pipeline | None = None
        self.source: str | None = None

    @property
    def by_blocks(self) -> bool:
        """Whether class means and a scatter are all that the estimator learns from."""
        return learns_from_sums(resolve_estimator(self.estimator), self.estimator_params)

    def check(self) -> None:
        """Refuse an estimator that does not exist, and parameters that it does not have."""
        check_parameters(resolve_estimator(self.estimator), self.estimator_params, "head.sklearn.params")
        super().check()

    def replace(self, values: Mapping[str, Any]) -> None:
        """Take over parameters of the estimator."""
        check_parameters(resolve_estimator(self.estimator), values, "head.search")
        self.estimator_params |= values

    def learn(self, X: Features, index: Ints, groups: Ints | None) -> None:
        """Fit scaler and estimator, and find where probabilities come from."""
        self.selected = {"estimator": self.estimator, **self.selected, "params": dict(self.estimator_params)}
        self.pipeline = self._fitted_pipeline(X, index)
        self.source = _source(self.pipeline, X, len(self.classes_))
        self.has_probabilities = self.source is not None
        self.why_no_probabilities = None if self.source else NO_PROBABILITIES.format(self.estimator)

    def _fitted_pipeline(self, X: Features, index: Ints) -> Pipeline:
        from sklearn.pipeline import Pipeline

        estimator, arguments = self._make_estimator(index)
        if isinstance(X, Rows) and not self.by_blocks:  # as one of several candidates
            X = X[:]
        scaler = _scaler(X) if self.params.standardize else None
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if isinstance(X, Rows):
                    moments = standardisation(X, False) if scaler is None else (scaler.mean_, scaler.scale_)
                    centred = scaler is not None
                    fit_to_sums(estimator, X, index, self._class_weights(index), moments, centred=centred)
                else:
                    estimator.fit(X if scaler is None else scaler.transform(X), index, **arguments)
        except (ValueError, TypeError, AttributeError, np.linalg.LinAlgError) as error:
            raise HeadError(
                f"{self.estimator} cannot be fitted.",
                where=f"{len(X)} rows, {len(np.unique(index))} classes",
                why=str(error).strip(),
                remedy="correct head.sklearn.params or choose another head",
            ) from error
        texts = dict.fromkeys(str(item.message).strip().splitlines()[0] for item in caught)
        self.warnings += tuple(f"{self.estimator}: {text}" for text in texts)
        if "n_jobs" in estimator.get_params():
            estimator.set_params(n_jobs=1)
        return Pipeline([*([("scale", scaler)] if scaler is not None else []), ("classify", estimator)])

    def _make_estimator(self, index: Ints) -> tuple[Any, dict[str, Any]]:
        """An unfitted estimator, and the arguments for its `fit`."""
        kind = resolve_estimator(self.estimator)
        names = kind._get_param_names()
        values = dict(self.estimator_params)
        if "random_state" in names:
            values.setdefault("random_state", derive_seed("sklearn", self.estimator, self.params.seed) % 2**31)
        if "n_jobs" in names:
            values.setdefault("n_jobs", self.jobs)
        if self.estimator in ("knn", "sklearn.neighbors.KNeighborsClassifier"):
            values.setdefault("n_neighbors", min(5, len(index)))
        arguments = self._class_weight(kind, values, index)
        try:
            return kind(**values), arguments
        except TypeError as error:
            raise HeadError(f"{self.estimator} cannot be made.", why=str(error)) from error

    def _class_weight(self, kind: type[BaseEstimator], values: dict[str, Any], index: Ints) -> dict[str, Any]:
        from sklearn.utils.validation import has_fit_parameter

        if self.params.class_weight is None:
            return {}
        weights = self._class_weights(index)
        if "class_weight" in kind._get_param_names():
            values.setdefault("class_weight", dict(enumerate(weights.tolist())))
            return {}
        if has_fit_parameter(kind, "sample_weight"):
            return {"sample_weight": weights[index]}
        raise HeadError(
            f"{self.estimator} cannot weight classes.",
            where="head.class_weight",
            remedy="remove head.class_weight, or choose logistic, linear, mlp, svm, ridge or random_forest",
        )

    def calibrate(self, X: Features, index: Ints, groups: Ints | None) -> None:
        """Choose a temperature out of fold for a decision function, and where the params ask for one."""
        if self.source is None or (self.source == "predict_proba" and self.params.calibrate != "temperature"):
            return
        result = self._across_folds(X, index, groups)
        if result.logits is None or not result.known.any():
            self.has_probabilities = self.source == "predict_proba"
            self.why_no_probabilities = "too few images to calibrate the decision function out of fold"
        else:
            self._cool(result)

    def logits(self, X: Features) -> Floats:
        """Logarithms of probabilities, or decision values; one value becomes minus and plus its half."""
        assert self.source is not None
        values = by_rows(self._fitted(), self.source, X).astype(np.float64)
        if self.source == "predict_proba":
            return np.asarray(np.log(np.maximum(values, LOG_FLOOR)))
        return np.stack([-0.5 * values, 0.5 * values], axis=1) if values.ndim == 1 else values

    def predict(self, X: Features) -> Ints:
        """The estimator's own prediction (n,)."""
        with _predicting():
            return np.asarray(self.classes_[by_rows(self._fitted(), "predict", X).astype(np.int64)])

    def predict_proba(self, X: Features) -> Floats:
        """The estimator's own probabilities (n, c), or those calibrated from its decision function."""
        with _predicting():
            if self.has_probabilities and self.source == "predict_proba" and self.temperature == 1:
                return by_rows(self._fitted(), self.source, X).astype(np.float64)
            return super().predict_proba(X)

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

    def write(self, file: Path) -> dict[str, Any]:
        """A skops file, in which every name is on the allow-list.

        Raises:
            HeadError: the estimator holds a type that could not be loaded again (some meta-estimators).
        """
        from .sklearn_file import pipeline_bytes

        file.write_bytes(pipeline_bytes(self._fitted(), self.estimator))
        return {
            "estimator": self.estimator,
            "temperature": self.temperature,
            "source": self.source,
            "has_probabilities": self.has_probabilities,
            "why_no_probabilities": self.why_no_probabilities,
        }

    def read(self, file: Path, record: Mapping[str, Any]) -> None:
        """A pipeline whose every type is on the allow-list; the names in ``record`` are kept as text.

        Raises:
            RunError: the file names another type, which is neither imported nor constructed.
        """
        from .sklearn_file import load_pipeline

        self.pipeline = load_pipeline(read_regular_file(file), file)
        self.estimator, self.temperature = str(record["estimator"]), float(record["temperature"])
        self.source, self.has_probabilities = record["source"], bool(record["has_probabilities"])
        self.why_no_probabilities = record["why_no_probabilities"]
        if self.source not in (None, "predict_proba", "decision_function"):
            raise ValueError(f"probabilities cannot come from {self.source!r}")


# -- rows -----------------------------------------------------------------------------------------------------------


@contextmanager
def _predicting() -> Iterator[None]:
    """One thread, and no check of values that extraction has checked."""
    from sklearn import config_context

    with one_library_thread(), config_context(assume_finite=True):
        yield


def by_rows(pipeline: Pipeline, method: str, X: NDArray[Any]) -> NDArray[Any]:
    """A method of the last step over rows (n, d), such that a row's result depends on that row alone.

    Estimators in `INDEPENDENT` compute each row by itself, or with products in float64 whose rows do not depend on
    their place: they get chunks of one shape. The rest get one row at a time, since the last bits of a float32
    product depend on the row's place in the batch.
    """
    if isinstance(X, Rows) and len(X):
        return np.concatenate([by_rows(pipeline, method, X[rows]) for rows in X.blocks()])
    X = np.ascontiguousarray(X, dtype=np.float32)
    for _, step in pipeline.steps[:-1]:
        X = step.transform(X) if len(X) else X
    call = getattr(pipeline[-1], method)
    independent = type(pipeline[-1]).__name__ in INDEPENDENT
    return in_chunks(call, X, CHUNK_ROWS if independent else 1)


def in_chunks(function: Callable[[NDArray[Any]], NDArray[Any]], X: NDArray[Any], rows: int) -> NDArray[Any]:
    """``function`` over ``X`` in chunks of exactly ``rows`` rows, the last one padded with copies of its last row.

    Libraries pick their arithmetic by the shape of a call; one shape for all calls keeps a row's result free of
    how many rows stand beside it.
    """
    if not len(X):
        return np.asarray(function(np.zeros((rows, X.shape[1]), dtype=X.dtype))[:0])
    results = []
    for start in range(0, len(X), rows):
        chunk = X[start : start + rows]
        if len(chunk) < rows:
            chunk = np.concatenate([chunk, np.repeat(chunk[-1:], rows - len(chunk), axis=0)])
        results.append(function(np.ascontiguousarray(chunk))[: len(X) - start])
    return np.concatenate(results)


def _scaler(X: Features) -> Any:
    """A fitted `StandardScaler` that divides by the scale of all heads."""
    from sklearn.preprocessing import StandardScaler

    if isinstance(X, Rows):
        scaler = StandardScaler().fit(X[:1])
        scaler.mean_, scaler.scale_ = standardisation(X, True)
        scaler.var_, scaler.n_samples_seen_ = np.square(scaler.scale_), np.int64(len(X))
        return scaler
    scaler = StandardScaler().fit(X)
    scaler.scale_ = standardisation(X, True)[1]
    return scaler


def _source(pipeline: Pipeline, X: Features, classes: int) -> str | None:
    """The method that probabilities can be made of, if there is one."""
    if hasattr(pipeline, "predict_proba"):
        return "predict_proba"
    if not hasattr(pipeline, "decision_function"):
        return None
    shape = np.shape(pipeline.decision_function(X[:1]))
    return "decision_function" if shape == ((1,) if classes == 2 else (1, classes)) else None


# -- names and parameters of estimators -----------------------------------------------------------------------------


def resolve_estimator(name: str) -> type[BaseEstimator]:
    """The classifier class that an alias or a dotted path below ``sklearn.`` names; nothing else is imported.

    Raises:
        HeadError: there is no such name, or it is no classifier.
    """
    from sklearn.base import BaseEstimator, ClassifierMixin

    path = ALIASES.get(name, name)
    if not DOTTED.fullmatch(path):
        raise _unknown(name, "it is neither an alias nor a dotted path below sklearn.")
    module_name, _, attribute = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), attribute, None)
    except ImportError as error:
        raise _unknown(name, str(error)) from error
    if found is None:
        raise _unknown(name, f"{module_name} has no {attribute}")
    if not (inspect.isclass(found) and found.__module__.startswith("sklearn.") and issubclass(found, BaseEstimator)):
        raise _unknown(name, f"{path} is no estimator")
    if not issubclass(found, ClassifierMixin):
        raise _unknown(name, f"{path} is no classifier")
    return found


def check_parameters(estimator: type[BaseEstimator], params: Mapping[str, Any], where: str) -> None:
    """Refuse parameters that the estimator's signature does not have.

    Raises:
        HeadError: names the parameter, near ones, and all valid ones.
    """
    valid = parameter_names(estimator)
    for name in params:
        if name not in valid:
            raise HeadError(
                f"{estimator.__name__} has no parameter {name!r}.",
                where=where,
                remedy=f"{near(str(name), valid)}valid: {', '.join(valid)}",
            )


def parameter_names(estimator: type[BaseEstimator]) -> list[str]:
    """The names in the estimator's signature, sorted."""
    return list(estimator._get_param_names())


def _unknown(name: str, why: str) -> HeadError:
    from sklearn.utils import all_estimators

    from .kinds import KINDS  # here, as the table names this family

    paths = {estimator.__name__: _public_path(estimator) for _, estimator in all_estimators("classifier")}
    known = {**{kind: kind for kind in KINDS}, **paths, **{path: path for path in paths.values()}}
    close = near(name.rpartition(".")[2], list(known)) or near(name, list(known))
    for short in sorted(paths, key=len, reverse=True):
        close = re.sub(rf"(?<![\w.]){short}\b", paths[short], close)
    return HeadError(
        f"There is no classifier {name!r}.",
        where="head.kind or head.sklearn.estimator",
        why=why,
        remedy=f"{close}aliases: {', '.join(ALIASES)}; or any scikit-learn classifier by its dotted path",
    )


def _public_path(estimator: type[BaseEstimator]) -> str:
    module = ".".join(part for part in estimator.__module__.split(".") if not part.startswith("_"))
    return f"{module}.{estimator.__name__}"
