"""Pictures as HTML: figures of images, mistakes with what explains them, and the map. CSS alone filters and shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..evaluate.text import images, percent
from ..insight.gallery import ATLAS_SIDE, ClassPictures, Confusion, FeatureMap, Gallery, Mistake, Picture
from . import page
from .page import esc

# Told apart by people with the usual kinds of colour blindness (Okabe and Ito, Color Universal Design, 2008), grey for
# their black, which a dark page would swallow. After one round of them come squares, after two hollow dots.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442", "#8b95a1")
SHAPES = ("background:{0}", "background:{0};border-radius:1px", "background:none;border:2.5px solid {0}")
FILTERS = len(COLOURS) * len(SHAPES)  # classes that can be shown and hidden one by one


def tile(picture: Picture, *lines: str, kind: str = "") -> str:
    """An image with its path as a title, and lines of HTML below; its path alone where the image has gone."""
    shown = (
        f'<img src="{picture.uri}" alt="{esc(picture.path)}" title="{esc(picture.path)}">'
        if picture.uri
        else f'<span class="gone" title="{esc(picture.path)}">{esc(picture.path)}</span>'
    )
    below = "".join(f"<span>{line}</span>" for line in lines if line)
    return f'<figure class="tile {kind}">{shown}<figcaption>{below}</figcaption></figure>'


def tiles(inner: Iterable[str]) -> str:
    """Tiles side by side, or nothing."""
    text = "".join(inner)
    return f'<div class="tiles">{text}</div>' if text else ""


def mistakes(gallery: Gallery) -> str:
    """The most confident mistakes, each with the training images nearest to it."""
    if not gallery.mistakes:
        return ""
    words = f"{images(gallery.mistaken)} classified wrongly; "
    words += "all of them" if gallery.mistaken == len(gallery.mistakes) else f"the {len(gallery.mistakes)} surest"
    intro = page.paragraph(f"{words}, the surest first. Beside each the nearest training images.", soft=True)
    return intro + f'<div class="cases">{"".join(map(_case, gallery.mistakes))}</div>'


def _case(mistake: Mistake) -> str:
    sure = "" if mistake.probability is None else page.prose(percent(mistake.probability))
    own = tile(mistake.picture, f"<b>{esc(mistake.picture.label)}</b>", f"taken for {esc(mistake.predicted)}", sure)
    near = "".join(tile(picture, esc(picture.label), kind="near") for picture in mistake.nearest)
    return f'<div class="case">{own}{near}</div>'


def confusions(gallery: Gallery) -> str:
    """The pairs confused most, with examples."""
    return "".join(map(_confusion, gallery.confused))


def _confusion(pair: Confusion) -> str:
    title = f"<h3>{esc(pair.label)} taken for {esc(pair.predicted)}, {images(pair.n)}</h3>"
    return title + tiles(tile(picture) for picture in pair.examples)


def class_pictures(classes: Sequence[ClassPictures], total: int) -> str:
    """Typical and odd images of each class."""
    more = page.paragraph(f"The first {len(classes)} of {total:,} classes.", soft=True) if len(classes) < total else ""
    return more + "".join(
        f'<h3>{esc(each.label)}</h3><div class="sides"><div><p class="soft">typical</p>'
        f'{tiles(tile(picture) for picture in each.typical)}</div><div><p class="soft">odd</p>'
        f"{tiles(tile(picture) for picture in each.odd)}</div></div>"
        for each in classes
    )


# -- the map --------------------------------------------------------------------------------------------------------


def feature_map(drawn: FeatureMap | None) -> str:
    """The features in two dimensions, coloured by class; classes can be hidden, points show their image."""
    if drawn is None:
        return ""
    counts = {target: int((drawn.target == target).sum()) for target in range(len(drawn.class_names))}
    order = sorted((target for target in counts if counts[target]), key=lambda target: -counts[target])
    group = {target: min(place, FILTERS) for place, target in enumerate(order)}
    sample = f" A sample of {len(drawn.x):,} of {drawn.total:,} images." if len(drawn.x) < drawn.total else ""
    wrong = " Rings mark mistakes." if drawn.wrong.any() else ""
    what = "the image" if drawn.atlas else "which image it is"
    how = f"Tick classes on and off; point at a dot, or tap it, to see {what}."
    intro = page.paragraph(f"{drawn.method} of the features, coloured by class.{wrong}{sample} {how}", soft=True)
    keys = "".join(_key(group[target], drawn.class_names[target]) for target in order[:FILTERS])
    if len(order) > FILTERS:
        keys += _key(FILTERS, f"{len(order) - FILTERS} other classes")
    dots = "".join(_dot(drawn, place, group) for place in range(len(drawn.x)))
    return f'{intro}<style>{_rules(drawn)}</style><div class="mapping"><div class="keys">{keys}</div>' + (
        f'<div class="map">{dots}</div></div>'
    )


def _key(group: int, name: str) -> str:
    return f'<label><input type="checkbox" checked id="map-{group}"><i style="{_mark(group)}"></i>{esc(name)}</label>'


def _mark(group: int) -> str:
    """The look of a class's dots; all classes after the last of `FILTERS` share one."""
    if group >= FILTERS:
        return "background:var(--soft);opacity:.5"
    return SHAPES[group // len(COLOURS)].format(COLOURS[group % len(COLOURS)])


def _dot(drawn: FeatureMap, place: int, group: dict[int, int]) -> str:
    target = int(drawn.target[place])
    number = group.get(target, -1)
    label = drawn.class_names[target] if target >= 0 else "no label"
    wrong = ", a mistake" if drawn.wrong[place] else ""
    kind = f"m{number}{' w' if drawn.wrong[place] else ''}" if number >= 0 else "u"
    where = f"left:{100 * drawn.x[place]:.1f}%;top:{100 * (1 - drawn.y[place]):.1f}%"
    cell = f";--c:{place % 40};--r:{place // 40}" if drawn.atlas else ""
    side = " e" if drawn.x[place] > 0.5 else ""
    text = f"{esc(drawn.paths[place])}: {esc(label)}{wrong}"
    return f'<b tabindex="-1" class="{kind}{side}" style="{where}{cell}" data-t="{text}"></b>'


def _rules(drawn: FeatureMap) -> str:
    """Colours, filters and the pictures of the dots; without ``:has`` (before 2023) nothing is hidden."""
    side = ATLAS_SIDE
    rules = [
        f".mapping:has(#map-{group}:not(:checked)) .m{group}{{display:none}}.map .m{group}{{{_mark(group)}}}"
        for group in range(FILTERS + 1)
    ]
    if drawn.atlas:
        rules.append(
            f".map b:hover::before,.map b:focus::before{{width:{side}px;height:{side}px;zoom:2;"
            f"background:url({drawn.atlas}) calc(var(--c)*-{side}px) calc(var(--r)*-{side}px)}}"
        )
    return "".join(rules)
