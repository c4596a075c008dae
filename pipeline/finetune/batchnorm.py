"""BatchNorm while fine-tuning: fixed statistics by default, and computed inside the convolution before it.

With fixed statistics a BatchNorm is a scale and a shift for each channel, so it can be multiplied into the kernel of
the convolution that feeds it: the gradients of both reach their parameters through the small product, and two passes
over the large activations are saved in each direction. The same convolution keeps its gradient fast on the CPU where a
depthwise kernel is larger than the map.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

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


# -- depthwise convolution ---------------------------------------------------------------------------------------------


def convolve(conv: nn.Conv2d, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``conv`` of ``images`` with ``weight`` and ``bias`` in place of its own.

    oneDNN computes the weights' gradient of a depthwise convolution ten times slower than need be where the kernel
    reaches over the whole map, as 5 x 5 kernels do in the last blocks of a MobileNetV3 that sees small images; there
    each tap of the kernel is summed up by itself.
    """
    if torch.is_grad_enabled() and weight.requires_grad and _is_slow(conv, images):
        result: Tensor = _Depthwise.apply(images, weight, bias, conv.stride, conv.padding)
        return result
    return F.conv2d(images, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _is_slow(conv: nn.Conv2d, images: Tensor) -> bool:
    depthwise = conv.groups == conv.in_channels == conv.out_channels > 1 and conv.dilation == (1, 1)
    if not depthwise or isinstance(conv.padding, str) or images.device.type != "cpu" or images.dtype != torch.float32:
        return False
    large = max(images.shape[-2:]) < min(conv.kernel_size)
    return large and min(images.shape) > 0 and not torch.is_autocast_enabled("cpu")


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(images, weight, bias, stride, padding, 1, len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        towards_images = None
        if ctx.needs_input_grad[0]:
            towards_images = torch.ops.aten.convolution_backward(
                gradient,
                images,
                weight,
                None,
                ctx.stride,
                ctx.padding,
                (1, 1),
                False,
                (0, 0),
                len(weight),
                (True, False, False),
            )[0]
        towards_weight = weight_gradient(gradient, images, weight.shape, stride=ctx.stride, padding=ctx.padding)
        towards_bias = gradient.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None
        return towards_images, towards_weight, towards_bias, None, None


def weight_gradient(
    gradient: Tensor, images: Tensor, shape: torch.Size, *, stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """The gradient (c, 1, kh, kw) from that of the output (n, c, ho, wo): a product and a sum for each tap."""
    result = gradient.new_zeros(shape)
    for row in range(shape[2]):
        above, source_rows = _overlap(row, images.shape[2], gradient.shape[2], stride[0], padding[0])
        for column in range(shape[3]):
            left, source_columns = _overlap(column, images.shape[3], gradient.shape[3], stride[1], padding[1])
            part = gradient[:, :, above, left]
            if part.numel():
                result[:, 0, row, column] = (part * images[:, :, source_rows, source_columns]).sum((0, 2, 3))
    return result


def _overlap(tap: int, size: int, outputs: int, stride: int, padding: int) -> tuple[slice, slice]:
    """Which outputs, and the inputs they see through ``tap``, lie inside the map; empty slices where none do."""
    first = max(0, -(-(padding - tap) // stride))
    end = min(outputs, (size - 1 + padding - tap) // stride + 1)
    if end <= first:
        return slice(0, 0), slice(0, 0)
    source = first * stride + tap - padding
    return slice(first, end), slice(source, source + (end - first - 1) * stride + 1, stride)
