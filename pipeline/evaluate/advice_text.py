"""Advice as a screen for the terminal and as values for JSON."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .advice import Advice, Recommendation
from .advice_facts import Facts
from .advice_rules import Reason, Step

WIDTH = 100
HOW_TO_JUDGE = (
    "What decides is how near your images are to those the backbone was trained on (ImageNet: photographs of"
    " animals, plants, things and scenes). Similar: ordinary photographs. Different: X-rays, microscopy, satellite"
    " images, drawings, documents, spectrograms. Say which with --domain similar or --domain different; or train the"
    " probe and ask again, since its score tells."
)
MIRROR = (
    "Set finetune.augment.horizontal_flip=0 where a mirrored image means something else (digits, letters, left and"
    " right)."
)


@dataclass(frozen=True)
class Given:
    """How the user called: the params file and the settings, repeated in every command."""

    file: str | None = None
    settings: tuple[str, ...] = ()


def advice_lines(facts: Facts, advice: Advice, given: Given) -> Iterator[str]:
    """The whole screen."""
    yield from _fact_lines(facts)
    for reason in advice.evidence:
        yield from _wrapped(_sourced(reason), "  - ", "    ")
    for warning in advice.warnings:
        yield from _wrapped(f"Warning: {warning}", "  ! ", "    ")
    if advice.domain is None:
        yield ""
        yield from _wrapped(HOW_TO_JUDGE)
    shared = shared_steps(advice.recommendations)
    if len(advice.recommendations) > 1 and shared:
        yield ""
        yield "Either way, first:"
        yield from _step_lines(advice.recommendations[0].steps[:shared], given)
    else:
        shared = 0
    for recommendation in advice.recommendations:
        yield ""
        yield from _recommendation_lines(recommendation, advice, given, skip=shared)
    if any("finetune" in step.verbs for each in advice.recommendations for step in each.steps):
        yield ""
        yield from _wrapped(MIRROR)


def advice_values(facts: Facts, advice: Advice, given: Given) -> dict[str, Any]:
    """The object of ``--json``, without what only the scan knows."""
    smallest, largest = facts.smallest, facts.largest
    return {
        "train": facts.train,
        "train_is_estimated": facts.estimated,
        **facts.others,
        "classes": len(facts.class_names),
        "smallest": {"label": smallest[0], "n": smallest[1]},
        "median": facts.median,
        "largest": {"label": largest[0], "n": largest[1]},
        "imbalance": facts.imbalance,
        "majority_share": largest[1] / facts.train,
        "duplicates": facts.duplicates,
        "leaked": facts.leaked,
        "probe": None if facts.probe is None else vars(facts.probe),
        "finetuned": None if facts.tuned is None else vars(facts.tuned),
        "curve": [vars(point) for point in facts.curve],
        "domain": advice.domain,
        "judged_by": advice.judged_by,
        "evidence": [reason.text for reason in advice.evidence],
        "recommendations": [_values(each, given) for each in advice.recommendations],
        "warnings": list(advice.warnings),
    }


def commands(step: Step, given: Given) -> tuple[str | None, str]:
    """The step as a line for make (None where there is no target) and as one for the shell."""
    return _make_line(step, given), " && ".join(_verb_lines(step, given))


def shared_steps(recommendations: Sequence[Recommendation]) -> int:
    """How many steps all recommendations begin with."""
    columns = zip(*(each.steps for each in recommendations), strict=False)
    return next((n for n, column in enumerate(columns) if len(set(column)) > 1), min(_lengths(recommendations)))


def _lengths(recommendations: Sequence[Recommendation]) -> list[int]:
    return [len(each.steps) for each in recommendations]


def _fact_lines(facts: Facts) -> Iterator[str]:
    others = "".join(f", {count:,} {name}" for name, count in facts.others.items())
    about = "about " if facts.estimated else ""
    yield f"{about}{facts.train:,} training images{others}, in {len(facts.class_names)} classes"
    (small, fewest), (large, most) = facts.smallest, facts.largest
    sizes = f"smallest {fewest:,} ({small!r}), median {facts.median:,g}, largest {most:,} ({large!r})"
    yield from _wrapped(f"images a class: {sizes}; largest to smallest {facts.imbalance:.1f}", "  ", "    ")
    yield f"  always naming {large!r} would be right for {100 * most / facts.train:.1f} % of them"
    if facts.duplicates:
        yield f"  {facts.duplicates:,} files repeat another one byte for byte"


def _recommendation_lines(recommendation: Recommendation, advice: Advice, given: Given, *, skip: int) -> Iterator[str]:
    if advice.domain is None:
        head = f"If your images are {recommendation.domain}: "
    else:
        who = "as you say" if advice.judged_by == "user" else "as the probe's score says"
        head = f"Domain {recommendation.domain}, {who}. "
    yield from _wrapped(head + recommendation.title)
    for reason in recommendation.reasons:
        yield from _wrapped(_sourced(reason), "  - ", "    ")
    if skip == len(recommendation.steps):
        yield "  Nothing more to run: `pipeline predict` labels new images with the probe."
    yield from _step_lines(recommendation.steps[skip:], given, first=skip + 1)


def _step_lines(steps: Sequence[Step], given: Given, first: int = 1) -> Iterator[str]:
    for number, step in enumerate(steps, first):
        yield from _wrapped(step.what, f"  {number}. ", "     ")
        make, shell = commands(step, given)
        if make:
            yield f"       {make}"
        yield f"       {shell}"


def _values(recommendation: Recommendation, given: Given) -> dict[str, Any]:
    steps = []
    for step in recommendation.steps:
        make, shell = commands(step, given)
        steps.append({"what": step.what, "settings": list(step.settings), "make": make, "shell": shell})
    return {
        "domain": recommendation.domain,
        "strategy": recommendation.strategy,
        "title": recommendation.title,
        "reasons": [vars(reason) for reason in recommendation.reasons],
        "steps": steps,
    }


def _make_line(step: Step, given: Given) -> str | None:
    if step.target is None:
        return None
    words = ["make", step.target]
    words += [f"PARAMS={shlex.quote(given.file)}"] if given.file else []
    settings = " ".join([*given.settings, *step.settings])
    words += [f"SET={_quoted(settings)}"] if settings else []
    words += [f"ARGS={_quoted(' '.join(step.options))}"] if step.options else []
    return " ".join(words)


def _verb_lines(step: Step, given: Given) -> Iterator[str]:
    settings = [word for setting in (*given.settings, *step.settings) for word in ("-s", setting)]
    file = ["-p", given.file] if given.file else []
    for verb in step.verbs:
        own = step.options if verb == step.verbs[-1] else ()
        yield shlex.join(["pipeline", verb, *own, *file, *settings])


def _quoted(text: str) -> str:
    """In double quotes, as people write it, where nothing in it means something to the shell."""
    return f'"{text}"' if not set(text) & set('"\\$`!') else shlex.quote(text)


def _sourced(reason: Reason) -> str:
    return reason.text if reason.source is None else f"{reason.text} [{reason.source}]"


def _wrapped(text: str, first: str = "", rest: str = "") -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
