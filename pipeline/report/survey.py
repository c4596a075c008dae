"""The page of ``pipeline inspect``: what was found, with pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ..data.source import SPLITS
from ..evaluate.text import images, percent, percent_range
from ..insight.duplicates import DuplicateGroup
from ..insight.gallery import Curator, Gallery
from ..insight.labelling import Next
from ..insight.survey import Survey
from . import page, pictures
from .page import esc

GROUPS, OF_A_GROUP = 30, 6
DOUBTS = 36
OUTLIERS, POOR, NEXT = 24, 24, 60


@dataclass(frozen=True)
class SurveyContent:
    """What the page is made from.

    Attributes:
        next: what to label next, where that was asked.
    """

    name: str
    survey: Survey
    gallery: Gallery
    curator: Curator
    made: str
    next: Next | None = None


def render_survey(content: SurveyContent) -> str:
    """The page as HTML without external resources and without scripts."""
    sections = (page.section(title, section(content)) for title, section in SURVEY_SECTIONS.items())
    return page.page(content.name, [_header(content), _cards(content.survey), _notes(content), *sections])


def _header(content: SurveyContent) -> str:
    table = content.survey.table
    counts = ", ".join(
        f"{int((table.splits == number).sum()):,} {name}"
        for number, name in enumerate(SPLITS)
        if (table.splits == number).any()
    )
    line = f"{images(len(table))} ({counts}) in {len(table.class_names)} classes. {content.made}"
    return f"<h1>{esc(content.name)}</h1>{page.paragraph(line, soft=True)}"


def _cards(survey: Survey) -> str:
    cards = {
        "Groups of near-duplicates": (len(survey.groups), f"{sum(len(g.rows) for g in survey.groups):,} images"),
        "Leaks across splits": (len(survey.leaks), "groups in more than one split"),
        "Labels in doubt": (len(survey.doubted), _expected(survey)),
        "Outliers": (len(survey.outliers), "far from their class"),
        "Hard to see": (len(survey.poor), "dark, blurred, tiny ..."),
    }
    inner = "".join(
        f'<div class="card"><span>{esc(title)}</span><b>{"–" if value is None else f"{value:,}"}</b>'
        f"<span>{esc(words)}</span></div>"
        for title, (value, words) in cards.items()
    )
    return f'<div class="scores counts">{inner}</div>'


def _expected(survey: Survey) -> str:
    if survey.judged is None:
        return "no head to judge by"
    count = len(survey.judged.doubts.doubted)
    words = [f"of {count} about {survey.judged.doubts.expected_among_first(count):.0f} wrong"] if count else []
    words += [f"{len(survey.disputed)} look alike and differ in label"] if survey.disputed else []
    return "; ".join(words) or "none"


def _notes(content: SurveyContent) -> str:
    what = (
        "insights.csv lists every finding. Write a label into its last column, or - to leave an image out, and give "
        "the file as data.corrections; no image is touched."
    )
    notes = page.note(page.paragraph(what))
    return notes + (page.note(page.bullets(content.survey.notes), warn=True) if content.survey.notes else "")


# -- sections -------------------------------------------------------------------------------------------------------


def accuracy(content: SurveyContent) -> str:
    """What the findings mean for the accuracy on the reported split."""
    survey = content.survey
    shares = survey.scores()
    if not shares or survey.judged is None or survey.reported is None:
        return ""
    rows = [
        (
            esc(share.name),
            f"{share.n:,}",
            percent(share.accuracy),
            "–" if share.interval is None else percent_range(share.interval),
        )
        for share in shares
    ]
    text = page.table(("images", "n", "accuracy", "95 % interval"), rows)
    bounds = survey.score_range()
    split = SPLITS[survey.reported]
    intro = page.paragraph(f"{survey.judged.head} On {split}:", soft=True)
    doubted = int((survey.table.splits[survey.doubted] == survey.reported).sum())
    if bounds is None or not doubted:
        return intro + text
    line = (
        f"Should the {doubted} doubted labels of {split} be wrong, it lies between {percent_range(bounds, ' and ')} %."
    )
    return intro + text + page.paragraph(line)


def duplicates(content: SurveyContent) -> str:
    """Groups side by side, leaks first, and how sure the bar is."""
    survey = content.survey
    bar = survey.bar
    kinds = ", ".join(f"{kind} {percent(share)}" for kind, share in bar.missed.items())
    measured = (
        f"Measured on {bar.copies} copies of these images the search misses {percent(bar.miss_rate)} ({kinds}), and at "
        f"most {percent(bar.false_alarms)} of the images are expected to be paired in error."
        if bar.copies
        else "The bar could not be measured, since there are too few images."
    )
    shown = survey.groups[:GROUPS]
    more = f" The first {GROUPS} of {len(survey.groups):,} groups." if len(survey.groups) > GROUPS else ""
    found = "" if survey.groups else " None was found."
    return page.paragraph(measured + found + more, soft=True) + "".join(_group(content, group) for group in shown)


def _group(content: SurveyContent, group: DuplicateGroup) -> str:
    kinds = [
        *(["leak across splits"] if group.leaks else []),
        *(["labels disagree"] if group.disputed else []),
        *(["byte for byte"] if group.score == float("inf") else []),
    ]
    shown = content.curator.pictures(group.rows[:OF_A_GROUP])
    more = f", {len(group.rows)} images" if len(group.rows) > OF_A_GROUP else ""
    title = f'<p class="soft">{esc((", ".join(kinds) or "near-duplicates") + more)}</p>'
    inner = pictures.tiles(pictures.tile(each, esc(each.label), esc(each.split)) for each in shown)
    return f'<div class="group">{title}{inner}</div>'


def labels(content: SurveyContent) -> str:
    """Labels in doubt with the suggestion and what speaks for it."""
    judged, curator = content.survey.judged, content.curator
    if judged is None:
        return ""
    doubted = judged.doubts.doubted
    if not len(doubted):
        return page.paragraph(f"No label is more likely wrong than right.{_disputed(content.survey)}", soft=True)
    first = doubted[:DOUBTS]
    expected = judged.doubts.expected_among_first(len(first))
    total = judged.doubts.wrong.sum()
    intro = (
        f"{judged.head} Of the first {len(first)} about {expected:.0f} are likely to be wrong; among all "
        f"{images(len(judged.rows))} about {total:.0f}, most of which cannot be told from hard images."
        f"{_disputed(content.survey)}"
    )
    near = curator.nearest_in_train(judged.rows[first], 2)
    cases = []
    for number, place in enumerate(first):
        row = int(judged.rows[place])
        (own,) = curator.pictures([row])
        agree = (
            f"also on {judged.agreeing[place]} of {len(judged.backbones)} other backbones" if judged.backbones else ""
        )
        lines = (
            f"<b>{esc(own.label)}</b>",
            f"{esc(curator.table.class_names[judged.doubts.suggestion[place]])}?",
            page.prose(f"wrong: {percent(judged.doubts.wrong[place])}"),
            esc(agree),
        )
        around = "".join(pictures.tile(each, esc(each.label), kind="near") for each in curator.pictures(near[number]))
        cases.append(f'<div class="case">{pictures.tile(own, *lines)}{around}</div>')
    return page.paragraph(intro, soft=True) + f'<div class="cases">{"".join(cases)}</div>'


def _disputed(survey: Survey) -> str:
    count = len(survey.disputed)
    return f" {images(count)} look like another that is labelled otherwise: see the near-duplicates." if count else ""


def outliers(content: SurveyContent) -> str:
    """Images far from their class, and the share of mistakes among them."""
    survey = content.survey
    rows = survey.outliers
    if not len(rows):
        return page.paragraph("No image is far from its class.", soft=True)
    share, usual = survey.errors_among(rows), survey.errors_among(survey.table.targets.argsort())
    words = f"{images(len(rows))} far from the others of their class"
    if share is not None and usual is not None and share.n:
        words += f"; {percent(share.accuracy)} of those judged are classified wrongly"
        words += f", of all images {percent(usual.accuracy)}"
    shown = content.curator.pictures(rows[:OUTLIERS].tolist())
    return page.paragraph(f"{words}.", soft=True) + pictures.tiles(
        pictures.tile(each, esc(each.label), f"{survey.outlier[row]:.1f}")
        for each, row in zip(shown, rows.tolist(), strict=False)
    )


def quality(content: SurveyContent) -> str:
    """Images that are hard to see, with what ails them."""
    survey = content.survey
    rows = survey.poor
    if not len(rows):
        return ""
    shown = content.curator.pictures(rows[:POOR].tolist())
    return page.paragraph(f"{images(len(rows))}, the worst first.", soft=True) + pictures.tiles(
        pictures.tile(each, esc(each.label), esc(survey.problems[row]))
        for each, row in zip(shown, rows.tolist(), strict=False)
    )


def label_next(content: SurveyContent) -> str:
    """What to label next."""
    if content.next is None:
        return ""
    picks = content.next.picks[:NEXT]
    shown = content.next.curator.pictures([pick.row for pick in picks])
    words = f"{images(len(content.next.picks))}, the most useful first; next.csv lists them."
    return page.paragraph(words, soft=True) + (
        pictures.tiles(pictures.tile(each, page.prose(pick.reason)) for each, pick in zip(shown, picks, strict=True))
    )


def mistakes(content: SurveyContent) -> str:
    """The surest mistakes, and the pairs confused most."""
    return pictures.mistakes(content.gallery)


def confusions(content: SurveyContent) -> str:
    return pictures.confusions(content.gallery)


def classes(content: SurveyContent) -> str:
    return pictures.class_pictures(content.gallery.classes, len(content.survey.table.class_names))


def feature_map(content: SurveyContent) -> str:
    return pictures.feature_map(content.gallery.map)


SURVEY_SECTIONS: Final[dict[str, Callable[[SurveyContent], str]]] = {
    "Label these next": label_next,
    "What it means for the accuracy": accuracy,
    "Labels in doubt": labels,
    "Near-duplicates": duplicates,
    "Outliers": outliers,
    "Hard to see": quality,
    "Mistakes": mistakes,
    "Most confused": confusions,
    "Classes": classes,
    "Map": feature_map,
}
