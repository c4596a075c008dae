"""params.yaml and the typed params agree, and every way to get them wrong is told in words, all at once."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from pipeline.backbones import ZOOS
from pipeline.errors import ParamsError, Problem
from pipeline.heads import KINDS
from pipeline.params import Params, dump_params, load_params, names, sections

from .conftest import PROJECT

PARAMS_YAML = PROJECT / "params.yaml"

# Where params.yaml is not the default: a fresh clone must work without a download.
EXCEPTIONS: dict[str, object] = {}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a params file and give its path."""

    def write_file(text: str | bytes) -> Path:
        file = tmp_path / "params.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    return write_file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all examples that hypothesis makes."""
    return tmp_path_factory.mktemp("params")


def problems(file: Path, *overrides: str) -> list[Problem]:
    with pytest.raises(ParamsError) as caught:
        load_params(file, overrides)
    return caught.value.problems


def flat(tree: dict[str, Any], parents: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; an empty mapping is a value."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{parents}{name}.")
        else:
            yield f"{parents}{name}", value


class TestTheFile:
    def test_shows_every_key_and_no_other(self) -> None:
        shown = {key for key, _ in flat(yaml.safe_load(PARAMS_YAML.read_text()))}
        assert shown == {key for key, _ in flat(Params().model_dump())}

    def test_shows_the_defaults(self) -> None:
        shown = dict(flat(load_params(PARAMS_YAML).model_dump()))
        defaults = {
            key: PROJECT / value if isinstance(value, Path) else value for key, value in flat(Params().model_dump())
        }
        different = {key: value for key, value in shown.items() if value != defaults[key]}
        assert different == EXCEPTIONS

    def test_explains_every_key_that_has_no_twin(self) -> None:
        """The keys of ``mlp`` are those of ``linear``; three colour keys stand below the one that explains them."""
        quiet = {"contrast", "saturation", "optimizer", "label_smoothing", "weight_decay"}
        bare = [
            line.split(":")[0].strip()
            for line in PARAMS_YAML.read_text().split("\n")
            if re.match(r" +\w+: [^#]*$", line)
        ]
        linear = set(sections.NetworkParams.model_fields)
        assert set(bare) - linear - quiet - {"epochs", "dropout"} == set()

    def test_marks_what_decides_the_features(self) -> None:
        marked: dict[str, set[str]] = {name: set() for name in Params.model_fields}
        section = ""
        for line in PARAMS_YAML.read_text().split("\n"):
            if top := re.match(r"(\w+):", line):
                section = top[1]
            elif key := re.match(r" +(\w+):.*\[key\]", line):
                marked[section].add(key[1])
        assert marked.pop("backbone") == set(sections.BackboneParams.model_fields)
        assert marked.pop("transform") == set(sections.TransformParams.model_fields)
        assert marked.pop("cache") == {"dtype"}
        assert marked["extract"] >= {"precision", "views", "decoder"}
        assert not marked.pop("extract") & {"device", "batch_size", "workers", "part_seconds", "shard"}
        assert not any(marked.values())  # data, head, finetune and runs cost nothing

    def test_fits_on_a_screen_in_width(self) -> None:
        assert max(map(len, PARAMS_YAML.read_text().split("\n"))) <= 120


class TestNumbers:
    @pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.e-5", "+1e-5", "0.00001", ".1e-4", "10e-6"])
    def test_an_exponent_makes_a_number_in_the_file_and_in_s(self, write: Write, text: str) -> None:
        file = write(f"finetune: {{backbone_lr: {text}}}")
        params = load_params(file, [f"finetune.head_lr={text}", f"head.search={{C: [{text}]}}"])
        assert params.finetune.backbone_lr == params.finetune.head_lr == 1e-5
        assert params.head.search == {"C": [1e-5]}

    @pytest.mark.parametrize("text", ["e5", "1e", "resnet18", "1e-5x", "efficientnet_b0", "2001-01-01", "1.2.3"])
    def test_other_words_stay_text(self, write: Write, text: str) -> None:
        assert load_params(write(f"backbone: {{name: {text}}}")).backbone.name == text

    @pytest.mark.parametrize("text", [".nan", ".inf", "-.inf", "1e400", "'1e-5'", "yes", "null"])
    def test_a_rate_is_a_finite_number(self, write: Write, text: str) -> None:
        assert [problem.key for problem in problems(write(""), f"finetune.head_lr={text}")] == ["finetune.head_lr"]

    def test_a_whole_number_does_for_a_fraction(self, write: Write) -> None:
        value = load_params(write("finetune: {clip_norm: 1}")).finetune.clip_norm
        assert (value, type(value)) == (1.0, float)


class TestOverrides:
    def test_later_ones_win_over_the_file(self, write: Write) -> None:
        file = write("head: {kind: knn, folds: 3}")
        head = load_params(file, ["head.kind=svm", "head.kind=[svm, ridge]"]).head
        assert head.kinds == ("svm", "ridge")
        assert head.folds == 3

    def test_a_key_inside_a_section_leaves_its_other_defaults(self, write: Write) -> None:
        for params in (load_params(write("head: {mlp: {lr: 0.1}}")), load_params(write(""), ["head.mlp.lr=0.1"])):
            assert params.head.mlp == sections.MlpParams(hidden=[256], dropout=0.4, lr=0.1)

    def test_a_mapping_for_a_section_changes_the_keys_it_names(self, write: Write) -> None:
        file = write("data: {seed: 3, root: there}\nhead: {search: {C: [1]}}")
        params = load_params(file, ["data={root: /here}", "head.search={gamma: [2]}"])
        assert (params.data.root, params.data.seed) == (Path("/here"), 3)
        assert params.head.search == {"gamma": [2]}  # the words in a free mapping are one value

    def test_free_mappings_take_dotted_keys(self, write: Write) -> None:
        params = load_params(write(""), ["head.sklearn.params.C=1e-3", "head.search.gamma=[scale, 1]"])
        assert params.head.sklearn.params == {"C": 0.001}
        assert params.head.search == {"gamma": ["scale", 1]}

    @pytest.mark.parametrize("text", ["data.root", "=3", ".seed=3", "data..seed=3", "", "data.=3"])
    def test_the_form_is_key_equals_value(self, write: Write, text: str) -> None:
        assert [problem.rule for problem in problems(write(""), text)] == ["must look like key.path=value"]

    def test_a_value_has_nothing_below_it(self, write: Write) -> None:
        (problem,) = problems(write("data: {seed: 1}"), "data.seed.x=3")
        assert str(problem) == "-s data.seed.x: cannot be set, because seed is a value, not a section; got 1."

    def test_the_value_is_yaml(self, write: Write) -> None:
        (problem,) = problems(write(""), "head.search={C: [1")
        assert (problem.key, problem.rule) == ("head.search", "must be a YAML value")


class TestPaths:
    def test_those_of_the_file_are_relative_to_it_and_those_of_s_to_here(
        self, write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        here = tmp_path_factory.mktemp("elsewhere")
        monkeypatch.chdir(here)
        file = write("data: {root: images}\nbackbone: {weights: w.pth}\nruns: {dir: ../runs}")
        params = load_params(file, ["cache.dir=features", "runs.dir=out"])
        assert params.data.root == file.parent / "images"
        assert params.backbone.weights == str(file.parent / "w.pth")
        assert params.cache.dir == here / "features"
        assert params.runs.dir == here / "out"
        assert load_params(file).runs.dir == file.parent.parent / "runs"

    def test_a_relative_file_gives_absolute_paths(self, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
        file = write("data: {root: images}")
        monkeypatch.chdir(file.parent.parent)
        params = load_params(Path(file.parent.name) / file.name)
        assert params.data.root == file.parent / "images"
        assert params.cache.dir == file.parent / "cache"

    @pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V2", "random"])
    def test_names_of_weights_are_no_paths(self, write: Write, weights: str) -> None:
        assert load_params(write(f"backbone: {{weights: {weights}}}")).backbone.weights == weights

    @pytest.mark.parametrize("weights", ["w.safetensors", "runs/one/backbone.safetensors", "./w", "w.pt"])
    def test_files_of_weights_are(self, write: Write, weights: str) -> None:
        file = write(f"backbone: {{weights: {weights}}}")
        assert load_params(file).backbone.weights == str(file.parent / weights.removeprefix("./"))

    def test_home_is_known_and_nobody_elses_ends_in_an_error(
        self, write: Write, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", "/home/ada")
        params = load_params(write("data: {root: ~/images}\ncache: {dir: ~no-such-user/cache}"))
        assert params.data.root == Path("/home/ada/images")
        assert params.cache.dir.is_absolute()


WRONG = """
data: {root: 3, val_fraction: 0.7, test_fraction: 0.6, layot: flat, seed: -1}
backbone: {name: 18, pooling: mean}
transform: {mean: [0.5, 0.5], background: [1, 2, 300]}
extract: {batch_size: 0, workers: many, device: gpu, shard: 3/3}
head: {mlp: {lr: fast, epochs: 2.5, epoch: 3}, lr: 1, class_weight: balance, linear: {hidden: [3]}}
finetune: {unfreeze: last-0, tensorboard: 1, augment: {crop_scale: [1, 0.5]}}
runs: {name: latest}
folds: 3
hed: {}
"""
REPORT = """
data.root: must be a path; got 3. Put quotes around it.
data.seed: must be at least 0; got -1.
data.layot: is not a key of this section; got 'flat'. Did you mean data.layout?
backbone.name: must be text; got 18. Put quotes around it.
backbone.pooling: must be default, avg, max, cls or cls_avg, or a list; got 'mean'.
transform.mean: has too few values; got [0.5, 0.5].
transform.background.2: must be at most 255; got 300.
extract.device: must be auto, cpu, mps, cuda or cuda:N; got 'gpu'.
extract.batch_size: must be at least 1, or auto; got 0.
extract.workers: must be a whole number, or auto; got 'many'.
extract.shard: must be i/n with i from 0 to n - 1, so at most 2/3; got '3/3'.
head.class_weight: must be balanced, or keys with values; got 'balance'.
head.linear: linear has no hidden layers; choose kind mlp for them; got {'hidden': [3]}.
head.mlp.lr: must be a number; got 'fast'.
head.mlp.epochs: must be a whole number; got 2.5.
head.mlp.epoch: is not a key of this section; got 3. Did you mean head.mlp.epochs?
head.lr: is not a key of this section; got 1. Did you mean head.linear.lr or head.mlp.lr?
finetune.unfreeze: must be none, all, gradual or last-N; got 'last-0'.
finetune.tensorboard: must be true or false; got 1.
finetune.augment.crop_scale: must be the smallest and the largest share, above 0, the smallest first; got [1, 0.5].
runs.name: must not be `latest`, which names the newest run; got 'latest'.
folds: is not a key of this section; got 3. Did you mean head.folds?
hed: is not a key of this section; got {}. Did you mean head?
"""


class TestProblems:
    def test_all_are_reported_at_once_each_with_key_rule_got_and_nearest_name(self, write: Write) -> None:
        found = [str(problem) for problem in problems(write(WRONG))]
        assert sorted(found) == sorted(REPORT.strip().split("\n"))

    def test_those_of_the_file_and_of_s_come_together(self, write: Write) -> None:
        file = write("data: {rot: x, seed: 1, seed: 2}")
        found = problems(file, "nonsense", "head.knd=svm", "cache.dtype=[")
        keys = [problem.key for problem in found]
        assert keys == ["seed", "-s nonsense", "cache.dtype", "data.rot", "head.knd"]

    def test_those_of_s_are_named_so_and_unknown_names_come_with_them(self, write: Write) -> None:
        file, overrides = write("data: {rot: x}"), ("head.kind=svmm", "backbone.name=resnet5", "heads.kind=svm")
        with pytest.raises(ParamsError) as caught:
            load_params(file, overrides, kinds=KINDS)
        text = str(caught.value)
        assert caught.value.where == f"{file} and -s" and len(caught.value.problems) == 4
        assert "-s head.kind: is no kind of head; got 'svmm'. Did you mean svm?" in text
        assert "Did you mean resnet50" in text and "-s heads: is not a key" in text and "    data.rot: is" in text
        with pytest.raises(ParamsError) as caught:
            load_params(file, ["data.rot=y"])
        assert caught.value.where == "-s"

    def test_names_of_other_libraries_are_left_to_them(self, write: Write) -> None:
        for override in ("head.kind=sklearn.svm.SVC", "backbone.name=timm/x", "backbone.name=a:b", "head.kind=[svm]"):
            assert load_params(write(""), [override], kinds=KINDS)

    def test_the_names_are_those_of_the_tables(self) -> None:
        assert {*names.PACKAGED, *names.torchvision_models()} == set(ZOOS["torchvision"].names())

    def test_the_message_names_the_file_and_the_way_out(self, write: Write) -> None:
        file = write("data: {rot: x}")
        with pytest.raises(ParamsError) as caught:
            load_params(file)
        text = str(caught.value)
        assert text.startswith("The params have 1 problem.")
        assert str(file) in text
        assert "remedy: correct the keys" in text
        assert caught.value.exit_code == 2
        (shown,) = caught.value.as_dict()["problems"]  # type: ignore[misc]
        assert shown["key"] == "data.rot"

    def test_fractions_must_leave_something_to_train_on(self, write: Write) -> None:
        (problem,) = problems(write("data: {val_fraction: 0.5, test_fraction: 0.6}"))
        assert problem.key == "data"
        assert "must stay below 1" in problem.rule
        assert "root" not in problem.got

    @pytest.mark.parametrize("pattern", ["(", "no group", "(two)(groups)"])
    def test_the_group_pattern_has_one_group(self, write: Write, pattern: str) -> None:
        assert [problem.key for problem in problems(write(""), f"data.group_pattern='{pattern}'")] == [
            "data.group_pattern"
        ]

    def test_a_repeated_key_is_named_with_its_line(self, write: Write) -> None:
        file = write("data: {seed: 1}\nhead:\n  kind: svm\n  kind: knn\ndata: {seed: 2}\n")
        assert [(problem.key, problem.got[-6:]) for problem in problems(file)] == [
            ("kind", "line 4"),
            ("data", "line 5"),
        ]

    def test_an_empty_section_is_its_defaults(self, write: Write) -> None:
        file = write("data:\nhead:\n  mlp:\n  folds: 3\nfinetune:\n  augment:\n")
        params = load_params(file)
        assert params.head == sections.HeadParams(folds=3)
        assert params.finetune == sections.FinetuneParams()

    @pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "{}"])
    def test_an_empty_file_is_the_defaults(self, write: Write, text: str) -> None:
        assert load_params(write(text)).head == sections.HeadParams()

    def test_a_huge_value_is_shown_in_short(self, write: Write) -> None:
        (problem,) = problems(write(f"backbone: {{nam: [{', '.join(['x' * 50] * 1000)}]}}"))
        assert len(str(problem)) < 250


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


class TestFilesThatAreNoParams:
    @pytest.mark.parametrize(
        "text",
        [
            "- 1",
            "words",
            "3",
            "a: [1",
            "\t: x",
            "a: b: c",
            "--- {}\n--- {}",
            "a: !!python/object/apply:os.system [ls]",
            "[" * 5000,
            "{a: " * 3000,
            "? [a]\n: 1",
            "? {a: 1}\n: 1",
            "1: 2",
            "null: 2",
            "true: 2",
            "data: {1: 2}",
            "data: {root: \a}",
            'data: {root: "a\\0b"}',
            f"data: {{seed: {'9' * 5000}}}",
            f"data: {{seed: 1{'0' * 400}}}",
            "data: &a [*a]",
            "data: *unknown",
            bomb(30),
            b"\xff\xfe\x00",
            b"\x00\x01\x02",
            b"data: {root: caf\xe9}",
            b"\x80" * 100,
        ],
        ids=range(27),
    )
    def test_end_in_a_message(self, write: Write, text: str | bytes) -> None:
        assert 1 <= len(problems(write(text))) <= 30

    @given(st.binary(max_size=60))
    @settings(max_examples=80, deadline=None)
    def test_any_bytes_end_in_params_or_in_a_message(self, folder: Path, data: bytes) -> None:
        file = folder / "params.yaml"
        file.write_bytes(data)
        with contextlib.suppress(ParamsError):
            assert isinstance(load_params(file), Params)

    @given(st.text(max_size=40), st.text(max_size=20))
    @settings(max_examples=80, deadline=None)
    def test_any_override_ends_in_params_or_in_a_message(self, folder: Path, key: str, value: str) -> None:
        empty = folder / "empty.yaml"
        empty.touch()
        for override in (f"{key}={value}", f"data.root={value}", f"head.search={value}", f"data={value}"):
            with contextlib.suppress(ParamsError):
                assert isinstance(load_params(empty, [override]), Params)

    def test_a_missing_file_and_a_folder_are_told_with_the_way_out(self, tmp_path: Path) -> None:
        for file in (tmp_path / "missing.yaml", tmp_path):
            with pytest.raises(ParamsError) as caught:
                load_params(file)
            assert "-p FILE" in str(caught.value)

    def test_a_byte_order_mark_is_no_character(self, write: Write) -> None:
        assert load_params(write(b"\xef\xbb\xbfdata: {seed: 7}")).data.seed == 7


words = st.text(min_size=1, max_size=8).filter(lambda text: "\0" not in text and text.isprintable())
tricky = st.sampled_from(["yes", "null", "1e5", "007", "2001-01-01", "~", "é", "a b", "#", "-", "a: b", "*x", "!", "'"])
labels = words | tricky
positive = st.floats(1e-12, 1e12)
share = st.floats(0, 0.49)
plain = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | labels

trees = st.fixed_dictionaries(
    {},
    optional={
        "data": st.fixed_dictionaries(
            {},
            optional={
                "root": labels.map(lambda name: f"/images/{name}"),
                "extensions": st.just("all") | st.lists(st.from_regex(r"\A\.[a-z]{1,4}\Z"), min_size=1),
                "val_fraction": share,
                "test_fraction": share,
                "seed": st.integers(0, 2**32 - 1),
            },
        ),
        "backbone": st.fixed_dictionaries({}, optional={"name": labels, "layer": st.none() | labels}),
        "transform": st.fixed_dictionaries(
            {}, optional={"resize": st.none() | st.integers(1, 999), "std": st.lists(positive, min_size=3, max_size=3)}
        ),
        "extract": st.fixed_dictionaries({}, optional={"batch_size": st.just("auto") | st.integers(1, 9)}),
        "head": st.fixed_dictionaries(
            {},
            optional={
                "kind": labels | st.lists(labels, min_size=1, max_size=3, unique=True),
                "class_weight": st.sampled_from([None, "balanced"]) | st.dictionaries(labels, positive),
                "search": st.dictionaries(labels, st.lists(plain, max_size=3), max_size=3),
                "mlp": st.fixed_dictionaries({}, optional={"hidden": st.lists(st.integers(1, 99)), "lr": positive}),
                "sklearn": st.fixed_dictionaries({}, optional={"params": st.dictionaries(labels, plain, max_size=3)}),
            },
        ),
        "finetune": st.fixed_dictionaries({}, optional={"unfreeze": st.just("last-3"), "backbone_lr": positive}),
    },
)


class TestRoundTrip:
    @given(trees)
    @settings(max_examples=40, deadline=None)
    def test_what_is_dumped_loads_to_equal_params(self, folder: Path, tree: dict[str, Any]) -> None:
        params = Params.model_validate(tree)
        file = folder / "params.yaml"
        file.write_text(dump_params(params), encoding="utf-8")
        loaded = load_params(file)
        relative = {"data", "cache", "runs"}
        assert loaded.model_dump(exclude=relative) == params.model_dump(exclude=relative)
        assert loaded.data.model_dump(exclude={"root"}) == params.data.model_dump(exclude={"root"})
        assert loaded.data.root == folder / params.data.root
        assert dump_params(load_params(file)) == dump_params(loaded)

    def test_infinity_survives_where_it_means_something(self, write: Write) -> None:
        params = load_params(write("head: {sklearn: {params: {C: .inf}}}"))
        assert load_params(write(dump_params(params))).head.sklearn.params["C"] == math.inf

    def test_names_that_are_no_utf8_survive(self, write: Write) -> None:
        params = load_params(write('data: {root: "/caf\\udce9"}'))
        assert load_params(write(dump_params(params))).data.root == params.data.root == Path("/caf\udce9")

    def test_any_reader_finds_text_where_text_was(self, write: Write) -> None:
        weights = {"1e5": 1.0, "2001-01-01": 1.0, "yes": 2.0}
        text = dump_params(Params(head=sections.HeadParams(class_weight=weights)))
        assert yaml.safe_load(text)["head"]["class_weight"] == weights
        assert load_params(write(text)).head.class_weight == weights

    def test_the_dump_shows_every_key(self) -> None:
        dumped = {key for key, _ in flat(yaml.safe_load(dump_params(Params())))}
        assert dumped == {key for key, _ in flat(Params().model_dump())}


def all_sections(model: type[BaseModel] = Params) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from all_sections(field.annotation)


@pytest.mark.parametrize("section", [*all_sections()], ids=lambda section: section.__name__)
def test_sections_are_frozen_and_strict(section: type[BaseModel]) -> None:
    params = section()
    name = next(iter(section.model_fields))
    with pytest.raises(ValueError, match="frozen"):
        setattr(params, name, getattr(params, name))
    with pytest.raises(ValueError, match="Extra inputs"):
        section.model_validate({"no_such_key": 1})
