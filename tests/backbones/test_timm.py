"""Backbones of timm compute what timm itself does."""

from __future__ import annotations

import pytest
import torch

from pipeline.backbones import build_network
from pipeline.params import BackboneParams, TransformParams

timm = pytest.importorskip("timm", reason="the extra timm is not installed")


@pytest.mark.parametrize("name", ["test_vit.r160_in1k", "test_resnet.r160_in1k"])
def test_features_are_those_of_timm(name: str) -> None:
    built = build_network(BackboneParams(name=f"timm/{name}", weights="random"), TransformParams())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = timm.create_model(name, pretrained=False).eval()
    config = model.pretrained_cfg
    assert (built.transform.crop, built.transform.mean) == (config["input_size"][-1], config["mean"])
    images = torch.rand(2, 3, built.transform.crop, built.transform.crop)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
    assert torch.equal(built.module(images), expected)
