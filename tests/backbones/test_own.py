"""The user's own networks: imported where the user names them, keyed by source and tensors, never from a run."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline import extract, load_params, load_run, train_head
from pipeline.backbones import WeightsMemo, build_network, identify_network, prepare_for_inference
from pipeline.cli import main
from pipeline.errors import BackboneError, FinetuneError, RunError
from pipeline.features.spec import FeatureSpec
from pipeline.params import BackboneParams, Params, TransformParams
from pipeline.stages.finetune import START_FILE, TRAINING_FOLDER, finetune

CONTRACTS = Path(__file__).resolve().parent.parent / "contracts"
NAME = "own_network:build"
SOURCE = """
    import torch
    from torch import nn

    def build():
        body = [nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU()]
        return nn.Sequential(*body), {"resize": 20, "crop": 16}

    def vectors():
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, 5))

    def nothing():
        return 3
    """
Write = Callable[[str], None]


@pytest.fixture(autouse=True)
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write the module into the working directory, where it has not been imported yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def again(source: str) -> None:
        sys.modules.pop("own_network", None)
        (tmp_path / "own_network.py").write_text(textwrap.dedent(source))

    again(SOURCE)
    yield again
    sys.modules.pop("own_network", None)


def section(name: str = NAME, weights: str = "DEFAULT", **values: object) -> BackboneParams:
    return BackboneParams.model_validate({"name": name, "weights": weights, **values})


def test_maps_are_pooled_and_vectors_stay() -> None:
    built = build_network(section(), TransformParams())
    batch = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(built.module(batch), built.module.network.model(batch).mean((2, 3)))
    assert (built.feature_dim, built.transform.crop, built.identity.weights) == (4, 16, "DEFAULT")
    assert build_network(section(pooling="max"), TransformParams()).identity.digest == built.identity.digest
    assert build_network(section("own_network:vectors"), TransformParams()).feature_dim == 5
    assert prepare_for_inference(built, device=torch.device("cpu"), precision="float32").folded == 1
    assert build_network(section(seed=1), TransformParams()).identity.digest != built.identity.digest


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("own_network:absent", "no such function"),
        ("own_network:nothing", "it returned int"),
        ("own_netwrk:build", "No module named"),
    ],
)
def test_what_cannot_be_built_says_why(name: str, why: str) -> None:
    with pytest.raises(BackboneError, match="cannot be built") as caught:
        build_network(section(name), TransformParams())
    assert why in str(caught.value.why)


def test_only_the_network_itself_can_be_asked_for() -> None:
    with pytest.raises(BackboneError, match="no layer"):
        build_network(section(layer="0"), TransformParams())
    with pytest.raises(BackboneError, match="no class token"):
        build_network(section(pooling="cls"), TransformParams())


def test_the_source_is_part_of_the_identity_and_nothing_drawn_is_remembered(tmp_path: Path, write: Write) -> None:
    memo = tmp_path / "memo.json"
    first = identify_network(section(), TransformParams(), WeightsMemo(memo))[0]
    assert first.code and not memo.exists() and first.as_dict()["code"] == first.code
    write(SOURCE + "# changed\n")
    second = identify_network(section(), TransformParams(), WeightsMemo(memo))[0]
    assert second.code != first.code and second.digest == first.digest
    write(SOURCE.replace("nn.ReLU()", "nn.GELU()"))
    assert identify_network(section(), TransformParams(), WeightsMemo(memo))[0].code not in (first.code, second.code)


def test_a_spec_holds_the_source_only_where_there_is_one() -> None:
    plain = FeatureSpec("a", "b", None, "default", {}, "pillow", "float32", "float16")
    own = FeatureSpec("m:f", "b", None, "default", {}, "pillow", "float32", "float16", code="c")
    assert "code" not in plain.as_dict() and FeatureSpec.from_dict(plain.as_dict()) == plain
    assert own.as_dict()["code"] == "c" and FeatureSpec.from_dict(own.as_dict()) == own
    assert own.folder_name == f"m_f-{own.key}"


def test_its_tensors_may_come_from_a_file(tmp_path: Path) -> None:
    state = build_network(section(seed=3), TransformParams()).module.network.model.state_dict()
    save_file({f"module.{key}": value for key, value in state.items()}, tmp_path / "weights.safetensors")
    built = build_network(section(weights=str(tmp_path / "weights.safetensors")), TransformParams())
    assert built.identity.digest == build_network(section(seed=3), TransformParams()).identity.digest


@pytest.fixture
def params(tmp_path: Path) -> Params:
    places = {"data.root": CONTRACTS / "images", "cache.dir": tmp_path / "cache", "runs.dir": tmp_path / "runs"}
    settings = {**places, "backbone.name": NAME, "extract.device": "cpu", "extract.workers": 1, "head.folds": 2}
    (tmp_path / "params.yaml").write_text("")
    return load_params(tmp_path / "params.yaml", [f"{key}={value}" for key, value in settings.items()])


def test_nothing_that_a_run_folder_names_is_imported(params: Params, capsys: pytest.CaptureFixture[str]) -> None:
    quiet = {"say": lambda _line: None}
    extract(params, quiet=True, **quiet)
    folder = train_head(params, **quiet)["run"]
    pictures = CONTRACTS / "images" / "val"
    elsewhere = [f"cache.dir={params.cache.dir}-new", "extract.workers=1"]
    del sys.modules["own_network"]
    with pytest.raises(RunError, match="--backbone own_network:build"):
        load_run(folder, elsewhere).predict([pictures])
    assert "own_network" not in sys.modules
    options = ["predict", folder, str(pictures), "--backbone", NAME, "-q", "--json"]
    with pytest.raises(SystemExit) as stop:
        main([*options, *(word for item in elsewhere for word in ("-s", item))])
    assert stop.value.code == 0 and '"label"' in capsys.readouterr().out


def test_a_run_is_not_repeated_with_another_source(params: Params, write: Write) -> None:
    quiet = {"say": lambda _line: None}
    extract(params, quiet=True, **quiet)
    folder = train_head(params, **quiet)["run"]
    write(SOURCE + "# changed\n")
    run = load_run(folder, [f"cache.dir={params.cache.dir}-new", f"backbone.name={NAME}"])
    with pytest.raises(RunError, match="source file"):
        run.predict([CONTRACTS / "images" / "val"])


def test_an_unfinished_training_names_nothing_either(params: Params) -> None:
    folder = params.runs.dir / TRAINING_FOLDER / "stopped"
    folder.mkdir(parents=True)
    (folder / START_FILE).write_text('{"from": null}')
    (folder / "params.yaml").write_text(f"backbone: {{name: '{NAME}'}}")
    plain = params.model_copy(update={"backbone": BackboneParams()})
    with pytest.raises(FinetuneError, match=f"-s backbone.name={NAME}"):
        finetune(plain, resume="latest")
    assert "own_network" not in sys.modules
