"""Image towers of CLIP and SigLIP are what open_clip computes, before or after the projection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.backbones import BuiltNetwork, build_classifier, build_network, describe_backbone, trainable_module
from pipeline.backbones.catalogue import find_zoo, locate_weights, matching_names
from pipeline.backbones.openclip import text_features
from pipeline.errors import BackboneError, WeightsError
from pipeline.finetune.groups import find_blocks
from pipeline.params import BackboneParams, TransformParams

from .test_transform import random_image

open_clip = pytest.importorskip("open_clip")

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
CLIP = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
TIMM = {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}
CONFIGS = {
    "tiny-clip": {"embed_dim": 16, "vision_cfg": CLIP, "text_cfg": TEXT},
    "tiny-timm": {"embed_dim": 16, "custom_text": True, "vision_cfg": TIMM, "text_cfg": TEXT},
    "tiny-resnet": {"embed_dim": 16, "vision_cfg": {**CLIP, "layers": [1, 1, 1, 1]}, "text_cfg": TEXT},
}


@pytest.fixture(scope="module", autouse=True)
def _configs(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("configs")
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole models, both towers, as open_clip's training saves them."""
    folder = tmp_path_factory.mktemp("files")
    for name in CONFIGS:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            state = open_clip.create_model(name, pretrained_text=False).state_dict()
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, folder / f"{name}.pt")
    return folder


def build(name: str, weights: Path | str = "random", size: int | None = None, **params: Any) -> BuiltNetwork:
    section = BackboneParams.model_validate({"name": f"openclip/{name}", "weights": str(weights), **params})
    return build_network(section, TransformParams(resize=size, crop=size))


def own_model(name: str, files: Path, **options: Any) -> Any:
    return open_clip.create_model(name, pretrained=str(files / f"{name}.pt"), pretrained_text=False, **options).eval()


def images(size: int) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
def test_features_are_those_of_encode_image(name: str, files: Path) -> None:
    built, model = build(name, files / f"{name}.pt"), own_model(name, files)
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(size=built.transform.crop), is_train=False
    )
    picture = random_image(490, 390)
    pixels = built.transform.normalise(torch.from_numpy(built.transform.pixels(picture))[None])
    torch.testing.assert_close(pixels[0], transform(picture), rtol=0, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(built.module(pixels), model.encode_image(pixels))
    assert (built.feature_dim, built.notes) == (16, ())
    assert built.module.network.pooling.endswith("after the projection")


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-timm"])
def test_before_the_projection_is_what_the_projection_is_given(name: str, files: Path) -> None:
    built, model = build(name, files / f"{name}.pt", layer="pooled"), own_model(name, files)
    batch = images(built.transform.crop)
    with torch.no_grad():
        pooled, projected = built.module(batch), model.encode_image(batch)
        found = pooled @ model.visual.proj if name == "tiny-clip" else model.visual.head(pooled)
    assert built.feature_dim == {"tiny-clip": 32, "tiny-timm": 64}[name]
    torch.testing.assert_close(found, projected)
    assert built.module.network.pooling == "class token, before the projection"


def test_what_cannot_be_had_is_refused(files: Path) -> None:
    for params in ({"layer": "pooled"}, {"layer": "transformer"}, {"pooling": "avg"}):
        with pytest.raises(BackboneError):
            build("tiny-resnet", **params)
    with pytest.raises(BackboneError, match="no classifier"):
        build_classifier("openclip/tiny-clip", "random")


def test_position_embeddings_are_interpolated_as_open_clip_does(files: Path) -> None:
    model = own_model("tiny-clip", files, force_image_size=48)
    with torch.no_grad():
        wanted = model.encode_image(images(48))
    assert torch.equal(build("tiny-clip", files / "tiny-clip.pt", 48).module(images(48)), wanted)


def test_a_tower_of_timm_takes_other_sizes_where_it_can() -> None:
    assert build("tiny-timm", size=192).feature_dim == 16
    with pytest.raises(BackboneError, match="cannot take images of 256 x 256") as caught:
        build("ViT-B-16-SigLIP", size=256)
    assert caught.value.remedy == "set transform.crop to 224"


def test_a_tower_is_fine_tuned_in_its_own_blocks() -> None:
    for name, count in (("tiny-clip", 3), ("tiny-timm", 7)):
        network = trainable_module(build(name))
        blocks = find_blocks(network)
        inside = [id(parameter) for block in blocks for _, parameter in block.parameters]
        assert len(blocks) == count and sorted(inside) == sorted(id(item) for item in network.parameters())


def test_weights_with_another_activation_are_refused() -> None:
    with pytest.raises(BackboneError, match="open_clip has no") as caught:
        build("ViT-B-32.openai")
    assert "another activation" in str(caught.value)
    assert "openclip/ViT-B-32-quickgelu.openai" in matching_names(["openclip/ViT-B-32"])
    with pytest.raises(BackboneError):
        build("ViT-B-33.openai")


def test_siglip_is_squashed_as_it_was_trained() -> None:
    row = describe_backbone("openclip/ViT-B-16-SigLIP.webli")
    assert row.transform["resize_mode"] == "squash" and row.pooling == "attention pooling, after the projection"
    assert (row.feature_dim, row.weights, row.input_size) == (768, ("webli",), 224)


def test_weights_lie_where_the_hub_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    name = "openclip/ViT-B-16-SigLIP.webli"
    assert find_zoo(name).resolve(name, "openai") is None
    assert locate_weights(name, "DEFAULT").path is None
    folder = tmp_path / "models--timm--ViT-B-16-SigLIP"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "open_clip_model.safetensors").write_bytes(b"")
    source = locate_weights(name, "DEFAULT")
    assert source.path is not None and source.path.name == "open_clip_model.safetensors" and source.label == "webli"


def test_texts_are_those_of_the_zero_shot_classifier(files: Path) -> None:
    names, templates = ["ant", "bee"], ["a photo of a {}.", "{}"]
    model, tokenize = own_model("tiny-clip", files), open_clip.get_tokenizer("tiny-clip")
    wanted = open_clip.build_zero_shot_classifier(model, tokenize, names, templates).T * model.logit_scale.exp()
    prompts = [[template.format(name) for template in templates] for name in names]
    found = text_features(
        "openclip/tiny-clip", locate_weights("openclip/tiny-clip", str(files / "tiny-clip.pt")), prompts
    )
    np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=1e-5, atol=1e-6)
    with pytest.raises(WeightsError, match="Random weights"):
        text_features("openclip/tiny-clip", locate_weights("openclip/tiny-clip", "random"), prompts)
