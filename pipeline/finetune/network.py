"""The classifier in training: which blocks are open, in which mode, and who shares its gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..params.sections import FinetuneParams
from ..runtime.distributed import World
from .batchnorm import BatchNormMode, batchnorm_modules, find_pairs
from .classifier import Classifier
from .groups import Block, Group, backbone_groups, find_blocks, head_groups, unfrozen_blocks
from .optimizer import as_param_group, make_optimizer


class TrainingNetwork:
    """Holds a `Classifier` on its device together with its optimizer, and opens blocks as epochs go by.

    Frozen blocks compute in evaluation mode, need no gradients and are in no optimizer. A BatchNorm moves its
    statistics only where its block is open and ``batchnorm`` is ``train``.
    """

    def __init__(
        self,
        classifier: Classifier,
        params: FinetuneParams,
        *,
        device: torch.device,
        batchnorm: BatchNormMode,
        world: World | None = None,
    ) -> None:
        self.params, self.device, self.batchnorm, self.world = params, device, batchnorm, world or World()
        if params.sync_batchnorm and self.world.size > 1 and device.type == "cuda":
            classifier = nn.SyncBatchNorm.convert_sync_batchnorm(classifier)  # type: ignore[no-untyped-call]
        self.classifier = classifier.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.pairs = find_pairs(self.classifier.backbone)
        self.blocks: list[Block] = find_blocks(self.classifier.backbone)
        self.open = range(len(self.blocks), len(self.blocks))
        self.groups: list[Group] = head_groups(self.classifier, params)
        self.epoch = 0
        self._forward: nn.Module = self.classifier
        self.classifier.requires_grad_(False)
        self._optimizer: torch.optim.Optimizer | None = None
        self.advance(1)

    def advance(self, epoch: int) -> None:
        """Open what trains in ``epoch``; passing over epochs adds their groups in the same order as training did."""
        for current in range(self.epoch + 1, epoch + 1):
            opened = unfrozen_blocks(self.params.unfreeze, len(self.blocks), epoch=current, epochs=self.params.epochs)
            self._add_groups([index for index in opened if index not in self.open])
            self.open = opened if self.params.backbone_lr else self.open
        self.epoch = epoch

    def train_mode(self) -> None:
        """Training mode for what is open, evaluation mode for what is not."""
        self.classifier.train()
        self.classifier.backbone.train(len(self.open) == len(self.blocks))
        for index, block in enumerate(self.blocks):
            for module in block.modules:
                module.train(index in self.open)
        if self.batchnorm == "frozen":
            for norm in batchnorm_modules(self.classifier.backbone):
                norm.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Logits; a single image passes with BatchNorm's running statistics, since it has none of its own."""
        if len(images) > 1:
            return cast(Tensor, self._forward(images))
        moving = [norm for norm in batchnorm_modules(self.classifier) if norm.training]
        for norm in moving:
            norm.eval()
        logits = cast(Tensor, self._forward(images))
        for norm in moving:
            norm.train()
        return logits

    def gradient_sync(self, closes: bool) -> AbstractContextManager[object]:
        """Processes exchange gradients in the batch that closes a step only."""
        wrapped = isinstance(self._forward, DistributedDataParallel)
        return self._forward.no_sync() if wrapped and not closes else nullcontext()  # type: ignore[operator]

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Of the groups opened so far."""
        assert self._optimizer is not None
        return self._optimizer

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Everything that trains."""
        return [parameter for group in self.groups for _, parameter in group.parameters]

    @property
    def trainable(self) -> int:
        """Numbers that train."""
        return sum(group.count for group in self.groups)

    @property
    def total(self) -> int:
        """Numbers there are, in backbone and head."""
        return sum(parameter.numel() for parameter in self.classifier.parameters())

    def _add_groups(self, new_blocks: list[int]) -> None:
        first = self._optimizer is None
        added = backbone_groups(self.blocks, new_blocks, self.params)
        self.groups += added
        if first:
            self._optimizer = make_optimizer(self.groups, self.params, self.device)
        else:
            for group in added:
                self.optimizer.add_param_group(as_param_group(group))
        for group in self.groups if first else added:
            for _, parameter in group.parameters:
                parameter.requires_grad_(True)
        if self.world.size > 1 and (first or added):
            # Reduces the gradients of what needs them when it is built: built anew when more is opened.
            ids = [self.device.index] if self.device.type == "cuda" else None
            self._forward = DistributedDataParallel(self.classifier, device_ids=ids)
