"""Depthwise convolution on the CPU whose gradient stays fast where the kernel is larger than the map."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
