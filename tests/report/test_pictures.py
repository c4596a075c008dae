"""Pictures and the map: whole HTML, no script, hostile names, and images that have gone."""

from __future__ import annotations

import re

import numpy as np

from pipeline.insight.gallery import ClassPictures, Confusion, FeatureMap, Gallery, Mistake, Picture
from pipeline.report import pictures
from pipeline.report.pictures import FILTERS

from .test_report import HOSTILE, _assert_harmless

PIXEL = "data:image/png;base64,iVBORw0KGgo="


def picture(name: str = "ant/1.jpg", label: str = "ant", uri: str | None = PIXEL) -> Picture:
    return Picture(name, label, "val", uri)


def drawn(classes: int, n: int = 200, atlas: str | None = None) -> FeatureMap:
    generator = np.random.default_rng(0)
    names = tuple(f"{HOSTILE[index % 7]} {index}" for index in range(classes))
    x, y = generator.random(n), generator.random(n)
    target = generator.integers(-1, classes, n)
    paths = [HOSTILE[index % 7] for index in range(n)]
    return FeatureMap("PCA", x, y, target, generator.random(n) < 0.1, paths, names, 5 * n, atlas)


def test_hostile_names_stay_text() -> None:
    shown = [picture(name, name, PIXEL if number % 2 else None) for number, name in enumerate(HOSTILE)]
    gallery = Gallery(
        [Mistake(each, each.label, 0.5, shown) for each in shown], 9, [Confusion(HOSTILE[0], HOSTILE[1], 3, shown)]
    )
    parts = [
        pictures.mistakes(gallery),
        pictures.confusions(gallery),
        pictures.class_pictures([ClassPictures(HOSTILE[0], shown, shown)], 3),
        pictures.feature_map(drawn(7, atlas=PIXEL)),
    ]
    document = _assert_harmless("<main>" + "".join(parts) + "</main>")
    assert HOSTILE[0] in "".join(document.texts)


def test_an_image_that_has_gone_shows_its_path() -> None:
    assert "sub/ant.jpg</span>" in pictures.tile(picture("sub/ant.jpg", uri=None)) and "<img" not in pictures.tile(
        picture(uri=None)
    )


def test_every_point_has_a_class_that_can_be_hidden() -> None:
    text = pictures.feature_map(drawn(5))
    groups = set(re.findall(r'<b tabindex="-1" class="(m\d+)', text))
    assert groups == {f"m{number}" for number in range(5)}
    assert all(f'id="map-{number}"' in text and f"#map-{number}:not(:checked)" in text for number in range(5))
    assert text.count("<b ") == 200 and "A sample of 200 of 1,000 images." in text


def test_of_many_classes_the_largest_have_a_filter_of_their_own() -> None:
    text = pictures.feature_map(drawn(100, 2000))
    assert text.count('type="checkbox"') == FILTERS + 1 and f"{100 - FILTERS} other classes" in text


def test_nothing_is_shown_where_there_is_nothing() -> None:
    assert pictures.mistakes(Gallery()) == pictures.confusions(Gallery()) == pictures.feature_map(None) == ""
