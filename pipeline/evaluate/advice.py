"""Facts about a data set in, advice out: which row of the table holds, and what the user's own runs say beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from .advice_facts import Facts, Point, Probe
from .advice_rules import DOMAINS, KORNBLITH, PROBE, TITLES, Domain, Reason, Step, Strategy, find_rule

FEW_IN_A_CLASS: Final = 5  # below it a class is hardly learned, and not measured
SMALL_MEDIAN: Final = 20
IMBALANCED: Final = 10.0
# Of the mistakes of always naming the largest class, the share that a probe removes: our own rule of thumb.
FITS: Final = 0.75
MISFITS: Final = 0.5
RISE: Final = 0.01  # of accuracy, from about half of the images to all of them
HALF: Final = 0.6
SMALL_BACKBONE: Final = "starter"
STRONG_BACKBONES: Final = ("resnet50", "efficientnet_b0")
TUNABLE_HEADS: Final = ("logistic", "linear", "mlp")


@dataclass(frozen=True)
class Recommendation:
    """What to do where the images are of ``domain``."""

    domain: Domain
    strategy: Strategy
    title: str
    reasons: tuple[Reason, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Advice:
    """One recommendation where the domain is known, else one for each.

    Attributes:
        judged_by: who said how near the domain is: the user, a probe's score, or nobody.
        evidence: what the user's own runs say, whatever the domain.
    """

    domain: Domain | None
    judged_by: Literal["user", "probe"] | None
    recommendations: tuple[Recommendation, ...]
    evidence: tuple[Reason, ...]
    warnings: tuple[str, ...]


def advise(facts: Facts, domain: Domain | None = None) -> Advice:
    """The table's answer for ``domain``; without one for what a probe's score tells, else for both."""
    judged = domain or judge_domain(facts)
    wanted = DOMAINS if judged is None else (judged,)
    by: Literal["user", "probe"] | None = "user" if domain else "probe" if judged else None
    recommendations = tuple(_recommend(facts, each) for each in wanted)
    return Advice(judged, by, recommendations, tuple(_evidence(facts)), tuple(_warnings(facts)))


def judge_domain(facts: Facts) -> Domain | None:
    """What a probe's score says of the domain; None without one, or where it leaves the question open.

    A good score shows that the features fit. A poor one may be the fault of a small backbone as well.
    """
    if facts.probe is None or not facts.pretrained:
        return None
    low, high = (_share_removed(facts.probe, accuracy) for accuracy in facts.probe.interval)
    if low >= FITS:
        return "similar"
    return "different" if high <= MISFITS and facts.probe.backbone != SMALL_BACKBONE else None


def curve_rises(curve: Sequence[Point]) -> bool | None:
    """Whether accuracy still grew from about half of the images to all; None where the curve cannot tell."""
    points = sorted(curve, key=lambda point: point.images)
    halves = [point for point in points if point.images <= HALF * points[-1].images]
    if not halves:
        return None
    last, half = points[-1], halves[-1]
    return last.accuracy - half.accuracy >= RISE and last.accuracy > half.high


def _share_removed(probe: Probe, accuracy: float) -> float:
    return (accuracy - probe.chance) / max(1 - probe.chance, 1e-9)


def _recommend(facts: Facts, domain: Domain) -> Recommendation:
    rule = find_rule(facts.train, domain)
    reasons = list(rule.reasons)
    if rule.strategy != "probe" and facts.median < SMALL_MEDIAN:
        text = f"The middle class has {facts.median:g} training images: expect little of fine-tuning with so few."
        reasons.append(Reason(text))
    todo = [step for step in rule.steps if step != PROBE or not _has_probe(facts)]
    steps = (*_choose_backbone(facts), *(_adapted(step, facts, rule.strategy) for step in todo))
    return Recommendation(domain, rule.strategy, TITLES[rule.strategy], tuple(reasons), steps)


def _has_probe(facts: Facts) -> bool:
    """Whether the first step has been done: a probe on this backbone, its curve, and a head that can be tuned."""
    tunable = set(facts.head_kinds) <= set(TUNABLE_HEADS)
    return facts.probe is not None and facts.probe.backbone == facts.backbone and bool(facts.curve) and tunable


def _choose_backbone(facts: Facts) -> list[Step]:
    """A comparison of backbones first, where the one at hand is small or is what limits the score."""
    limits = curve_rises(facts.curve) is False and judge_domain(facts) != "similar"
    if facts.backbone != SMALL_BACKBONE and not limits:
        return []
    names = tuple(dict.fromkeys((facts.backbone, *STRONG_BACKBONES)))
    what = f"Look for a stronger backbone than {facts.backbone} (downloads weights); go on with -s backbone.name=..."
    return [Step(what, ("backbones",), options=("--rank", *names))]


def _adapted(step: Step, facts: Facts, strategy: Strategy) -> Step:
    """The step with class weights where classes are far apart, and a head that fine-tuning can start from."""
    if not {"train-head", "finetune"} & set(step.verbs):
        return step
    settings = list(step.settings)
    if facts.imbalance > IMBALANCED and not facts.weighted:
        settings.append("head.class_weight=balanced")
        settings += ["finetune.class_weight=balanced"] if "finetune" in step.verbs else []
    if strategy != "probe" and not set(facts.head_kinds) <= set(TUNABLE_HEADS):
        settings.append("head.kind=logistic")
    return replace(step, settings=tuple(settings))


def _evidence(facts: Facts) -> list[Reason]:
    found = []
    if facts.probe is not None:
        found.append(Reason(_probe_text(facts.probe, facts.pretrained)))
    rises = curve_rises(facts.curve)
    if rises is not None:
        found.append(Reason(_curve_text(sorted(facts.curve, key=lambda point: point.images), rises)))
    if facts.tuned is not None:
        real = "the difference is real" if facts.tuned.p < 0.05 else "they are not shown to differ"
        text = (
            f"Fine-tuning was tried ({facts.tuned.run}): {100 * facts.tuned.difference:+.1f} points against its probe"
        )
        found.append(Reason(f"{text} (exact McNemar p = {facts.tuned.p:.3g}: {real})."))
    if facts.backbone == SMALL_BACKBONE:
        text = "The starter backbone is small; the better a network does on ImageNet, the better it transfers."
        found.append(Reason(text, KORNBLITH))
    return found


def _probe_text(probe: Probe, pretrained: bool) -> str:
    low, high = probe.interval
    text = (
        f"The probe {probe.run} ({probe.backbone}{probe.note}) has {100 * probe.accuracy:.1f} % on {probe.split}"
        f" (95 % interval {100 * low:.1f} to {100 * high:.1f}, n = {probe.n}); always naming the largest class has"
        f" {100 * probe.chance:.1f} %"
    )
    if low <= probe.chance:
        return f"{text}: not shown to be better than that. Check the labels before anything else."
    if not pretrained:
        return f"{text}. It stood on random weights, so it says nothing about the domain."
    if _share_removed(probe, low) >= FITS:
        left = 100 * (1 - probe.accuracy)
        return f"{text}: the features fit, and fine-tuning can gain at most the {left:.1f} points that are missing."
    if _share_removed(probe, high) <= MISFITS:
        return f"{text}: the features fit badly. The domain is different, the backbone weak, or the classes are hard."
    return f"{text}: the features fit in part, which leaves the domain open."


def _curve_text(points: Sequence[Point], rises: bool) -> str:
    last = points[-1]
    half = [point for point in points if point.images <= HALF * last.images][-1]
    steps = f"{100 * half.accuracy:.1f} % with {half.images:,} images, {100 * last.accuracy:.1f} % with {last.images:,}"
    if rises:
        return f"The learning curve still rises ({steps}): more labelled images are the surest way to a better score."
    return (
        f"The learning curve is flat ({steps}): more images of the same kind would not help this probe. Other features"
        " would: a stronger backbone, or fine-tuning."
    )


def _warnings(facts: Facts) -> list[str]:
    warnings = []
    rows = sorted(zip(facts.counts, facts.class_names, strict=True))
    few = [f"{name!r} {count}" for count, name in rows if count < FEW_IN_A_CLASS]
    if few:
        shown = ", ".join(few[:5]) + (f" and {len(few) - 5} more" if len(few) > 5 else "")
        warnings.append(
            f"{len(few)} class(es) with fewer than {FEW_IN_A_CLASS} training images ({shown}): hardly learned, and"
            " their scores are noise. Add images, or merge classes."
        )
    if facts.imbalance > IMBALANCED:
        done = "The params weight the classes" if facts.weighted else "The commands set class_weight=balanced"
        warnings.append(
            f"The largest class has {facts.imbalance:.0f} times the images of the smallest. {done}; look at the"
            " balanced accuracy rather than the accuracy."
        )
    if not facts.pretrained:
        warnings.append("backbone.weights is random: nothing is transferred. The advice supposes pretrained weights.")
    if facts.leaked:
        warnings.append(
            f"{facts.leaked:,} image(s) of val or test are also in train, byte for byte; reports also give the score"
            " without them."
        )
    return warnings
