"""One step of a training: which blocks are open, in which precision, the loss, its gradients, the new weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import DeviceError, FinetuneError
from ..params import FinetuneParams
from ..params.sections import Precision
from ..runtime.device import to_device
from ..runtime.distributed import World
from ..runtime.seeds import derive_seed
from .augment import Augment, Mix, mix_images
from .batchnorm import BatchNormMode, batchnorm_modules, find_pairs, resolve_batchnorm
from .classifier import Classifier
from .groups import (
    Group,
    as_param_group,
    backbone_groups,
    find_blocks,
    first_groups,
    make_optimizer,
    set_rates,
    unfrozen_blocks,
)
from .images import (
    Batch,
    CachedImages,
    LabelledImages,
    PixelTransform,
    cache_budget,
    plan_epoch,
    prepare_batches,
    resolve_workers,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# -- how it computes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """How a training computes; resolved, nothing ``auto``.

    Attributes:
        dtype: of mixed precision; float32 for none.
        class_weights: (c,), or None for equal ones.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    batchnorm: BatchNormMode = "frozen"
    class_weights: NDArray[np.floating] | None = None
    world: World = field(default_factory=World)

    def autocast(self) -> AbstractContextManager[object]:
        """Mixed precision inside the block."""
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, self.dtype)


def resolve_setup(
    params: FinetuneParams,
    device: torch.device,
    *,
    targets: NDArray[np.int64],
    class_names: Sequence[str],
    from_scratch: bool = False,
    world: World | None = None,
) -> Setup:
    """Decide what ``params`` leave to be decided.

    Args:
        targets: of the images that train.
        from_scratch: whether both backbone and head begin at random.

    Raises:
        FinetuneError: ``class_weight`` names a class that is not there.
        DeviceError: the precision does not work on ``device``.
    """
    return Setup(
        device=device,
        dtype=resolve_training_dtype(params.precision, device),
        batchnorm=resolve_batchnorm(params.batchnorm, from_scratch=from_scratch),
        class_weights=resolve_class_weights(params, targets, class_names),
        world=world or World(),
    )


def resolve_training_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the hardware multiplies in it (CUDA from Ampere on, CPUs with AMX), else float32.

    Raises:
        DeviceError: float16 on a CPU, whose gradients it cannot scale.
    """
    if precision == "auto":
        return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32
    if precision == "float16" and device.type != "cuda":
        raise DeviceError(
            f"Training in float16 does not work on {device.type}.",
            where="finetune.precision",
            remedy="use finetune.precision=auto",
        )
    return DTYPES[precision]


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        # Without AMX, bfloat16 on a CPU is slower than float32. Older torch has no question for it: then float32.
        supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
        return bool(supported and supported())
    return False


def resolve_class_weights(
    params: FinetuneParams, targets: NDArray[np.int64], class_names: Sequence[str]
) -> NDArray[np.float64] | None:
    """The weight (c,) of each class: ``n / (c * count)`` as scikit-learn's ``balanced``, or by name (others 1).

    Raises:
        FinetuneError: a name that is not a class.
    """
    given = params.class_weight
    if given is None:
        return None
    if given == "balanced":
        counts = np.bincount(targets, minlength=len(class_names))
        return np.where(counts > 0, len(targets) / (len(class_names) * np.maximum(counts, 1)), 1.0)
    if unknown := sorted(set(given) - set(class_names)):
        raise FinetuneError(
            f"There is no class called {unknown[0]!r}.",
            where="finetune.class_weight",
            remedy=f"classes: {', '.join(class_names)}",
        )
    return np.array([given.get(name, 1.0) for name in class_names])


# -- what trains -----------------------------------------------------------------------------------------------------


class TrainableClassifier:
    """Holds a `Classifier` on its device together with its optimizer, and opens blocks as epochs go by.

    Frozen blocks compute in evaluation mode, need no gradients and are in no optimizer. A BatchNorm moves its
    statistics only where its block is open and ``setup.batchnorm`` is ``train``.

    Raises:
        FinetuneError: nothing trains.
    """

    def __init__(self, classifier: Classifier, params: FinetuneParams, setup: Setup) -> None:
        self.params, self.setup = params, setup
        moves = setup.batchnorm == "train"  # fixed statistics have nothing to tell one another
        if params.sync_batchnorm and moves and setup.world.size > 1 and setup.device.type == "cuda":
            classifier = nn.SyncBatchNorm.convert_sync_batchnorm(classifier)  # type: ignore[no-untyped-call]
        self.classifier = classifier.to(setup.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.pairs = find_pairs(self.classifier.backbone)
        self.blocks = find_blocks(self.classifier.backbone)
        self.classifier.requires_grad_(False)
        self.epoch, self.open = 1, self._opened(1)
        self.groups: list[Group] = first_groups(self.classifier, params)
        self.optimizer = make_optimizer(self.groups, params, setup.device)
        self._wrapped: nn.Module = self.classifier
        self._forward = self._compiled()
        self._unfreeze(self.groups)

    def advance(self, epoch: int) -> None:
        """Open what trains in ``epoch``; passing over epochs adds their groups in the same order as training did."""
        for current in range(self.epoch + 1, epoch + 1):
            opened = self._opened(current)
            added = backbone_groups(self.blocks, [index for index in opened if index not in self.open], self.params)
            for group in added:
                self.optimizer.add_param_group(as_param_group(group))
            self.groups += added
            self.epoch, self.open = current, opened
            self._unfreeze(added)

    def train_mode(self) -> None:
        """Training mode for what is open, evaluation mode for what is not."""
        self.classifier.train()
        self.classifier.backbone.train(len(self.open) == len(self.blocks))
        for index, block in enumerate(self.blocks):
            for module in block.modules:
                module.train(index in self.open)
        if self.setup.batchnorm == "frozen":
            for norm in batchnorm_modules(self.classifier.backbone):
                norm.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits; a single image passes with BatchNorm's running statistics, since it has none of its own.

        Where processes compute the statistics together they are those of all their images, and the others would wait
        for ever for one that took no part.
        """
        if len(images) > 1:
            return cast(Tensor, self._forward(images))
        alone = [norm for norm in batchnorm_modules(self.classifier) if not isinstance(norm, nn.SyncBatchNorm)]
        moving = [norm for norm in alone if norm.training]
        for norm in moving:
            norm.eval()
        logits = cast(Tensor, self._forward(images))
        for norm in moving:
            norm.train()
        return logits

    def gradient_sync(self, closes: bool) -> AbstractContextManager[object]:
        """Processes exchange gradients in the batch that closes a step only."""
        wrapped = self._wrapped
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) and not closes else nullcontext()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Everything that trains."""
        return [parameter for group in self.groups for _, parameter in group.parameters]

    @property
    def trainable(self) -> int:
        """Numbers that train."""
        return sum(group.count for group in self.groups)

    def _opened(self, epoch: int) -> range:
        count = len(self.blocks)
        opened = unfrozen_blocks(self.params.unfreeze, count, epoch=epoch, epochs=self.params.epochs)
        return opened if self.params.backbone_lr else range(count, count)

    def _unfreeze(self, groups: list[Group]) -> None:
        for group in groups:
            for _, parameter in group.parameters:
                parameter.requires_grad_(True)
        if self.setup.world.size > 1 and groups:
            # Reduces the gradients of what needs them when it is built: built anew when more is opened.
            ids = [self.setup.device.index] if self.setup.device.type == "cuda" else None
            self._wrapped = DistributedDataParallel(self.classifier, device_ids=ids)
            self._forward = self._compiled()

    def _compiled(self) -> nn.Module:
        """What computes the steps: compiled once for each size of a batch and each set of open blocks."""
        return cast(nn.Module, torch.compile(self._wrapped, dynamic=False)) if self.params.compile else self._wrapped


# -- the step --------------------------------------------------------------------------------------------------------


class Objective:
    """Cross-entropy with label smoothing and a weight for each class, as sums that add up across batches."""

    def __init__(
        self, label_smoothing: float, class_weights: NDArray[np.floating] | None, device: torch.device
    ) -> None:
        self.label_smoothing = label_smoothing
        self._rounded = None if class_weights is None else np.asarray(class_weights, dtype=np.float32)
        self._weights = None if self._rounded is None else torch.as_tensor(self._rounded, device=device)

    def loss_sum(self, logits: Tensor, targets: Tensor, mix: Mix | None) -> Tensor:
        """The sum of the images' weighted losses; divided by `weight_sum` of a step it is that step's loss."""
        loss = self._sum(logits, targets)
        if mix is None:
            return loss
        return mix.share * loss + (1 - mix.share) * self._sum(logits, targets[mix.partners])

    def weight_sum(self, targets: NDArray[np.int64]) -> float:
        """The weights of all images of a step. Mixing permutes targets within a batch and so leaves it as it is."""
        if self._rounded is None:
            return float(len(targets))
        return float(self._rounded.astype(np.float64)[targets].sum())

    def _sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, self._weights, label_smoothing=self.label_smoothing, reduction="sum")


def correct_sum(logits: Tensor, targets: Tensor, mix: Mix | None) -> Tensor:
    """How many images are classified correctly; a mixed one counts by its shares."""
    predicted = logits.detach().argmax(1)
    correct = (predicted == targets).sum()
    if mix is None:
        return correct
    return mix.share * correct + (1 - mix.share) * (predicted == targets[mix.partners]).sum()


class Stepper:
    """Feeds training images through a `TrainableClassifier`."""

    def __init__(self, model: TrainableClassifier, images: LabelledImages, transform: PixelTransform) -> None:
        params, setup = model.params, model.setup
        self.model, self.params, self.setup, self.transform = model, params, setup, transform
        self.source = CachedImages(images.source, cache_budget(params.image_cache_mb))
        self.targets = images.targets.astype(np.int64)
        self.augment = Augment(
            params.augment, size=transform.crop, interpolation=transform.interpolation, fill=transform.mean
        )
        self.workers = resolve_workers(params.workers, setup.device, setup.world)
        self.objective = Objective(params.label_smoothing, setup.class_weights, setup.device)
        self.scaler = torch.amp.GradScaler(setup.device.type, enabled=setup.dtype == torch.float16)
        self.sum_dtype = torch.float32 if setup.device.type == "mps" else torch.float64

    def plan(self, epoch: int) -> list[Batch]:
        """The batches of ``epoch`` for this process."""
        return plan_epoch(len(self.targets), self.params, epoch=epoch, world=self.setup.world)

    def prepare(self, batches: list[Batch], epoch: int) -> Iterator[Tensor]:
        """Augmented pixels of each batch, uint8 (n, 3, size, size), prepared ahead by threads."""

        def pixels_of(row: int) -> NDArray[np.uint8]:
            digest = self.source.digest(row)
            return self.augment.pixels(self.source.image(row), seed=self.params.seed, epoch=epoch, digest=digest)

        rows = [batch.rows for batch in batches]
        device = self.setup.device
        return prepare_batches(rows, pixels_of, size=self.augment.size, workers=self.workers, device=device)

    def add_gradients(self, batch: Batch, pixels: Tensor, epoch: int) -> Tensor:
        """Forward and backward; the batch's sums of (loss, weights, correct, images), on the device.

        Dropout is drawn from (seed, epoch, batch), so nothing depends on what happened before.
        """
        device = self.setup.device
        torch.manual_seed(derive_seed(self.params.seed, "batch", epoch, batch.index, self.setup.world.rank))
        images = self.transform.normalise(pixels.to(device, non_blocking=True), torch.float32)
        targets = to_device(self.targets[batch.rows], device)
        mix = self._mix(images, batch, epoch)
        images = images if mix is None else mix.images
        with self.model.gradient_sync(batch.closes):
            with self.setup.autocast():
                logits = self.model.forward(images.contiguous(memory_format=torch.channels_last))
            loss = self.objective.loss_sum(logits.float(), targets, mix)
            self.scaler.scale(loss * self._share(batch)).backward()  # type: ignore[no-untyped-call]
        # Filled in on the device: a copy to a GPU would wait for all that it has been told to do.
        weight = torch.full((), self.objective.weight_sum(self.targets[batch.rows]), device=device)
        count = torch.full((), len(batch.rows), device=device)
        sums = (loss.detach(), weight, correct_sum(logits, targets, mix), count)
        return torch.stack([value.to(self.sum_dtype) for value in sums]) * float(batch.counts)

    def step(self, factor: float) -> None:
        """Move the weights at ``factor`` times each group's rate, and forget the gradients."""
        optimizer = self.model.optimizer
        set_rates(optimizer, factor)
        if self.params.clip_norm:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters, self.params.clip_norm)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def _mix(self, images: Tensor, batch: Batch, epoch: int) -> Mix | None:
        place = (self.params.seed, epoch, batch.index)
        strengths = {"mixup": self.params.mixup, "cutmix": self.params.cutmix}
        return mix_images(images, **strengths, place=place, rank=self.setup.world.rank)

    def _share(self, batch: Batch) -> float:
        """What turns the batch's sum into its part of the step's mean; processes average their gradients.

        A borrowed image has no say.
        """
        weights = self.objective.weight_sum(self.targets[batch.step_rows])
        return self.setup.world.size / weights if batch.counts else 0.0
