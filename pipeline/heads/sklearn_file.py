"""The file of a scikit-learn head: skops behind an exact allow-list; apart, since importing skops takes seconds.

The allow-list names every type that a saved head may hold; a file that names any other is refused.
The names were collected by fitting, saving and inspecting each classifier that scikit-learn offers; a test repeats
that for all aliases. They name classes whose construction only stores numbers; functions, methods and anything that
a file could use to run code of its choice are not among them.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import skops.io
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.ensemble._hist_gradient_boosting.predictor import TreePredictor
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree._tree import Tree
from skops.io.exceptions import UntrustedTypesFoundException

from ..errors import HeadError, RunError

SCHEMA = "schema.json"
NODE_KEYS = {"__class__", "__module__", "__loader__"}

BASICS = frozenset(
    {
        "builtins.dict",
        "builtins.list",
        "builtins.tuple",
        "builtins.set",
        "builtins.str",
        "builtins.int",
        "builtins.float",
        "builtins.bool",
        "builtins.slice",
        "numpy.ndarray",
        "numpy.dtype",
        "numpy.bool",
        "numpy.bool_",
        "numpy.float32",
        "numpy.float64",
        "numpy.int32",
        "numpy.int64",
        "numpy.uint8",
        "numpy.uint32",
        "numpy.uint64",
        "numpy.random._generator.Generator",
        "numpy.random._mt19937.MT19937",
        "numpy.random._pcg64.PCG64",
        "numpy.random.mtrand.RandomState",
        "scipy.sparse._csr.csr_matrix",
    }
)

ESTIMATORS = frozenset(
    {
        "sklearn.calibration.CalibratedClassifierCV",
        "sklearn.discriminant_analysis.LinearDiscriminantAnalysis",
        "sklearn.discriminant_analysis.QuadraticDiscriminantAnalysis",
        "sklearn.dummy.DummyClassifier",
        "sklearn.ensemble._bagging.BaggingClassifier",
        "sklearn.ensemble._forest.ExtraTreesClassifier",
        "sklearn.ensemble._forest.RandomForestClassifier",
        "sklearn.ensemble._gb.GradientBoostingClassifier",
        "sklearn.ensemble._hist_gradient_boosting.gradient_boosting.HistGradientBoostingClassifier",
        "sklearn.ensemble._weight_boosting.AdaBoostClassifier",
        "sklearn.gaussian_process._gpc.GaussianProcessClassifier",
        "sklearn.linear_model._logistic.LogisticRegression",
        "sklearn.linear_model._logistic.LogisticRegressionCV",
        "sklearn.linear_model._passive_aggressive.PassiveAggressiveClassifier",
        "sklearn.linear_model._perceptron.Perceptron",
        "sklearn.linear_model._ridge.RidgeClassifier",
        "sklearn.linear_model._ridge.RidgeClassifierCV",
        "sklearn.linear_model._stochastic_gradient.SGDClassifier",
        "sklearn.multiclass.OneVsRestClassifier",
        "sklearn.naive_bayes.BernoulliNB",
        "sklearn.naive_bayes.ComplementNB",
        "sklearn.naive_bayes.GaussianNB",
        "sklearn.naive_bayes.MultinomialNB",
        "sklearn.neighbors._classification.KNeighborsClassifier",
        "sklearn.neighbors._classification.RadiusNeighborsClassifier",
        "sklearn.neighbors._nearest_centroid.NearestCentroid",
        "sklearn.neural_network._multilayer_perceptron.MLPClassifier",
        "sklearn.pipeline.Pipeline",
        "sklearn.preprocessing._data.StandardScaler",
        "sklearn.preprocessing._label.LabelBinarizer",
        "sklearn.preprocessing._label.LabelEncoder",
        "sklearn.semi_supervised._label_propagation.LabelPropagation",
        "sklearn.semi_supervised._label_propagation.LabelSpreading",
        "sklearn.svm._classes.LinearSVC",
        "sklearn.svm._classes.NuSVC",
        "sklearn.svm._classes.SVC",
        "sklearn.tree._classes.DecisionTreeClassifier",
        "sklearn.tree._classes.DecisionTreeRegressor",
        "sklearn.tree._classes.ExtraTreeClassifier",
        "sklearn.tree._classes.ExtraTreeRegressor",
    }
)

INNER_PARTS = frozenset(
    {
        "sklearn._loss._loss.CyHalfBinomialLoss",
        "sklearn._loss._loss.CyHalfMultinomialLoss",
        "sklearn._loss.link.Interval",
        "sklearn._loss.link.LogitLink",
        "sklearn._loss.link.MultinomialLogit",
        "sklearn._loss.loss.HalfBinomialLoss",
        "sklearn._loss.loss.HalfMultinomialLoss",
        "sklearn.calibration._CalibratedClassifier",
        "sklearn.calibration._SigmoidCalibration",
        "sklearn.ensemble._hist_gradient_boosting.binning._BinMapper",
        "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
        "sklearn.gaussian_process._gpc._BinaryGaussianProcessClassifierLaplace",
        "sklearn.gaussian_process.kernels.ConstantKernel",
        "sklearn.gaussian_process.kernels.Product",
        "sklearn.gaussian_process.kernels.RBF",
        "sklearn.linear_model._sgd_fast.Hinge",
        "sklearn.linear_model._sgd_fast.Log",
        "sklearn.linear_model._sgd_fast.ModifiedHuber",
        "sklearn.linear_model._sgd_fast.SquaredHinge",
        "sklearn.metrics._dist_metrics.ChebyshevDistance64",
        "sklearn.metrics._dist_metrics.DistanceMetric64",
        "sklearn.metrics._dist_metrics.EuclideanDistance64",
        "sklearn.metrics._dist_metrics.ManhattanDistance64",
        "sklearn.metrics._dist_metrics.MinkowskiDistance64",
        "sklearn.neighbors._ball_tree.BallTree",
        "sklearn.neighbors._ball_tree.BallTree64",
        "sklearn.neighbors._kd_tree.KDTree",
        "sklearn.neighbors._kd_tree.KDTree64",
        "sklearn.neural_network._stochastic_optimizers.AdamOptimizer",
        "sklearn.neural_network._stochastic_optimizers.SGDOptimizer",
        "sklearn.tree._tree.Tree",
    }
)

TYPES = BASICS | ESTIMATORS | INNER_PARTS

# How skops rebuilds an object. The nodes that call functions, methods or operators are left out.
LOADERS = frozenset(
    {
        "DictNode",
        "JsonNode",
        "ListNode",
        "LossNode",
        "NdArrayNode",
        "ObjectNode",
        "RandomGeneratorNode",
        "RandomStateNode",
        "SetNode",
        "SliceNode",
        "SparseMatrixNode",
        "TreeNode",
        "TupleNode",
        "TypeNode",
    }
)


def pipeline_bytes(pipeline: Pipeline, name: str) -> bytes:
    """A skops file of a fitted pipeline.

    Args:
        name: what messages call its estimator.

    Raises:
        HeadError: it holds a type that could not be loaded again (some meta-estimators).
    """
    data: bytes = skops.io.dumps(pipeline, compression=zipfile.ZIP_DEFLATED)
    if unknown := sorted(set(unknown_names(data))):
        raise HeadError(
            f"{name} cannot be saved.",
            why=f"it holds {', '.join(unknown)}, which a run folder may not name",
            remedy="choose another classifier or other parameters",
        )
    return data


def load_pipeline(data: bytes, file: Path) -> Pipeline:
    """The pipeline of a skops file whose every name is on the allow-list.

    Raises:
        RunError: the file names another type, which is neither imported nor constructed.
        KeyError, TypeError, ValueError, zipfile.BadZipFile: the file is damaged.
    """
    if unknown := sorted(set(unknown_names(data))):
        raise RunError(
            f"The head of this run names {unknown[0]}, which is not allowed in a run folder.",
            where=file,
            why=f"not on the list of types that may be loaded: {', '.join(unknown)}",
            remedy="train the head again yourself; do not load run folders from sources that you do not trust",
        )
    try:
        pipeline = skops.io.loads(data, trusted=sorted(TYPES))
    except UntrustedTypesFoundException as error:
        raise ValueError(str(error)) from error
    _check_pipeline(pipeline)
    return pipeline


def _check_pipeline(pipeline: Any) -> None:
    """Refuse what is not a classifier behind at most a scaler, and trees that point outside themselves."""
    steps = [step for _, step in pipeline.steps] if isinstance(pipeline, Pipeline) else []
    scaled = all(isinstance(step, StandardScaler) for step in steps[:-1])
    if not steps or not scaled or not isinstance(steps[-1], ClassifierMixin):
        raise ValueError("it holds no classifier")
    check_trees(pipeline)


def unknown_names(data: bytes) -> Iterator[str]:
    """Names in a skops file that are not on the allow-list, read from its schema as plain JSON."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        schema = json.loads(archive.read(SCHEMA))
    for node in _nodes(schema):
        name, loader = f"{node.get('__module__')}.{node.get('__class__')}", node.get("__loader__")
        allowed = BASICS if loader == "TypeNode" else TYPES
        if name not in allowed:
            yield name
        elif loader not in LOADERS:
            yield f"{loader} of {name}"


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in the schema that says how to build something."""
    open_ = [value]
    while open_:
        item = open_.pop()
        if isinstance(item, dict):
            if NODE_KEYS & set(item):
                yield item
            open_ += item.values()
        elif isinstance(item, list):
            open_ += item


# -- trees: scikit-learn follows their indices without looking whether they are in range ----------------------------


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
