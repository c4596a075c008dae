"""The cache verbs on a real, tiny cache: what is whole verifies, what is wrong is named, what is used stays."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from pipeline.errors import CacheError, MissingFeaturesError, VerifyError
from pipeline.features.cache import FeatureCache
from pipeline.features.inventory import DAY
from pipeline.features.parts import build_part, part_name
from pipeline.features.store import read_spec
from pipeline.params import Params, load_params
from pipeline.stages.cache import _causes, collect_garbage, explain_cache, export_features, list_cache, verify_cache
from pipeline.stages.extract import extract
from pipeline.stages.open import load_features

from .conftest import FAST, write_image, write_images

Extract = Callable[..., dict[str, Any]]
MakeParams = Callable[..., Params]
# By name, so that the machine's own choice of a precision has no say.
FLOAT32 = "extract.precision=float32"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of the images of `root`, made once: equal images need no second forward pass, as promised."""
    folder = tmp_path_factory.mktemp("template")
    (folder / "params.yaml").write_text("")
    write_images(folder / "images")
    places = (f"data.root={folder / 'images'}", f"cache.dir={folder / 'cache'}", FLOAT32)
    extract(load_params(folder / "params.yaml", (*FAST, *places)), lambda _line: None, quiet=True)
    shutil.rmtree(folder / "cache" / "index", ignore_errors=True)  # of files so new it may not be there
    return folder / "cache"


@pytest.fixture
def make_params(make_params: MakeParams) -> MakeParams:
    """As for all stages, in float32."""
    return partial(make_params, FLOAT32)


@pytest.fixture
def run_extract(make_params: MakeParams, template: Path, tmp_path: Path) -> Extract:
    """Extract with overrides, quietly; gives the summary. Without overrides the features come from the template."""

    def run(*overrides: str) -> dict[str, Any]:
        if not overrides and not any(make_params().cache.dir.glob("mobilenet*")):
            shutil.copytree(template, make_params().cache.dir, dirs_exist_ok=True)
        return extract(make_params(*overrides), lambda _line: None, quiet=True)

    return run


class Lines(list[str]):
    """Takes what is said."""

    def __call__(self, line: str) -> None:
        self.append(line)

    @property
    def text(self) -> str:
        return "\n".join(self)


def yes(_question: str) -> bool:
    return True


def no(_question: str) -> bool:
    return False


def key_folder(summary: dict[str, Any]) -> Path:
    return Path(summary["cache"])


def replace_features(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Exchange the only part of a key for one of other features that is as whole as the first."""
    spec = read_spec(folder / "spec.json")
    assert spec
    (part,) = folder.glob("part-*")
    with h5py.File(part) as file:
        features, digests = file["features"][:], file["digest"][:]
    part.unlink()
    data = build_part(change(features), digests, spec)
    (folder / part_name(data)).write_bytes(data)


def test_ls_shows_every_key_with_what_made_it(run_extract: Extract, make_params: MakeParams, tmp_path: Path) -> None:
    first, second = run_extract(), run_extract("transform.resize=34", "cache.dtype=float32")
    (tmp_path / "cache" / "index").mkdir(exist_ok=True)
    (tmp_path / "cache" / "index" / ".tmp-1-aa-x.idx").write_bytes(b"half")
    listed = list_cache(make_params())
    keys = {key["key"]: key for key in listed["keys"]}
    assert set(keys) == {first["key"], second["key"]}
    assert keys[first["key"]]["dtype"] == "float16" and keys[second["key"]]["dtype"] == "float32"
    assert keys[second["key"]]["transform"]["resize"] == 34
    assert {(key["backbone"], key["rows"], key["view"]) for key in keys.values()} == {
        ("mobilenet_v3_small", 24, "plain")
    }
    assert [file["bytes"] for file in listed["temporary"]] == [4]
    assert listed["bytes"] == 4 + sum(key["bytes"] for key in keys.values())
    json.dumps(listed)


def test_verify_finds_nothing_wrong_with_a_good_cache(run_extract: Extract, make_params: MakeParams) -> None:
    summary = run_extract()
    run_extract("transform.resize=34")
    report, lines = verify_cache(make_params(), say := Lines(), sample=5), say.text
    assert report["problems"] == []
    by_name = {Path(key["folder"]).name: key for key in report["keys"]}
    mine = by_name.pop(key_folder(summary).name)
    (other,) = by_name.values()
    assert mine["recomputed"]["images"] == 5 and mine["recomputed"]["max_difference"] == 0
    assert other["recomputed"] is None and "only their bytes" in other["note"]
    assert "only their bytes" in lines and "5 features computed again" in lines


def test_verify_recomputes_augmented_views_too(run_extract: Extract, make_params: MakeParams) -> None:
    run_extract("extract.views=1")
    report = verify_cache(make_params("extract.views=1"), Lines(), sample=3)
    assert [key["recomputed"]["images"] for key in report["keys"]] == [3, 3]


def test_verify_names_a_damaged_part_and_extract_mends_it(run_extract: Extract, make_params: MakeParams) -> None:
    summary = run_extract()
    (part,) = key_folder(summary).glob("part-*")
    whole = part.read_bytes()
    part.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(VerifyError, match="1 problem") as caught:
        verify_cache(make_params(), Lines())
    assert part.name in str(caught.value) and caught.value.exit_code == 1
    report = caught.value.as_dict()["report"]
    assert isinstance(report, dict) and report["keys"][0]["parts"] == 0
    assert not part.exists() and part.with_name(f"damaged-{part.name}").exists()

    assert run_extract()["forwarded"] == 24
    assert part.read_bytes() == whole
    assert verify_cache(make_params(), Lines())["problems"] == []


def test_verify_names_a_damaged_spec_and_the_next_extract_mends_it(
    run_extract: Extract, make_params: MakeParams
) -> None:
    spec = key_folder(run_extract()) / "spec.json"
    spec.write_text(spec.read_text().replace('"resize": 32', '"resize": 33'))
    with pytest.raises(VerifyError, match="1 problem") as caught:
        verify_cache(make_params(), Lines())
    assert str(spec) in str(caught.value)
    assert run_extract()["forwarded"] == 0
    assert verify_cache(make_params(), Lines())["problems"] == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda features: np.roll(features, 1, axis=0), 24),
        (lambda features: features * np.float16(1.1), 24),
        (lambda features: np.where(np.arange(len(features))[:, None] == 3, features[4], features), 1),
    ],
    ids=["shifted by one", "scaled", "one row wrong"],
)
def test_verify_finds_features_that_are_not_those_of_their_images(
    run_extract: Extract, make_params: MakeParams, change: Callable[[np.ndarray], np.ndarray], named: int
) -> None:
    replace_features(key_folder(run_extract()), change)
    with pytest.raises(VerifyError, match="comes out differently") as caught:
        verify_cache(make_params(), Lines(), sample=24)
    problems = caught.value.report["problems"]
    assert isinstance(problems, list) and len(problems) == named


def test_the_sample_is_chosen_by_its_seed(
    run_extract: Extract, make_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_extract()

    def chosen(seed: int) -> list[str]:
        # Nothing agrees, so that the error names every image looked at.
        monkeypatch.setattr("pipeline.features.verify.Agreement.within", lambda self, _t: self.cosines > 2)
        with pytest.raises(VerifyError) as caught:
            verify_cache(make_params(), Lines(), sample=3, seed=seed)
        problems = caught.value.report["problems"]
        assert isinstance(problems, list)
        return problems

    assert chosen(1) == chosen(1) != chosen(2)
    assert len(chosen(1)) == 3


def test_verify_works_on_bytes_where_the_images_are_gone(
    run_extract: Extract, make_params: MakeParams, root: Path
) -> None:
    run_extract()
    shutil.rmtree(root)
    report = verify_cache(make_params(), say := Lines())
    assert report["problems"] == [] and report["keys"][0]["recomputed"] is None
    assert str(root) in say.text


def test_verify_of_images_that_were_replaced_compares_nothing(
    run_extract: Extract, make_params: MakeParams, root: Path
) -> None:
    run_extract()
    for number, image in enumerate(sorted(root.rglob("*.jpg"))):
        write_image(image, 500 + number)
    report = verify_cache(make_params(), Lines())
    assert report["keys"][0]["recomputed"]["images"] == 0 and report["problems"] == []


def test_verify_of_no_cache_verifies_nothing(make_params: MakeParams, tmp_path: Path) -> None:
    assert verify_cache(make_params(), Lines())["keys"] == []
    assert not (tmp_path / "cache").exists()


def test_why_says_that_all_is_there(run_extract: Extract, make_params: MakeParams) -> None:
    run_extract()
    found = explain_cache(make_params(), say := Lines())
    assert (found["images"], found["with_feature"], found["new"]) == (24, 24, 0)
    assert "24 of 24" in say.text and len(say) == 1


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("transform.resize=34", "transform.resize 32 -> 34"),
        ("extract.precision=bfloat16", "precision float32 -> bfloat16"),
        ("cache.dtype=float32", "dtype float16 -> float32"),
        ("backbone.pooling=max", "pooling default -> max"),
        ("transform.background=[0, 0, 0]", "transform.background [255,255,255] -> [0,0,0]"),
    ],
)
def test_why_names_the_field_that_made_another_key(
    run_extract: Extract, make_params: MakeParams, override: str, said: str
) -> None:
    summary = run_extract()
    found = explain_cache(make_params(override), say := Lines())
    assert found["with_feature"] == 0 and said in say.text
    (near,) = found["nearest"]
    assert (near["folder"], near["holds"]) == (key_folder(summary).name, 24) and len(near["differences"]) == 1


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        (["backbone", "precision", "transform.resize", "weights_digest"], ["backbone"]),
        (["layer", "pooling", "weights_digest"], ["layer", "pooling"]),
        (["precision", "weights_digest"], ["weights_digest"]),
        (["dtype", "transform.crop"], ["dtype", "transform.crop"]),
    ],
)
def test_why_leaves_out_what_follows_another_field(fields: list[str], told: list[str]) -> None:
    assert [each["field"] for each in _causes([{"field": name} for name in fields])] == told


def test_why_names_the_nearest_key_first(run_extract: Extract, make_params: MakeParams) -> None:
    run_extract("transform.resize=36", "cache.dtype=float32")
    near = run_extract("transform.resize=36")
    found = explain_cache(make_params(), Lines())
    assert [len(each["differences"]) for each in found["nearest"]] == [1, 2]
    assert found["nearest"][0]["folder"] == key_folder(near).name


def test_why_names_the_images_that_are_new(run_extract: Extract, make_params: MakeParams, root: Path) -> None:
    run_extract()
    write_image(root / "train" / "cat" / "new.jpg", 100)
    shutil.copy(root / "train" / "cat" / "02.jpg", root / "train" / "dog" / "copy.jpg")
    (root / "train" / "cat" / "bad.jpg").write_bytes(b"no image")
    extract_bad = explain_cache(make_params(), say := Lines())
    assert (extract_bad["with_feature"], extract_bad["new"]) == (25, 2)
    assert extract_bad["new_paths"] == ["train/cat/bad.jpg", "train/cat/new.jpg"] and "'train/cat/new.jpg'" in say.text
    run_extract()
    found = explain_cache(make_params(), Lines())
    assert (found["with_feature"], found["quarantined"], found["new"]) == (26, 1, 0)


def test_why_in_an_empty_cache_says_so(make_params: MakeParams) -> None:
    found = explain_cache(make_params(), say := Lines())
    assert found["new"] == 24 and found["nearest"] == [] and "No other key" in say.text


def set_unused(folder: Path, days: float) -> None:
    moment = time.time() - days * DAY
    os.utime(folder / "used", (moment, moment))


def name_in_run(params: Params, key: str) -> None:
    run = params.runs.dir / "first"
    run.mkdir(parents=True)
    (run / "model.json").write_text(json.dumps({"feature_key": key}))


def test_gc_proposes_asks_and_removes(run_extract: Extract, make_params: MakeParams) -> None:
    old, new = run_extract("transform.resize=34"), run_extract()
    set_unused(key_folder(old), 31)
    refused = collect_garbage(make_params(), say := Lines(), no, days=30)
    assert [item["path"] for item in refused["proposed"]] == [str(key_folder(old))] and refused["removed"] == []
    assert key_folder(old).exists() and "31 days" in say.text
    size = refused["proposed_bytes"]
    done = collect_garbage(make_params(), Lines(), yes, days=30)
    assert done["removed"] == [str(key_folder(old))] and done["freed_bytes"] == size > 0
    assert not key_folder(old).exists()
    assert run_extract()["forwarded"] == 0 and run_extract()["key"] == new["key"]


def test_gc_keeps_what_a_run_names(run_extract: Extract, make_params: MakeParams) -> None:
    old = run_extract()
    set_unused(key_folder(old), 100)
    name_in_run(make_params(), old["key"])
    assert collect_garbage(make_params(), Lines(), yes, days=30)["proposed"] == []


def test_gc_keeps_what_was_loaded_lately(run_extract: Extract, make_params: MakeParams) -> None:
    old = run_extract()
    set_unused(key_folder(old), 100)
    load_features(make_params())
    assert collect_garbage(make_params(), Lines(), yes, days=30)["proposed"] == []


def test_gc_asks_nothing_when_there_is_nothing(run_extract: Extract, make_params: MakeParams) -> None:
    run_extract()

    def refuse(question: str) -> bool:
        raise AssertionError(question)

    assert collect_garbage(make_params(), Lines(), refuse, days=30)["proposed"] == []


def test_gc_waits_for_no_writer(run_extract: Extract, make_params: MakeParams, root: Path) -> None:
    """While an extraction is at work, gc says so and removes nothing."""
    old = run_extract("transform.resize=34")
    set_unused(key_folder(old), 31)
    errors: list[str] = []

    def collect(_line: str) -> None:
        with pytest.raises(CacheError, match="someone is writing") as caught:
            collect_garbage(make_params(), Lines(), yes, days=30)
        errors.append(str(caught.value))

    with pytest.MonkeyPatch.context() as patch:
        real = FeatureCache._embed

        def embed(self: FeatureCache, *arguments: Any) -> Any:
            collect("")
            return real(self, *arguments)

        patch.setattr(FeatureCache, "_embed", embed)
        extract(make_params(), lambda _line: None, quiet=True)
    assert len(errors) == 1 and key_folder(old).exists()


def test_export_holds_what_load_features_gives(run_extract: Extract, make_params: MakeParams, tmp_path: Path) -> None:
    run_extract()
    done = export_features(make_params(), tmp_path / "features.h5", Lines())
    table = load_features(make_params())
    assert (done["images"], done["feature_dim"], done["classes"]) == (24, 1024, 2)
    with h5py.File(done["file"]) as file:
        assert file["features"][:].tobytes() == table.features.tobytes()
        assert file["paths"].asstr()[:].tolist() == table.paths
        assert [file["class_names"].asstr()[label] for label in file["labels"]] == [
            path.split("/")[1] for path in table.paths
        ]
        assert file["split"].asstr()[:].tolist() == [path.split("/")[0] for path in table.paths]


def test_export_of_missing_features_names_the_images(
    run_extract: Extract, make_params: MakeParams, root: Path, tmp_path: Path
) -> None:
    run_extract()
    write_image(root / "train" / "cat" / "new.jpg", 100)
    with pytest.raises(MissingFeaturesError, match=r"new\.jpg"):
        export_features(make_params(), tmp_path / "features.h5", Lines())
    assert not (tmp_path / "features.h5").exists()
