"""From a kind of head to the head."""

from __future__ import annotations

from collections.abc import Sequence

from ..params import HeadParams
from .base import OWN_KINDS, Head
from .estimators import ALIASES, resolve_estimator
from .logistic import LogisticHead
from .network import NetworkHead


def known_kinds() -> tuple[str, ...]:
    """The kinds by name; a dotted path below ``sklearn.`` is a kind as well."""
    return (*OWN_KINDS, *ALIASES)


def make_head(kind: str, params: HeadParams, *, class_names: Sequence[str], jobs: int = 1, device: str = "cpu") -> Head:
    """An unfitted head of ``kind``: one of `known_kinds`, or a dotted path below ``sklearn.``.

    Args:
        class_names: names by target, for class weights and messages.
        jobs: how many folds and candidates are fitted at once.
        device: where torch heads are fitted, as torch names it.

    Raises:
        HeadError: no such kind (near names are given), or parameters that it does not have.
    """
    if kind == "logistic":
        return LogisticHead(params, class_names=class_names, device=device)
    if kind == "linear":
        return NetworkHead(kind, params.linear, params, class_names=class_names, device=device, jobs=jobs)
    if kind == "mlp":
        return NetworkHead(kind, params.mlp, params, class_names=class_names, device=device, jobs=jobs)
    from .sklearn_head import SklearnHead  # here, as importing scikit-learn takes longer than the default head

    named = kind == "sklearn"
    estimator = params.sklearn.estimator if named else kind
    resolve_estimator(estimator)
    values = params.sklearn.params if named else {}
    return SklearnHead(kind, estimator, values, params, class_names=class_names, jobs=jobs)
