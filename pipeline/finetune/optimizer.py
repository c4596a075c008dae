"""The optimizer for a list of groups, and its rates at each step."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import FinetuneError
from ..params.sections import FinetuneParams
from .groups import Group


def make_optimizer(groups: list[Group], params: FinetuneParams, device: torch.device) -> torch.optim.Optimizer:
    """AdamW, Adam (decay as a penalty on the loss) or SGD with momentum; fused where the device has it.

    Raises:
        FinetuneError: no parameter trains.
    """
    if not groups:
        raise FinetuneError(
            "Nothing is left to train.",
            where="finetune",
            why=f"head_lr is {params.head_lr}, backbone_lr {params.backbone_lr}, unfreeze {params.unfreeze}",
            remedy="set finetune.head_lr above 0",
        )
    items = [as_param_group(group) for group in groups]
    fused = device.type in ("cpu", "cuda")
    if params.optimizer == "sgd":
        return torch.optim.SGD(items, lr=params.head_lr, momentum=params.momentum, fused=fused)
    kind = torch.optim.AdamW if params.optimizer == "adamw" else torch.optim.Adam
    return kind(items, lr=params.head_lr, fused=fused)


def as_param_group(group: Group) -> dict[str, Any]:
    """What torch's optimizers take; ``base_lr`` is the rate that the schedule's factor multiplies."""
    return {
        "params": [parameter for _, parameter in group.parameters],
        "lr": group.lr,
        "base_lr": group.lr,
        "weight_decay": group.weight_decay,
        "name": group.name,
    }


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Multiply every group's own rate by the schedule's ``factor``."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
