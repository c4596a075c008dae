"""Zero-shot prompts beside a probe: what the texts of the classes say of an image, as far as that helps on train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import yaml
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from ..errors import HeadError
from ..files import read_regular_file
from ..runtime.seeds import make_generator
from .base import Head
from .common import Features, Floats, Ints, check_training_data, near
from .crossval import no_folds, stratified_group_folds
from .layers import Layers
from .logistic import LogisticHead

TEMPLATE = "a photo of a {}."
TEXTS = "texts"
BLENDS = tuple(number / 10 for number in range(11))
LABELS = (1, 2, 4, 8, 16, 32, 64)


class PromptsHead(Head):
    """Logits of texts (the cosine to each class's text, at the temperature of the model) blended with those of a probe.

    The share of the texts is the one of lowest log loss out of fold on train: 0 is the probe alone, 1 the prompts
    alone. ``head.prompts`` names the texts' matrix, a safetensors file of ``texts`` (classes, features).
    """

    file = "head.safetensors"

    def configure(self) -> None:
        """Nothing is known yet of texts and probe."""
        self.texts = Layers((), ())
        self.probe = Layers((), ())
        self.blend = 0.0

    def fit(self, X: Features, y: Ints, groups: Ints | None = None) -> Self:
        """As `Head.fit`; and find from how many images a class on the probe alone beats the prompts."""
        super().fit(X, y, groups)
        (plain, *_), _, index = check_training_data(X, y)
        self.selected["probe_beats_prompts_from"] = self._labels_needed(plain, index, groups)
        return self

    def learn(self, X: Features, index: Ints, groups: Ints | None) -> None:
        """Fit the probe, and choose the share of the texts on the predictions of its cross-validation."""
        self.texts = _one_layer(self._matrix(X.shape[1])[self.classes_])
        plain, own = self._plain(index, groups)
        probe = self._probe().fit(X.reshape(self._views, len(plain), -1), self.classes_[plain], own)
        seen = probe.out_of_fold
        if seen is None or seen.logits is None:
            raise no_folds()
        self.probe, said = probe.as_layers(), self._said(X[: len(plain)])
        blends = [replace(seen, predicted=_positions(both), logits=both) for both in _mixtures(seen.logits, said)]
        losses = [blended.log_loss or 0.0 for blended in blends]
        best = int(np.argmin(losses))
        self.blend, self.out_of_fold, self.warnings = BLENDS[best], blends[best], probe.warnings
        self.selected |= {
            "share_of_prompts": self.blend,
            "prompts_accuracy": blends[-1].accuracy,
            "probe_accuracy": blends[0].accuracy,
            "cv_accuracy": blends[best].accuracy,
            "cv_log_loss": losses[best],
            "C": probe.selected["C"],
        }
        self.selections += probe.selections
        self._select("the share of the prompts", "out of fold")

    def logits(self, X: Features) -> Floats:
        """The probe's and the texts', weighted by the share of each."""
        return (1 - self.blend) * self.probe.logits(X) + self.blend * self._said(X)

    def parameter_count(self) -> int:
        """Of the probe; the texts are not trained."""
        return self.probe.parameter_count()

    def write(self, file: Path) -> dict[str, Any]:
        """Probe and texts in float64, as safetensors."""
        (weight,), (bias,), (texts,) = self.probe.weights, self.probe.biases, self.texts.weights
        arrays = {"probe.weight": weight, "probe.bias": bias, TEXTS: texts}
        file.write_bytes(save_tensors({name: np.ascontiguousarray(array) for name, array in arrays.items()}))
        return {"blend": self.blend}

    def read(self, file: Path, record: Mapping[str, Any]) -> None:
        """Probe, texts and the share of these."""
        arrays = load_tensors(read_regular_file(file))
        weight, bias, texts = arrays["probe.weight"], arrays["probe.bias"], arrays[TEXTS]
        if not len(self.classes_) == len(weight) == len(bias) or weight.shape != texts.shape or weight.ndim != 2:
            raise ValueError("the shapes of its arrays do not fit together")
        self.probe, self.texts, self.blend = Layers((weight,), (bias,)), _one_layer(texts), float(record["blend"])

    def _said(self, X: Features) -> Floats:
        """What the texts say of images (n, d): logits (n, c)."""
        rows = np.asarray(X, np.float64)
        lengths = np.sqrt((rows * rows).sum(axis=1, keepdims=True))
        return self.texts.logits(rows / np.maximum(lengths, np.finfo(np.float64).tiny))

    def _probe(self) -> LogisticHead:
        params = self.params.model_copy(update={"kind": "logistic", "search": {}, "calibrate": "none"})
        return LogisticHead("logistic", params, class_names=self.class_names, jobs=self.jobs, device=self.device)

    def _matrix(self, width: int) -> Floats:
        file = self.params.prompts
        if file is None or file.suffix != ".safetensors":
            raise HeadError("A head of kind prompts needs the features of its texts.", where="head.prompts")
        texts: Floats = load_tensors(read_regular_file(file))[TEXTS]
        if texts.shape != (len(self.class_names), width):
            raise HeadError(
                "The texts do not fit the images.",
                where=file,
                why=f"texts have shape {texts.shape}, there are {len(self.class_names)} classes and {width} features",
            )
        return texts

    def _labels_needed(self, X: Features, index: Ints, groups: Ints | None) -> str:
        """From how many images a class on a probe beats the prompts, judged on rows that it did not see."""
        folds = stratified_group_folds(index, groups, self.params.folds, self.params.seed)
        probe = self._probe()
        probe.classes_ = self.classes_
        order = make_generator("prompts", self.params.seed).permutation(len(index))
        for count in [count for count in LABELS if folds and count <= np.bincount(index).min()]:
            hits = 0
            for train, test in folds:
                shuffled = order[np.isin(order, train)]
                few = np.concatenate([shuffled[index[shuffled] == target][:count] for target in np.unique(index)])
                hits += int((probe.fit_fold(X, index, groups, (few, test))[0] == index[test]).sum())
            if hits / len(index) > self.selected["prompts_accuracy"]:
                return f"{count} {'image' if count == 1 else 'images'} a class"
        return "not with the images there are"


def read_prompts(file: Path | None, class_names: Sequence[str]) -> list[list[str]]:
    """Of each class one or more texts: of its name, or as a YAML file maps the name to a text or a list of texts.

    Raises:
        HeadError: the file cannot be read, or lacks a class.
    """
    if file is None:
        return [[TEMPLATE.format(name.replace("_", " "))] for name in class_names]
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise HeadError("The file of prompts cannot be read.", where=file, why=str(error)) from error
    texts = content if isinstance(content, dict) else {}
    found = [texts.get(name) for name in class_names]
    lists = [[item] if isinstance(item, str) else item for item in found]
    for name, item in zip(class_names, lists, strict=True):
        if not isinstance(item, list) or not item or not all(isinstance(text, str) and text for text in item):
            remedy = f"{near(name, [str(key) for key in texts])}give each class a text, or a list of texts"
            raise HeadError(f"The file of prompts has no text for the class {name!r}.", where=file, remedy=remedy)
    return [list(item) for item in lists if item is not None]


def _mixtures(probe: Floats, texts: Floats) -> list[Floats]:
    return [(1 - blend) * probe + blend * texts for blend in BLENDS]


def _positions(logits: Floats) -> Ints:
    return np.asarray(logits.argmax(axis=1), np.int64)


def _one_layer(texts: Floats) -> Layers:
    return Layers((np.asarray(texts, np.float64),), (np.zeros(len(texts)),))
