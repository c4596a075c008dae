"""The share of the prompts is what helps out of fold: all of good texts where labels are few, none of wrong ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.errors import HeadError
from pipeline.heads import choose_head, load_head, make_head
from pipeline.heads.prompts import PromptsHead, read_prompts
from pipeline.params import HeadParams

NAMES = ("ant", "bee", "wasp")
CENTRES = np.random.default_rng(0).normal(size=(3, 12))


def images(count: int, noise: float = 1.0, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    y = np.arange(3 * count) % 3
    return (CENTRES[y] + noise * generator.normal(size=(len(y), 12))).astype(np.float32), y


def head(folder: Path, texts: np.ndarray = CENTRES, **params: object) -> PromptsHead:
    units = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    save_file({"texts": 10 * units}, folder / "texts.safetensors")
    section = HeadParams.model_validate({"kind": "prompts", "prompts": folder / "texts.safetensors", **params})
    made = make_head("prompts", section, class_names=NAMES)
    assert isinstance(made, PromptsHead)
    return made


def test_good_texts_carry_few_labels_and_are_compared_with_the_probe(tmp_path: Path) -> None:
    fitted = head(tmp_path).fit(*images(4, noise=2.0))
    selected = fitted.selected
    assert selected["share_of_prompts"] == fitted.blend > 0
    assert selected["prompts_accuracy"] > selected["probe_accuracy"]
    X, y = images(200, noise=2.0, seed=9)
    probe = make_head("logistic", HeadParams(), class_names=NAMES).fit(*images(4, noise=2.0))
    assert (fitted.predict(X) == y).mean() > (probe.predict(X) == y).mean()
    assert "the share of the prompts" in [selection.what for selection in fitted.selections]


def test_wrong_texts_leave_the_probe_alone(tmp_path: Path) -> None:
    X, y = images(40)
    fitted = head(tmp_path, CENTRES[[1, 2, 0]]).fit(X, y)
    probe = make_head("logistic", HeadParams(), class_names=NAMES).fit(X, y)
    assert fitted.blend == 0 and np.array_equal(fitted.logits(X), probe.logits(X))
    assert fitted.selected["probe_beats_prompts_from"] == "1 image a class"


def test_prompts_that_stay_ahead_are_said_to(tmp_path: Path) -> None:
    fitted = head(tmp_path).fit(*images(8, noise=3.0))
    assert fitted.selected["probe_beats_prompts_from"] == "not with the images there are"


def test_it_is_saved_and_loaded_to_the_byte_and_rows_do_not_mix(tmp_path: Path) -> None:
    X, y = images(10)
    fitted = head(tmp_path, calibrate="temperature").fit(X, y)
    loaded = load_head(tmp_path, fitted.save(tmp_path))
    assert np.array_equal(loaded.predict_proba(X), fitted.predict_proba(X))
    assert np.array_equal(fitted.logits(X[3:4]), fitted.logits(X)[3:4])
    assert fitted.as_layers() is None and fitted.parameter_count() == 3 * 13


def test_it_stands_beside_other_kinds(tmp_path: Path) -> None:
    made = head(tmp_path)
    section = made.params.model_copy(update={"kind": ["logistic", "prompts"]})
    choice = choose_head(section, *images(5, noise=2.0), class_names=NAMES)
    assert {entry.kind for entry in choice.entries if not entry.baseline} == {"logistic", "prompts"}
    assert choice.head.kind == "prompts"


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    X, y = images(6)
    with pytest.raises(HeadError, match="Cross-validation is impossible"):
        head(tmp_path).fit(X[:3], y[:3])
    with pytest.raises(HeadError, match="do not fit the images"):
        head(tmp_path, CENTRES[:, :5]).fit(X, y)
    with pytest.raises(HeadError, match="needs the features of its texts"):
        make_head("prompts", HeadParams(kind="prompts"), class_names=NAMES).fit(X, y)


def test_prompts_are_read_from_a_file_or_made_of_the_names(tmp_path: Path) -> None:
    assert read_prompts(None, ["fire_ant"]) == [["a photo of a fire ant."]]
    file = tmp_path / "prompts.yaml"
    file.write_text("ant: an ant\nbee: [a bee, a honey bee]\n")
    assert read_prompts(file, ["bee", "ant"]) == [["a bee", "a honey bee"], ["an ant"]]
    for text, name in (("ants: an ant", "ant"), ("ant: []", "ant"), ("ant: [1]", "ant"), ("[", "")):
        file.write_text(text)
        with pytest.raises(HeadError) as caught:
            read_prompts(file, ["ant"])
        assert name in str(caught.value)
