"""A pretrained classifier on images, without training anything: its top classes by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..backbones import Features, Forward, build_classifier, make_decoder
from ..backbones.backbone import CPU_BATCH, DECODER_RULES
from ..data.digests import Digests
from ..data.images import open_given
from ..evaluate import ClassifierOutput
from ..features.decoding import Decoding, as_the_rule_says
from ..features.extractor import extract_features
from ..features.prepare import Preparation
from ..features.quarantine import Quarantine, decoding_rule
from ..features.views import PLAIN
from ..heads.common import softmax
from ..params import Params
from ..runtime.cores import worker_count
from ..runtime.device import resolve_device
from ..runtime.interrupt import stop_after_batch
from ..runtime.progress import ProgressBar
from .run import Prediction, label_images


def classify(params: Params, paths: Sequence[Path | str], *, top: int = 5, quiet: bool = False) -> list[Prediction]:
    """The ``top`` classes of each image by the pretrained model ``backbone.name`` with ``backbone.weights``.

    Raises:
        WeightsError: the weights cannot be had, or have no classifier.
        DataError: a path does not exist, or there is no image.
    """
    module, transform, categories = build_classifier(params.backbone.name, params.backbone.weights)
    images = open_given(paths, params.data, params.cache.dir)
    decoder = make_decoder(transform, params.data.max_pixels, DECODER_RULES[params.extract.decoder])
    quarantine = Quarantine(params.cache.dir, decoding_rule(decoder, transform.resize, transform.crop))
    device = resolve_device(params.extract.device)
    logits: dict[bytes, Features] = {}

    def sink(features: Features, digests: Digests) -> None:
        logits.update(zip(map(bytes, digests), features, strict=True))

    decoding = as_the_rule_says(Decoding(decoder, PLAIN, transform.framing), device)
    preparation = Preparation(images, lambda _digest: False, quarantine, decode=decoding)
    with stop_after_batch() as interruption, ProgressBar("classifying", len(images), quiet=quiet) as bar:
        extract_features(
            range(len(images)),
            preparation,
            Forward(lambda: module.to(device), transform.normalise, device, CPU_BATCH),
            sink,
            workers=worker_count(params.extract.workers),
            interruption=interruption,
            seen=lambda _content: bar.advance(),
        )
    rows = [row for row in np.flatnonzero(images.known).tolist() if images.digest(row) in logits]
    scores = np.array([logits[images.digest(row)] for row in rows]).reshape(len(rows), len(categories))
    probabilities = softmax(scores.astype(np.float64))
    output = ClassifierOutput(probabilities.argmax(axis=1), probabilities)
    return label_images(images, rows, output, categories, top, problem=quarantine.problem_with)
