"""From params to a backbone, and to its identity without touching weights that are known."""

from __future__ import annotations

import hashlib
import http.server
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import pipeline.backbones.build as build_module
from pipeline.backbones import (
    BackboneIdentity,
    WeightsMemo,
    build_classifier,
    build_network,
    identify_network,
)
from pipeline.backbones import weights as weights_module
from pipeline.backbones.catalogue import describe_backbone, locate_weights
from pipeline.backbones.torchvision import PACKAGED
from pipeline.backbones.transform import Transform
from pipeline.backbones.weights import checkpoint_bytes, download
from pipeline.errors import WeightsError
from pipeline.params import BackboneParams, TransformParams

from .conftest import build, filled_model

NAME = "shufflenet_v2_x0_5"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A weights file that lies long enough unchanged to be remembered."""
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(dict(filled_model(NAME).state_dict()), path)
    return path


@pytest.fixture
def old_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading happens an hour after the files of the test were written."""
    now = time.time_ns
    monkeypatch.setattr(build_module.time, "time_ns", lambda: now() + 3_600_000_000_000)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the backbones that were loaded, in order."""
    calls: list[str] = []
    original = build_module.build_network

    def counting(params: BackboneParams, transform: TransformParams) -> Any:
        calls.append(params.name)
        return original(params, transform)

    monkeypatch.setattr(build_module, "build_network", counting)
    return calls


def params(path: Path | str, **values: Any) -> BackboneParams:
    return BackboneParams.model_validate({"name": NAME, "weights": str(path), **values})


def test_random_weights_are_seeded_and_leave_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = build_network(params("random"), TransformParams())
    assert torch.equal(torch.rand(3), expected)
    again, other = build_network(params("random"), TransformParams()), build(NAME, seed=1)
    assert first.identity == again.identity != other.identity
    assert first.identity == BackboneIdentity(NAME, "random-0", first.identity.digest)


def test_an_untouched_weights_file_is_neither_loaded_nor_hashed(
    tmp_path: Path, weights: Path, built: list[str], old_files: None
) -> None:
    memo = tmp_path / "cache" / "weights.json"
    first = identify_network(params(weights), TransformParams(), WeightsMemo(memo))
    assert built == [NAME]
    assert identify_network(params(weights), TransformParams(), WeightsMemo(memo)) == first
    assert built == [NAME]
    backbone = build_network(params(weights), TransformParams())
    assert first == (backbone.identity, backbone.transform, backbone.feature_dim)


@pytest.mark.parametrize("change", ["transform", "layer", "pooling", "content", "touched"])
def test_whatever_changes_is_looked_at_again(
    tmp_path: Path, weights: Path, built: list[str], old_files: None, change: str
) -> None:
    memo = WeightsMemo(tmp_path / "weights.json")
    first = identify_network(params(weights), TransformParams(), memo)
    transform = TransformParams(crop=64) if change == "transform" else TransformParams()
    values = {"layer": "stage3"} if change == "layer" else {"pooling": "max"} if change == "pooling" else {}
    if change == "content":
        state = safetensors.torch.load_file(weights)
        state["conv1.0.weight"] += 1
        safetensors.torch.save_file(state, weights)
    if change == "touched":
        os.utime(weights, ns=(1, 1))
    second = identify_network(params(weights, **values), transform, memo)
    assert built == [NAME, NAME] and (first == second) == (change == "touched")


def test_a_file_just_written_is_hashed_again(tmp_path: Path, weights: Path, built: list[str]) -> None:
    memo = WeightsMemo(tmp_path / "weights.json")
    for _ in range(2):
        identify_network(params(weights), TransformParams(), memo)
    assert built == [NAME, NAME]


def test_random_weights_are_remembered_too(tmp_path: Path, built: list[str]) -> None:
    for seed in (0, 0, 1):
        identify_network(params("random", seed=seed), TransformParams(), WeightsMemo(tmp_path / "weights.json"))
    assert built == [NAME, NAME]


def test_a_damaged_fact_is_found_out_anew(tmp_path: Path, built: list[str]) -> None:
    file = tmp_path / "weights.json"
    first = identify_network(params("random"), TransformParams(), WeightsMemo(file))
    file.write_text(file.read_text().replace('"crop": 224', '"crop": -224'))
    assert identify_network(params("random"), TransformParams(), WeightsMemo(file)) == first
    assert built == [NAME, NAME]


def test_a_download_that_fails_says_what_was_tried_and_the_ways_out() -> None:
    started = time.monotonic()
    with pytest.raises(WeightsError) as caught:
        build_network(params("DEFAULT"), TransformParams())
    assert time.monotonic() - started < 20
    assert "IMAGENET1K_V1" in caught.value.what and ".pth" in str(caught.value.where)
    assert "backbone.weights" in str(caught.value.remedy) and "TORCH_HOME" in str(caught.value.remedy)
    folder = download_path().parent
    assert not folder.exists() or not list(folder.iterdir())


def download_path() -> Path:
    path = locate_weights(NAME, "DEFAULT").path
    assert path is not None
    return path


def test_a_download_is_fetched_once_and_its_removal_forgets_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built: list[str], old_files: None
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    fetched: list[str] = []

    def fetch(url: str, target: str, digest: str, **_options: Any) -> None:
        assert digest in url
        fetched.append(url)
        torch.save(filled_model(NAME).state_dict(), target)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    memo = WeightsMemo(tmp_path / "weights.json")
    first = identify_network(params("DEFAULT"), TransformParams(), memo)
    assert first[0].weights == "IMAGENET1K_V1" and download_path().is_file()
    identify_network(params("DEFAULT"), TransformParams(), memo)  # remembered now that the file is there
    loads = len(built)
    download_path().unlink()
    assert identify_network(params("IMAGENET1K_V1"), TransformParams(), memo) == first
    assert len(built) == loads and len(fetched) == 1


CONTENT = bytes(range(256)) * 4096
PROMISE = hashlib.sha256(CONTENT).hexdigest()[:8]


class _Server(http.server.BaseHTTPRequestHandler):
    """Sends CONTENT, less of it than it announced (``cut``), or nothing more after a while (``stall``)."""

    def do_GET(self) -> None:
        self.do_HEAD()
        kind = self.path.strip("/").partition("-")[0].partition(".")[0]
        self.wfile.write(CONTENT if kind == "whole" else CONTENT[:-1000])
        if kind == "stall":
            time.sleep(2)

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        return None


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a server on this machine."""
    monkeypatch.setattr(weights_module, "TIMEOUT_SECONDS", 0.5)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", [f"whole-{PROMISE}.pth", "whole.pth"])
def test_a_download_arrives_whole(tmp_path: Path, address: str, name: str) -> None:
    path = tmp_path / "checkpoints" / name
    download(f"{address}/{name}", path, what="test")
    assert path.read_bytes() == CONTENT and list(path.parent.iterdir()) == [path]
    assert socket.getdefaulttimeout() is None
    download("http://127.0.0.1:9/never-asked", path, what="test")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("whole-01234567.pth", "hash"),
        (f"cut-{PROMISE}.pth", "hash"),
        ("cut.pth", f"{len(CONTENT) - 1000} of {len(CONTENT)} bytes"),
        (f"stall-{PROMISE}.pth", "timed out"),
        ("stall.pth", "timed out"),
    ],
)
def test_a_download_that_is_not_what_was_promised_leaves_nothing(
    tmp_path: Path, address: str, name: str, why: str
) -> None:
    path = tmp_path / "checkpoints" / name
    with pytest.raises(WeightsError, match="downloaded") as caught:
        download(f"{address}/{name}", path, what="test")
    assert why in str(caught.value.why) and list(path.parent.iterdir()) == []


def test_packaged_weights_are_a_backbone_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, path = Transform(resize=72, crop=64), tmp_path / "small.safetensors"
    half = {key: value.half() for key, value in filled_model(NAME).state_dict().items() if not key.startswith("fc.")}
    path.write_bytes(checkpoint_bytes(half, own, name="small"))
    monkeypatch.setitem(PACKAGED, "small", (NAME, path))
    backbone = build_network(BackboneParams(name="small"), TransformParams())
    assert (backbone.transform, backbone.identity.name, backbone.identity.weights) == (own, "small", "DEFAULT")
    assert backbone.feature_dim == 1024 and backbone.module(torch.zeros(1, 3, 64, 64)).dtype == torch.float32
    random = build_network(BackboneParams(name="small", weights="random"), TransformParams())
    assert random.transform == own and random.identity.digest != backbone.identity.digest
    row = describe_backbone("small")
    assert (row.weights, row.input_size) == (("DEFAULT",), 64)
    with pytest.raises(WeightsError, match="IMAGENET1K_V1"):
        build_network(BackboneParams(name="small", weights="IMAGENET1K_V1"), TransformParams())


def test_the_transform_of_a_file_without_one_is_the_plain_preset(weights: Path) -> None:
    assert build_network(params(weights), TransformParams()).transform == Transform(resize=256, crop=224)
    assert build_network(params(weights), TransformParams(resize=288)).transform.resize == 288


def test_the_shared_weights_are_right(shared: Path) -> None:
    """The statistics of pooled features and the hits that come with these weights, on some of the images."""
    path = str(shared / "weights" / "mobilenet_v2-imagenet.safetensors")
    backbone = build_network(BackboneParams(name="mobilenet_v2", weights=path), TransformParams())
    files = sorted((shared / "data").glob("hymenoptera_data/val/*/*.jpg"))[::6]
    pixels = np.stack([backbone.transform.pixels(Image.open(file).convert("RGB")) for file in files])
    batch = backbone.transform.normalise(torch.from_numpy(pixels))
    features = backbone.module(batch)
    assert features.shape == (len(files), 1280)
    assert features.mean().item() == pytest.approx(0.40, abs=0.03)
    assert features.std().item() == pytest.approx(0.59, abs=0.04)
    module, transform, categories = build_classifier("mobilenet_v2", path)
    assert transform == backbone.transform
    names = [categories[index] for index in module(batch).argmax(1)]
    hits = sum(
        name == {"ants": "ant", "bees": "bee"}[file.parent.name] for name, file in zip(names, files, strict=True)
    )
    assert hits / len(files) > 0.65
