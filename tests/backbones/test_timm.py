"""timm's networks are what timm computes, from whatever file, with every promise of a backbone."""

from __future__ import annotations

import argparse
import http.server
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.backbones import (
    BackboneIdentity,
    BuiltNetwork,
    WeightsMemo,
    backbone_bytes,
    build_classifier,
    build_network,
    describe_backbone,
    identify_network,
    list_backbones,
    prepare_for_inference,
    trainable_module,
)
from pipeline.backbones.catalogue import locate_weights, matching_names
from pipeline.backbones.weights import read_checkpoint
from pipeline.errors import BackboneError, WeightsError
from pipeline.finetune.groups import find_blocks
from pipeline.params import BackboneParams, TransformParams

from .test_transform import random_image

timm = pytest.importorskip("timm")
hub = pytest.importorskip("huggingface_hub")

VIT, EFFICIENTNET = "timm/test_vit.r160_in1k", "timm/test_efficientnet.r160_in1k"
DINOV2 = "timm/vit_small_patch14_reg4_dinov2.lvd142m"
SMALL = (
    VIT,
    EFFICIENTNET,
    "timm/test_vit3.r160_in1k",  # a register, pooled by attention
    "timm/test_nfnet.r160_in1k",
    "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "timm/convnext_atto.d2_in1k",
    "timm/mobilenetv4_conv_small.e2400_r224_in1k",
    DINOV2,
)
AT_98 = TransformParams(resize=98, crop=98)  # DINOv2's own 518 pixels take seconds


def build(
    name: str, weights: Path | str = "random", *, transform: TransformParams | None = None, **params: Any
) -> BuiltNetwork:
    section = BackboneParams.model_validate({"name": name, "weights": str(weights), **params})
    return build_network(section, transform or TransformParams())


@cache
def own_model(name: str, **options: Any) -> nn.Module:
    """timm's model with the weights of seed 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(name.removeprefix("timm/"), **options).eval()


@pytest.fixture
def vit_file(tmp_path: Path) -> Path:
    """As timm saves one in its own training."""
    content = {"state_dict": own_model(VIT).state_dict(), "args": argparse.Namespace(model="test_vit"), "epoch": 3}
    torch.save(content, tmp_path / "checkpoint.pth.tar")
    return tmp_path / "checkpoint.pth.tar"


def images(size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def own_features(model: Any, batch: Tensor) -> Tensor:
    return model.forward_head(model.forward_features(batch), pre_logits=True)


# -- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_features_are_those_of_timm_under_its_own_transform(name: str) -> None:
    options = {"img_size": 98} if name == DINOV2 else {}
    transform = AT_98 if name == DINOV2 else None
    built, model = build(name, transform=transform), own_model(name, **options)
    config = {**timm.data.resolve_model_data_config(model), **({"input_size": (3, 98, 98)} if options else {})}
    transformed = timm.data.create_transform(**config)
    pictures = [random_image(*size) for size in ((490, 390), (390, 491), (100, 80))]
    theirs = torch.stack([transformed(picture) for picture in pictures])
    pixels = torch.from_numpy(np.stack([built.transform.pixels(picture) for picture in pictures]))
    ours = built.transform.normalise(pixels)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert torch.equal(built.module(theirs), own_features(model, theirs))
    assert built.feature_dim == own_features(model, theirs).shape[1]


def test_pooling_leaves_registers_out_and_says_what_it_is() -> None:
    model, batch = own_model(DINOV2, img_size=98), images(98)
    with torch.no_grad():
        tokens = model.forward_features(batch)
    wanted = {
        "default": tokens[:, 0],
        "cls": tokens[:, 0],
        "avg": tokens[:, 5:].mean(1),
        "max": tokens[:, 5:].amax(1),
        "cls_avg": torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], 1),
    }
    for pooling, features in wanted.items():
        built = build(DINOV2, transform=AT_98, pooling=pooling)
        assert torch.equal(built.module(batch), features), pooling
        assert ("class token" in built.module.network.pooling) == (pooling in ("default", "cls", "cls_avg"))


def test_the_pooling_of_the_weights_is_told() -> None:
    assert describe_backbone(DINOV2).pooling == "class token"
    assert describe_backbone("timm/vit_small_patch16_dinov3.lvd1689m").pooling == "average over positions"
    assert describe_backbone("timm/test_vit3.r160_in1k").pooling == "attention pooling"


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_other_poolings_are_timms_own(pooling: str) -> None:
    for name in ("timm/test_convnext.r160_in1k", "timm/test_vit2.r160_in1k"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = timm.create_model(name.removeprefix("timm/")).eval()
        model.reset_classifier(0, pooling)
        assert torch.equal(build(name, pooling=pooling).module(images(160)), own_features(model, images(160)))


def test_a_norm_after_the_pooling_follows_every_pooling() -> None:
    name = "timm/beit3_base_patch16_224.in22k_ft_in1k"
    network = build(name, pooling="cls_avg").module.network
    assert not isinstance(network.pool.norm, nn.Identity)
    assert network.pool.norm is network.model.fc_norm
    assert "pool.norm.weight" not in dict(network.named_parameters())


def test_poolings_that_do_not_fit_are_refused() -> None:
    for name, pooling, why in (
        (EFFICIENTNET, "cls", "class token"),
        ("timm/test_vit2.r160_in1k", "cls_avg", "class token"),
    ):
        with pytest.raises(BackboneError, match="does not fit") as caught:
            build(name, pooling=pooling)
        assert why in str(caught.value)


@pytest.mark.parametrize(
    ("name", "layer"), [(VIT, "blocks.2"), (EFFICIENTNET, "blocks.1"), ("timm/test_resnet.r160_in1k", "layer2")]
)
def test_a_layer_is_what_its_module_gives(name: str, layer: str) -> None:
    model, seen = own_model(name), []
    hook = model.get_submodule(layer).register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    own_features(model, images(160))
    hook.remove()
    built = build(name, layer=layer)
    wanted = seen[0].mean((2, 3)) if seen[0].dim() == 4 else seen[0][:, 1:].mean(1)
    torch.testing.assert_close(built.module(images(160)), wanted)
    assert built.parameters < build(name).parameters
    if name == VIT:
        assert torch.equal(build(name, layer=layer, pooling="cls").module(images(160)), seen[0][:, 0])


def test_an_unknown_layer_names_near_ones() -> None:
    with pytest.raises(BackboneError) as caught:
        build(VIT, layer="block.2")
    assert "blocks.2" in str(caught.value.remedy)


def test_batchnorm_with_an_activation_inside_is_folded() -> None:
    for name in (EFFICIENTNET, "timm/mobilenetv4_conv_small.e2400_r224_in1k"):
        built = build(name)
        prepared = prepare_for_inference(built, device=torch.device("cpu"), precision="float32")
        norms = sum(isinstance(module, nn.BatchNorm2d) for module in built.module.modules())
        assert prepared.folded == norms > 10
        torch.testing.assert_close(prepared(images(160)), built.module(images(160)), rtol=1e-4, atol=1e-5)


# -- image sizes -----------------------------------------------------------------------------------------------------


def test_position_embeddings_are_interpolated_as_timm_does(vit_file: Path) -> None:
    built = build(VIT, vit_file, transform=TransformParams(resize=192, crop=192))
    with torch.random.fork_rng():
        overlay = {"file": str(vit_file)}
        model = timm.create_model("test_vit.r160_in1k", pretrained=True, pretrained_cfg_overlay=overlay, img_size=192)
    assert built.transform.crop == 192
    assert torch.equal(built.module(images(192)), own_features(model.eval(), images(192)))
    assert built.identity.digest != build(VIT, vit_file).identity.digest


def test_a_file_is_used_at_the_size_it_was_made_for(tmp_path: Path) -> None:
    larger = own_model(VIT, img_size=192)
    save_file(larger.state_dict(), tmp_path / "larger.safetensors")
    built = build(VIT, tmp_path / "larger.safetensors")
    assert (built.transform.crop, built.transform.resize) == (192, 202)
    assert torch.equal(built.module(images(192)), own_features(larger, images(192)))


def test_sizes_that_a_network_cannot_take_are_refused_with_the_reason() -> None:
    with pytest.raises(BackboneError, match="cannot take images of 10 x 10"):
        build(VIT, transform=TransformParams(resize=10, crop=10))
    with pytest.raises(BackboneError, match="cannot be made for images of 97 x 97") as caught:
        build("timm/xcit_nano_12_p16_224.fb_in1k", transform=TransformParams(resize=97, crop=97))
    assert caught.value.why


# -- files -----------------------------------------------------------------------------------------------------------


def test_what_timm_saves_in_training_loads_without_unpickling(vit_file: Path) -> None:
    built = build(VIT, vit_file)
    assert built.notes == () and built.identity == replace(build(VIT).identity, weights="file")


def test_a_folder_for_hugging_face_brings_its_transform(tmp_path: Path) -> None:
    model = own_model(VIT)
    config = {**model.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "crop_pct": 0.8, "crop_mode": "squash"}
    timm.models.save_for_hf(model, str(tmp_path), model_config={"pretrained_cfg": config}, safe_serialization=True)
    built = build(VIT, tmp_path / "model.safetensors")
    assert torch.equal(built.module(images(160)), own_features(model, images(160)))
    assert (built.transform.mean, built.transform.resize) == ((0.1, 0.2, 0.3), 200)
    assert built.transform.resize_mode == "squash" and built.transform.as_dict()["resize_mode"] == "squash"
    other = build("timm/test_vit2.r160_in1k")  # a config.json of another architecture says nothing
    save_file(other.module.network.model.state_dict(), tmp_path / "other.safetensors")
    assert build("timm/test_vit2.r160_in1k", tmp_path / "other.safetensors").transform == other.transform


def test_a_changed_config_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm.models.save_for_hf(own_model(VIT), str(tmp_path), safe_serialization=True)
    monkeypatch.setattr("pipeline.backbones.build.time.time_ns", lambda: 2**62)
    params = BackboneParams(name=VIT, weights=str(tmp_path / "model.safetensors"))
    memo = tmp_path / "memo.json"
    first = identify_network(params, TransformParams(), WeightsMemo(memo))
    assert identify_network(params, TransformParams(), WeightsMemo(memo)) == first
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"bicubic"', '"bilinear"'))
    assert identify_network(params, TransformParams(), WeightsMemo(memo))[1].interpolation == "bilinear"


def test_the_names_of_the_original_dinov2_are_timms_own_translation(tmp_path: Path) -> None:
    state = dict(own_model(DINOV2, img_size=98).state_dict())
    original = {key: value for key, value in state.items() if key != "reg_token"}
    original |= {"register_tokens": state["reg_token"], "mask_token": torch.zeros(1, 384)}
    original["pos_embed"] = torch.cat([torch.zeros(1, 1, 384), state["pos_embed"]], 1)
    torch.save(original, tmp_path / "dinov2.pth")
    built = build(DINOV2, tmp_path / "dinov2.pth", transform=AT_98)
    assert built.notes == () and built.identity.digest == build(DINOV2, transform=AT_98).identity.digest


def test_another_class_count_is_dropped_and_a_missing_tensor_is_an_error(tmp_path: Path) -> None:
    state = dict(own_model(VIT).state_dict())
    seven = {**state, "head.weight": torch.zeros(7, 64), "head.bias": torch.zeros(7)}
    save_file(seven, tmp_path / "seven.safetensors")
    built = build(VIT, tmp_path / "seven.safetensors")
    assert built.notes == ("the classifier of the weights (7 outputs) was dropped",)
    assert built.identity.digest == build(VIT).identity.digest
    del state["blocks.3.norm1.weight"]
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(WeightsError, match="do not fit") as caught:
        build(VIT, tmp_path / "less.safetensors")
    assert "blocks.3.norm1.weight" in str(caught.value)
    save_file({"something": torch.zeros(2)}, tmp_path / "strange.safetensors")
    with pytest.raises(WeightsError, match="do not fit"):
        build(VIT, tmp_path / "strange.safetensors")


def test_fine_tuned_weights_load_back_at_their_size(tmp_path: Path, vit_file: Path) -> None:
    built = build(VIT, vit_file, transform=TransformParams(resize=192, crop=192))
    network = trainable_module(built)
    (tmp_path / "tuned.safetensors").write_bytes(backbone_bytes(network, built.transform, name=VIT))
    tuned = build(VIT, tmp_path / "tuned.safetensors")
    assert tuned.transform == built.transform and tuned.identity.digest == built.identity.digest


def test_layers_are_grouped_by_depth_as_timm_groups_them() -> None:
    for name, count in ((VIT, 7), (EFFICIENTNET, 6), ("timm/coat_tiny.in1k", 18)):
        network = trainable_module(build(name))
        blocks = find_blocks(network)
        inside = [id(parameter) for block in blocks for _, parameter in block.parameters]
        assert len(blocks) == count and sorted(inside) == sorted(id(item) for item in network.parameters())
    assert [block.name for block in find_blocks(build(VIT).module.network)][1:3] == ["model.blocks.0", "model.blocks.1"]


# -- downloads -------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's library."""
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def mirror(no_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A server of a local folder in the place of the hub; the paths that were asked for."""
    save_file(own_model(VIT).state_dict(), tmp_path / "model.safetensors")
    data, asked = (tmp_path / "model.safetensors").read_bytes(), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            there = self.path == "/timm/test_vit.r160_in1k/resolve/main/model.safetensors"
            self.send_response(200 if there else 404)
            for key, value in (("X-Repo-Commit", "a" * 40), ("ETag", '"etag"'), ("Content-Length", str(len(data)))):
                self.send_header(key, value)
            if not there:
                self.send_header("X-Error-Code", "EntryNotFound")
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(hub.constants, "ENDPOINT", address)
    template = hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
    monkeypatch.setattr(
        hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + template[template.index("/{repo_id}") :]
    )
    yield asked
    server.shutdown()


def test_pretrained_weights_are_fetched_once_and_found_without_a_network(
    mirror: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.backbones.build.time.time_ns", lambda: 2**62)
    memo, params = WeightsMemo(tmp_path / "memo.json"), BackboneParams(name=VIT)
    identity, _, _ = identify_network(params, TransformParams(), memo)
    assert identity == replace(build(VIT).identity, weights="r160_in1k") and mirror
    mirror.clear()
    assert build(VIT, "DEFAULT").identity == identity == build(VIT, "r160_in1k").identity
    source = locate_weights(VIT, "DEFAULT")
    assert source.path is not None and read_checkpoint(source.path).tensors
    source.path.unlink()
    assert identify_network(params, TransformParams(), WeightsMemo(tmp_path / "memo.json"))[0] == identity
    assert mirror == []


def test_without_a_network_the_ways_out_are_told_at_once(no_hub: Path) -> None:
    with pytest.raises(WeightsError, match="could not be downloaded") as caught:
        build(VIT, "DEFAULT")
    assert "HF_HOME" in str(caught.value) and "backbone.weights" in str(caught.value)
    with pytest.raises(WeightsError, match="could not be downloaded"):
        build("timm/gcvit_xxtiny.in1k", "DEFAULT")


# -- names and lists -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm/test_vit", "timm/test_vit.r161_in1k", "timm/tst_vit.r160_in1k"])
def test_a_wrong_name_is_answered_with_near_ones(name: str) -> None:
    with pytest.raises(BackboneError, match="timm has no"):
        build(name)


def test_near_names_are_those_of_the_architecture() -> None:
    with pytest.raises(BackboneError) as caught:
        build("timm/resnet50")
    assert "timm/resnet50.a1_in1k" in str(caught.value.remedy)


def test_a_thousand_names_are_listed_only_when_asked_for() -> None:
    assert not any(name.startswith("timm/") for name in matching_names())
    assert len(matching_names(["timm/"])) > 1000
    assert len(matching_names(["timm/vit_*_dinov2*"])) > 4
    for limits in ({"parameters": 30_000_000}, {"width": 500}):
        rows = list(list_backbones(["timm/vit_*_dinov2*"], licence="apache", **limits))
        assert DINOV2 in [row.name for row in rows] and len(rows) == 2
        assert {row.licence for row in rows} == {"apache-2.0"} and {row.feature_dim for row in rows} == {384}
    assert list(list_backbones(["timm/vit_*_dinov2*"], licence="mit")) == []


def test_what_no_transform_computes_is_refused_and_not_listed() -> None:
    name = "timm/vit_base_patch16_sapiens2.fb"
    if name not in matching_names(["sapiens2"]):
        pytest.skip("this version of timm has no network of images that are not square")
    with pytest.raises(BackboneError, match="1024 x 768"):
        describe_backbone(name)
    assert list(list_backbones(["timm/vit_base_patch16_sapiens2*"])) == []


def test_only_weights_of_a_thousand_named_classes_classify(vit_file: Path) -> None:
    module, transform, categories = build_classifier(VIT, str(vit_file))
    with torch.no_grad():
        assert torch.equal(module(images(160)), own_model(VIT)(images(160)))
    assert len(categories) == 1000 and categories[310] == "ant" and transform.crop == 160
    with pytest.raises(BackboneError, match="no classifier"):
        build_classifier(DINOV2, "random")


def test_an_identity_without_own_code_is_written_as_before() -> None:
    assert set(BackboneIdentity("a", "b", "c").as_dict()) == {"name", "weights", "digest", "layer", "pooling"}


def test_pixels_of_grey_strips_are_timms(tmp_path: Path) -> None:
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(own_model(VIT)))
    built = build(VIT)
    picture = Image.new("RGB", (300, 20), (120, 120, 120))
    ours = built.transform.normalise(torch.from_numpy(built.transform.pixels(picture))[None])[0]
    torch.testing.assert_close(ours, transform(picture), rtol=0, atol=1e-6)
