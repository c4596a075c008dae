"""Which scikit-learn classifiers there are, by alias or dotted path, and which parameters they take."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import HeadError
from .base import OWN_KINDS, near

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator

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

    paths = {estimator.__name__: _public_path(estimator) for _, estimator in all_estimators("classifier")}
    known = {**{kind: kind for kind in (*OWN_KINDS, *ALIASES)}, **paths, **{path: path for path in paths.values()}}
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
