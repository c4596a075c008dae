"""Check the trees of a loaded head: scikit-learn follows their indices without looking whether they are in range."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.ensemble._hist_gradient_boosting.predictor import TreePredictor
from sklearn.tree._tree import Tree


def check_trees(pipeline: Any) -> None:
    """Raise ValueError where a tree of ``pipeline`` points outside itself or outside the features."""
    for part in _parts(pipeline, set()):
        if isinstance(part, Tree):
            _check_tree(part)
        else:
            _check_predictor(part, pipeline.n_features_in_)


def _parts(value: Any, seen: set[int]) -> Iterator[Tree | TreePredictor]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tree | TreePredictor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _parts(item, seen)
    elif isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.dtype == object):
        for item in value:
            yield from _parts(item, seen)
    elif isinstance(value, BaseEstimator):
        yield from _parts(vars(value), seen)


def _check_tree(tree: Tree) -> None:
    left, right, feature = tree.children_left, tree.children_right, tree.feature
    inner = left != -1
    place = np.flatnonzero(inner)
    if not (
        _within(left[inner], place, tree.node_count)
        and _within(right[inner], place, tree.node_count)
        and ((feature[inner] >= 0) & (feature[inner] < tree.n_features)).all()
    ):
        raise ValueError("a decision tree points outside itself")


def _check_predictor(predictor: TreePredictor, features: int) -> None:
    nodes = predictor.nodes
    inner = nodes["is_leaf"] == 0
    place = np.flatnonzero(inner)
    chosen = nodes["feature_idx"][inner]
    if not (
        _within(nodes["left"][inner], place, len(nodes))
        and _within(nodes["right"][inner], place, len(nodes))
        and ((chosen >= 0) & (chosen < features)).all()
        and not nodes["is_categorical"].any()
    ):
        raise ValueError("a boosted tree points outside itself")


def _within(children: NDArray[Any], parents: NDArray[Any], count: int) -> bool:
    """Children lie behind their parents, which also rules out circles, and inside the tree."""
    positions = children.astype(np.int64)
    return bool(((positions > parents) & (positions < count)).all())
