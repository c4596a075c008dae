"""The score on the selection set: evaluation pixels, prepared once and kept where they fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..params.sections import FinetuneParams
from ..runtime.distributed import World
from .batches import prepare_batches, resolve_workers
from .history import Score
from .images import LabelledImages, PixelTransform, cache_budget


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Mixed precision in ``dtype``; float32 means none."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


class SelectionSet:
    """Images in the backbone's own transform, scored by any number of processes, each its share.

    Pixels stay in memory where all of them fit into ``params.image_cache_mb``.
    """

    def __init__(
        self,
        images: LabelledImages,
        transform: PixelTransform,
        device: torch.device,
        params: FinetuneParams,
        *,
        world: World | None = None,
    ) -> None:
        self.images, self.transform, self.device = images, transform, device
        world = world or World()
        self.rows = np.arange(world.rank, len(images), world.size)
        self.shared = world.size > 1
        self.workers = resolve_workers(params.workers, device)
        size = params.batch_size
        self._batches = [self.rows[start : start + size] for start in range(0, len(self.rows), size)]
        self._keeps = len(self.rows) * 3 * transform.crop**2 <= cache_budget(params.image_cache_mb)
        self._kept: list[Tensor] = []

    def score(self, classifier: nn.Module, dtype: torch.dtype = torch.float32) -> Score:
        """The score of ``classifier``, left in evaluation mode."""
        sums = torch.zeros(3, dtype=torch.float64)
        for rows, logits in zip(self._batches, self._forward(classifier, dtype), strict=True):
            targets = torch.from_numpy(self.images.targets[rows])
            sums[0] += F.cross_entropy(logits.double(), targets, reduction="sum")
            sums[1] += (logits.argmax(1) == targets).sum()
            sums[2] += len(rows)
        if self.shared:
            sums = sums.to(self.device if self.device.type == "cuda" else "cpu")
            torch.distributed.all_reduce(sums)
        loss, correct, count = sums.tolist()
        return Score(loss / max(count, 1), correct / max(count, 1), int(count))

    def logits(self, classifier: nn.Module, dtype: torch.dtype = torch.float32) -> NDArray[np.float32]:
        """Logits (rows of this process, classes), in the order of ``rows``."""
        parts = list(self._forward(classifier, dtype))
        return np.concatenate([part.numpy() for part in parts]) if parts else np.empty((0, 0), np.float32)

    def pixels(self) -> Iterator[Tensor]:
        """The evaluation pixels of this process's images, a batch at a time: uint8 (n, 3, crop, crop), on the CPU."""
        if self._kept:
            yield from self._kept
            return
        kept: list[Tensor] = []
        prepared = prepare_batches(self._batches, self._pixels_of, size=self.transform.crop, workers=self.workers)
        for pixels in prepared:
            if self._keeps:
                kept.append(pixels)
            yield pixels
        self._kept = kept

    def _forward(self, classifier: nn.Module, dtype: torch.dtype) -> Iterator[Tensor]:
        classifier.eval()
        for pixels in self.pixels():
            yield self._logits_of(pixels, classifier, dtype)

    @torch.inference_mode()
    def _logits_of(self, pixels: Tensor, classifier: nn.Module, dtype: torch.dtype) -> Tensor:
        images = self.transform.normalise(pixels.to(self.device, non_blocking=True), torch.float32)
        with autocast(self.device, dtype):
            logits: Tensor = classifier(images.contiguous(memory_format=torch.channels_last))
        return logits.float().cpu()

    def _pixels_of(self, row: int) -> NDArray[np.uint8]:
        return self.transform.pixels(self.images.source.image(row)).transpose(1, 2, 0)
