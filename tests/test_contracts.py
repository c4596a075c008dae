"""What users hold today: the keys of their caches, their run folders, the JSON, verbs and options that scripts rely on.

Every test goes by what a user touches (the command line, the names in `pipeline`, files on disk), so that all that
lies between may be rebuilt. More keys, verbs, options and files may come; none may go, and no value may change its
kind. `contracts/README.md` says how the data was made. It is not made anew when a test fails: then a promise was
broken, and the caches and runs of users with it.

Some keys cannot be the same everywhere, and the data says which field ``varies`` and why: without AVX2 torch draws
other random weights, and ``precision: auto`` depends on the CPU. Such a field is taken as it is found, and the key must
be the one that follows from it. All other fields and keys are exact, under torch 2.11 as under 2.14. (Random weights of
vision transformers are not among the cases: torch has changed how it draws from a truncated normal distribution.)
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

import pipeline
from pipeline import extract, load_features, load_params, load_run, train_head
from pipeline.cli import main

CONTRACTS = Path(__file__).resolve().parent / "contracts"
IMAGES, RUNS, CACHE = CONTRACTS / "images", CONTRACTS / "runs", CONTRACTS / "cache"
# Kinds of CPU round differently; measured: at most 4e-5 apart, with AVX-512, AVX2 and neither.
TOLERANCE = 1e-3

Json = Any
Begin = Callable[..., dict[str, Json]]


def read_json(file: Path) -> Json:
    return json.loads(file.read_text(encoding="utf-8"))


KEYS = read_json(CONTRACTS / "keys.json")
SUMMARIES = read_json(CONTRACTS / "summaries.json")
ERRORS = read_json(CONTRACTS / "errors.json")
VERBS = read_json(CONTRACTS / "verbs.json")


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Json:
        """The one object on standard output."""
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)


def run(*arguments: object) -> Done:
    """The console script with these arguments, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stop:
        main(list(map(str, arguments)))
    return Done(int(stop.value.code or 0), out.getvalue(), err.getvalue())


def succeed(*arguments: object) -> Json:
    """The JSON of a command that ends well."""
    done = run(*arguments, "--json")
    assert done.code == 0, done.err
    return done.json


def settings(values: Mapping[str, object]) -> list[str]:
    """``-s key=value`` for each."""
    return with_s(f"{key}={value}" for key, value in values.items())


def with_s(words: Iterable[str]) -> list[str]:
    """``-s WORD`` for each."""
    return [part for word in words for part in ("-s", word)]


# -- keys ------------------------------------------------------------------------------------------------------------


def made_up(name: str, like: torch.Tensor) -> torch.Tensor:
    """A tensor that its name and shape alone determine, whatever the versions and the CPU."""
    if not like.is_floating_point():
        return torch.zeros_like(like)
    counted = np.arange(like.numel(), dtype=np.uint32) * np.uint32(2_654_435_761) + np.uint32(zlib.crc32(name.encode()))
    values = counted / 2**32 - 0.5
    values *= 2 / np.sqrt(max(like[0].numel(), 1)) if like.dim() > 1 else 0.5
    if name.endswith("running_var"):
        values += 1
    return torch.from_numpy(values.astype(np.float32)).reshape(like.shape)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights of made-up numbers as safetensors, one also as a training program's nested .pth.

    Of the vision transformer there is only the first of its layers, for images of 64 pixels.
    """
    folder = tmp_path_factory.mktemp("weights")
    models: dict[str, torch.nn.Module] = {
        "mobilenet_v2": torchvision.models.mobilenet_v2(),
        "squeezenet1_1": torchvision.models.squeezenet1_1(),
        "vit_b_32": torchvision.models.VisionTransformer(64, 32, 1, 12, 768, 3072),
    }
    for name, model in models.items():
        tensors = {key: made_up(key, tensor) for key, tensor in model.state_dict().items()}
        save_file(tensors, folder / f"{name}.safetensors")
        if name == "mobilenet_v2":
            nested = {"epoch": 3, "state_dict": {f"module.{key}": tensor for key, tensor in tensors.items()}}
            torch.save(nested, folder / f"{name}.pth")
    return folder


@pytest.fixture(scope="module")
def begin(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Begin:
    """Extract one image with the settings of a case; gives the ``spec.json`` of each key that this begins."""
    folder = tmp_path_factory.mktemp("keys")
    (folder / "params.yaml").touch()
    shutil.copytree(IMAGES / "train" / "ants", folder / "images" / "train" / "ants", ignore=all_but("00.png"))
    places = settings({"data.root": folder / "images", "cache.dir": folder / "cache", "extract.device": "cpu"})
    places += settings({"extract.batch_size": 1, "extract.workers": 1})

    def begin(case: Json, **tokens: Path) -> dict[str, Json]:
        tokens = {"weights": weights, "runs": RUNS, **tokens}
        words = [re.sub(r"<(\w+)>", lambda match: str(tokens[match[1]]), word) for word in case["set"]]
        summary = succeed("extract", "-p", folder / "params.yaml", *places, *with_s(words))
        backbone = Path(summary["cache"]).name.removesuffix(f"-{summary['key']}")
        keys = [summary["key"], *(view["key"] for view in summary["views"])]
        return {key: read_json(folder / "cache" / f"{backbone}-{key}" / "spec.json") for key in keys}

    return begin


def all_but(name: str) -> Callable[[str, list[str]], list[str]]:
    """For `shutil.copytree`: copy only the file of this name."""
    return lambda _folder, names: [each for each in names if each != name]


def key_of(spec: Json) -> str:
    """The key that a spec gives."""
    text = json.dumps(spec, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()[:16]


def varying(case: Json) -> set[str]:
    """The fields of a case that this machine may give another value than the one that made the data."""
    avx = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return {field for field, why in case.get("varies", {}).items() if not (avx and why == "without AVX2")}


@pytest.mark.parametrize("name", KEYS)
def test_a_spec_and_its_key_stay(name: str, begin: Begin, request: pytest.FixtureRequest) -> None:
    case = KEYS[name]
    uses_shared = any("<shared>" in word for word in case["set"])
    found = begin(case, **({"shared": request.getfixturevalue("shared")} if uses_shared else {}))
    assert {key_of(spec): spec for spec in found.values()} == found, "a key is the digest of its spec"
    wanted = case["keys"]
    if masked := varying(case):
        taken = {field: next(iter(found.values()))[field] for field in masked}
        wanted = {key_of({**spec, **taken}): {**spec, **taken} for spec in wanted.values()}
    assert found == wanted


def test_the_keys_on_record_follow_from_their_specs() -> None:
    records = [(key, spec) for case in KEYS.values() for key, spec in case["keys"].items()]
    assert all(key == key_of(spec) for key, spec in records)


# -- caches and runs that users have ---------------------------------------------------------------------------------


def test_a_cache_of_today_serves_its_features_and_nothing_is_computed_again(tmp_path: Path) -> None:
    shutil.copytree(CACHE, tmp_path / "cache")
    (tmp_path / "params.yaml").touch()
    overrides = [f"data.root={IMAGES / 'val'}", "extract.device=cpu", "extract.precision=float32"]
    options = ["-p", tmp_path / "params.yaml", *with_s(overrides)]
    (folder,) = CACHE.iterdir()
    summary = succeed("extract", *options)
    assert f"starter-{summary['key']}" == folder.name
    assert [summary[name] for name in ("reused", "embedded", "forwarded")] == [9, 0, 0]
    stored = rows_of(folder)
    table = load_features(load_params(tmp_path / "params.yaml", overrides))
    assert len(stored) == len(table.paths) == 9
    for digest, row in zip(table.digests, table.features, strict=True):
        np.testing.assert_array_equal(row, stored[bytes(digest)])
    (proof,) = succeed("cache", "verify", "--sample", "9", *options)["keys"]
    assert proof["recomputed"]["images"] == 9 and proof["problems"] == []
    for file in [*folder.glob("part-*.h5"), folder / "spec.json"]:
        assert (tmp_path / "cache" / folder.name / file.name).read_bytes() == file.read_bytes()


def rows_of(folder: Path) -> dict[bytes, np.ndarray]:
    """The rows of a key's parts by digest, as plain h5py reads them."""
    rows: dict[bytes, np.ndarray] = {}
    for part in folder.glob("part-*.h5"):
        with h5py.File(part) as file:
            rows |= {bytes(digest): row for digest, row in zip(file["digest"], file["features"], strict=True)}
    return rows


RUN_NAMES = sorted(folder.name for folder in RUNS.iterdir())


@pytest.mark.parametrize("name", RUN_NAMES)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.InconsistentVersionWarning")
def test_a_run_of_today_predicts_and_scores_what_it_reported(name: str, tmp_path: Path) -> None:
    loaded = load_run(RUNS / name, [f"cache.dir={tmp_path / 'cache'}"])
    found = {Path(prediction.path).name: prediction for prediction in loaded.predict([IMAGES])}
    with open(RUNS / name / "predictions.csv", newline="", encoding="utf-8") as file:
        reported = list(csv.DictReader(file))
    assert len(found) == len(reported) == 33
    for row in reported:
        prediction = found[Path(row["path"]).name]
        assert prediction.error is None and prediction.label == row["predicted"]
        assert {label for label, _ in prediction.top} == {"ants", "bees", "cats"}
        for label, probability in prediction.top:
            assert probability == pytest.approx(float(row[f"p_{label}"]), abs=TOLERANCE)
    check_scores(RUNS / name, tmp_path)
    model = read_json(RUNS / name / "model.json")
    assert (tmp_path / "cache" / f"{model['backbone']['name']}-{model['feature_key']}" / "spec.json").exists()


def check_scores(folder: Path, project: Path) -> None:
    """`evaluate` on the images of the run gives the scores in its metrics.json."""
    (project / "params.yaml").touch()
    places = ["-p", project / "params.yaml", "-s", f"cache.dir={project / 'cache'}"]
    summary = succeed("evaluate", folder, "--data", IMAGES, *places)
    wanted = read_json(folder / "metrics.json")
    assert (summary["split"], summary["n"]) == (wanted["split"], wanted["n"]) == ("val", 9)
    for score in ("accuracy", "macro_f1", "log_loss"):
        assert summary["metrics"][score] == pytest.approx(wanted["metrics"][score], abs=10 * TOLERANCE)


def test_runs_of_today_are_compared_with_one_another(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").touch()
    compared = succeed("compare", "-p", tmp_path / "params.yaml", "-s", f"runs.dir={RUNS}")
    heads = {row["run"]: row["head"] for row in compared["runs"]}
    assert heads == {"logistic": "logistic", "mlp": "mlp", "svm": "svm", "tuned": "logistic"}
    assert compared["notes"] == []


def test_what_a_run_of_today_names_is_no_garbage(tmp_path: Path) -> None:
    shutil.copytree(CACHE, tmp_path / "cache")
    make_old(tmp_path / "cache")
    (tmp_path / "params.yaml").touch()
    options = ["-p", tmp_path / "params.yaml", "-s", f"cache.dir={tmp_path / 'cache'}"]
    assert succeed("cache", "gc", *options, "-s", f"runs.dir={RUNS}")["proposed"] == []
    proposed = succeed("cache", "gc", *options, "-s", f"runs.dir={tmp_path / 'none'}")["proposed"]
    assert [Path(item["path"]).name for item in proposed] == [folder.name for folder in CACHE.iterdir()]


def test_a_tuned_run_of_today_can_be_tuned_further(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").touch()
    own = {"backbone.weights": RUNS / "tuned" / "backbone.safetensors", "backbone.layer": "stage2.1"}
    quick = {"finetune.epochs": 1, "finetune.device": "cpu", "finetune.precision": "float32"}
    places = {"data.root": IMAGES, "extract.device": "cpu", "extract.precision": "float32"}
    options = ["-p", tmp_path / "params.yaml", *settings({**places, **own, **quick})]
    assert succeed("extract", *options)["key"] == read_json(RUNS / "tuned" / "model.json")["feature_key"]
    summary = succeed("finetune", "--from", RUNS / "tuned", *options)
    assert summary["selected"]["probe_run"] == "tuned"


# -- what verbs print for scripts ------------------------------------------------------------------------------------


def shape_of(value: Json) -> Json:
    """The keys of a JSON value with the names of their types: objects as such, lists of objects by each shape once."""
    if isinstance(value, dict):
        return {key: shape_of(item) for key, item in value.items()}
    if not isinstance(value, list):
        return "null" if value is None else type(value).__name__
    shapes: list[Json] = []
    for shape in map(shape_of, value):
        if shape not in shapes:
            shapes.append(shape)
    if any(isinstance(shape, dict) for shape in shapes):
        return shapes
    return f"list[{' | '.join(sorted(map(str, shapes)))}]" if shapes else "list"


def missing(wanted: Json, found: Json, where: str = "") -> list[str]:
    """Where ``found`` lacks a key that is ``wanted``, or has a value of another type."""
    if isinstance(wanted, dict):
        if not isinstance(found, dict):
            return [f"{where} is {found}, not an object"]
        lacking = [f"{where}.{key} is gone" for key in wanted if key not in found]
        both = [key for key in wanted if key in found]
        return [*lacking, *(line for key in both for line in missing(wanted[key], found[key], f"{where}.{key}"))]
    if isinstance(wanted, list):
        if not isinstance(found, list):
            return [f"{where} is {found}, not a list of objects"]
        unmet = [each for each in wanted if all(missing(each, other) for other in found)]
        strange = [other for other in found if all(missing(each, other) for each in wanted)]
        return [*(f"{where} has no item like {each}" for each in unmet), *(f"{where} has {each}" for each in strange)]
    return [] if found in wanted.split(" or ") else [f"{where} is {found}, not {wanted}"]


def test_the_comparison_of_shapes_sees_what_is_lost_and_what_changed() -> None:
    wanted = shape_of({"a": 1, "b": [{"c": "x"}, {"d": None}], "e": [1.0]})
    assert wanted == {"a": "int", "b": [{"c": "str"}, {"d": "null"}], "e": "list[float]"}
    assert missing(wanted, shape_of({"a": 2, "b": [{"c": "y", "z": 1}, {"d": None}], "e": [2.0], "f": 3})) == []
    assert missing(wanted, shape_of({"a": 2.0, "b": [{"c": "y"}]})) == [
        ".e is gone",
        ".a is float, not int",
        ".b has no item like {'d': 'null'}",
    ]
    assert missing(wanted, shape_of({"a": 2, "b": [{"c": "y"}, {"d": None}, {"d": 1}], "e": [2.0]})) == [
        ".b has {'d': 'int'}"
    ]
    assert missing("float or null", "null") == [] and missing("float or null", "int") != []


CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox")


def write_picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (36, 40, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def write_pictures(folder: Path) -> None:
    """Six classes, four train and two val images each; with one unreadable image and one that leaks from train."""
    for number in range(36):
        split = "val" if number % 3 == 0 else "train"
        write_picture(folder / split / CLASSES[number // 6] / f"{number:02}.png", number)
    shutil.copy(folder / "train" / "ant" / "01.png", folder / "val" / "ant" / "leaked.png")
    (folder / "val" / "bee" / "broken.png").write_bytes(b"no image")


@dataclass(frozen=True)
class Project:
    """A folder with images, a cache, the runs ``probe``, ``knn`` and ``tuned``, and the JSON that each verb gave."""

    folder: Path
    summaries: dict[str, Json]

    @property
    def options(self) -> list[str]:
        """For every verb: the params file and the places in it."""
        return ["-p", str(self.folder / "params.yaml")]


PARAMS = """
data: {root: images}
backbone: {layer: stage2}
transform: {resize: 36, crop: 32}
extract: {device: cpu, precision: float32, workers: 1, views: 1}
head: {folds: 2, logistic: {strengths: 3}}
finetune: {device: cpu, precision: float32, epochs: 1, batch_size: 8, selection_fraction: 0.25, augment: {crop: 32}}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Project:
    """Every verb once, in the order of a user's day."""
    project = Project(tmp_path_factory.mktemp("project"), {})
    folder = project.folder
    write_pictures(folder / "images")
    (folder / "params.yaml").write_text(PARAMS)
    stray = folder / "images" / "val" / "bee" / "broken.png"

    def day(name: str, *arguments: object) -> None:
        project.summaries[name] = succeed(*arguments, *project.options)

    day("extract", "extract")
    day("train-head", "train-head", "--curve", "-s", "runs.name=probe")
    day("train-head knn", "train-head", "-s", "head.kind=knn", "-s", "runs.name=knn")
    day("finetune", "finetune", "-s", "runs.name=tuned")
    day("finetune --find-lr", "finetune", "--find-lr")
    day("evaluate", "evaluate", "probe")
    day("predict", "predict", "probe", folder / "images" / "val", "--top", "2")
    day("compare", "compare", "probe", "tuned")
    day("advise", "advise", "--domain", "similar")
    day("backbones --rank", "backbones", "--rank", "starter", "squeezenet1_1=random")
    day("classify", *classify(weights), folder / "images" / "val" / "ant" / "00.png", stray)
    day("cache ls", "cache", "ls")
    day("cache verify", "cache", "verify", "--sample", "2")
    day("cache why", "cache", "why", "-s", "transform.resize=40")
    day("cache export", "cache", "export", folder / "features.h5")
    make_old(folder / "cache")
    day("cache gc", "cache", "gc", "--yes")
    project.summaries["metrics.json"] = read_json(folder / "runs" / "probe" / "metrics.json")
    return project


def classify(weights: Path) -> list[str]:
    names = {"backbone.name": "mobilenet_v2", "backbone.weights": weights / "mobilenet_v2.safetensors"}
    return ["classify", "--top", "2", *settings(names)]


def make_old(cache: Path) -> None:
    """As if no key had been used for forty days."""
    moment = time.time() - 40 * 86_400
    for file in cache.glob("*/used"):
        os.utime(file, (moment, moment))


@pytest.mark.parametrize("verb", SUMMARIES)
def test_a_summary_keeps_its_keys_and_their_types(verb: str, project: Project, tmp_path: Path) -> None:
    found = project.summaries.get(verb)
    if found is None:
        found = succeed(*{"backbones": ("backbones",), "demo-data": ("demo-data", tmp_path / "demo")}[verb])
    assert missing(SUMMARIES[verb], shape_of(found), verb) == []


def test_every_image_is_counted_once(project: Project) -> None:
    counts = project.summaries["extract"]
    assert counts["images"] == sum(counts[name] for name in ("embedded", "reused", "duplicates", "quarantined")) == 38
    assert (counts["duplicates"], counts["quarantined"], counts["forwarded"]) == (1, 1, 36 + 24)


@pytest.mark.parametrize("name", ERRORS)
def test_a_failure_is_one_error_object_and_an_exit_code(name: str, project: Project) -> None:
    case = ERRORS[name]
    words = [word.replace("<project>", str(project.folder)) for word in case["arguments"]]
    done = run(*words, *project.options, "--json")
    assert done.code == case["exit"]
    assert done.json["error"]["type"] == case["type"]
    assert missing(case["error"], shape_of(done.json["error"]), "error") == []
    assert f"Error: {done.json['error']['what']}" in done.err and "Traceback" not in done.err


def test_damage_in_the_cache_is_an_error_with_the_report(project: Project, tmp_path: Path) -> None:
    shutil.copytree(project.folder / "cache", tmp_path / "cache")
    part = min((tmp_path / "cache").glob("*/part-*.h5"))
    part.write_bytes(part.read_bytes()[:-1] + b"!")
    done = run("cache", "verify", "--sample", "0", "--json", *project.options, "-s", f"cache.dir={tmp_path / 'cache'}")
    error = done.json["error"]
    assert (done.code, error["type"]) == (1, "VerifyError")
    (bytes_only,) = [shape for shape in SUMMARIES["cache verify"]["keys"] if shape["recomputed"] == "null"]
    assert missing({**SUMMARIES["cache verify"], "keys": [bytes_only]}, shape_of(error["report"])) == []
    assert any(part.name in problem for problem in error["report"]["problems"])


def test_with_json_only_the_object_is_on_standard_output(project: Project) -> None:
    command = [sys.executable, "-m", "pipeline", "extract", "-s", "data.rot=1", "-s", "head.kind=[]", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(Path(pipeline.__file__).parent.parent)}
    done = subprocess.run(command, cwd=project.folder, env=environment, capture_output=True, text=True)
    assert (done.returncode, list(json.loads(done.stdout))) == (2, ["error"])
    assert done.stderr.startswith("Error: The params have 2 problems.")


# -- files, verbs and names ------------------------------------------------------------------------------------------

IN_EVERY_RUN = {"metrics.json", "model.json", "params.yaml", "predictions.csv", "report.html"}
FILES = {
    "probe": {*IN_EVERY_RUN, "head.safetensors"},
    "knn": {*IN_EVERY_RUN, "head.skops"},
    "tuned": {*IN_EVERY_RUN, "head.safetensors", "backbone.safetensors", "history.csv", "history.svg"},
}


@pytest.mark.parametrize("name", FILES)
def test_a_run_folder_holds_what_it_held(name: str, project: Project) -> None:
    folder = project.folder / "runs" / name
    assert {file.name for file in folder.iterdir()} >= FILES[name]
    first, *rows = (folder / "predictions.csv").read_text(encoding="utf-8").splitlines()
    assert first.split(",") == ["path", "digest", "split", "label", "predicted", *(f"p_{label}" for label in CLASSES)]
    assert len(rows) == 37 and rows[0].startswith("train/ant/01.png,")


def test_plain_h5py_reads_the_cache_and_the_export(project: Project) -> None:
    with h5py.File(next((project.folder / "cache").glob("starter-*/part-*.h5"))) as part:
        rows = len(part["features"])
        assert {"features", "digest"} <= set(part)
        assert (part["features"].dtype, part["features"].shape) == (np.float16, (rows, 116))
        assert (part["digest"].dtype, part["digest"].shape) == (np.uint8, (rows, 16))
    with h5py.File(project.folder / "features.h5") as export:
        assert (export["features"].dtype, export["features"].shape) == (np.float32, (37, 116))
        assert (export["labels"].dtype, export["labels"].shape) == (np.int64, (37,))
        assert export["digest"].shape == (37, 16)
        assert [name.decode() for name in export["class_names"]] == list(CLASSES)
        assert {name.decode() for name in export["split"]} == {"train", "val"}
        assert b"train/ant/01.png" in set(export["paths"])


def help_of(*verb: str) -> str:
    done = run(*verb, "--help")
    assert done.code == 0
    return done.out


def options_of(text: str) -> set[str]:
    """The options that a help text lists, short and long."""
    heads = re.findall(r"^  (-\S.*?)(?:  |$)", text, re.MULTILINE)
    return {name for head in heads for name in re.findall(r"(?<!\S)--?[a-z][a-z-]*", head)}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_keeps_its_options(verb: str) -> None:
    *group, name = verb.split() or [""]
    assert re.search(rf"^  {name}\b", help_of(*group), re.MULTILINE), "the verb is listed"
    assert options_of(help_of(*verb.split())) >= set(VERBS[verb].split())


def test_the_names_of_the_package_do_what_the_readme_shows(tmp_path: Path) -> None:
    assert set(pipeline.__all__) >= {"extract", "load_features", "load_params", "load_run", "train_head"}
    (tmp_path / "params.yaml").touch()
    overrides = ["transform.resize=36", "transform.crop=32", "backbone.layer=stage2", "head.folds=2"]
    params = load_params(tmp_path / "params.yaml", [f"data.root={IMAGES}", "extract.device=cpu", *overrides])
    lines: list[str] = []
    assert extract(params, lines.append, quiet=True)["images"] == 33
    table = load_features(params)
    assert table.features.dtype == np.float32 and table.features.shape == (33, 116)
    assert table.digests.dtype == np.uint8 and table.digests.shape == (33, 16)
    assert table.class_names == ("ants", "bees", "cats") and sorted(set(table.targets)) == [0, 1, 2]
    assert table.paths[0] == "train/ants/00.png" and len(table.splits) == 33
    (first,) = load_run(train_head(params, lines.append)["run"]).predict([IMAGES / "val" / "ants" / "24.png"], top=2)
    assert first.path == str(IMAGES / "val" / "ants" / "24.png") and first.error is None
    assert (first.label, first.probability) == first.top[0] and len(first.top) == 2
