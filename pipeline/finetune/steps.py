"""One step of training: prepare pixels, add up gradients over accumulated batches, move the weights."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..runtime.seeds import derive_seed
from .augment import Augment
from .batches import Batch, plan_epoch, prepare_batches, resolve_workers
from .images import CachedImages, LabelledImages, PixelTransform, cache_budget
from .mixing import Mix, mix_images
from .network import TrainingNetwork
from .objective import correct_sum, make_objective
from .optimizer import set_rates
from .selection import autocast


class Stepper:
    """Feeds training images through a `TrainingNetwork`.

    Args:
        class_weights: (c,), or None for equal ones.
        dtype: of mixed precision; float32 for none.
    """

    def __init__(
        self,
        network: TrainingNetwork,
        images: LabelledImages,
        transform: PixelTransform,
        *,
        class_weights: NDArray[np.floating] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        params = network.params
        self.network, self.params, self.transform, self.dtype = network, params, transform, dtype
        self.device, self.world = network.device, network.world
        self.source = CachedImages(images.source, cache_budget(params.image_cache_mb))
        self.targets = images.targets.astype(np.int64)
        self.augment = Augment(
            params.augment, size=transform.crop, interpolation=transform.interpolation, fill=transform.mean
        )
        self.workers = resolve_workers(params.workers, self.device)
        self.objective = make_objective(params.label_smoothing, class_weights, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.sum_dtype = torch.float32 if self.device.type == "mps" else torch.float64

    def plan(self, epoch: int) -> list[Batch]:
        """The batches of ``epoch`` for this process."""
        return plan_epoch(len(self.targets), self.params, epoch=epoch, world=self.world)

    def prepare(self, batches: list[Batch], epoch: int) -> Iterator[Tensor]:
        """Augmented pixels of each batch, uint8 (n, 3, size, size), prepared ahead by threads."""

        def pixels_of(row: int) -> NDArray[np.uint8]:
            digest = self.source.digest(row)
            return self.augment.pixels(self.source.image(row), seed=self.params.seed, epoch=epoch, digest=digest)

        rows = [batch.rows for batch in batches]
        pin = self.device.type == "cuda"
        return prepare_batches(rows, pixels_of, size=self.augment.size, workers=self.workers, pin=pin)

    def add_gradients(self, batch: Batch, pixels: Tensor, epoch: int) -> Tensor:
        """Forward and backward; the batch's sums of (loss, weights, correct, images), on the device.

        Dropout is drawn from (seed, epoch, batch), so nothing depends on what happened before.
        """
        torch.manual_seed(derive_seed(self.params.seed, "batch", epoch, batch.index, self.world.rank))
        images = self.transform.normalise(pixels.to(self.device, non_blocking=True), torch.float32)
        targets = torch.from_numpy(self.targets[batch.rows]).to(self.device, non_blocking=True)
        mix = self._mix(images, batch, epoch)
        images = images if mix is None else mix.images
        with self.network.gradient_sync(batch.closes):
            with autocast(self.device, self.dtype):
                logits = self.network.forward(images.contiguous(memory_format=torch.channels_last))
            loss = self.objective.loss_sum(logits.float(), targets, mix)
            self.scaler.scale(loss * self._share(batch)).backward()  # type: ignore[no-untyped-call]
        weight = self.objective.weight_sum(self.targets[batch.rows])
        sums = (loss.detach(), weight, correct_sum(logits, targets, mix), len(batch.rows))
        total = torch.stack([torch.as_tensor(value, device=self.device).to(self.sum_dtype) for value in sums])
        return total * float(batch.counts)

    def step(self, factor: float) -> None:
        """Move the weights at ``factor`` times each group's rate, and forget the gradients."""
        optimizer = self.network.optimizer
        set_rates(optimizer, factor)
        if self.params.clip_norm:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters, self.params.clip_norm)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def _mix(self, images: Tensor, batch: Batch, epoch: int) -> Mix | None:
        strengths = {"mixup": self.params.mixup, "cutmix": self.params.cutmix}
        return mix_images(images, **strengths, place=(self.params.seed, epoch, batch.index), rank=self.world.rank)

    def _share(self, batch: Batch) -> float:
        """What turns the batch's sum into its part of the step's mean; processes average their gradients.

        A borrowed image has no say.
        """
        weights = self.objective.weight_sum(self.targets[batch.step_rows])
        return self.world.size / weights if batch.counts else 0.0
