"""Every model by name gives features; pooling and layers are what they say; frozen means frozen."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import get_model, list_models
from torchvision.models.vision_transformer import VisionTransformer

from pipeline.backbones import (
    BackboneRow,
    BuiltNetwork,
    FrozenBackbone,
    backbone_names,
    list_backbones,
    make_module,
    trainable_module,
)
from pipeline.backbones.torchvision import classifier_path, cut_model
from pipeline.backbones.zoo import measure_features
from pipeline.errors import BackboneError

from .conftest import build, filled_model

ALL = list_models(module=torchvision.models)
# One a family, the smallest, with an image size that its architecture allows.
FAMILIES = {
    "alexnet": 63,
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "efficientnet_v2_s": 32,
    "googlenet": 32,
    "inception_v3": 75,
    "mnasnet0_5": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "regnet_y_400mf": 32,
    "resnet18": 32,
    "resnext50_32x4d": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_0": 32,
    "swin_t": 32,
    "swin_v2_t": 32,
    "vgg11": 32,
    "wide_resnet50_2": 32,
}


@pytest.fixture(scope="module")
def rows() -> dict[str, BackboneRow]:
    return {row.name: row for row in list_backbones()}


def images(size: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def plain_features(name: str, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What goes into the classifier of torchvision's own model, and what our network says."""
    model = filled_model(name)
    caught: list[torch.Tensor] = []
    handle = model.get_submodule(classifier_path(model)).register_forward_pre_hook(
        lambda _, args: caught.append(args[0])
    )
    with torch.no_grad():
        model(images(size))
        handle.remove()
        network = cut_model(name, model, layer=None, pooling="default")
        return caught[0], network(images(size))


@pytest.mark.parametrize("name", ALL)
def test_every_model_gives_features_of_its_dimension(name: str, rows: dict[str, BackboneRow]) -> None:
    network, feature_dim = make_module(name)
    assert feature_dim == rows[name].feature_dim
    assert sum(parameter.numel() for parameter in network.parameters()) == rows[name].parameters


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_features_are_what_the_plain_model_gives_its_classifier(name: str) -> None:
    expected, features = plain_features(name, FAMILIES[name])
    if expected.dim() == 4:  # squeezenet classifies positions, then pools; its features are the pooled positions
        expected = expected.mean((2, 3))
    assert torch.equal(features, expected) or torch.allclose(features, expected, rtol=1e-5, atol=1e-6)


def test_the_list_agrees_with_well_known_numbers(rows: dict[str, BackboneRow]) -> None:
    assert set(ALL) <= set(rows) <= set(backbone_names())
    known = {"resnet18": 512, "mobilenet_v2": 1280, "mobilenet_v3_small": 1024, "squeezenet1_0": 512, "vit_b_16": 768}
    assert {name: rows[name].feature_dim for name in known} == known
    assert rows["resnet18"].parameters == 11_689_512 - 513_000
    assert rows["resnet50"].weights == ("IMAGENET1K_V1", "IMAGENET1K_V2") and rows["inception_v3"].input_size == 299


@pytest.mark.parametrize("name", ["convnext_tiny", "densenet121", "mnasnet0_5", "mobilenet_v2", "regnet_y_400mf"])
def test_max_pooling_takes_the_maximum_of_the_last_map(name: str) -> None:
    _, average_dim = make_module(name, pooling="avg")
    network, maximum_dim = make_module(name, pooling="max")
    assert maximum_dim == average_dim
    assert any("max" in type(m).__name__.lower() or getattr(m, "kind", "") == "max" for m in network.modules())


@pytest.mark.parametrize(
    ("name", "last"), [("resnet18", "layer4"), ("mobilenet_v2", "features"), ("densenet121", None)]
)
def test_pooling_values(name: str, last: str | None) -> None:
    average, maximum = build(name, pooling="avg"), build(name, pooling="max")
    torch.testing.assert_close(build(name).module(images(64)), average.module(images(64)))
    with torch.no_grad():
        model = average.module.network.model
        maps = model.get_submodule(last)(images(64)) if last == "features" else None
        if last == "layer4":
            maps = nn.Sequential(*list(model.children())[:-2])(images(64))
        if last is None:
            maps = torch.relu(model.features(images(64)))
    assert maps is not None
    torch.testing.assert_close(maximum.module(images(64)), maps.amax((2, 3)))
    torch.testing.assert_close(average.module(images(64)), maps.mean((2, 3)))
    assert maximum.identity.digest == average.identity.digest


def test_class_token_with_the_mean_of_patches() -> None:
    torch.manual_seed(0)
    small = VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32).eval()

    def network(layer: str | None, pooling: str) -> nn.Module:
        return cut_model("vit_b_16", copy.deepcopy(small), layer=layer, pooling=pooling)

    tokens: list[torch.Tensor] = []
    small.encoder.register_forward_hook(lambda *call: tokens.append(call[2]))
    with torch.no_grad():
        small(images(32))
        features = network(None, "cls_avg")(images(32))
        torch.testing.assert_close(network(None, "cls")(images(32)), tokens[0][:, 0])
        torch.testing.assert_close(network("encoder", "default")(images(32)), tokens[0][:, 1:].mean(1))
        torch.testing.assert_close(network("encoder", "cls")(images(32)), tokens[0][:, 0])
    torch.testing.assert_close(features, torch.cat([tokens[0][:, 0], tokens[0][:, 1:].mean(1)], 1))
    assert make_module("vit_b_16", pooling="cls_avg")[1] == 1536


@pytest.mark.parametrize(
    ("name", "pooling", "named"),
    [
        ("vgg16", "max", "positions"),
        ("alexnet", "avg", "positions"),
        ("resnet18", "cls", "class token"),
        ("swin_t", "cls_avg", "class token"),
        ("vit_b_16", "max", "cls_avg"),
    ],
)
def test_a_pooling_that_does_not_fit_is_refused_by_name(name: str, pooling: str, named: str) -> None:
    with pytest.raises(BackboneError) as caught:
        make_module(name, pooling=pooling)
    assert name in str(caught.value) and pooling in str(caught.value) and named in str(caught.value)


@pytest.mark.parametrize(
    ("name", "layer", "feature_dim"),
    [
        ("resnet18", "layer3", 256),
        ("resnet18", "layer3.0.conv1", 256),
        ("vgg16", "features", 512),
        ("vgg16", "classifier.0", 4096),
        ("densenet121", "features.denseblock3", 1024),
        ("efficientnet_b0", "features.5", 112),
        ("convnext_tiny", "features.3", 192),
        ("swin_t", "features.3", 192),
        ("vit_b_16", "encoder.layers.encoder_layer_5", 768),
        ("inception_v3", "Mixed_6e", 768),
        ("googlenet", "inception4c", 512),
        ("shufflenet_v2_x0_5", "stage3", 96),
        ("squeezenet1_0", "features.7", 256),
        ("regnet_y_400mf", "trunk_output.block3", 208),
        ("mobilenet_v3_small", "features.8", 48),
        ("mnasnet0_5", "layers.10", 40),
    ],
)
def test_an_earlier_layer_is_pooled(name: str, layer: str, feature_dim: int) -> None:
    assert make_module(name, layer=layer)[1] == feature_dim


def test_a_cut_network_holds_only_what_it_runs() -> None:
    network, _ = make_module("vit_b_16", layer="encoder.layers.encoder_layer_2")
    names = {name.split(".")[3] for name in network.state_dict() if ".encoder_layer_" in name}
    assert names == {"encoder_layer_0", "encoder_layer_1", "encoder_layer_2"}


@pytest.mark.parametrize("name", ["resnet18", "swin_t"])
def test_a_layers_features_are_the_hooked_output_pooled(name: str) -> None:
    layer, dims = ("layer3", (2, 3)) if name == "resnet18" else ("features.3", (1, 2))
    backbone, whole = build(name, layer=layer), build(name).module.network
    caught: list[torch.Tensor] = []
    whole.model.get_submodule(layer).register_forward_hook(lambda *call: caught.append(call[2].clone()))
    with torch.no_grad():
        whole(images(64))
    torch.testing.assert_close(backbone.module(images(64)), caught[0].mean(dims))
    assert backbone.parameters < sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("layer", ["layr3", "layer3.7", "", "encoder.layers.encoder_layer_0.self_attention.out_proj"])
def test_an_unknown_layer_is_answered_with_near_names(layer: str) -> None:
    name = "vit_b_16" if layer.startswith("encoder") else "resnet18"
    with pytest.raises(BackboneError) as caught:
        make_module(name, layer=layer)
    assert caught.value.where == "backbone.layer"
    assert ("self_attention" if name == "vit_b_16" else "layer3") in str(caught.value.remedy)


def test_unknown_names_are_answered_with_near_ones() -> None:
    with pytest.raises(BackboneError, match="resnet81") as caught:
        make_module("resnet81")
    assert "resnet18" in str(caught.value.remedy)


@pytest.mark.parametrize(("name", "size"), [("vit_b_16", 224), ("maxvit_t", 224)])
def test_a_crop_that_a_model_cannot_take_names_the_size(name: str, size: int) -> None:
    network, _ = make_module(name)
    with pytest.raises(BackboneError) as caught:
        measure_features(network, 160, name)
    assert "160 x 160" in caught.value.what and str(size) in str(caught.value.remedy)


def test_a_frozen_backbone_is_frozen() -> None:
    backbone = build("mobilenet_v3_small")
    before = copy.deepcopy(backbone.module.state_dict())
    backbone.module.train()
    backbone.module.network.train()
    for module in backbone.module.modules():
        module.training = True
    first = backbone.module(images(64, 4) * 3 + 1)
    second = backbone.module(images(64, 4) * 3 + 1)
    assert torch.equal(first, second) and not first.requires_grad
    assert not any(parameter.requires_grad for parameter in backbone.module.parameters())
    after = backbone.module.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_training_mode_without_the_guard_would_move_the_buffers() -> None:
    """The check above can fail: an unfrozen network does move them."""
    network = trainable_module(build("mobilenet_v3_small"))
    before = copy.deepcopy(dict(network.named_buffers()))
    network(images(64, 4))
    assert any(not torch.equal(before[key], value) for key, value in network.named_buffers())


def test_the_trainable_copy_computes_the_same_and_is_independent(resnet: BuiltNetwork) -> None:
    copied = trainable_module(resnet)
    assert copied.training and all(parameter.requires_grad for parameter in copied.parameters())
    assert torch.equal(copied.eval()(images(64)), resnet.module(images(64)))
    copied(images(64)).sum().backward()
    with torch.no_grad():
        next(copied.parameters()).zero_()
    assert not torch.equal(copied(images(64)), resnet.module(images(64)))
    assert isinstance(resnet.module, FrozenBackbone)


def test_torchvisions_names_are_kept(resnet: BuiltNetwork) -> None:
    theirs = {key for key in get_model("resnet18").state_dict() if not key.startswith("fc.")}
    assert set(trainable_module(resnet).model.state_dict()) == theirs
