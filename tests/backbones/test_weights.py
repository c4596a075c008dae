"""State dicts in every wrapping are understood, and what does not fit is named."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline.backbones import BuiltNetwork, backbone_bytes, build_classifier, build_network, trainable_module
from pipeline.backbones.catalogue import locate_weights
from pipeline.backbones.torchvision import make_model
from pipeline.backbones.transform import Transform
from pipeline.backbones.weights import read_checkpoint, tensors_digest
from pipeline.errors import BackboneError, WeightsError
from pipeline.params import BackboneParams, TransformParams

from .conftest import filled_model

NAME = "mobilenet_v3_small"


def load(path: Path, name: str = NAME, **params: Any) -> BuiltNetwork:
    return build_network(BackboneParams(name=name, weights=str(path), **params), TransformParams())


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return dict(filled_model(NAME).state_dict())


@pytest.fixture(scope="module")
def digest(state: dict[str, Tensor]) -> str:
    return tensors_digest({key: value for key, value in state.items() if not key.startswith("classifier.3.")})


def saved(tmp_path: Path, content: Any, name: str = "weights.pth") -> Path:
    path = tmp_path / name
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(content, path)
    else:
        torch.save(content, path)
    return path


WRAPPINGS = {
    "plain": lambda state: state,
    "ordered": OrderedDict,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"state": {0: torch.zeros(2)}}},
    "model": lambda state: {"model": state},
    "nested twice": lambda state: {"model": {"state_dict": state}},
    "module.": lambda state: {f"module.{key}": value for key, value in state.items()},
    "backbone. beside a head": lambda state: {
        **{f"backbone.{key}": value for key, value in state.items()},
        "head.weight": torch.zeros(2, 1024),
    },
    "module.model. in state_dict": lambda state: {"state_dict": {f"module.model.{k}": v for k, v in state.items()}},
    "without classifier": lambda state: {k: v for k, v in state.items() if not k.startswith("classifier.3.")},
    "without counters": lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrappings_are_understood(tmp_path: Path, state: dict[str, Tensor], digest: str, wrapping: str) -> None:
    backbone = load(saved(tmp_path, WRAPPINGS[wrapping](state)))
    assert backbone.identity.digest == digest and backbone.identity.weights == "file"
    assert len(backbone.notes) == ("head" in wrapping)
    assert not backbone.notes or "head.weight" in backbone.notes[0]


def test_the_digest_does_not_depend_on_the_file_format(tmp_path: Path, state: dict[str, Tensor], digest: str) -> None:
    assert load(saved(tmp_path, state, "w.safetensors")).identity.digest == digest
    assert load(saved(tmp_path, state, "misnamed.bin")).identity.digest == digest
    half = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    restored = {key: value.float() if value.is_floating_point() else value for key, value in half.items()}
    stored_half = load(saved(tmp_path, half, "half.safetensors"))
    assert stored_half.identity.digest == load(saved(tmp_path, restored)).identity.digest != digest
    assert all(value.dtype != torch.float16 for value in stored_half.module.state_dict().values())


@pytest.mark.parametrize("key", ["features.0.0.weight", "features.0.1.running_mean", "classifier.0.bias"])
def test_the_digest_changes_with_every_tensor_that_computes(state: dict[str, Tensor], key: str) -> None:
    changed = {**state, key: state[key].clone()}
    changed[key].view(-1)[0] += 1e-3
    assert tensors_digest(changed) != tensors_digest(state)
    counted = {**state, "features.0.1.num_batches_tracked": torch.tensor(7)}
    assert tensors_digest(counted) == tensors_digest(state)


def test_another_number_of_classes_drops_the_classifier(tmp_path: Path, state: dict[str, Tensor], digest: str) -> None:
    head = {"classifier.3.weight": torch.zeros(5, 1024), "classifier.3.bias": torch.zeros(5)}
    backbone = load(saved(tmp_path, {**state, **head}))
    assert backbone.identity.digest == digest
    assert backbone.notes == ("the classifier of the weights (5 outputs) was dropped",)


def test_loaded_tensors_have_storage_of_their_own(tmp_path: Path, state: dict[str, Tensor]) -> None:
    tied = {**state, "features.0.1.weight": torch.ones(1).expand(16), "features.0.1.bias": torch.ones(1).expand(16)}
    module = trainable_module(load(saved(tmp_path, tied)))
    with torch.no_grad():
        module.get_parameter("model.features.0.1.weight")[0] = 5
    assert module.get_parameter("model.features.0.1.weight").tolist()[:2] == [5, 1]


def test_missing_tensors_are_named_and_so_is_the_model_they_fit(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = saved(tmp_path, state)
    with pytest.raises(WeightsError) as caught:
        load(path, "mobilenet_v2")
    assert "missing" in str(caught.value.why) and "features.0.0.weight" in str(caught.value.why)
    assert f"backbone.name={NAME}" in str(caught.value.remedy) and caught.value.where == path
    partial = {key: value for key, value in state.items() if key != "features.4.block.0.0.weight"}
    with pytest.raises(WeightsError, match="do not fit") as caught:
        load(saved(tmp_path, partial))
    assert "features.4.block.0.0.weight" in str(caught.value.why) and "1 of" in str(caught.value.why)


def test_a_cut_backbone_needs_only_its_own_tensors(tmp_path: Path, state: dict[str, Tensor], digest: str) -> None:
    first = {key: value for key, value in state.items() if key.startswith(tuple(f"features.{n}." for n in range(5)))}
    cut = load(saved(tmp_path, first), layer="features.4")
    assert cut.identity.digest == load(saved(tmp_path, state), layer="features.4").identity.digest != digest


@pytest.mark.parametrize(
    ("replacement", "named"),
    [
        (torch.zeros(16, 3, 5, 5), "(16, 3, 5, 5) instead of (16, 3, 3, 3)"),
        (torch.full((16, 3, 3, 3), float("nan")), "not finite"),
        (torch.zeros(16, 3, 3, 3, dtype=torch.complex64), "real numbers"),
        (torch.zeros(16, 3, 3, 3).to_sparse(), "plain tensor"),
        (torch.zeros(16, 3, 3, 3, device="meta"), "plain tensor"),
    ],
)
def test_unusable_tensors_are_named(tmp_path: Path, state: dict[str, Tensor], replacement: Tensor, named: str) -> None:
    with pytest.raises(WeightsError) as caught:
        load(saved(tmp_path, {**state, "features.0.0.weight": replacement}))
    assert "features.0.0.weight" in str(caught.value.why) and named in str(caught.value.why)


class _Payload:
    def __reduce__(self) -> Any:
        return (print, ("code ran",))


def test_files_that_would_run_code_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = saved(tmp_path, nn.Linear(2, 2))
    payload = tmp_path / "payload.pth"
    payload.write_bytes(pickle.dumps(_Payload()))
    for path in (whole, payload, saved(tmp_path, {"state_dict": _Payload()}, "inner.pth")):
        with pytest.raises(WeightsError) as caught:
            load(path)
        assert "weights-only" in str(caught.value.why) and "state_dict" in str(caught.value.remedy)
    assert "code ran" not in capsys.readouterr().out


def header(content: object) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text


FULL = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BROKEN = {
    "empty.pth": b"",
    "empty.safetensors": b"",
    "text.pth": b"these are no weights",
    "page.pth": b"<!DOCTYPE html><html>404</html>",
    "lfs.safetensors": b"version 1\noid sha256:00\nsize 9\n# git-lfs",
    "zip.pth": b"PK\x03\x04" + bytes(60),
    "pickle.pth": pickle.dumps({"a": 1}),
    "numbers.pth": pickle.dumps([1, 2, 3]),
    "huge_header.safetensors": (2**62).to_bytes(8, "little") + b"{}",
    "no_tensors.safetensors": header({"__metadata__": {"transform": "{}"}}),
    "truncated.safetensors": header({"conv1.weight": FULL}) + bytes(4),
    "overlap.safetensors": header({"a": FULL, "b": FULL}) + bytes(8),
    "long.safetensors": header({"a": {**FULL, "shape": [2**40]}}) + bytes(8),
    "negative.safetensors": header({"a": {**FULL, "shape": [-2]}}) + bytes(8),
    "dtype.safetensors": header({"a": {**FULL, "dtype": "F7"}}) + bytes(8),
    "deep.safetensors": header(b'{"a":' * 5000),
    "not_json.safetensors": header(b"{nonsense") + bytes(8),
    "metadata.safetensors": header({"__metadata__": {"transform": 7}, "a": FULL}) + bytes(8),
    "transform.safetensors": header({"__metadata__": {"transform": "{"}, "a": FULL}) + bytes(8),
    "transform_list.safetensors": header({"__metadata__": {"transform": "[1]"}, "a": FULL}) + bytes(8),
    "transform_crop.safetensors": header({"__metadata__": {"transform": '{"crop": -3}'}, "a": FULL}) + bytes(8),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_lie_get_a_message(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(BROKEN[name])
    with pytest.raises(WeightsError) as caught:
        load(path)
    assert caught.value.where == path and caught.value.why and caught.value.remedy


def test_damage_anywhere_in_a_file_gives_a_message(tmp_path: Path, state: dict[str, Tensor]) -> None:
    content = saved(tmp_path, {"conv.weight": torch.ones(3)}).read_bytes()
    path = tmp_path / "damaged.pth"
    for position in range(0, len(content), 37):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x5A]) + content[position + 1 :])
        with suppress(WeightsError):  # a changed value goes unseen; nothing but a message may come of the rest
            read_checkpoint(path)
        path.write_bytes(content[:position])
        with pytest.raises(WeightsError):
            read_checkpoint(path)


@pytest.mark.parametrize("path", ["missing.pth", "", "folder.pth"])
def test_a_path_that_is_no_file_is_said(tmp_path: Path, path: str) -> None:
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(WeightsError):
        load(tmp_path / path)


def test_a_fine_tuned_network_loads_back_with_its_transform(tmp_path: Path, state: dict[str, Tensor]) -> None:
    network = trainable_module(load(saved(tmp_path, state)))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.01)
    own = Transform(resize=72, crop=64, interpolation="bicubic", mean=(0.1, 0.2, 0.3), exif=False)
    path = tmp_path / "backbone.safetensors"
    path.write_bytes(backbone_bytes(network, own, name=NAME))
    backbone = load(path)
    # Decoding is the user's choice at extraction, so what params say about it wins over the file.
    assert backbone.transform == Transform(
        **{**own.as_dict(), "mean": own.mean, "std": own.std, "exif": True, "background": (255, 255, 255)}
    )
    assert backbone.notes == () and tensors_digest(network.model.state_dict()) == backbone.identity.digest
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(network.eval()(images), backbone.module(images))


def test_old_densenet_names_are_brought_up_to_date(tmp_path: Path) -> None:
    state = dict(filled_model("densenet121").state_dict())
    old = {}
    for key, value in state.items():
        for layer in ("norm", "relu", "conv"):
            for number in "12":
                if "denselayer" in key:
                    key = key.replace(f".{layer}{number}.", f".{layer}.{number}.")
        old[key] = value
    assert set(old) != set(state)
    new_digest = load(saved(tmp_path, state), "densenet121").identity.digest
    assert load(saved(tmp_path, old), "densenet121").identity.digest == new_digest


def test_auxiliary_heads_are_dropped_in_silence(tmp_path: Path) -> None:
    state = dict(filled_model("googlenet").state_dict())
    extra = {"aux1.conv.conv.weight": torch.zeros(128, 512, 1, 1), "aux2.fc2.bias": torch.zeros(1000)}
    assert load(saved(tmp_path, {**state, **extra}), "googlenet").notes == ()


def test_every_mnasnet_loads_from_a_file_without_module_versions(tmp_path: Path) -> None:
    state = dict(filled_model("mnasnet0_5").state_dict())
    assert load(saved(tmp_path, state, "w.safetensors"), "mnasnet0_5").feature_dim == 1280


def test_position_embeddings_tell_the_image_size(tmp_path: Path) -> None:
    whole = make_model("vit_b_32", tensors={"encoder.pos_embedding": torch.empty(1, 145, 1)}).state_dict()
    names = ("class_token", "conv_proj.weight", "conv_proj.bias", "encoder.pos_embedding")
    path = saved(tmp_path, {name: torch.zeros(whole[name].shape) for name in names})
    backbone = load(path, "vit_b_32", layer="encoder.dropout")
    assert (backbone.transform.resize, backbone.transform.crop) == (439, 384)
    assert backbone.module(torch.zeros(1, 3, 384, 384)).shape == (1, 768)
    params = BackboneParams(name="vit_b_32", weights=str(path), layer="encoder.dropout")
    with pytest.raises(BackboneError) as caught:
        build_network(params, TransformParams(crop=160))
    assert caught.value.where == "transform.crop" and "384" in str(caught.value.remedy)


def test_names_of_weights() -> None:
    for alias in ("DEFAULT", "ResNet50_Weights.DEFAULT", "IMAGENET1K_V2"):
        source = locate_weights("resnet50", alias)
        assert source.label == source.tag == "IMAGENET1K_V2" and source.path and source.path.name.startswith("resnet50")
    assert locate_weights("resnet50", "ResNet50_Weights.IMAGENET1K_V1").label == "IMAGENET1K_V1"
    assert locate_weights("resnet50", "random", seed=4).label == "random-4"
    with pytest.raises(WeightsError) as caught:
        locate_weights("resnet50", "IMAGENET1K_V3")
    assert "IMAGENET1K_V2" in str(caught.value.remedy)


def test_a_classifier_needs_its_thousand_classes(tmp_path: Path, state: dict[str, Tensor]) -> None:
    module, transform, categories = build_classifier(NAME, str(saved(tmp_path, state)))
    assert module(torch.zeros(1, 3, 64, 64)).shape == (1, 1000) and len(categories) == 1000
    assert categories[309:311] == ("bee", "ant") and transform.crop == 224
    few = {**state, "classifier.3.weight": torch.zeros(5, 1024), "classifier.3.bias": torch.zeros(5)}
    none = {key: value for key, value in state.items() if not key.startswith("classifier.3.")}
    for content in (few, none):
        with pytest.raises(WeightsError) as caught:
            build_classifier(NAME, str(saved(tmp_path, content)))
        assert "predict" in str(caught.value.remedy)
