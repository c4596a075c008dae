"""Small backbones, built once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.backbones import BuiltNetwork, FeatureNetwork, build_network
from pipeline.backbones.torchvision import cut_model, make_model
from pipeline.params import BackboneParams, TransformParams


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # for tensors this small, threads only wait for each other
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """An empty checkpoint folder, and a proxy that refuses every connection."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.getbasetemp() / "torch_home"))
    for name in [name for name in os.environ if name.lower() in ("http_proxy", "no_proxy", "all_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")


@cache
def build(name: str, **params: object) -> BuiltNetwork:
    """A backbone from random weights unless told otherwise; built once, and frozen."""
    return build_network(
        BackboneParams.model_validate({"weights": "random", "name": name, **params}), TransformParams()
    )


def filled_model(name: str) -> nn.Module:
    """torchvision's whole model with cheap random values that keep activations in range."""
    model = make_model(name)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, value in model.state_dict().items():
        if value.is_meta or key.endswith(("running_mean", "running_var")):
            scale = (3 / max(value[0].numel(), 1)) ** 0.5 if value.dim() > 1 else 0.2
            offset = 1.0 if value.dim() == 1 and not key.endswith(("bias", "mean")) else 0.0
            state[key] = torch.empty(value.shape).uniform_(offset - scale, offset + scale, generator=generator)
    whole = model.state_dict()
    whole.update(state)
    model.load_state_dict(whole, assign=True)
    return model


def filled_network(name: str) -> FeatureNetwork:
    """A network of the architecture from `filled_model`."""
    return cut_model(name, filled_model(name), layer=None, pooling="default").requires_grad_(False)


@pytest.fixture(scope="session")
def resnet() -> BuiltNetwork:
    return build("resnet18")


@pytest.fixture
def mobilenet_file(shared: Path) -> Path:
    return shared / "weights" / "mobilenet_v2-imagenet.safetensors"
