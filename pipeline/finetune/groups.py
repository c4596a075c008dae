"""Which parameters train, and at which rate: blocks by depth, differential rates, no decay for norms and biases."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import FinetuneError
from ..params.sections import FinetuneParams
from .classifier import Classifier

DOMINANT = 0.9  # a child that holds this share of the parameters is opened to find the blocks inside it
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


@dataclass(frozen=True)
class Block:
    """A stretch of the backbone: its modules, and its parameters by name, in the order of the forward pass."""

    name: str
    modules: tuple[nn.Module, ...]
    parameters: tuple[tuple[str, nn.Parameter], ...]


@dataclass(frozen=True)
class Group:
    """Parameters of one learning rate and weight decay; ``block`` is the backbone's block, None for the head."""

    name: str
    lr: float
    weight_decay: float
    parameters: tuple[tuple[str, nn.Parameter], ...]
    block: int | None

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


def head_groups(classifier: Classifier, params: FinetuneParams) -> list[Group]:
    """The head's parameters at ``head_lr``, its biases without decay; none at a rate of zero."""
    if not params.head_lr:
        return []
    return _split("head", _named(classifier.head, "head"), params.head_lr, params, block=None)


def backbone_groups(blocks: list[Block], chosen: Iterable[int], params: FinetuneParams) -> list[Group]:
    """Groups for the ``chosen`` blocks; block i of n trains at ``backbone_lr * layer_decay ** (n - 1 - i)``.

    Blocks share their groups where neither decay nor gradual unfreezing tells them apart. A rate of zero gives no
    group: such a block is frozen.
    """
    chosen = list(chosen)
    if not params.backbone_lr or not chosen:
        return []
    if params.layer_decay == 1 and params.unfreeze != "gradual":
        together = [item for index in chosen for item in blocks[index].parameters]
        return _split("backbone", together, params.backbone_lr, params, block=chosen[0])
    groups: list[Group] = []
    for index in reversed(chosen):
        rate = params.backbone_lr * params.layer_decay ** (len(blocks) - 1 - index)
        groups += _split(f"backbone.{blocks[index].name}", blocks[index].parameters, rate, params, block=index)
    return groups


def group_rows(groups: list[Group]) -> list[dict[str, Any]]:
    """The table of groups: name, tensors, parameters, lr, weight_decay."""
    return [
        {
            "name": group.name,
            "tensors": len(group.parameters),
            "parameters": group.count,
            "lr": group.lr,
            "weight_decay": group.weight_decay,
        }
        for group in groups
    ]


def describe_groups(groups: list[Group], total: int) -> str:
    """The table as text, with trainable and total numbers of parameters below it."""
    rows = [("group", "tensors", "parameters", "lr", "weight decay")]
    for row in group_rows(groups):
        numbers = (f"{row['tensors']}", f"{row['parameters']:,}", f"{row['lr']:.3g}", f"{row['weight_decay']:.3g}")
        rows.append((row["name"], *numbers))
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


def _split(
    name: str, parameters: Iterable[tuple[str, nn.Parameter]], lr: float, params: FinetuneParams, *, block: int | None
) -> list[Group]:
    """Vectors (norms and biases) keep their size by themselves; only matrices and kernels are decayed."""
    parameters = list(parameters)
    matrices = tuple(item for item in parameters if item[1].ndim > 1)
    vectors = tuple(item for item in parameters if item[1].ndim <= 1)
    groups = [
        Group(name, lr, params.weight_decay, matrices, block),
        Group(f"{name} (norms, biases)", lr, 0.0, vectors, block),
    ]
    return [group for group in groups if group.parameters]
