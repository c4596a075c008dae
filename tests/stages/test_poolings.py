"""Several poolings: one pass over the images, each under the key and with the bytes that it has alone, one chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import extract, load_params, load_run, train_head
from pipeline.backbones import timm as timm_module
from pipeline.backbones.zoo import FeatureNetwork
from pipeline.errors import UsageError
from pipeline.params import Params
from pipeline.stages.finetune import finetune
from pipeline.stages.open import open_cache, open_caches
from pipeline.stages.rank import rank_backbones

IMAGES = Path(__file__).resolve().parent.parent / "contracts" / "images"
RESNET = ("squeezenet1_1", ("avg", "max"))


def quiet(_line: str) -> None:
    """Say nothing."""


@pytest.fixture
def params(tmp_path: Path) -> Any:
    def load(name: str, poolings: tuple[str, ...] | str, *more: str, cache: str = "cache") -> Params:
        places = (f"data.root={IMAGES}", f"cache.dir={tmp_path / cache}", f"runs.dir={tmp_path / 'runs'}")
        (tmp_path / "params.yaml").write_text("head: {folds: 2}\nextract: {device: cpu, workers: 1, batch_size: 4}")
        listed = poolings if isinstance(poolings, str) else f"[{', '.join(poolings)}]"
        small = ("transform.resize=40", "transform.crop=32") if name == RESNET[0] else ()
        settings = (f"backbone.name={name}", "backbone.weights=random", f"backbone.pooling={listed}")
        return load_params(tmp_path / "params.yaml", [*places, *settings, *small, *more])

    return load


@pytest.mark.parametrize(
    ("name", "poolings"),
    [
        RESNET,
        ("timm/test_vit.r160_in1k", ("cls", "avg", "default")),
        ("timm/test_efficientnet.r160_in1k", ("avg", "max")),
    ],
)
def test_each_has_the_key_and_the_bytes_that_it_has_alone(name: str, poolings: tuple[str, ...], params: Any) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    together = extract(params(name, poolings, "extract.views=1"), quiet, quiet=True)
    assert [row["pooling"] for row in together["poolings"]] == list(poolings)
    assert together["forwarded"] == together["embedded"] + together["views"][0]["forwarded"]
    for pooling in poolings:
        extract(params(name, pooling, "extract.views=1", cache="alone"), quiet, quiet=True)
        one = open_cache(params(name, pooling, "extract.views=1"))
        alone = open_cache(params(name, pooling, "extract.views=1", cache="alone"))
        assert one.key == alone.key
        for left, right in zip([one, *one.views()], [alone, *alone.views()], strict=True):
            digests = right.store.digests
            assert len(digests) and np.array_equal(left.read(digests), right.read(digests))
        again = extract(params(name, pooling), quiet, quiet=True)
        assert again["forwarded"] == 0


def test_what_comes_before_the_pooling_is_computed_once(params: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    calls: list[int] = []
    trunk = timm_module.TimmNetwork.trunk
    monkeypatch.setattr(timm_module.TimmNetwork, "trunk", lambda self, x: calls.append(len(x)) or trunk(self, x))
    one = extract(params("timm/test_vit.r160_in1k", "cls", "extract.precision=float32"), quiet, quiet=True)
    alone = calls.count(4)
    calls.clear()
    both = params("timm/test_vit.r160_in1k", ("avg", "max", "cls_avg"), "extract.precision=float32")
    extract(both, quiet, quiet=True)
    assert calls.count(4) == alone and one["embedded"] > 4


def test_maps_of_a_layer_are_computed_once(params: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    trunk = FeatureNetwork.trunk
    monkeypatch.setattr(FeatureNetwork, "trunk", lambda self, x: calls.append(len(x)) or trunk(self, x))
    layer = ("extract.precision=float32", "backbone.layer=features.7")
    extract(params(RESNET[0], "avg", *layer, cache="alone"), quiet, quiet=True)
    alone = calls.count(4)
    calls.clear()
    extract(params(RESNET[0], ("avg", "max"), *layer), quiet, quiet=True)
    assert calls.count(4) == alone > 1
    two, one = (open_cache(params(RESNET[0], "avg", *layer, cache=name)) for name in ("cache", "alone"))
    assert two.store.read(one.store.digests).tobytes() == one.store.read(one.store.digests).tobytes()


def test_only_what_is_missing_is_added(params: Any) -> None:
    name, poolings = RESNET
    first = extract(params(name, "avg"), quiet, quiet=True)
    rows = len(open_cache(params(name, "avg")).store.digests)
    added = extract(params(name, poolings), quiet, quiet=True)
    assert added["key"] == first["key"] and added["forwarded"] == first["forwarded"]
    caches = open_caches(params(name, poolings))
    assert [len(cache.store.digests) for cache in caches] == [rows, rows]
    assert extract(params(name, poolings), quiet, quiet=True)["forwarded"] == 0


def test_train_head_chooses_one_and_the_run_names_it(params: Any) -> None:
    both = params(*RESNET)
    extract(both, quiet, quiet=True)
    lines: list[str] = []
    folder = Path(train_head(both, lines.append)["run"])
    metrics = json.loads((folder / "metrics.json").read_text())
    chosen = [row for row in metrics["leaderboard"] if row["chosen"]]
    assert len(chosen) == 1 and chosen[0]["kind"].startswith("logistic on ")
    assert "the pooling was chosen by" in metrics["protocol"]
    run = load_run(folder)
    pooling = chosen[0]["kind"].removeprefix("logistic on ")
    assert run.params.backbone.pooling == run.model.backbone.pooling == pooling
    scores = {row["kind"]: row["cv_accuracy"] for row in metrics["leaderboard"] if not row["baseline"]}
    assert scores[chosen[0]["kind"]] == max(scores.values()) and len(scores) == 2
    assert run.predict([IMAGES / "val"])[0].label


def test_ranking_compares_poolings(params: Any) -> None:
    summary = rank_backbones(params(*RESNET), ["squeezenet1_1=random"], quiet, size=12, quiet=True)
    assert {row["label"] for row in summary["backbones"]} == {
        "squeezenet1_1=random (avg)",
        "squeezenet1_1=random (max)",
    }


def test_where_one_is_needed_several_are_refused(params: Any) -> None:
    for call in (open_cache, lambda both: finetune(both, quiet)):
        with pytest.raises(UsageError, match="names avg, max"):
            call(params(*RESNET))
