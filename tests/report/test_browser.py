"""The page in a browser: the filter filters without a script, dots show images, and nothing is asked of the network."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.insight.gallery import ATLAS_SIDE, FeatureMap, Gallery, Mistake, Picture
from pipeline.report import page, pictures

from .browser import Page, find_browser
from .test_report import _metrics, _render

BROWSER = find_browser()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
CLASSES, POINTS = 3, 30


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """A page with a map of three classes and a case with pictures."""
    sheet = io.BytesIO()
    Image.new("RGB", (40 * ATLAS_SIDE, ATLAS_SIDE), "teal").save(sheet, "JPEG")
    uri = f"data:image/jpeg;base64,{base64.b64encode(sheet.getvalue()).decode()}"
    place = np.random.default_rng(0).random((2, POINTS))
    paths = [f"photos/{number}.jpg" for number in range(POINTS)]
    target = np.arange(POINTS) % CLASSES
    wrong = np.arange(POINTS) == 4
    drawn = FeatureMap("t-SNE", place[0], place[1], target, wrong, paths, ("ant", "bee", "cat"), POINTS, uri)
    picture = Picture("photos/" + "long" * 60 + ".jpg", "ant", "val", uri)
    gallery = Gallery([Mistake(picture, "bee" * 40, 0.9, [picture] * 3)], 1)
    file = tmp_path / "report.html"
    parts = [page.section("Mistakes", pictures.mistakes(gallery)), page.section("Map", pictures.feature_map(drawn))]
    file.write_text(page.page("A page", parts), encoding="utf-8")
    return file


@pytest.mark.parametrize("width", [400, 1200])
def test_the_filter_hides_a_class_and_nothing_is_requested(report: Path, tmp_path: Path, width: int) -> None:
    assert BROWSER is not None
    with Page(BROWSER, tmp_path / "profile", width=width) as shown:
        shown.open(report)
        visible = "[0, 1, 2].map(n => [...document.querySelectorAll('.m' + n)].filter(e => e.offsetParent).length)"
        assert shown.ask(visible) == [10, 10, 10]
        shown.click("#map-1")
        assert shown.ask(visible) == [10, 0, 10]
        shown.click("#map-1")
        assert shown.ask(visible) == [10, 10, 10]
        colours = "[0, 1, 2].map(n => getComputedStyle(document.querySelector('.m' + n)).backgroundColor)"
        assert len(set(shown.ask(colours))) == 3

        before = "getComputedStyle(document.querySelector('.m2'), '::before').backgroundImage"
        assert shown.ask(before) == "none"
        shown.point_at(".m2")
        assert shown.ask(before).startswith('url("data:image/jpeg')
        assert "photos/2.jpg: cat" in shown.ask("getComputedStyle(document.querySelector('.m2'), '::after').content")

        assert shown.ask("document.documentElement.scrollWidth") <= width
        assert [address for address in shown.requests if not address.startswith("data:")] == [report.as_uri()]


def test_on_a_phone_numbers_keep_their_units_and_tables_fit(tmp_path: Path) -> None:
    assert BROWSER is not None
    names = tuple(f"class {number}" for number in range(10))
    row = {"kind": "logistic", "cv_accuracy": 0.9, "cv_log_loss": 0.3, "val_accuracy": None, "seconds": 1.0}
    rows = [{**row, "selected": True, "settings": "C=0.0316"}, {**row, "kind": "nearest_centroid", "baseline": True}]
    file = tmp_path / "report.html"
    file.write_text(_render(_metrics(names, 200, leaderboard=rows, selected={"C": 0.1, "x": {"y": [1, 2]}})), "utf-8")
    with Page(BROWSER, tmp_path / "profile", width=400) as shown:
        shown.open(file)
        assert shown.ask("document.documentElement.scrollWidth") <= 400
        wide = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
        assert shown.ask(wide) == 0
        high = "[...document.querySelectorAll('.card b')].filter(e => e.getClientRects()[0].height > 80).length"
        assert shown.ask(high) == 0
        assert "val" not in shown.ask("document.querySelector('thead').innerText").split("\t")
        assert '{"' not in shown.ask("document.body.innerText")
