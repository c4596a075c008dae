"""A zoo from outside the package: one class and one entry in the table give a backbone with all its promises."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.backbones import (
    ZOOS,
    FeatureNetwork,
    Transform,
    WeightsMemo,
    WeightsSource,
    Zoo,
    backbone_bytes,
    backbone_names,
    build_classifier,
    build_network,
    identify_network,
    list_backbones,
    make_module,
    prepare_for_inference,
    trainable_module,
)
from pipeline.backbones import build as build_module
from pipeline.backbones import openclip as openclip_module
from pipeline.backbones import timm as timm_module
from pipeline.backbones.weights import tensors_digest
from pipeline.backbones.zoo import Tensors, layer_error, pooling_error, without_storage
from pipeline.errors import BackboneError, WeightsError
from pipeline.features.spec import FeatureSpec
from pipeline.finetune.groups import find_blocks
from pipeline.params import BackboneParams, TransformParams

PRESET = Transform(resize=20, crop=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
NAME = "toy/tiny"


class Tiny(nn.Module):
    """Two convolutions, the mean of their map, and a classifier of three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Conv2d(4, 6, 3, 2, 1)
        self.head: nn.Module = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(self.stem(images * self.scale)).mean((2, 3)))
        return scores


class ToyZoo:
    """Knows one network; ``folder`` holds its pretrained weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> Sequence[str]:
        return [NAME]

    def owns(self, name: str) -> bool:
        return name == NAME

    def version(self, name: str) -> str:
        return "toys 1"

    def code_digest(self, name: str) -> None:
        return None

    def licence(self, name: str) -> str | None:
        return "MIT"

    def published(self, name: str) -> None:
        return None

    def tags(self, name: str) -> Sequence[str]:
        return ["first", "second"]

    def resolve(self, name: str, weights: str) -> WeightsSource | None:
        tag = "second" if weights in ("DEFAULT", "newest") else weights
        return WeightsSource(tag, self.folder / f"{tag}.safetensors", tag) if tag in self.tags(name) else None

    def preset(self, name: str, source: WeightsSource, image_size: int | None = None) -> Transform:
        return PRESET if source.tag != "first" else Transform(resize=None, crop=24)

    def make(
        self,
        name: str,
        *,
        layer: str | None = None,
        pooling: str = "default",
        image_size: int | None = None,
        tensors: Tensors | None = None,
        initialise: bool = False,
    ) -> FeatureNetwork:
        if layer is not None:
            raise layer_error(name, layer, {"stem", "body"})
        if pooling != "default":
            raise pooling_error(name, pooling, "toys pool in one way", "default")
        network, _ = self.make_classifier(name, tensors=tensors, initialise=initialise)
        network.model.head = nn.Identity()
        return network

    def make_classifier(
        self, name: str, *, tensors: Tensors | None = None, initialise: bool = False
    ) -> tuple[FeatureNetwork, tuple[str, ...]]:
        with nullcontext() if initialise else without_storage():
            model = Tiny().eval()
        shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
        blocks = [["stem.0", "stem.1"], ["absent"], ["body"]]
        network = FeatureNetwork(model, input_size=16, classifier="head", shapes=shapes, blocks=blocks)
        return network, ("ball", "doll", "kite")

    def adapt(self, name: str, network: FeatureNetwork, tensors: Tensors) -> Tensors:
        return {key.replace("trunk", "body"): tensors[key] for key in tensors if not key.startswith("teacher.")}


@pytest.fixture
def state() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return dict(Tiny().state_dict())


@pytest.fixture(autouse=True)
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: dict[str, Tensor]) -> Zoo:
    """In the table beside the others, its weights on disk."""
    zoo: Zoo = ToyZoo(tmp_path)
    monkeypatch.setitem(ZOOS, "toys", zoo)
    for tag in zoo.tags(NAME):
        safetensors.torch.save_file(state, tmp_path / f"{tag}.safetensors")
    return zoo


def params(weights: Path | str = "random", **values: object) -> BackboneParams:
    return BackboneParams.model_validate({"name": NAME, "weights": str(weights), **values})


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def plain_features(state: dict[str, Tensor]) -> Tensor:
    model = Tiny().eval()
    model.load_state_dict(state)
    model.head = nn.Identity()
    with torch.no_grad():
        return model(images())


def test_it_is_listed_with_its_size() -> None:
    assert backbone_names()[-1] == NAME
    row = list(list_backbones())[-1]
    assert (row.name, row.feature_dim, row.weights, row.input_size) == (NAME, 6, ("first", "second"), 16)
    assert (
        row.parameters
        == 1 + 4 * 3 * 9 + 2 * 4 + 6 * 4 * 9 + 6
        == sum(p.numel() for p in make_module(NAME)[0].parameters())
    )


@pytest.mark.parametrize(
    ("name", "extra"), [("timm/resnet18.a1_in1k", "timm"), ("openclip/ViT-B-32.openai", "openclip")]
)
def test_a_library_that_is_not_installed_is_named_with_its_extra(
    name: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, {"timm": "timm", "openclip": "open_clip"}[extra], None)
    for module in (timm_module, openclip_module):
        for function in vars(module).values():
            getattr(function, "cache_clear", lambda: None)()
    with pytest.raises(BackboneError, match="is not installed") as caught:
        make_module(name)
    assert f"image-transfer-pipeline[{extra}]" in str(caught.value.remedy)
    assert NAME in backbone_names()


def test_near_misses_name_it() -> None:
    with pytest.raises(BackboneError) as caught:
        make_module("toy/tinny")
    assert NAME in str(caught.value.remedy)
    with pytest.raises(WeightsError) as refused:
        build_network(params("third"), TransformParams())
    assert "DEFAULT, first, second, random" in str(refused.value.remedy)
    with pytest.raises(BackboneError) as layer:
        make_module(NAME, layer="bodi")
    assert "body" in str(layer.value.remedy)
    with pytest.raises(BackboneError, match="toys pool"):
        make_module(NAME, pooling="max")


def test_random_weights_are_seeded() -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    built = build_network(params(seed=1), TransformParams())
    assert torch.equal(torch.rand(2), expected)
    assert built.identity.weights == "random-1" and built.transform == PRESET and built.feature_dim == 6
    assert built.identity == build_network(params(seed=1), TransformParams()).identity
    assert built.identity.digest != build_network(params(seed=2), TransformParams()).identity.digest
    assert built.module(images()).shape == (2, 6)


@pytest.mark.parametrize("weights", ["DEFAULT", "newest", "second", "first"])
def test_pretrained_weights_by_tag(state: dict[str, Tensor], weights: str) -> None:
    built = build_network(params(weights), TransformParams())
    assert built.identity.weights == ("first" if weights == "first" else "second")
    assert built.transform.crop == (24 if weights == "first" else 16) and built.notes == ()
    assert torch.equal(built.module(images()), plain_features(state))


def test_a_file_is_digested_by_its_tensors(tmp_path: Path, state: dict[str, Tensor]) -> None:
    digest = tensors_digest({key: value for key, value in state.items() if not key.startswith("head.")})
    other = {key.replace("body", "trunk"): value for key, value in state.items() if not key.startswith("head.")}
    renamed = {f"model.{key}": value for key, value in other.items()} | {"teacher.weight": torch.zeros(1)}
    five = {**state, "head.weight": torch.zeros(5, 6), "head.bias": torch.zeros(5)}
    for content, notes in ((state, 0), (renamed, 0), (five, 1)):
        safetensors.torch.save_file(content, tmp_path / "own.safetensors")
        built = build_network(params(tmp_path / "own.safetensors"), TransformParams())
        assert (built.identity.weights, built.identity.digest, len(built.notes)) == ("file", digest, notes)
    assert built.notes == ("the classifier of the weights (5 outputs) was dropped",)
    safetensors.torch.save_file({"stem.0.weight": state["stem.0.weight"]}, tmp_path / "own.safetensors")
    with pytest.raises(WeightsError, match="do not fit toy/tiny"):
        build_network(params(tmp_path / "own.safetensors"), TransformParams())


def test_it_is_keyed_like_any_other_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zoo: Zoo) -> None:
    now = build_module.time.time_ns
    monkeypatch.setattr(build_module.time, "time_ns", lambda: now() + 3_600_000_000_000)
    memo = tmp_path / "memo.json"
    first = identify_network(params("DEFAULT"), TransformParams(), WeightsMemo(memo))
    identity, transform, _ = first
    built = build_network(params("second"), TransformParams())
    assert first == (built.identity, built.transform, built.feature_dim)
    spec = FeatureSpec(
        backbone=identity.name,
        weights_digest=identity.digest,
        layer=identity.layer,
        pooling=identity.pooling,
        transform=transform.as_dict(),
        decoder="pillow",
        precision="float32",
        dtype="float16",
        view="plain",
    )
    assert spec.key
    loads: list[str] = []
    monkeypatch.setattr(build_module, "read_checkpoint", lambda path: loads.append(path))
    monkeypatch.setattr(build_module, "tensors_digest", lambda state: loads.append("hashed"))
    assert identify_network(params("newest"), TransformParams(), WeightsMemo(memo)) == first
    assert loads == []


def test_a_memory_made_with_another_version_of_the_library_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memo = WeightsMemo(tmp_path / "memo.json")
    identify_network(params(), TransformParams(), memo)
    monkeypatch.setattr(ToyZoo, "version", lambda *_: "toys 2")
    built: list[str] = []
    original = build_module.build_network
    monkeypatch.setattr(build_module, "build_network", lambda p, t: built.append(p.name) or original(p, t))
    identify_network(params(), TransformParams(), memo)
    assert built == [NAME]


def test_it_runs_frozen_prepared_and_as_a_classifier() -> None:
    built = build_network(params("DEFAULT"), TransformParams())
    prepared = prepare_for_inference(built, device=torch.device("cpu"), precision="float32")
    torch.testing.assert_close(prepared(images()), built.module(images()), rtol=1e-4, atol=1e-5)
    assert prepared.folded == 1
    assert tensors_digest(built.module.network.model.state_dict()) == built.identity.digest
    module, transform, categories = build_classifier(NAME)
    assert module(images()).shape == (2, 3) and transform == PRESET and categories == ("ball", "doll", "kite")


def test_it_is_fine_tuned_in_its_own_blocks_and_loads_back(tmp_path: Path) -> None:
    network = trainable_module(build_network(params("DEFAULT"), TransformParams()))
    blocks = find_blocks(network)
    assert [block.name for block in blocks] == ["model.stem.0", "model.body"]
    assert [len(block.parameters) for block in blocks] == [4, 2] and [len(b.modules) for b in blocks] == [2, 1]
    network(images(4)).sum().backward()
    torch.optim.SGD(network.parameters(), 0.1).step()
    own = Transform(resize=18, crop=16)
    (tmp_path / "tuned.safetensors").write_bytes(backbone_bytes(network, own, name=NAME))
    tuned = build_network(params(tmp_path / "tuned.safetensors"), TransformParams())
    with torch.no_grad():
        assert torch.equal(tuned.module(images()), network.eval()(images()))
    assert tuned.transform == own and tuned.notes == ()
