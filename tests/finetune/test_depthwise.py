"""The gradient of large depthwise kernels, tap by tap, is the one that torch computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline.finetune.depthwise import _is_slow, convolve


@pytest.mark.parametrize(("size", "kernel"), [((2, 2), 5), ((4, 4), 5), ((1, 1), 3), ((3, 2), 7), ((4, 3), 5)])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_equal_those_of_torch(size: tuple[int, int], kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, kernel, stride, kernel // 2, groups=6)
    images = torch.randn(5, 6, *size, requires_grad=True)
    assert _is_slow(conv, images)
    expected = conv(images)
    towards = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, [images, conv.weight, conv.bias], towards)
    result = convolve(conv, images, conv.weight, conv.bias)
    got = torch.autograd.grad(result, [images, conv.weight, conv.bias], towards)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_other_convolutions_are_left_to_torch() -> None:
    images = torch.randn(2, 6, 4, 4)
    assert not _is_slow(nn.Conv2d(6, 6, 3, groups=6, padding=1), images)
    assert not _is_slow(nn.Conv2d(6, 6, 5, padding=2), images)
    assert not _is_slow(nn.Conv2d(6, 12, 5, padding=2, groups=6), images)
    assert not _is_slow(nn.Conv2d(6, 6, 5, padding=2, groups=6), images.double())
