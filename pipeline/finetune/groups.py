"""Which parameters train, and at which rate: blocks by depth, differential rates, an optimizer, a schedule.

Norms and biases are not decayed. Schedules are functions of the step: nothing to save, nothing to restore.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import FinetuneError
from ..params.sections import FinetuneParams
from .classifier import Classifier

DOMINANT = 0.9  # a child that holds this share of the parameters is opened to find the blocks inside it
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
WARMUP_SHARE = 0.3  # of a one-cycle schedule, and its first and last factor: as in torch's OneCycleLR
FIRST_DIVISOR = 25.0
LAST_DIVISOR = 1e4

BACKBONE_LR, HEAD_LR, NEW_HEAD_LR = 3e-4, 1e-4, 1e-3  # what `auto` is for batches of USUAL_BATCH
USUAL_BATCH = 32
ATTENTION_SHARE = 0.1  # of the backbone's rate, for networks whose norms are LayerNorms

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Block:
    """A stretch of the backbone: its modules, and its parameters by name, in the order of the forward pass."""

    name: str
    modules: tuple[nn.Module, ...]
    parameters: tuple[tuple[str, nn.Parameter], ...]


@dataclass(frozen=True)
class Group:
    """Parameters of one learning rate and weight decay, by name."""

    name: str
    lr: float
    weight_decay: float
    parameters: tuple[tuple[str, nn.Parameter], ...]

    @property
    def count(self) -> int:
        """Numbers in the group."""
        return sum(parameter.numel() for _, parameter in self.parameters)


def find_blocks(backbone: nn.Module) -> list[Block]:
    """The backbone's blocks, the input's first: those it names in ``blocks``, or its top-level modules.

    Containers of blocks (``features``, ``encoder.layers``) are opened. Parameters outside any block
    (class token, position embedding) go with the first block, and bare norms go with the block before them.
    """
    names: Sequence[Sequence[str]] | None = getattr(backbone, "blocks", None)
    blocks = _top_level_blocks(backbone) if names is None else _named_blocks(backbone, names)
    taken = {id(parameter) for block in blocks for _, parameter in block.parameters}
    loose = tuple(item for item in _named(backbone, "") if id(item[1]) not in taken)
    if not blocks:
        return [Block("backbone", (backbone,), loose)] if loose else []
    first = blocks[0]
    return [Block(first.name, first.modules, loose + first.parameters), *blocks[1:]]


def unfrozen_blocks(unfreeze: str, blocks: int, *, epoch: int, epochs: int) -> range:
    """The blocks that train in ``epoch`` (from 1).

    ``gradual`` begins with the head alone and opens the blocks from the output on in equal strides, all of them in
    the last epoch (after Howard and Ruder 2018, who open one block an epoch).
    """
    if unfreeze == "none":
        return range(blocks, blocks)
    if unfreeze == "all":
        return range(blocks)
    if unfreeze == "gradual":
        opened = math.ceil(blocks * (epoch - 1) / max(epochs - 1, 1))
        return range(blocks - opened, blocks)
    count = int(unfreeze.removeprefix("last-"))
    if count > blocks:
        raise FinetuneError(
            f"The backbone has {blocks} blocks, so the last {count} cannot be unfrozen.",
            where="finetune.unfreeze",
            remedy=f"use all, or last-N with N up to {blocks}",
        )
    return range(blocks - count, blocks)


def head_rate(params: FinetuneParams) -> float:
    """``head_lr``; ``auto`` is 1e-4 for a head that is at its best already and 1e-3 for a new one, by batch size."""
    if params.head_lr != "auto":
        return params.head_lr
    return _by_batch(HEAD_LR if params.start == "probe" else NEW_HEAD_LR, params)


def backbone_rate(params: FinetuneParams, blocks: Sequence[Block]) -> float:
    """``backbone_lr``; ``auto`` is 3e-4, and a tenth where most norms are LayerNorms, by batch size.

    3e-4 was chosen on the development sets of benchmarks/finetune_quality.py. Transformers and ConvNeXts are usually
    fine-tuned at a tenth of a convolutional network's rate (WiSE-FT: 3e-5).
    """
    if params.backbone_lr != "auto":
        return params.backbone_lr
    parts = (part for block in blocks for module in block.modules for part in module.modules())
    norms = [part for part in parts if isinstance(part, NORMS)]
    layered = sum(not isinstance(norm, nn.modules.batchnorm._NormBase) for norm in norms)
    return _by_batch(BACKBONE_LR * (ATTENTION_SHARE if 2 * layered > len(norms) else 1.0), params)


def _by_batch(rate: float, params: FinetuneParams) -> float:
    """``rate`` of the usual batch for the one at hand, by the square root (Adam; Krizhevsky 2014, Malladi 2022)."""
    return float(f"{rate * math.sqrt(params.batch_size * params.accumulate / USUAL_BATCH):.2g}")


def head_groups(classifier: Classifier, params: FinetuneParams) -> list[Group]:
    """The head's parameters at ``head_lr``, its biases without decay; none at a rate of zero."""
    rate = head_rate(params)
    return _split("head", _named(classifier.head, "head"), rate, params) if rate else []


def backbone_groups(blocks: list[Block], chosen: Iterable[int], params: FinetuneParams) -> list[Group]:
    """Groups for the ``chosen`` blocks; block i of n trains at ``backbone_lr * layer_decay ** (n - 1 - i)``.

    Blocks share their groups where neither decay nor gradual unfreezing tells them apart. A rate of zero gives no
    group: such a block is frozen.
    """
    chosen = list(chosen)
    highest = backbone_rate(params, blocks)
    if not highest or not chosen:
        return []
    if params.layer_decay == 1 and params.unfreeze != "gradual":
        together = [item for index in chosen for item in blocks[index].parameters]
        return _split("backbone", together, highest, params)
    groups: list[Group] = []
    for index in reversed(chosen):
        rate = highest * params.layer_decay ** (len(blocks) - 1 - index)
        groups += _split(f"backbone.{blocks[index].name}", blocks[index].parameters, rate, params)
    return groups


def first_groups(classifier: Classifier, params: FinetuneParams) -> list[Group]:
    """What trains from the first epoch on.

    Raises:
        FinetuneError: nothing would, or more blocks are to be unfrozen than there are.
    """
    blocks = find_blocks(classifier.backbone)
    opened = unfrozen_blocks(params.unfreeze, len(blocks), epoch=1, epochs=params.epochs)
    groups = head_groups(classifier, params) + backbone_groups(blocks, opened, params)
    if not groups:
        raise FinetuneError(
            "Nothing is left to train.",
            where="finetune",
            why=f"head_lr is {params.head_lr}, backbone_lr {params.backbone_lr}, unfreeze {params.unfreeze}",
            remedy="set finetune.head_lr above 0",
        )
    return groups


def describe_groups(groups: list[Group], total: int) -> str:
    """A table of the groups, with trainable and total numbers of parameters below it."""
    rows = [("group", "tensors", "parameters", "lr", "weight decay")]
    for group in groups:
        numbers = (f"{len(group.parameters)}", f"{group.count:,}", f"{group.lr:.3g}", f"{group.weight_decay:.3g}")
        rows.append((group.name, *numbers))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    trainable = sum(group.count for group in groups)
    share = 100 * trainable / max(total, 1)
    return "\n".join([*lines, f"trainable {trainable:,} of {total:,} parameters ({share:.1f} %)"])


def _named_blocks(backbone: nn.Module, names: Sequence[Sequence[str]]) -> list[Block]:
    """A block for each sequence of names of modules and parameters; what a cut backbone lacks is passed over."""
    modules = dict(backbone.named_modules())
    blocks = []
    for block in names:
        beginnings = tuple(f"{name}." for name in block)
        parameters = tuple(item for item in _named(backbone, "") if f"{item[0]}.".startswith(beginnings))
        if parameters:
            blocks.append(Block(block[0], tuple(modules[name] for name in block if name in modules), parameters))
    return blocks


def _top_level_blocks(backbone: nn.Module) -> list[Block]:
    blocks: list[Block] = []
    for name, module in _open(backbone, ""):
        parameters = tuple(_named(module, name))
        if not parameters:
            continue
        if blocks and _only_norms(module):
            last = blocks[-1]
            blocks[-1] = Block(last.name, (*last.modules, module), last.parameters + parameters)
        else:
            blocks.append(Block(name, (module,), parameters))
    return blocks


def _open(module: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    """The children of ``module``; those that are mere containers of blocks are replaced by what they contain."""
    children = [(f"{prefix}{name}", child) for name, child in module.named_children()]
    sizes = [_size(child) for _, child in children]
    first = next((child for (_, child), size in zip(children, sizes, strict=True) if size), None)
    opened: list[tuple[str, nn.Module]] = []
    for (name, child), size in zip(children, sizes, strict=True):
        within = sum(_size(inner) > 0 for inner in child.children())
        dominant = within > 0 and size >= DOMINANT * sum(sizes)
        # `features` of networks that end in large linear layers: first, and with more parts than stand beside it.
        leads = child is first and within > sum(other > 0 for other in sizes) - 1 > 0
        opened += _open(child, f"{name}.") if dominant or leads else [(name, child)]
    return opened


def _only_norms(module: nn.Module) -> bool:
    owners = [part for part in module.modules() if next(part.parameters(recurse=False), None) is not None]
    return all(isinstance(part, NORMS) for part in owners)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _named(module: nn.Module, prefix: str) -> list[tuple[str, nn.Parameter]]:
    return [(f"{prefix}.{name}".lstrip("."), parameter) for name, parameter in module.named_parameters()]


def _split(name: str, parameters: Iterable[tuple[str, nn.Parameter]], lr: float, params: FinetuneParams) -> list[Group]:
    """Vectors (norms and biases) keep their size by themselves; only matrices and kernels are decayed."""
    parameters = list(parameters)
    matrices = tuple(item for item in parameters if item[1].ndim > 1)
    vectors = tuple(item for item in parameters if item[1].ndim <= 1)
    groups = [
        Group(name, lr, params.weight_decay, matrices),
        Group(f"{name} (norms, biases)", lr, 0.0, vectors),
    ]
    return [group for group in groups if group.parameters]


# -- optimizer and schedule --------------------------------------------------------------------------------------------


def make_optimizer(groups: list[Group], params: FinetuneParams, device: torch.device) -> torch.optim.Optimizer:
    """AdamW, Adam (decay as a penalty on the loss) or SGD with momentum; fused where the device has it."""
    items = [as_param_group(group) for group in groups]
    fused = device.type in ("cpu", "cuda")
    if params.optimizer == "sgd":
        return torch.optim.SGD(items, lr=groups[0].lr, momentum=params.momentum, fused=fused)
    kind = torch.optim.AdamW if params.optimizer == "adamw" else torch.optim.Adam
    return kind(items, lr=groups[0].lr, fused=fused)


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


def highest_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The highest rate at present of the ``head_lr`` and of the ``backbone_lr``, where they train."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        part = "head_lr" if group["name"].startswith("head") else "backbone_lr"
        rates[part] = max(rates.get(part, 0.0), group["lr"])
    return rates


def make_schedule(params: FinetuneParams, steps_per_epoch: int) -> Schedule:
    """The factor on every group's rate at optimizer step 0, 1, ... of the whole training."""
    total = max(steps_per_epoch * params.epochs, 1)
    match params.schedule:
        case "one_cycle":
            return lambda step: params.one_cycle_peak * one_cycle(step, total)
        case "cosine":
            warmup = round(params.warmup_epochs * steps_per_epoch)
            return lambda step: cosine(step, total, min(warmup, total - 1))
        case "step":
            return lambda step: float(params.step_gamma ** (step // (params.step_epochs * steps_per_epoch)))
        case "none":
            return lambda step: 1.0


def one_cycle(step: int, total: int) -> float:
    """From 1/25 up to 1 and down to nearly 0, both along a cosine (Smith and Topin 2018)."""
    peak = WARMUP_SHARE * total - 1
    first, last = 1 / FIRST_DIVISOR, 1 / FIRST_DIVISOR / LAST_DIVISOR
    if step <= peak:
        return _along_cosine(first, 1.0, step / peak)
    return _along_cosine(1.0, last, min((step - peak) / max(total - 1 - peak, 1e-9), 1.0))


def cosine(step: int, total: int, warmup: int) -> float:
    """Linear to 1 within ``warmup`` steps, then along a cosine; the step after the last would be at 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return _along_cosine(1.0, 0.0, (step - warmup) / (total - warmup))


def _along_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
