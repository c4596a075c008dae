"""The recipes: valid, nothing in them that is the default anyway, and what their tutorials say."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from pipeline.params import Params, load_params

from .conftest import PROJECT
from .features.examples import fill, make_digests, make_store

RECIPES = sorted((PROJECT / "recipes").glob("*.yaml"))
# Names said although they are the default: a recipe for ResNet-18 says so; rates that a comment explains.
SAID_ALL_THE_SAME = {"backbone.name", "finetune.head_lr", "finetune.backbone_lr", "finetune.one_cycle_peak"}


def flat(tree: dict[str, Any], parents: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{parents}{name}.")
        else:
            yield f"{parents}{name}", value


def load(name: str) -> Params:
    return load_params(PROJECT / "recipes" / f"{name}.yaml")


def test_the_usual_tutorials_are_there() -> None:
    names = {path.stem for path in RECIPES}
    assert names >= {
        *("mlp_head", "resnet50_new_layer", "resnet18_dropout_head", "efficientnet_b0_flowers"),
        *("ants_and_bees_frozen", "ants_and_bees_finetuned"),
    }


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
class TestEveryRecipe:
    def test_is_valid_and_shares_cache_and_runs_with_the_project(self, path: Path) -> None:
        params = load_params(path)
        assert params.cache.dir == PROJECT / "cache"
        assert params.runs.dir == PROJECT / "runs"
        assert params.data.root.parent == PROJECT / "data"

    def test_holds_only_what_differs(self, path: Path) -> None:
        defaults = dict(flat(Params().model_dump(mode="json")))
        said = dict(flat(yaml.safe_load(path.read_text())))
        assert {key for key in said if said[key] == defaults[key]} <= SAID_ALL_THE_SAME

    def test_says_what_it_is_how_to_run_it_and_where_it_comes_from(self, path: Path) -> None:
        text = path.read_text()
        assert f"PARAMS=recipes/{path.name}" in text
        assert "# Where it comes from:" in text


def test_the_mlp() -> None:
    head = load("mlp_head").head
    assert head.kinds == ("mlp",)
    assert (head.mlp.hidden, head.mlp.dropout) == ([256], 0.4)
    assert (head.mlp.optimizer, head.mlp.lr, head.mlp.momentum) == ("sgd", 0.01, 0.9)


def test_the_new_layer_on_resnet50() -> None:
    params = load("resnet50_new_layer")
    tune = params.finetune
    assert (params.backbone.name, tune.unfreeze, tune.start, tune.optimizer, tune.head_lr) == (
        *("resnet50", "none", "random", "adam"),
        1e-3,
    )


def test_the_dropout_head_on_resnet18() -> None:
    params = load("resnet18_dropout_head")
    assert (params.backbone.name, params.finetune.dropout, params.finetune.start) == ("resnet18", 0.5, "random")


def test_the_five_flowers() -> None:
    params = load("efficientnet_b0_flowers")
    tune = params.finetune
    assert params.backbone.name == "efficientnet_b0"
    assert (tune.optimizer, tune.schedule, tune.epochs) == ("adamw", "one_cycle", 15)
    assert (tune.backbone_lr, tune.head_lr) == (1e-5, 1e-3)
    peaks = (tune.backbone_lr * tune.one_cycle_peak, tune.head_lr * tune.one_cycle_peak)
    assert peaks == pytest.approx((1e-4, 1e-2))
    assert (tune.label_smoothing, tune.dropout) == (0.1, 0.4)
    assert min(tune.augment.brightness, tune.augment.contrast, tune.augment.saturation, tune.augment.hue) > 0


@pytest.mark.parametrize(("name", "unfreeze"), [("ants_and_bees_frozen", "none"), ("ants_and_bees_finetuned", "all")])
def test_the_ants_and_bees(name: str, unfreeze: str) -> None:
    tune = load(name).finetune
    assert (tune.unfreeze, tune.start, tune.epochs, tune.batch_size) == (unfreeze, "random", 25, 4)
    assert (tune.optimizer, tune.head_lr, tune.momentum) == ("sgd", 0.001, 0.9)
    assert (tune.schedule, tune.step_epochs, tune.step_gamma) == ("step", 7, 0.1)
    if unfreeze == "all":
        assert tune.backbone_lr == tune.head_lr


def module_of(name: str) -> ModuleType:
    """A recipe that is a script."""
    spec = importlib.util.spec_from_file_location(name, PROJECT / "recipes" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_cache_goes_to_a_bucket_and_comes_back(tmp_path: Path) -> None:
    pytest.importorskip("fsspec")
    bucket, url = module_of("bucket"), f"file://{tmp_path / 'bucket'}"
    for number, (home, more) in enumerate([("a", 3), ("b", 5)]):
        store = make_store(tmp_path / home)
        fill(store, make_digests(more, seed=number))
        (tmp_path / home / "journal").mkdir()
        (tmp_path / home / "journal" / "1.slots").touch()
    key = store.folder.name
    assert bucket.push(tmp_path / "a", url) == 2 and bucket.push(tmp_path / "b", url) == 1
    assert not list((tmp_path / "bucket").rglob("*.slots"))
    assert bucket.push(tmp_path / "a", url) == 0
    for name in ("../../stranger-0123456789abcdef/spec.json", f"{key}/part-x.h5"):
        (tmp_path / "bucket" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "bucket" / name).touch()
    assert bucket.pull(tmp_path / "b", url) == 1 and bucket.pull(tmp_path / "new", url) == 3
    for home in ("b", "new"):
        assert len(make_store(tmp_path / home).digests) == 8


def test_spark_gets_a_function_of_frames(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    recipe = module_of("spark_extract")

    def embedder(frame: Any) -> Any:
        return frame.assign(digest="0" * 32, features=[[0.5]] * len(frame), reason="", key="k", checksum="c")

    frames = iter([pandas.DataFrame({"path": ["a", "b"]}), pandas.DataFrame({"path": ["c"]})])
    first, second = recipe.frames_embedded(embedder)(frames)
    assert first["path"].tolist() == ["a", "b"] and len(second) == 1
    assert [field.split()[0] for field in recipe.SCHEMA.split(", ")] == list(first.columns)
