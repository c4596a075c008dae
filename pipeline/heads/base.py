"""The head: a classifier on cached features that is fitted, judged out of fold, saved and loaded."""

from __future__ import annotations

import time
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from ..errors import HeadError, RunError
from ..features.rows import Rows, take_rows
from ..params import HeadParams
from .common import (
    Features,
    Floats,
    Ints,
    check_training_data,
    class_positions,
    class_weights,
    softmax,
    weighted_accuracy,
)
from .crossval import (
    Fold,
    OutOfFold,
    Score,
    Scores,
    align,
    candidates,
    choose_temperature,
    edges,
    hold_out,
    in_every_view,
    out_of_fold,
    stratified_group_folds,
)

if TYPE_CHECKING:
    from .layers import Layers

DAMAGED = (KeyError, TypeError, ValueError, OSError, SafetensorError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Selection:
    """One choice: ``what`` was chosen, ``how``, ``on`` which split.

    ``Selection("the strength C", "by 5-fold cross-validation", "train")``
    """

    what: str
    how: str
    on: str


class Head(ABC):
    """A classifier on features: fitted once, then the same answer for a row whatever stands beside it.

    A family of heads says how it learns (`learn`), what its probabilities are the softmax of (`logits`), and how it is
    written to its ``file`` and read again (`write`, `read`); `configure`, `check`, `replace` for parameters.
    One entry in `kinds.KINDS` makes it a kind. Heads travel to worker processes: all of their state must pickle.

    Attributes:
        classes_: the sorted target values seen in `fit` (c,); the columns of `predict_proba` follow them.
        selected: what was chosen and how well it did, as the run records it.
        selections: the choices that were made, in their order, for the sentence on the protocol.
        history: one row an epoch; empty where there are none.
        warnings: sentences for the user.
        temperature: what `predict_proba` divides logits by; 1 where a family folds it into its own state.
        out_of_fold: what cross-validation said of train, at that temperature, where fitting needed it anyway.
        held_score: how well it did on the part of train that it was watched with, where fitting holds one out.
    """

    file: ClassVar[str]

    def __init__(
        self, kind: str, params: HeadParams, *, class_names: Sequence[str] = (), jobs: int = 1, device: str = "cpu"
    ) -> None:
        self.kind, self.params, self.class_names = kind, params, tuple(class_names)
        self.jobs, self.device = jobs, device
        self.has_probabilities = True
        self.why_no_probabilities: str | None = None
        self.classes_: Ints = np.empty(0, dtype=np.int64)
        self._views = 1
        self._candidates = candidates(params.search, kind, params.kinds)
        self._found: dict[str, Any] = {}
        self._forget()
        self.configure()

    def _forget(self) -> None:
        self.selected: dict[str, Any] = {}
        self.selections: tuple[Selection, ...] = ()
        self.history: list[dict[str, Any]] = []
        self.warnings: tuple[str, ...] = ()
        self.out_of_fold: OutOfFold | None = None
        self.held_score: Score | None = None
        self.temperature = 1.0

    # -- what a family says -----------------------------------------------------------------------------------------

    @property
    def by_blocks(self) -> bool:
        """Whether it learns from `Rows` without holding all of them in memory."""
        return False

    def configure(self) -> None:  # noqa: B027 - a family without parameters has nothing to take over
        """Take over from ``params`` what is the family's own; nothing may be imported for it, nor refused yet."""

    @abstractmethod
    def learn(self, X: Features, index: Ints, groups: Ints | None) -> None:
        """Fit to features (n, d) and class positions (n,) in ``classes_``, every one of which occurs.

        What is held out in between comes from `folds` or `held_out`, which keep views of an image together.
        """

    @abstractmethod
    def logits(self, X: Features) -> Floats:
        """What the probabilities (n, c) are the softmax of, before the temperature; a row's bits are its own."""

    @abstractmethod
    def write(self, file: Path) -> dict[str, Any]:
        """Write what was learnt into ``file``, without pickle; what else `read` needs, as JSON."""

    @abstractmethod
    def read(self, file: Path, record: Mapping[str, Any]) -> None:
        """Take over what `write` wrote; nothing that ``file`` or ``record`` names may be imported.

        Raises:
            one of `DAMAGED`: it is not what `write` writes.
        """

    def replace(self, values: Mapping[str, Any]) -> None:
        """Take over parameters that a search tries.

        Raises:
            HeadError: there is no such parameter, or the value is impossible.
        """
        if values:
            raise HeadError(f"{self.kind} has no parameter to search.", where=f"head.search.{next(iter(values))}")

    def check(self) -> None:
        """Refuse, before anything is fitted, what the head cannot be configured with.

        Raises:
            HeadError: see its message.
        """
        for values in self._candidates:
            self._configured(values)

    def as_layers(self) -> Layers | None:
        """The fitted head as linear layers, which fine-tuning trains on; None where it is something else."""
        return None

    def parameter_count(self) -> int | None:
        """Trained numbers, or None where that is no meaningful count."""
        return None

    # -- fit --------------------------------------------------------------------------------------------------------

    def fit(self, X: Features, y: Ints, groups: Ints | None = None) -> Self:
        """Learn from features (n, d) and targets (n,); rows with one id in ``groups`` stay on one side of any split.

        Parameters are searched and a temperature is chosen where the params ask for it, both out of fold on train.

        Args:
            X: or (v, n, d): the images plain, then in v - 1 augmented views. All are learnt from; whatever is chosen
                or judged by images held out goes by the plain ones.

        Raises:
            HeadError: the features or targets cannot be learnt from, or the head cannot be configured so.
        """
        started = time.perf_counter()
        X, index, groups = self._take(X, y, groups)
        self._forget()
        if self._candidates:
            self._search(X, index, groups)
        self.learn(X, index, groups)
        self.calibrate(X, index, groups)
        self.selected["seconds"] = time.perf_counter() - started
        return self

    def _take(self, X: Features, y: Ints, groups: Ints | None) -> tuple[Features, Ints, Ints | None]:
        """Take over classes and number of views; features, class positions and groups of all rows, view after view."""
        if self.by_blocks and isinstance(X, Rows):
            self.classes_, index = class_positions(y)
            self._views = 1
            return X, index, groups
        X, self.classes_, index = check_training_data(X, y)
        self._views = len(X)
        groups = None if groups is None else np.tile(groups, self._views)
        return X.reshape(-1, X.shape[2]), np.tile(index, self._views), groups

    def _search(self, X: Features, index: Ints, groups: Ints | None) -> None:
        fits = [self._configured(values).fit_fold for values in self._candidates]
        results = out_of_fold(fits, X, index, groups, self.folds(index, groups), jobs=self.jobs)
        scores = [self.score(self.classes_[result.index], result.right, result.log_loss) for result in results]
        best = min(range(len(scores)), key=lambda number: scores[number].rank)
        self._found = self._candidates[best]
        self.replace(self._found)
        self.selected["search"] = [
            {"params": dict(values), **score.named("cv")}
            for values, score in zip(self._candidates, scores, strict=True)
        ]
        at_edge = edges(self._found, self._candidates)
        if at_edge:
            self.selected["edges"] = at_edge
        prefix = f"{self.kind}." if len(self.params.kinds) > 1 else ""
        self.warnings += tuple(
            f"the best {name}={self._found[name]:g} of {self.kind} is the {side} of those tried: widen "
            f"head.search.{prefix}{name} to look beyond it"
            for name, side in at_edge.items()
        )
        self._select(f"the parameters of {self.kind}", f"by {self.params.folds}-fold cross-validation")

    def calibrate(self, X: Features, index: Ints, groups: Ints | None) -> None:
        """Choose a temperature out of fold, where ``head.calibrate`` asks for one."""
        if self.params.calibrate == "temperature" and self.has_probabilities:
            self._cool(self._across_folds(X, index, groups))

    def _cool(self, result: OutOfFold) -> None:
        self.temperature = self._choose_temperature(result)
        assert self.out_of_fold is not None
        self.selected |= {"cv_accuracy": result.accuracy, "cv_log_loss": self.out_of_fold.log_loss}

    def _choose_temperature(self, result: OutOfFold) -> float:
        temperature, record = choose_temperature(result)
        self.selected |= record
        self._select("the temperature", "out of fold")
        self.out_of_fold = result.cooled(temperature)
        return temperature

    def _select(self, what: str, how: str) -> None:
        self.selections += (Selection(what, how, "train"),)

    def _class_weights(self, index: Ints) -> Floats:
        return class_weights(self.params.class_weight, self.classes_, index, self.class_names)

    # -- out of fold ------------------------------------------------------------------------------------------------

    def cross_validate(self, X: Features, y: Ints, groups: Ints | None = None) -> OutOfFold:
        """Out-of-fold predictions and logits of train, from `fit` where it made them.

        A head that is not fitted yet makes those choices that belong to its fit anew in each fold.
        """
        if self.out_of_fold is None:
            return self._across_folds(*self._take(X, y, groups))
        return self.out_of_fold

    def _across_folds(self, X: Features, index: Ints, groups: Ints | None) -> OutOfFold:
        folds = self.folds(index, groups)
        return out_of_fold([self._configured({}).fit_fold], X, index, groups, folds, jobs=self.jobs)[0]

    def folds(self, index: Ints, groups: Ints | None) -> list[Fold]:
        """Folds of the rows that `learn` got: they train on all views of an image, and test it plain."""
        index, groups = self._plain(index, groups)
        folds = stratified_group_folds(index, groups, self.params.folds, self.params.seed)
        return [(in_every_view(train, len(index), self._views), test) for train, test in folds]

    def held_out(self, index: Ints, groups: Ints | None, fraction: float) -> Fold:
        """Rows that `learn` got, to train on and to watch with: as `folds`, about ``fraction`` of the images once."""
        index, groups = self._plain(index, groups)
        train, held = hold_out(index, groups, fraction, self.params.seed)
        return in_every_view(train, len(index), self._views), held

    def _plain(self, index: Ints, groups: Ints | None) -> tuple[Ints, Ints | None]:
        images = len(index) // self._views
        return index[:images], None if groups is None else groups[:images]

    def score(self, y: Ints, right: NDArray[np.bool_], log_loss: float | None = None) -> Score:
        """How well rows with the targets ``y`` (n,) were classified, of which these were ``right`` (n,)."""
        setting = self.params.class_weight
        weighted = None if setting is None else weighted_accuracy(right, y, setting, self.class_names)
        return Score(float(right.mean()), log_loss, weighted)

    def _configured(self, values: Mapping[str, Any]) -> Self:
        """An unfitted head with some parameters replaced and nothing left to search, for one job."""
        params = self.params.model_copy(update={"search": {}})
        head = type(self)(self.kind, params, class_names=self.class_names, device=self.device)
        head.classes_, head._views, head._found = self.classes_, self._views, {**self._found, **values}
        head.replace(head._found)
        return head

    def fit_fold(self, X: Features, index: Ints, groups: Ints | None, fold: Fold) -> Scores:
        """Class positions (m,) and logits (m, c) of a fold's held-out rows; only its train part is learnt from."""
        train, test = fold
        seen, own = np.unique(index[train], return_inverse=True)
        if len(seen) < 2:
            return np.full(len(test), seen[0]), align(np.zeros((len(test), 1)), seen, len(self.classes_))
        head = self._configured({})
        head.classes_ = self.classes_[seen]
        head.learn(take_rows(X, train), own, None if groups is None else groups[train])
        held = take_rows(X, test)
        predicted = np.searchsorted(self.classes_, head.predict(held))
        return predicted, align(head.logits(held), seen, len(self.classes_)) if head.has_probabilities else None

    # -- predict ----------------------------------------------------------------------------------------------------

    def predict(self, X: Features) -> Ints:
        """Targets (n,) for features (n, d): the class of the largest logit."""
        return np.asarray(self.classes_[self.logits(X).argmax(axis=1)])

    def predict_proba(self, X: Features) -> Floats:
        """Probabilities (n, c).

        Raises:
            HeadError: the head gives none, see ``has_probabilities`` and ``why_no_probabilities``.
        """
        if not self.has_probabilities:
            raise HeadError("This head gives no probabilities.", why=self.why_no_probabilities)
        return softmax(self.logits(X) / self.temperature)

    # -- save and load ----------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the fitted head's file into ``folder``; the JSON object that `load` needs beside it.

        Raises:
            HeadError: the head holds a type that could not be loaded again (some meta-estimators).
        """
        record: dict[str, Any] = {
            "kind": self.kind,
            "classes": self.classes_.tolist(),
            "parameters": self.parameter_count(),
            "selected": self.selected,
            **self.write(folder / self.file),
        }
        if self.temperature != 1:
            record["temperature"] = self.temperature
        return {**record, "file": self.file}

    @classmethod
    def load(cls, folder: Path, record: Mapping[str, Any]) -> Self:
        """The fitted head of this family that `save` wrote, predicting the same to the byte.

        Raises:
            RunError: the file is missing, damaged, or names a type that is not allowed, which is then neither imported
                nor constructed.
        """
        try:
            if record["file"] != cls.file:
                raise ValueError(f"{record['file']!r} does not hold a head of kind {record['kind']}")
            head = cls(str(record["kind"]), HeadParams())
            head.classes_ = np.array([int(target) for target in record["classes"]], dtype=np.int64)
            head.selected = dict(record.get("selected") or {})
            head.temperature = float(record.get("temperature", 1.0))
            head.read(folder / cls.file, record)
        except DAMAGED as error:
            raise RunError(
                "The head of this run cannot be loaded.",
                where=folder,
                why=f"{type(error).__name__}: {error}",
                remedy="train it again with `pipeline train-head`",
            ) from error
        return head
