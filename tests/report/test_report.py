"""The report stands alone, shows what was measured, and no name of a class or folder can break out of it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.artifacts import RunMetrics, RunModel
from pipeline.report import SECTIONS, Content, page, render_report

from ..artifacts.examples import model_values, score_of

HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "caf\udce9",
    "line\nbreak\r\x1b[31m\x00",
    "$body ${title} $$ $x^2$",
    "&amp; </table></html>",
    "日本語",
)
_VOID = {"meta", "img", "br", "input"}


class _Document(HTMLParser):
    """Collects elements and texts, and complains about elements that are not closed in order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def _parsed(text: str) -> _Document:
    document = _Document()
    document.feed(text)
    document.close()
    assert document.open == []
    return document


def _metrics(names: tuple[str, ...], n: int = 60, *, chances: bool = True, **changes: Any) -> RunMetrics:
    generator = np.random.default_rng(0)
    y = generator.integers(len(names), size=n)
    values = generator.random((n, len(names))) + 2 * np.eye(len(names))[y]
    values /= values.sum(axis=1, keepdims=True)
    wrong = generator.random(n) < 0.2
    predicted = np.where(wrong, (y + 1) % len(names), y)
    counts = np.bincount(y, minlength=len(names))
    scores = score_of(y, predicted, values if chances else None, names, train_counts=counts).model_dump()
    return RunMetrics.model_validate({**scores, "protocol": "Nothing was chosen on val.", **changes})


def _render(metrics: RunMetrics, name: str = "run", **changes: Any) -> str:
    model = RunModel.model_validate(model_values(class_names=metrics.class_names, **changes))
    return render_report(Content(name, model, metrics, "data:\n  root: x\n"))


def _assert_harmless(text: str) -> _Document:
    text.encode("utf-8")
    document = _parsed(text)
    for tag, attributes in document.tags:
        assert tag not in {"script", "iframe", "link", "object", "embed", "form"}
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,", "data:image/jpeg;base64,"))
    assert "@import" not in text and "url(http" not in text
    return document


@pytest.mark.parametrize("classes", [2, 5, 7, 31])
def test_hostile_names_stay_text(classes: int) -> None:
    names = tuple([*HOSTILE, *(f"{name} {index}" for index in range(5) for name in HOSTILE)][:classes])
    metrics = _metrics(
        names,
        warnings=[HOSTILE[0], HOSTILE[2]],
        selected={HOSTILE[0]: HOSTILE[1], "nested": {"a": [1, HOSTILE[2]]}},
        leaderboard=[{"kind": HOSTILE[0], "note": HOSTILE[3], HOSTILE[1]: 1, "selected": True}],
        history=[{"epoch": 1, "<b>_loss": 1.0, "train_loss": 2.0}, {"epoch": 2, "<b>_loss": 1.0, "train_loss": 1.0}],
    )
    document = _assert_harmless(
        _render(metrics, HOSTILE[0], data={"root": HOSTILE[1], "digest": "0", "images": {HOSTILE[2]: 1}})
    )
    shown = "".join(document.texts)
    assert HOSTILE[0] in shown and HOSTILE[1] in shown


def test_it_shows_scores_intervals_baseline_protocol_and_provenance() -> None:
    metrics = _metrics(("ant", "bee", "cat"), leak={"leaked": 3, "n": 57, "accuracy": 0.5, "accuracy_ci95": [0.4, 0.6]})
    text = _render(metrics)
    low, high = metrics.metrics["accuracy_ci95"]  # type: ignore[misc]
    shown = "".join(_parsed(text).texts).replace("\xa0", " ")
    for expected in (
        f"{100 * metrics.metrics['accuracy']:.1f} %",  # type: ignore[operator]
        f"95 %: {100 * low:.1f} to {100 * high:.1f} %",
        "baseline (always",
        "Nothing was chosen on val.",
        "3 of the 60 images of val are also in train",
        "Most confused pairs",
        "Trainable: 2,562 / 2,226,434 (0.1 %)",
        "python 3.11",
        "root: x",
        "2026-11-21",
    ):
        assert expected in shown


def test_the_matrix_is_a_table_up_to_thirty_classes_and_a_picture_above() -> None:
    few = _render(_metrics(tuple(f"c{index}" for index in range(30)), 300))
    assert few.count('class="confusion') == 1 and "<img" not in few
    many = _render(_metrics(tuple(f"c{index}" for index in range(200)), 2000))
    assert 'class="confusion' not in many and many.count("data:image/png") == 1
    assert "Worst recall first" in many and "Most confused pairs" in many
    _assert_harmless(many)


def test_too_many_classes_for_a_matrix() -> None:
    text = _render(_metrics(tuple(str(index) for index in range(1200)), 1300))
    assert "There is no matrix: more than 1000 classes." in text


def test_matrix_cells_are_the_counts() -> None:
    metrics = _metrics(("ant", "bee"))
    table = _render(metrics).split('class="confusion')[1].split("</table>")[0]
    cells = [int(cell) for cell in re.findall(r"<td[^>]*>(\d+)</td>", table)]
    assert metrics.confusion is not None and cells == [count for row in metrics.confusion for count in row]


def test_curves_are_drawn_only_where_there_are_any() -> None:
    plain = _render(_metrics(("a", "b"), chances=False))
    for title in ("Training", "Learning curve", "Calibration", "Coverage", "Heads"):
        assert f"<h2>{title}</h2>" not in plain
    assert "the head gives no probabilities" in plain
    rows = [
        {"epoch": k, "train_loss": 1 / k, "val_loss": None if k == 2 else 1.0, "val_accuracy": 0.5} for k in (1, 2, 3)
    ]
    points = [{"images": k, "accuracy": 0.5, "low": 0.4, "high": 0.6} for k in (10, 20)]
    full = _render(_metrics(("a", "b"), history=rows, curve=points, leaderboard=[{"kind": "svm", "selected": True}]))
    for title in ("Training", "Learning curve", "Calibration", "Coverage", "Heads"):
        assert f"<h2>{title}</h2>" in full
    assert full.count("<figure>") == 5
    _assert_harmless(full)


def test_the_leak_is_said_once() -> None:
    leak = {"leaked": 3, "n": 57, "accuracy": 0.5, "accuracy_ci95": [0.4, 0.6]}
    sentence = "3 of the 60 images of val are also in train, byte for byte. Without them the accuracy is 50.0 % "
    text = _render(_metrics(("a", "b"), leak=leak, warnings=[sentence + "(95 %: 40.0 to 60.0 %, 57 images)."]))
    assert text.count("byte for byte") == 1


def test_no_image_and_one_image() -> None:
    for y in ([], [1]):
        _assert_harmless(_render(score_of(y, y)))


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    rows = [{"epoch": k, "train_loss": 1 / k} for k in (1, 2, 3)]
    metrics = _metrics(("a", "b"), history=rows)
    assert _render(metrics) == _render(metrics)


def test_a_section_is_one_function_and_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A section written outside the package stands on the page, after the others, and not where it has nothing."""

    def mood(content: Content) -> str:
        return page.paragraph(f"{content.name} is <{content.metrics.split}>") if content.metrics.n else ""

    monkeypatch.setitem(SECTIONS, "Mood & more", mood)
    text = _render(_metrics(("a", "b")))
    assert text.index("<h2>How it was made</h2>") < text.index("<h2>Mood &amp; more</h2>\n<p>run is &lt;val&gt;</p>")
    assert "Mood" not in _render(score_of([], []))
