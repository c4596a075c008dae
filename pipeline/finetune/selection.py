"""The images that select the epoch: which ones, and the score on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed
from numpy.typing import NDArray
from torch import Tensor, nn

from ..data.source import TEST, VAL
from ..errors import FinetuneError
from ..features.cache import FeatureTable
from ..heads import hold_out, log_losses
from ..heads.common import softmax
from ..params import FinetuneParams
from .augment import Augment
from .history import SelectionScore
from .images import LabelledImages, PixelTransform, cache_budget, prepare_batches, resolve_workers
from .step import Setup

COOLING = 0.5


@dataclass(frozen=True)
class Holdout:
    """Rows of a table (int positions): what trains, what is held out to select the epoch, and the latter's name."""

    train: NDArray[np.int64]
    selection: NDArray[np.int64]
    name: str


def hold_out_selection(table: FeatureTable, params: FinetuneParams, *, reported: int) -> Holdout:
    """Select on val where a test split is reported, else on a stratified part of train, duplicates on one side.

    Raises:
        FinetuneError: no image can be set aside.
    """
    train, val = np.flatnonzero(table.train), np.flatnonzero(table.labelled(VAL))
    if reported == TEST and len(val):
        return Holdout(train, val, "val")
    kept, held = hold_out(table.targets[train], table.groups[train], params.selection_fraction, params.seed)
    if not len(held):
        raise FinetuneError(
            "No image can be set aside to select the epoch.",
            where=table.root,
            why="every class has a single independent image in train",
            remedy="add images, or give a test split so that val selects",
        )
    return Holdout(train[kept], train[held], "a held-out part of train")


def selection_score(
    logits: NDArray[np.float64],
    targets: NDArray[np.int64],
    class_weights: NDArray[np.floating] | None = None,
    *,
    cool: bool = False,
) -> SelectionScore:
    """What logits (n, c) of images of the classes ``targets`` (n,) are worth, each image with the weight of its class.

    With ``balanced`` weights (c,) the accuracy is the mean of the classes' own.

    Args:
        cool: also the loss at `selection_temperature`; without it an overconfident classifier that ranks better loses.
    """
    weights = np.ones(len(targets)) if class_weights is None else np.asarray(class_weights, np.float64)[targets]
    total = max(float(weights.sum()), 1e-12)
    right = logits.argmax(axis=1) == targets

    def loss(temperature: float) -> float:
        return float(weights @ log_losses(softmax(logits / temperature), targets)) / total

    cooled = loss(selection_temperature(logits, targets)) if cool else None
    return SelectionScore(loss(1.0), float(weights @ right) / total, cooled)


def selection_temperature(logits: NDArray[np.float64], targets: NDArray[np.int64]) -> float:
    """What logits (n, c) are to be divided by so that their probabilities are honest (Guo et al. 2017).

    The most probable one where its logarithm is normal around 0 with a deviation of `COOLING`: a few images that
    are all classified rightly would otherwise ask for a temperature of 0. Found in two passes over a grid.
    """

    def cost(log: float) -> float:
        return float(log_losses(softmax(logits / np.exp(log)), targets).sum()) + (log / COOLING) ** 2 / 2

    coarse = min(np.linspace(-1.6, 1.6, 9).tolist(), key=cost)
    return float(np.exp(min((coarse + np.linspace(-0.3, 0.3, 7)).tolist(), key=cost)))


class SelectionSet:
    """Images in the backbone's own transform, scored by any number of processes, each its share.

    Pixels stay in memory where all of them fit into ``params.image_cache_mb``.

    Args:
        augment: show the images changed by it instead, each in one way.
    """

    def __init__(
        self,
        images: LabelledImages,
        transform: PixelTransform,
        params: FinetuneParams,
        setup: Setup,
        *,
        augment: Augment | None = None,
    ) -> None:
        self.images, self.transform, self.setup, self.augment = images, transform, setup, augment
        self.cools = params.calibrate == "temperature"
        self.seed, self.size = params.seed, transform.crop if augment is None else augment.size
        self.workers = resolve_workers(params.workers, setup.device, setup.world)
        rows, size = np.arange(setup.world.rank, len(images), setup.world.size), params.batch_size
        self._batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        self._keeps = len(rows) * 3 * self.size**2 <= cache_budget(params.image_cache_mb)
        self._kept: list[Tensor] = []

    def score(self, classifier: nn.Module) -> SelectionScore:
        """The score of ``classifier``, left in evaluation mode; classes weigh as they do in training."""
        logits, weights = self.logits(classifier), self.setup.class_weights
        return selection_score(logits, self.images.targets, weights, cool=self.cools)

    def logits(self, classifier: nn.Module, *, mirror: bool = False) -> NDArray[np.float64]:
        """The logits (n, c) of all images, or of their mirror images; the same in every process."""
        classifier.eval()
        pixels = (batch.flip(3) if mirror else batch for batch in self.pixels())
        mine = [self._logits(batch, classifier).double().numpy() for batch in pixels]
        world = self.setup.world
        shares = [np.concatenate(mine) if mine else None]
        if world.size > 1:
            shares = [None] * world.size
            torch.distributed.all_gather_object(shares, np.concatenate(mine) if mine else None)
        known = [(rank, share) for rank, share in enumerate(shares) if share is not None]
        result = np.empty((len(self.images), known[0][1].shape[1]))
        for rank, share in known:
            result[rank :: world.size] = share
        return result

    def pixels(self) -> Iterator[Tensor]:
        """The evaluation pixels of this process's images, a batch at a time: uint8 (n, 3, crop, crop), on the CPU."""
        if self._kept:
            yield from self._kept
            return
        kept: list[Tensor] = []
        prepared = prepare_batches(self._batches, self._pixels_of, size=self.size, workers=self.workers)
        for pixels in prepared:
            if self._keeps:
                kept.append(pixels)
            yield pixels
        self._kept = kept

    @torch.inference_mode()
    def _logits(self, pixels: Tensor, classifier: nn.Module) -> Tensor:
        images = self.transform.normalise(pixels.to(self.setup.device, non_blocking=True), torch.float32)
        with self.setup.autocast():
            logits: Tensor = classifier(images.contiguous(memory_format=torch.channels_last))
        return logits.float().cpu()

    def _pixels_of(self, row: int) -> NDArray[np.uint8]:
        image = self.images.source.image(row)
        if self.augment is None:
            return self.transform.pixels(image).transpose(1, 2, 0)
        return self.augment.pixels(image, seed=self.seed, epoch=0, digest=self.images.source.digest(row))
