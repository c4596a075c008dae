"""Preparing for inference changes the speed, not the features."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import fx, nn

import pipeline.backbones.prepare as prepare_module
from pipeline.backbones import (
    BuiltNetwork,
    Verdict,
    WeightsMemo,
    accept_precision,
    prepare_for_inference,
    reduced_precisions_of,
    verdict_key,
)
from pipeline.backbones.onednn import FusedConvolution, can_fuse, fuse_convolutions
from pipeline.backbones.precision import sample_images
from pipeline.backbones.prepare import diffuse_rounding, fold_batchnorm, pool_in_float32
from pipeline.backbones.weights import tensors_digest

from .conftest import build, filled_network
from .test_torchvision import FAMILIES, images

CPU = torch.device("cpu")
WITHOUT_BATCHNORM = {"alexnet", "convnext_tiny", "squeezenet1_0", "swin_t", "swin_v2_t", "vgg11"}
# densenet normalises before the convolution too, where the input is a concatenation that others use as well.
NOT_ALL_FOLDED = {"densenet121"}
LARGE = {"alexnet", "vgg11", "wide_resnet50_2", "swin_v2_t"}  # slow to draw, and nothing in them that others have not


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - LARGE))
def test_folded_features_agree_with_the_plain_ones(name: str) -> None:
    network = filled_network(name)
    with torch.no_grad():
        expected = network(images(FAMILIES[name]))
        folded, count = fold_batchnorm(copy.deepcopy(network).to(memory_format=torch.channels_last))
        features = folded(images(FAMILIES[name]).to(memory_format=torch.channels_last))
    assert (features - expected).norm() <= 1e-4 * expected.norm()
    left = sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert (count == 0) == (name in WITHOUT_BATCHNORM) and (left > 0) == (name in NOT_ALL_FOLDED)


@pytest.mark.parametrize("params", [{"layer": "layer3"}, {"pooling": "max"}])
def test_cut_and_repooled_networks_fold_too(params: dict[str, str]) -> None:
    backbone = build("resnet18", **params)
    prepared = prepare_for_inference(backbone, device=CPU, precision="float32")
    torch.testing.assert_close(prepared(images(64)), backbone.module(images(64)), rtol=1e-4, atol=1e-5)
    assert prepared.folded >= 15


def test_the_backbone_is_left_as_it_was(resnet: BuiltNetwork) -> None:
    state = copy.deepcopy(resnet.module.state_dict())
    expected = resnet.module(images(64))
    prepared = prepare_for_inference(resnet, device=CPU, precision="bfloat16")
    features = prepared(images(64))
    assert features.dtype == torch.float32 and torch.nn.functional.cosine_similarity(features, expected).min() > 0.99
    assert torch.equal(resnet.module(images(64)), expected)
    assert all(torch.equal(state[key], value) for key, value in resnet.module.state_dict().items())
    assert tensors_digest(resnet.module.network.model.state_dict()) == resnet.identity.digest


def test_a_network_that_cannot_be_traced_runs_unfolded() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(x)) if x.sum() > 0 else x

    network = Branching().eval()
    assert fold_batchnorm(network) == (network, 0)


def test_a_convolution_used_twice_is_not_folded() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(self.conv(x)))

    network = Shared().eval()
    nn.init.uniform_(network.norm.running_var, 0.5, 2.0)
    expected = network(images(8))
    folded, count = fold_batchnorm(network)
    assert count == 0 and torch.allclose(folded(images(8)), expected)


def test_fused_convolutions_add_and_activate_like_the_plain_ones() -> None:
    """Every way in which an addition can follow: after, before, in place, shared, of another shape."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(6))
            self.twice, self.relu, self.six, self.silu = nn.Conv2d(4, 4, 1), nn.ReLU(True), nn.ReLU6(), nn.SiLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a = self.relu(self.convs[0](x))
            b = self.convs[1](a)
            b += a
            b = self.relu(b)
            c = b + self.convs[2](b)
            kept = self.six(self.convs[3](c))
            changed = kept * 1.0
            changed += self.convs[4](kept)
            d = self.convs[5](changed) + changed.mean((2, 3), keepdim=True)
            return self.silu(self.twice(d)) + self.twice(kept) + changed

    torch.manual_seed(0)
    block = Block().eval()
    example = torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        traced = fx.symbolic_trace(copy.deepcopy(block))
        assert fuse_convolutions(traced, example) == 6
        for x in (example, torch.randn(3, 4, 7, 12)):
            torch.testing.assert_close(traced(x), block(x), rtol=1e-4, atol=1e-5)
    fused = [module for module in traced.modules() if isinstance(module, FusedConvolution)]
    assert sum(module.adds for module in fused) >= 2
    assert {module.activation[0] for module in fused} >= {"none", "relu", "hardtanh"}


def test_a_machine_without_the_operators_gets_the_folded_network(
    resnet: BuiltNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = prepare_for_inference(resnet, device=CPU, precision="float32")
    monkeypatch.setattr(prepare_module, "fuse_convolutions", lambda *_args, **_options: 1 / 0)
    plain = prepare_for_inference(resnet, device=CPU, precision="float32")
    assert any(isinstance(module, FusedConvolution) for module in fused.modules()) == can_fuse(torch.float32)
    assert not any(isinstance(module, FusedConvolution) for module in plain.modules())
    torch.testing.assert_close(plain(images(64)), fused(images(64)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_diffused_rounding_keeps_the_sum_of_a_filter(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    rounded, plain = diffuse_rounding(weight, dtype), weight.to(dtype).float()
    assert torch.equal(rounded, rounded.to(dtype).float()) and rounded.shape == weight.shape
    error = (rounded - weight).flatten(1).sum(1).abs().mean()
    assert error < 0.3 * (plain - weight).flatten(1).sum(1).abs().mean()
    assert (rounded - weight).abs().max() <= 2 * torch.finfo(dtype).eps * weight.abs().max()


def test_threads_may_share_a_prepared_backbone() -> None:
    prepared = prepare_for_inference(build("mobilenet_v3_small"), device=CPU, precision="float32")
    batches = [images(64) * scale for scale in (0.5, 1.0, 1.5, 2.0)]
    expected = [prepared(batch) for batch in batches]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(pool.map(prepared, batches), expected, strict=True))


def test_the_verdict_tells_good_from_bad_and_is_remembered(tmp_path, resnet: BuiltNetwork) -> None:
    small = BuiltNetwork(resnet.module, type(resnet.transform)(crop=64), 512, resnet.identity, resnet.parameters)
    same = accept_precision(small, device=CPU, precision="float32")
    assert same.accepted and same.minimum_cosine == pytest.approx(1)
    network = copy.deepcopy(resnet.module)
    network.network.model.conv1.weight.data *= 1e30
    overflowing = BuiltNetwork(network, small.transform, 512, resnet.identity, resnet.parameters)
    verdict = accept_precision(overflowing, device=CPU, precision="float16")
    assert not verdict.accepted and verdict.minimum_cosine < 0.9
    key = verdict_key(resnet.identity, 64, device=CPU, precision="float16")
    WeightsMemo(tmp_path / "memo.json").put(key, verdict.as_dict())
    assert Verdict.from_dict(WeightsMemo(tmp_path / "memo.json").get(key)) == verdict
    assert Verdict.from_dict({"accepted": True}) is None and Verdict.from_dict(None) is None


def test_the_sample_is_the_same_every_time_and_varied() -> None:
    first, again = sample_images(48), sample_images(48)
    assert torch.equal(first, again) and first.shape == (16, 3, 48, 48) and first.dtype == torch.uint8
    assert first.float().std((1, 2, 3)).min() > 10 and len({image.numpy().tobytes() for image in first}) == 16


def test_reduced_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert reduced_precisions_of(torch.device("cuda:0")) == ("float16",)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert reduced_precisions_of(torch.device("cuda:0")) == ("bfloat16", "float16")
    assert reduced_precisions_of(torch.device("mps")) == ()
    for present, expected in ((False, ()), (True, ("bfloat16",))):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda present=present: present)
        assert reduced_precisions_of(CPU) == expected


@pytest.mark.parametrize(
    ("name", "params", "pools_last"),
    [
        ("resnet18", {}, True),
        ("mobilenet_v2", {}, True),
        ("resnet18", {"layer": "layer3"}, True),
        ("resnet18", {"pooling": "max"}, False),  # which rounds nothing
        ("mobilenet_v3_small", {}, False),  # a linear layer follows
        ("squeezenet1_0", {"layer": "features"}, True),  # has no BatchNorm, so that it is not traced
    ],
)
def test_pooling_in_float32_rounds_features_no_further(name: str, params: dict[str, str], pools_last: bool) -> None:
    network, _ = fold_batchnorm(copy.deepcopy(build(name, **params).module.network))
    network = network.to(torch.bfloat16)
    with torch.no_grad():
        rounded = network(images(64).bfloat16())
        assert pool_in_float32(network) is pools_last
        features = network(images(64).bfloat16())
    assert rounded.dtype == torch.bfloat16 and (features.dtype == torch.float32) == pools_last
    torch.testing.assert_close(features.float(), rounded.float(), rtol=2**-7, atol=1e-3)


def test_tf32_is_float32_where_there_is_no_gpu_and_is_never_left_on(resnet: BuiltNetwork) -> None:
    exact = prepare_for_inference(resnet, device=CPU, precision="float32")(images(64))
    assert torch.equal(prepare_for_inference(resnet, device=CPU, precision="tf32")(images(64)), exact)
