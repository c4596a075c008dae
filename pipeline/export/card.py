"""``README.md`` of a run folder: a model card as model hubs read it, from the run's own records alone.

The front matter follows https://huggingface.co/docs/hub/model-cards; its numbers are those of ``metrics.json``, exact.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Final

import numpy as np
import yaml

from ..artifacts import Predictions, RunMetrics, RunModel
from ..errors import BackboneError
from ..evaluate.metrics import METRICS
from ..evaluate.protocol import leak_sentence
from ..evaluate.text import images, percent, printable
from ..params import Params

CARD_FILE: Final = "README.md"
FEW_IMAGES: Final = 20
SHOWN_CLASSES: Final = 20

# What is known of weights by their name: the hub's licence identifier, and the sentence.
LICENCES: Final = {
    "random": ("unknown", "The backbone began with random weights, which nobody licenses."),
    "file": ("unknown", "The backbone's weights came from a file, of whose licence nothing is recorded."),
    "starter": (
        "mit",
        "The starter's weights are under the program's MIT licence; they were trained on ImageNet images.",
    ),
    "SWAG": ("cc-by-nc-4.0", "The SWAG weights are under CC-BY-NC 4.0: no commercial use."),
    "IMAGENET1K": ("other", "torchvision (BSD 3-Clause) publishes the weights; ImageNet's images are research data."),
}
UNKNOWN: Final = ("unknown", "Nothing is recorded of the licence of the backbone's weights.")


def render_card(name: str, model: RunModel, metrics: RunMetrics, predictions: Predictions, params: Params) -> str:
    """The card of the run ``name``: front matter, scores, how to predict, what it was made from, and its limits."""
    front = yaml.safe_dump(_front_matter(name, model, metrics, params), sort_keys=False, allow_unicode=True, width=120)
    sections = [
        f"# {_text(name)}",
        _what(model, metrics),
        "## Scores\n\n" + _scores(metrics),
        "## How to predict\n\n" + _use(name),
        "## Made from\n\n" + _origin(model, params),
        "## Limits\n\n" + "\n".join(f"- {line}" for line in _limits(metrics, predictions, params)),
    ]
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def licence_of(model: RunModel, params: Params) -> tuple[str, str]:
    """The hub's identifier of the licence of the backbone's weights, and a sentence; as far as they are known.

    Fine-tuned weights lie in a file of the run's own: what counts is what they began as.
    """
    name, label = model.backbone.name, model.backbone.weights
    if model.verb == "finetune":
        from ..backbones.catalogue import locate_weights

        label = locate_weights(name, params.backbone.weights, seed=params.backbone.seed).label
    label = f"{name} {label}" if name == "starter" else label
    known = next((value for key, value in LICENCES.items() if key in label), None)
    stated = None
    if known is None:
        from ..backbones.catalogue import find_zoo

        with suppress(BackboneError):  # a run of a zoo that is not here
            stated = find_zoo(name).licence(name)
    return known or ((stated, f"The library of the weights states the licence {stated}.") if stated else UNKNOWN)


# -- front matter ----------------------------------------------------------------------------------------------------


def _front_matter(name: str, model: RunModel, metrics: RunMetrics, params: Params) -> dict[str, Any]:
    licence, _ = licence_of(model, params)
    named = {"license_name": "weights-of-torchvision"} if licence == "other" else {}
    dataset = {
        "type": "imagefolder",
        "name": printable(_data_name(model)),
        "split": metrics.split,
        "revision": model.data.digest,
    }
    result = {
        "task": {"type": "image-classification", "name": "Image classification"},
        "dataset": dataset,
        "metrics": [_metric(key, metrics) for key in METRICS if metrics.metrics.get(key) is not None],
    }
    return {
        "library_name": "image-transfer-pipeline",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "transfer-learning", printable(model.head.kind)],
        "license": licence,
        **named,
        "base_model": printable(model.backbone.name),
        "base_model_relation": "finetune" if model.verb == "finetune" else "adapter",
        "metrics": [key for key in METRICS if metrics.metrics.get(key) is not None],
        "model-index": [{"name": printable(name), "results": [result]}],
    }


def _metric(key: str, metrics: RunMetrics) -> dict[str, Any]:
    interval = metrics.metrics.get(f"{key}_ci95")
    details = {"n": metrics.n, **({"ci95": list(interval)} if isinstance(interval, list) else {})}
    return {"type": key, "name": METRICS[key].title, "value": metrics.metrics[key], "args": details}


# -- text ------------------------------------------------------------------------------------------------------------


def _what(model: RunModel, metrics: RunMetrics) -> str:
    names = _listed([_code(label) for label in metrics.class_names])
    backbone = f"{_code(model.backbone.name)} ({_text(model.backbone.weights)})"
    how = (
        f"{backbone} and its {_text(model.head.kind)} head, fine-tuned together"
        if model.verb == "finetune"
        else f"a {_text(model.head.kind)} head on the features of the frozen backbone {backbone}"
    )
    return f"An image classifier of {len(metrics.class_names)} classes ({names}): {how}."


def _scores(metrics: RunMetrics) -> str:
    rows = ["| metric | value | 95 % interval |", "| :-- | --: | --: |"]
    for key, metric in METRICS.items():
        if key in metrics.metrics:
            value, bounds = metrics.metrics[key], metric.show_interval(metrics.metrics.get(f"{key}_ci95"))
            rows.append(f"| {metric.title} | {metric.show(value)} | {bounds or '–'} |")
    baseline = []
    if metrics.baseline_accuracy is not None and metrics.baseline_class is not None:
        share, label = percent(metrics.baseline_accuracy), _code(metrics.baseline_class)
        baseline = [f"To answer {label} always would be right for {share} of these {images(metrics.n)}."]
    return "\n".join(rows) + "\n\n" + " ".join([_text(metrics.protocol), *baseline])


def _use(name: str) -> str:
    return f"""```sh
pipeline predict PATH/TO/{_plain(name)} IMAGES...
pipeline export PATH/TO/{_plain(name)} model.onnx
```

Nothing in the folder is unpickled or imported when it is loaded. Images are decoded, resized, cropped and normalised
as `model.json` says; the exported file does that by itself."""


def _origin(model: RunModel, params: Params) -> str:
    counts = ", ".join(f"{count:,} {_text(split)}" for split, count in model.data.images.items() if count)
    lines = [
        f"Images: {_code(_data_name(model))} ({counts}), digest `{_plain(model.data.digest)}`.",
        f"Backbone: {_code(model.backbone.name)}, tensors `{_plain(model.backbone.digest)}`, in {model.precision}.",
        f"Licence: {licence_of(model, params)[1]} The licence of the images is not recorded.",
        f"Made {model.created:%Y-%m-%d} by image-transfer-pipeline with "
        + ", ".join(f"{_text(name)} {_text(version)}" for name, version in model.versions.items())
        + ".",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _limits(metrics: RunMetrics, predictions: Predictions, params: Params) -> list[str]:
    """What a user of the run must know, each in a line."""
    lines = ["It answers with one of its classes whatever an image shows."]
    if few := _small_classes(metrics, predictions):
        one = len(few) == 1
        head = f"{len(few)} {'class has' if one else 'classes have'} fewer than {FEW_IMAGES} images in train"
        lines.append(f"{head}: {_listed([f'{_code(label)} ({count})' for label, count in few])}.")
    if metrics.n < 100:
        lines.append(f"The scores rest on {images(metrics.n)}: their intervals are wide.")
    if params.data.group_pattern is None:
        lines.append(
            "Groups were not declared: where images of one patient, video or place are on both sides of the split, "
            "the scores are too good."
        )
    if metrics.leak is not None:
        lines.append(_text(leak_sentence(metrics.leak, metrics.split)))
    return [*lines, *(_text(warning) for warning in metrics.warnings)]


def _small_classes(metrics: RunMetrics, predictions: Predictions) -> list[tuple[str, int]]:
    train = [label for label, split in zip(predictions.labels, predictions.splits, strict=True) if split == "train"]
    place = {label: number for number, label in enumerate(metrics.class_names)}
    counts = np.bincount([place[label] for label in train if label in place], minlength=len(place)).tolist()
    small = [(label, count) for label, count in zip(metrics.class_names, counts, strict=True) if count < FEW_IMAGES]
    return sorted(small, key=lambda item: item[1])


def _data_name(model: RunModel) -> str:
    return model.data.root.rstrip("/").rpartition("/")[2] or model.data.root


def _listed(items: list[str]) -> str:
    more = len(items) - SHOWN_CLASSES
    return ", ".join(items[:SHOWN_CLASSES]) + (f" and {more:,} more" if more > 0 else "")


def _plain(text: str) -> str:
    """A name inside code, where nothing can be escaped."""
    return printable(text).replace("`", "'")


def _code(text: str) -> str:
    return f"`{_plain(text)}`"


def _text(text: str) -> str:
    """A name or sentence in running text; Markdown and HTML in it stay letters."""
    escaped = printable(text)
    for sign in "\\`*_[]<>|#":
        escaped = escaped.replace(sign, f"\\{sign}")
    return escaped
