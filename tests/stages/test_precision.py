"""What precision `auto` stands for is decided by whoever begins, and followed by every machine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.backbones import Verdict
from pipeline.backbones.backbone import batch_size
from pipeline.params import Params
from pipeline.stages.extract import extract
from pipeline.stages.open import load_features, open_backbone
from pipeline.stages.train_head import train_head

from .conftest import write_image

Extract = Callable[..., dict[str, Any]]
MakeParams = Callable[..., Params]
QUICK = ("head.logistic.strengths=3", "head.folds=2")


@pytest.fixture
def on_a_fast_machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Whether this machine is one that computes bfloat16 fast, and the backbone bears it."""

    def be(fast: bool) -> None:
        verdict = Verdict("bfloat16", True, 1.0, 1.0)
        monkeypatch.setattr("pipeline.backbones.backbone.reduced_precisions_of", lambda _d: ("bfloat16",) * fast)
        monkeypatch.setattr("pipeline.backbones.backbone.accept_precision", lambda *_a, **_k: verdict)

    return be


def test_a_login_node_follows_the_machine_that_extracted(
    run_extract: Extract, make_params: MakeParams, root: Path, on_a_fast_machine: Callable[[bool], None]
) -> None:
    on_a_fast_machine(True)
    first = run_extract()
    on_a_fast_machine(False)
    assert len(load_features(make_params())) == 24
    train_head(make_params(*QUICK), lambda _line: None)
    write_image(root / "train" / "cat" / "new.jpg", 100)
    lines: list[str] = []
    second = extract(make_params(), lines.append, quiet=True)
    assert (second["key"], second["forwarded"]) == (first["key"], 1)
    assert any(line.endswith("to write, on cpu in bfloat16") for line in lines)
    assert not any(line.startswith("Precision auto") for line in lines)  # told once, when it was decided


def test_nodes_of_a_job_array_share_one_key(run_extract: Extract, on_a_fast_machine: Callable[[bool], None]) -> None:
    keys = []
    for shard, fast in enumerate((False, True)):
        on_a_fast_machine(fast)
        keys.append(run_extract(f"extract.shard={shard}/2")["key"])
    assert keys[0] == keys[1]


def test_an_older_cache_has_the_precision_of_most_of_its_features(
    run_extract: Extract, root: Path, tmp_path: Path, on_a_fast_machine: Callable[[bool], None]
) -> None:
    most = run_extract("extract.precision=bfloat16")
    for image in sorted(root.rglob("*.jpg"))[5:]:
        image.rename(tmp_path / image.name)
    run_extract("extract.precision=float32")
    on_a_fast_machine(False)
    assert run_extract()["key"] == most["key"]


def test_who_only_reads_decides_nothing(
    run_extract: Extract, make_params: MakeParams, tmp_path: Path, on_a_fast_machine: Callable[[bool], None]
) -> None:
    on_a_fast_machine(False)
    with pytest.raises(Exception, match="no feature yet"):
        load_features(make_params())
    on_a_fast_machine(True)
    first = run_extract()
    assert "bfloat16" in next((tmp_path / "cache").glob("*/spec.json")).read_text() and first["embedded"] == 24


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff"])
def test_a_damaged_choice_is_made_again(
    run_extract: Extract, tmp_path: Path, on_a_fast_machine: Callable[[bool], None], content: bytes
) -> None:
    on_a_fast_machine(True)
    run_extract()
    (file,) = (tmp_path / "cache" / "precision").iterdir()
    file.write_bytes(content)
    shutil.rmtree(next((tmp_path / "cache").glob("*-*/")))
    on_a_fast_machine(False)
    run_extract()
    assert b"float32" in file.read_bytes()


def test_where_bfloat16_is_refused_float16_is_tried(make_params: MakeParams, monkeypatch: pytest.MonkeyPatch) -> None:
    def judge(*_a: object, precision: str, **_k: object) -> Verdict:
        good = precision == "float16"
        return Verdict(precision, good, 1.0 if good else 0.9983, 0.9999 if good else 0.9934)

    monkeypatch.setattr("pipeline.backbones.backbone.reduced_precisions_of", lambda _d: ("bfloat16", "float16"))
    monkeypatch.setattr("pipeline.backbones.backbone.accept_precision", judge)
    choice = open_backbone(make_params()).choice
    assert choice is not None and choice.precision == "float16"
    assert "bfloat16 not accepted" in choice.why and "float16 accepted" in choice.why


def test_tf32_is_never_what_auto_stands_for(run_extract: Extract, tmp_path: Path) -> None:
    named = run_extract("extract.precision=tf32")
    plain = run_extract()
    assert plain["key"] == run_extract("extract.precision=float32")["key"] != named["key"]


def test_batches_are_sized_by_the_device_and_not_by_what_is_free_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda:0")
    monkeypatch.delattr(torch.cuda, "mem_get_info")
    for memory, crop, precision, expected in (
        (80 << 30, 224, "float32", 512),
        (80 << 30, 224, "bfloat16", 1024),
        (80 << 30, 518, "bfloat16", 256),
        (8 << 30, 224, "float16", 128),
        (1 << 30, 512, "float32", 8),
    ):
        properties = SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device, found=properties: found)
        assert batch_size("auto", cuda, crop, precision) == expected
    assert batch_size(7, cuda, 224) == 7 and batch_size("auto", torch.device("cpu"), 224) == 8


def test_a_batch_size_that_did_not_fit_is_remembered_and_recorded(
    make_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that every later extraction, and a run's record of the shape, have the one that was used."""
    monkeypatch.setattr("pipeline.backbones.backbone.resolve_device", lambda *_a: torch.device("meta"))
    first = open_backbone(make_params("extract.batch_size=16"))
    assert first.forward.batch_size == 16
    first.forward._smaller(16)
    assert first.forward.batch_size == 8
    assert open_backbone(make_params("extract.batch_size=16")).forward.batch_size == 8
    assert open_backbone(make_params("extract.batch_size=32")).forward.batch_size == 32
