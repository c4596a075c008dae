"""BatchNorm while fine-tuning: fixed statistics by default, and computed inside the convolution before it.

With fixed statistics a BatchNorm is a scale and a shift for each channel, so it can be multiplied into the kernel of
the convolution that feeds it: the gradients of both reach their parameters through the small product, and two passes
over the large activations are saved in each direction.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .depthwise import convolve

Pair = tuple[nn.Conv2d, nn.BatchNorm2d]
BatchNormMode = Literal["frozen", "train"]


def resolve_batchnorm(wanted: Literal["auto", "frozen", "train"], *, from_scratch: bool) -> BatchNormMode:
    """``auto``: statistics are trained where both backbone and head begin at random, and frozen otherwise.

    A head that was fitted to features knows those that the running statistics give. Statistics of batches would
    hand it others from the first step on, however random the weights are, and the training would diverge.
    """
    if wanted != "auto":
        return wanted
    return "train" if from_scratch else "frozen"


def batchnorm_modules(module: nn.Module) -> list[_BatchNorm]:
    """Every BatchNorm that keeps running statistics."""
    found = [child for child in module.modules() if isinstance(child, _BatchNorm)]
    return [child for child in found if child.track_running_stats]


def find_pairs(backbone: nn.Module) -> list[Pair]:
    """Convolutions whose only reader is a BatchNorm; empty where the forward pass cannot be traced."""
    try:
        graph = fx.symbolic_trace(backbone).graph
    except (TypeError, ValueError, RuntimeError, AttributeError, NameError, fx.proxy.TraceError):
        return []  # control flow that depends on values; such a network trains unfused
    modules = dict(backbone.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    uses: dict[str, int] = {}
    for node in calls:
        uses[str(node.target)] = uses.get(str(node.target), 0) + 1
    pairs: list[Pair] = []
    for node in calls:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        conv, norm = modules.get(str(source.target)), modules.get(str(node.target))
        once = uses[str(node.target)] == 1 == uses[str(source.target)]
        if once and _is_plain(conv) and isinstance(norm, nn.BatchNorm2d) and norm.affine and norm.track_running_stats:
            pairs.append((conv, norm))  # type: ignore[arg-type]
    return pairs


@contextmanager
def fused(pairs: list[Pair]) -> Iterator[None]:
    """Inside the block each convolution computes its BatchNorm too, with the statistics as they are.

    Parameters, buffers and their names stay where they are; a BatchNorm in training mode computes as ever.
    """
    for conv, norm in pairs:
        conv.forward = partial(_convolve, conv, norm)  # type: ignore[method-assign]
        norm.forward = partial(_normalise, norm)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for conv, norm in pairs:
            del conv.forward, norm.forward


def _is_plain(module: nn.Module | None) -> bool:
    return type(module) is nn.Conv2d and module.padding_mode == "zeros"


def _convolve(conv: nn.Conv2d, norm: nn.BatchNorm2d, images: Tensor) -> Tensor:
    if norm.training:
        return convolve(conv, images, conv.weight, conv.bias)
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    mean = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
    weight = conv.weight * scale[:, None, None, None]
    return convolve(conv, images, weight, norm.bias - mean * scale)


def _normalise(norm: nn.BatchNorm2d, images: Tensor) -> Tensor:
    return nn.BatchNorm2d.forward(norm, images) if norm.training else images
