"""The two stages as scikit-learn estimators: images to cached features, and the logistic head as a classifier.

make_pipeline(ImageFeatures("resnet50", cache="cache"), LogisticPath()).fit(paths, labels)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.base import BaseEstimator, ClassifierMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from .data.images import Given, open_given
from .errors import DataError, HeadError
from .features.cache import FeatureCache
from .heads import make_head
from .params import HeadParams, Params, load_params
from .stages.open import open_backbone, open_cache

SHOWN = 3


class ImageFeatures(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Images to features (n, d), float32, through the cache: what has been computed is not computed again.

    It learns nothing, holds no weights and is therefore cheap to clone and to send to other processes.

    Args:
        backbone: the name, as in ``backbone.name``.
        weights: as in ``backbone.weights``.
        cache: folder of the cache, shared with the command line.
        settings: further params as for ``-s``: ``("backbone.layer=layer3", "transform.resize=128")``.
    """

    def __init__(
        self,
        backbone: str = "starter",
        *,
        weights: str | os.PathLike[str] = "DEFAULT",
        cache: str | os.PathLike[str] = "cache",
        settings: Sequence[str] = (),
    ) -> None:
        self.backbone, self.weights, self.cache, self.settings = backbone, weights, cache, settings

    def fit(self, X: Any, y: Any = None) -> Self:
        """Only resolve the backbone; no image is looked at.

        Raises:
            BackboneError, WeightsError, ParamsError: the backbone cannot be had.
        """
        backbone = open_backbone(self._params())
        self.n_features_out_ = self._n_features_out = backbone.feature_dim
        self.backbone_digest_ = backbone.identity.digest
        return self

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Features (n, d) of the images X, in their order.

        Args:
            X: a list, array or column (NumPy, pandas, polars) of n paths, bytes, uint8 arrays or PIL images; or one
                uint8 array (n, height, width, 3).

        Raises:
            TypeError: something is no image and no path.
            DataError: images cannot be read; a row may not be left out here.
        """
        check_is_fitted(self)
        items = _items_of(X)
        if not items:
            return np.empty((0, self.n_features_out_), np.float32)
        cache = self._opened(items)
        cache.fill()
        images = cache.images
        place = {path: row for row, path in enumerate(images.paths)}
        rows = [place.get(_name(item, number)) for number, item in enumerate(items)]
        present = cache.present
        if bad := [number for number, row in enumerate(rows) if row is None or not present[row]]:
            raise self._unreadable(cache, items, rows, bad)
        features: NDArray[np.float32] = cache.read(images.digests[np.array(rows)])
        return features

    def _opened(self, items: Sequence[Given]) -> FeatureCache:
        params = self._params()
        return open_cache(params, open_given(items, params.data, params.cache.dir), begins=True, quiet=True)

    def _params(self) -> Params:
        params = load_params(os.devnull, list(self.settings))
        own = {"name": self.backbone, "weights": os.fspath(self.weights)}
        cache = params.cache.model_copy(update={"dir": Path(self.cache).absolute()})
        return params.model_copy(update={"backbone": params.backbone.model_copy(update=own), "cache": cache})

    def _unreadable(
        self, cache: FeatureCache, items: Sequence[Given], rows: Sequence[int | None], bad: Sequence[int]
    ) -> DataError:
        def problem(number: int) -> str:
            row = rows[number]
            return "it is no file" if row is None else cache.quarantine.problem_with(cache.images, row)

        shown = [f"{_name(items[number], number)}: {problem(number)}" for number in bad[:SHOWN]]
        return DataError(
            f"{len(bad)} of {len(items)} images cannot be embedded.",
            why="\n    " + "\n    ".join(shown),
            remedy="leave them out, with their labels, before fitting",
        )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.requires_fit, tags.no_validation = False, True
        return tags


class LogisticPath(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """The default head: logistic regression at the strength that cross-validation chooses, along its whole path.

    Args:
        strengths, c_min, c_max: the strengths C that are tried, spaced evenly on a logarithmic scale.
        folds: of the cross-validation that chooses among them.
        class_weight: None, ``"balanced"``, or a weight a class.
        calibrate: ``"temperature"`` mends overconfident probabilities, out of fold.
        standardize: bring features to mean 0 and deviation 1.
        seed: of the folds.

    Attributes:
        classes_: the c labels. coef_, intercept_: (c, d) and (c,), or (1, d) and (1,) for two classes.
        C_: the strength that was chosen. selected_: what else cross-validation said.
    """

    def __init__(
        self,
        *,
        strengths: int = 45,
        c_min: float = 1e-6,
        c_max: float = 1e5,
        folds: int = 5,
        class_weight: Literal["balanced"] | dict[Any, float] | None = None,
        calibrate: Literal["none", "temperature"] = "none",
        standardize: bool = True,
        seed: int = 0,
    ) -> None:
        self.strengths, self.c_min, self.c_max, self.folds = strengths, c_min, c_max, folds
        self.class_weight, self.calibrate, self.standardize, self.seed = class_weight, calibrate, standardize, seed

    def fit(self, X: Any, y: Any, groups: Any = None) -> Self:
        """Fit to features (n, d) and n labels; rows with one id in ``groups`` stay in one fold.

        Raises:
            ValueError: they cannot be learnt from.
        """
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_classification_targets(y)
        self.classes_, index = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"LogisticPath needs at least two classes; all {len(y)} samples are of one class")
        ids = None if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
        names = [str(number) for number in range(len(self.classes_))]
        try:
            self._head = make_head("logistic", self._params(), class_names=names).fit(X, index, ids)
        except HeadError as error:
            raise ValueError(str(error)) from error
        self.selected_, self.C_ = dict(self._head.selected), float(self._head.selected["C"])
        layers = self._head.as_layers()
        assert layers is not None
        weight, bias = layers.weights[0], layers.biases[0]
        two = len(names) == 2
        self.coef_ = weight[1:] - weight[:1] if two else weight
        self.intercept_ = bias[1:] - bias[:1] if two else bias
        return self

    def _params(self) -> HeadParams:
        weight: Any = self.class_weight
        if isinstance(weight, dict):
            weight = {str(number): float(weight.get(label, 1)) for number, label in enumerate(self.classes_)}
        path = {"strengths": self.strengths, "c_min": self.c_min, "c_max": self.c_max}
        common = {"folds": self.folds, "standardize": self.standardize, "seed": self.seed}
        return HeadParams.model_validate(
            {"class_weight": weight, "calibrate": self.calibrate, "logistic": path, **common}
        )

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """Logits (n, c); for two classes (n,), positive for the second."""
        logits = self._logits(X)
        return logits if len(self.classes_) > 2 else logits[:, 1] - logits[:, 0]

    def predict(self, X: Any) -> NDArray[Any]:
        """Labels (n,)."""
        logits = self._logits(X)
        return np.asarray(self.classes_[logits.argmax(axis=1)])

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Probabilities (n, c)."""
        check_is_fitted(self)
        return self._head.predict_proba(self._features(X))

    def _logits(self, X: Any) -> NDArray[np.float64]:
        check_is_fitted(self)
        return self._head.logits(self._features(X))

    def _features(self, X: Any) -> Any:
        return validate_data(self, X, dtype=[np.float64, np.float32], reset=False)


def _items_of(X: Any) -> list[Given]:
    """The images of a list, an array, or a column of a table."""
    if isinstance(X, str | bytes | os.PathLike | Image.Image):
        raise TypeError(f"X must hold n images, not be one {type(X).__name__}: give [X]")
    if not isinstance(X, list | tuple | np.ndarray) and hasattr(X, "to_numpy"):  # pandas and polars
        X = X.to_numpy()
    if isinstance(X, np.ndarray) and X.ndim == 2 and X.shape[1] == 1:
        X = X[:, 0]
    if isinstance(X, np.ndarray) and X.dtype != np.uint8 and X.ndim != 1:
        raise TypeError(f"X must be one column of images, not {X.dtype} of shape {X.shape}")
    if isinstance(X, np.ndarray) and X.dtype == np.uint8 and X.ndim != 4:
        raise TypeError(f"one array of images has the shape (n, height, width, 3), not {X.shape}")
    return [str(item) if isinstance(item, np.str_) else item for item in X]


def _name(item: Given, number: int) -> str:
    """How `GivenSource` calls an item."""
    return os.path.abspath(Path(item)) if isinstance(item, str | os.PathLike) else f"image {number}"
