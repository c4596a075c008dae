"""BatchNorm inside the convolution computes what it computed beside it; large kernels have torch's gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn

from pipeline.finetune.batchnorm import (
    _is_slow,
    batchnorm_modules,
    convolve,
    find_pairs,
    fused,
    resolve_batchnorm,
)

from .support import tiny_backbone


def gradients_of(network: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    network.zero_grad()
    output = network(images)
    output.square().sum().backward()
    return output.detach(), [parameter.grad.clone() for parameter in network.parameters()]


@pytest.mark.parametrize("training", [False, True])
def test_fused_equals_plain(training: bool) -> None:
    network = tiny_backbone().double()
    torch.manual_seed(1)
    for norm in batchnorm_modules(network):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
        nn.init.uniform_(norm.weight, 0.5, 2.0)
    network.train(training)
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    twin = copy.deepcopy(network)
    plain, plain_gradients = gradients_of(network, images)
    pairs = find_pairs(twin)
    assert len(pairs) == 3
    with fused(pairs):
        other, other_gradients = gradients_of(twin, images)
    torch.testing.assert_close(other, plain)
    torch.testing.assert_close(other_gradients, plain_gradients)
    torch.testing.assert_close(dict(twin.state_dict()), dict(network.state_dict()))


def test_modules_are_left_as_they_were() -> None:
    network = tiny_backbone()
    with fused(find_pairs(network)):
        assert any("forward" in vars(module) for module in network.modules())
    assert not any("forward" in vars(module) for module in network.modules())


def test_a_convolution_that_others_read_is_not_fused() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen = self.conv(images)
            return self.norm(seen) + seen

    assert find_pairs(Shared()) == []


def test_a_network_that_cannot_be_traced_trains_unfused() -> None:
    class Branching(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images if images.sum() > 0 else -images

    assert find_pairs(Branching()) == []


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0"])
def test_known_architectures_are_fused_throughout(name: str) -> None:
    model = getattr(torchvision.models, name)(weights=None)
    assert len(find_pairs(model)) == len(batchnorm_modules(model))


@pytest.mark.parametrize(
    ("wanted", "from_scratch", "resolved"),
    [
        ("auto", False, "frozen"),
        ("auto", True, "train"),
        ("frozen", True, "frozen"),
        ("train", False, "train"),
    ],
)
def test_auto_trains_statistics_only_where_all_begins_at_random(wanted: str, from_scratch: bool, resolved: str) -> None:
    assert resolve_batchnorm(wanted, from_scratch=from_scratch) == resolved  # type: ignore[arg-type]


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
