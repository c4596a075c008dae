"""Advice: the usual table of transfer learning, what the user's own runs say beside it, and the commands that follow.

The bands of sizes are those of tutorials: conventions, not sharp limits. What stands in the table comes from the
sources named beside it; the rates are those this program starts from.
"""

from __future__ import annotations

import math
import shlex
import statistics
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any, Final, Literal, NamedTuple

from ..artifacts import CurvePoint
from .text import percent, percent_range

Domain = Literal["similar", "different"]
Strategy = Literal["probe", "probe-then-finetune", "finetune", "from-scratch"]

DOMAINS: Final[tuple[Domain, ...]] = ("similar", "different")
SMALL_BACKBONE: Final = "starter"
STRONG_BACKBONES: Final = ("resnet50", "efficientnet_b0")
TUNABLE_HEADS: Final = frozenset({"logistic", "linear", "mlp"})
FEW_IN_A_CLASS, SMALL_MEDIAN, IMBALANCED = 5, 20, 10.0
# Of the mistakes of always naming the largest class, the share that a probe removes: our own rule of thumb.
FITS, MISFITS = 0.75, 0.5
RISE, HALF = 0.01, 0.6  # of accuracy, from about half of the images to all of them
WIDTH = 100


class Why(NamedTuple):
    """A reason, and where it is written; None where the user's own data say it."""

    text: str
    source: str | None = None

    def __str__(self) -> str:
        return f"{self.text} [{self.source}]" if self.source else self.text


class Step(NamedTuple):
    """What to run next: ``verbs`` in their order, the last of which takes ``options`` and names the Make target."""

    what: str
    verbs: str
    settings: str = ""
    options: str = ""
    has_target: bool = True


class Rule(NamedTuple):
    """Holds for fewer than ``below`` training images of a domain; names entries of `WHYS` and `STEPS`."""

    below: float
    domain: Domain
    strategy: Strategy
    whys: str
    steps: str


TITLES: Final[dict[Strategy, str]] = {
    "probe": "Probe only: train a head on frozen features.",
    "probe-then-finetune": "Probe, then fine-tune at a small rate, and keep whichever is better.",
    "finetune": "Fine-tune the whole network, backbone and head each at a rate of its own.",
    "from-scratch": "Train from scratch, and compare with full fine-tuning.",
}
CS231N: Final = "Stanford CS231n, notes on transfer learning"
YOSINSKI: Final = "Yosinski et al. 2014, How transferable are features in deep neural networks?"
KORNBLITH: Final = "Kornblith et al. 2019, Do better ImageNet models transfer better?"
KUMAR: Final = "Kumar et al. 2022, Fine-tuning can distort pretrained features"
HOWARD: Final = "Howard and Ruder 2018, Universal language model fine-tuning for text classification"
HE: Final = "He et al. 2019, Rethinking ImageNet pre-training"

# fmt: off
WHYS: Final = {
    "overfits": Why("So few images would overfit millions of weights; where the domain is near, the last features fit"
                    " as they are.", CS231N),
    "baseline": Why("With few examples logistic regression on frozen features does as well as fine-tuning, or better.",
                    KORNBLITH),
    "earlier": Why("The last layers are the most tied to the images they were trained on; an earlier one"
                   " (backbone.layer, such as layer3 of a ResNet) may serve better.", CS231N),
    "further": Why("Features transfer less well the further the task is from the one they were learned on, and still"
                   " better than random ones.", YOSINSKI),
    "undistorted": Why("Starting from a trained head keeps fine-tuning from distorting good features; it did better"
                       " than either alone, above all on images unlike those of training.", KUMAR),
    "gradual": Why("Opening layer by layer from the output on, at small rates, keeps what the early layers know.",
                   HOWARD),
    "enough": Why("So many images can be trusted not to overfit when the whole network is tuned.", CS231N),
    "overtakes": Why("With more data fine-tuning overtakes the probe.", KORNBLITH),
    "rates": Why("Early layers are general and need little change: rates that fall towards the input.", HOWARD),
    "affords": Why("So many images allow training from scratch; starting from pretrained weights is often still"
                   " better, so run both.", CS231N),
    "catches-up": Why("With enough images and a long enough training, random weights reach pretrained ones, which"
                      " mainly train faster.", HE),
}
STEPS: Final = {
    "probe": Step("Train the probe; --curve shows whether more labels would help.", "extract train-head",
                  options="--curve"),
    "views": Step("Train the probe on four augmented views of each image beside the plain one.", "extract train-head",
                  "extract.views=4"),
    "gentle": Step("Fine-tune from the probe at a small rate; the probe is kept if no epoch beats it.", "finetune",
                   "finetune.epochs=10 finetune.backbone_lr=1e-5 finetune.head_lr=1e-4 finetune.patience=3"),
    "opening": Step("Fine-tune from the probe at a small rate, opening the network from its output on.", "finetune",
                    "finetune.epochs=10 finetune.backbone_lr=3e-5 finetune.head_lr=1e-4 finetune.unfreeze=gradual"
                    " finetune.augment.trivial_augment=true"),
    "find-rates": Step("Draw loss against learning rate: it suggests both rates (use them below).", "finetune",
                       options="--find-lr"),
    "full": Step("Fine-tune everything from the probe, earlier layers more slowly.", "finetune",
                 "finetune.epochs=20 finetune.backbone_lr=1e-4 finetune.head_lr=1e-3 finetune.layer_decay=0.8"
                 " finetune.augment.trivial_augment=true finetune.patience=5"),
    "scratch": Step("Train from random weights, for long and with strong augmentation.", "extract finetune",
                    "backbone.weights=random finetune.start=random finetune.epochs=100 finetune.warmup_epochs=5"
                    " finetune.backbone_lr=1e-3 finetune.head_lr=1e-3 finetune.weight_decay=0.05"
                    " finetune.label_smoothing=0.1 finetune.mixup=0.2 finetune.augment.trivial_augment=true",
                    has_target=False),
    "compare": Step("See which differences are real.", "compare"),
}
RULES: Final = (
    Rule(      100, "similar",   "probe",               "overfits baseline",                   "views"),
    Rule(      100, "different", "probe",               "baseline earlier",                    "views"),
    Rule(    1_000, "similar",   "probe",               "overfits baseline",                   "probe"),
    Rule(    1_000, "different", "probe-then-finetune", "further undistorted gradual earlier", "probe opening"),
    Rule(  100_000, "similar",   "probe-then-finetune", "undistorted enough",                  "probe gentle"),
    Rule(  100_000, "different", "finetune",            "further enough undistorted rates",    "probe find-rates full"),
    Rule(1_000_000, "similar",   "finetune",            "enough overtakes rates",              "probe find-rates full"),
    Rule(1_000_000, "different", "finetune",            "enough further rates",                "probe find-rates full"),
    Rule( math.inf, "similar",   "finetune",            "enough overtakes catches-up",         "probe find-rates full"),
    Rule( math.inf, "different", "from-scratch",        "affords catches-up",
         "probe find-rates full scratch compare"),
)
# fmt: on


def find_rule(train: int, domain: Domain) -> Rule:
    """The row of the table for ``train`` images."""
    return next(rule for rule in RULES if rule.domain == domain and train < rule.below)


# -- what is known --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """A run of stage two over these images: its score on ``split``, and that of always naming the largest class."""

    run: str
    backbone: str
    split: str
    n: int
    accuracy: float
    interval: tuple[float, float]
    chance: float
    note: str = ""

    def removed(self, accuracy: float) -> float:
        """Of the mistakes of always naming the largest class, the share that ``accuracy`` leaves out."""
        return (accuracy - self.chance) / max(1 - self.chance, 1e-9)


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned run over these images against its probe."""

    run: str
    difference: float
    p: float


@dataclass(frozen=True)
class Facts:
    """What the folder, the params and earlier runs say.

    Attributes:
        counts: training images of each class, by name.
        estimated: ``counts`` are shares of all images, since which of them train is not known before `extract`.
        others: images of the other splits, by name.
        duplicates: files whose bytes occurred before; None where contents are not known yet.
        leaked: images of the other splits that train holds too, byte for byte; None likewise.
        pretrained: the backbone's weights are not random.
        weighted: the params weight the classes already.
        tunable: fine-tuning can start from every kind of head of the params.
    """

    counts: dict[str, int]
    others: dict[str, int]
    backbone: str
    estimated: bool = False
    duplicates: int | None = None
    leaked: int | None = None
    pretrained: bool = True
    weighted: bool = False
    tunable: bool = True
    probe: Probe | None = None
    tuned: Tuned | None = None
    curve: tuple[CurvePoint, ...] = ()

    @property
    def train(self) -> int:
        return sum(self.counts.values())

    @property
    def median(self) -> float:
        return float(statistics.median(self.counts.values()))

    @property
    def imbalance(self) -> float:
        """Images of the largest class over those of the smallest that has any."""
        return max(self.counts.values()) / max(min((n for n in self.counts.values() if n), default=1), 1)

    @property
    def half_and_all(self) -> tuple[CurvePoint, CurvePoint] | None:
        """The points of the learning curve for about half of the images and for all; None where it is too short."""
        points = sorted(self.curve, key=lambda point: point.images)
        halves = [point for point in points if point.images <= HALF * points[-1].images]
        return (halves[-1], points[-1]) if halves else None

    @property
    def curve_rises(self) -> bool | None:
        """Whether accuracy still grew from half to all, by more than noise; None where the curve cannot tell."""
        ends = self.half_and_all
        return ends and ends[1].accuracy - ends[0].accuracy >= RISE and ends[1].accuracy > ends[0].high

    @property
    def judged(self) -> Domain | None:
        """What a probe's score says of the domain; None without one, or where it leaves the question open.

        A good score shows that the features fit. A poor one may be the fault of a small backbone as well.
        """
        if self.probe is None or not self.pretrained:
            return None
        low, high = map(self.probe.removed, self.probe.interval)
        if low >= FITS:
            return "similar"
        return "different" if high <= MISFITS and self.probe.backbone != SMALL_BACKBONE else None


# -- what follows ---------------------------------------------------------------------------------------------------


class TypedOptions(NamedTuple):
    """``-p`` and ``-s`` as the user typed them: every suggested command repeats them."""

    file: str | None = None
    settings: tuple[str, ...] = ()


def advise(facts: Facts, domain: Domain | None, options: TypedOptions) -> dict[str, Any]:
    """The summary of ``--json``: the table's answer for ``domain``, else for what a probe's score tells, else both."""
    judged = domain or facts.judged
    smallest, largest = (pick(facts.counts, key=lambda name: facts.counts[name]) for pick in (min, max))
    return {
        "train": facts.train,
        "train_is_estimated": facts.estimated,
        **facts.others,
        "classes": len(facts.counts),
        "smallest": {"label": smallest, "n": facts.counts[smallest]},
        "median": facts.median,
        "largest": {"label": largest, "n": facts.counts[largest]},
        "imbalance": facts.imbalance,
        "majority_share": facts.counts[largest] / facts.train,
        "duplicates": facts.duplicates,
        "leaked": facts.leaked,
        "probe": facts.probe and asdict(facts.probe),
        "finetuned": facts.tuned and asdict(facts.tuned),
        "curve": [point.model_dump() for point in facts.curve],
        "domain": judged,
        "judged_by": "user" if domain else "probe" if judged else None,
        "evidence": list(map(str, _evidence(facts))),
        "recommendations": [_recommend(facts, each, options) for each in DOMAINS if judged in (None, each)],
        "warnings": list(_warnings(facts)),
    }


def _recommend(facts: Facts, domain: Domain, options: TypedOptions) -> dict[str, Any]:
    rule = find_rule(facts.train, domain)
    whys = [WHYS[name] for name in rule.whys.split()]
    if rule.strategy != "probe" and facts.median < SMALL_MEDIAN:
        text = f"The middle class has {facts.median:g} training images: expect little of fine-tuning with so few."
        whys.append(Why(text))
    there = facts.probe is not None and facts.probe.backbone == facts.backbone and facts.curve and facts.tunable
    steps = [_adapted(STEPS[name], facts, rule) for name in rule.steps.split() if name != "probe" or not there]
    if facts.backbone == SMALL_BACKBONE or (facts.curve_rises is False and facts.judged != "similar"):
        # A backbone that is small, or that is what limits the score.
        names = " ".join(dict.fromkeys((facts.backbone, *STRONG_BACKBONES)))
        what = f"Look for a stronger backbone than {facts.backbone} (downloads weights); go on with"
        rank = Step(f"{what} -s backbone.name=...", "backbones", options=f"--rank {names}", has_target=False)
        steps.insert(0, rank)
    return {
        "domain": domain,
        "strategy": rule.strategy,
        "title": TITLES[rule.strategy],
        "reasons": [why._asdict() for why in whys],
        "steps": [
            {
                "what": step.what,
                "settings": step.settings.split(),
                "make": make_line(step, options),
                "shell": shell_line(step, options),
            }
            for step in steps
        ],
    }


def _adapted(step: Step, facts: Facts, rule: Rule) -> Step:
    """The step with class weights where classes are far apart, and a head that fine-tuning can start from."""
    verb, settings = step.verbs.split()[-1], step.settings.split()
    if verb in ("train-head", "finetune") and facts.imbalance > IMBALANCED and not facts.weighted:
        settings += ["head.class_weight=balanced", *(["finetune.class_weight=balanced"] if verb == "finetune" else [])]
    if verb in ("train-head", "finetune") and rule.strategy != "probe" and not facts.tunable:
        settings.append("head.kind=logistic")
    return step._replace(settings=" ".join(settings))


def make_line(step: Step, options: TypedOptions) -> str | None:
    """The step for make; None where it has no target."""
    words = ["make", step.verbs.split()[-1], *([f"PARAMS={shlex.quote(options.file)}"] if options.file else [])]
    settings = " ".join([*options.settings, *step.settings.split()])
    words += [f"{name}={_quoted(text)}" for name, text in (("SET", settings), ("ARGS", step.options)) if text]
    return " ".join(words) if step.has_target else None


def shell_line(step: Step, options: TypedOptions) -> str:
    """The step as commands of this program."""
    settings = [word for setting in (*options.settings, *step.settings.split()) for word in ("-s", setting)]
    common = [*(["-p", options.file] if options.file else []), *settings]
    *before, last = ([verb] for verb in step.verbs.split())
    commands = [*before, [*last, *step.options.split()]]
    return " && ".join(shlex.join(["pipeline", *command, *common]) for command in commands)


def _quoted(text: str) -> str:
    """In double quotes, as people write it, where nothing in it means something to the shell."""
    return f'"{text}"' if not set(text) & set('"\\$`!') else shlex.quote(text)


def _evidence(facts: Facts) -> Iterator[Why]:
    """What the user's own runs say, whatever the domain."""
    if facts.probe is not None:
        yield Why(_probe_text(facts.probe, facts.pretrained))
    if ends := facts.half_and_all:
        half, last = ends
        steps = f"{percent(half.accuracy)} with {half.images:,} images, {percent(last.accuracy)} with {last.images:,}"
        yield Why(
            f"The learning curve still rises ({steps}): more labelled images are the surest way to a better score."
            if facts.curve_rises
            else f"The learning curve is flat ({steps}): more images of the same kind would not help this probe. Other"
            " features would: a stronger backbone, or fine-tuning."
        )
    if tuned := facts.tuned:
        real = "the difference is real" if tuned.p < 0.05 else "they are not shown to differ"
        yield Why(
            f"Fine-tuning was tried ({tuned.run}): {100 * tuned.difference:+.1f} points against its probe"
            f" (exact McNemar p = {tuned.p:.3g}: {real})."
        )
    if facts.backbone == SMALL_BACKBONE:
        text = "The starter backbone is small; the better a network does on ImageNet, the better it transfers."
        yield Why(text, KORNBLITH)


def _probe_text(probe: Probe, pretrained: bool) -> str:
    low, high = probe.interval
    text = (
        f"The probe {probe.run} ({probe.backbone}{probe.note}) has {percent(probe.accuracy)} on {probe.split}"
        f" (95 % interval {percent_range(probe.interval)}, n = {probe.n}); always naming the largest class has"
        f" {percent(probe.chance)}"
    )
    if low <= probe.chance:
        return f"{text}: not shown to be better than that. Check the labels before anything else."
    if not pretrained:
        return f"{text}. It stood on random weights, so it says nothing about the domain."
    if probe.removed(low) >= FITS:
        left = 100 * (1 - probe.accuracy)
        return f"{text}: the features fit, and fine-tuning can gain at most the {left:.1f} points that are missing."
    if probe.removed(high) <= MISFITS:
        return f"{text}: the features fit badly. The domain is different, the backbone weak, or the classes are hard."
    return f"{text}: the features fit in part, which leaves the domain open."


def _warnings(facts: Facts) -> Iterator[str]:
    rows = sorted(facts.counts.items(), key=lambda row: row[::-1])
    if few := [f"{name!r} {count}" for name, count in rows if count < FEW_IN_A_CLASS]:
        shown = ", ".join(few[:5]) + (f" and {len(few) - 5} more" if len(few) > 5 else "")
        yield (
            f"{len(few)} class(es) with fewer than {FEW_IN_A_CLASS} training images ({shown}): hardly learned, and"
            " their scores are noise. Add images, or merge classes."
        )
    if facts.imbalance > IMBALANCED:
        done = "The params weight the classes" if facts.weighted else "The commands set class_weight=balanced"
        yield (
            f"The largest class has {facts.imbalance:.0f} times the images of the smallest. {done}; look at the"
            " balanced accuracy rather than the accuracy."
        )
    if not facts.pretrained:
        yield "backbone.weights is random: nothing is transferred. The advice supposes pretrained weights."
    if facts.leaked:
        yield (
            f"{facts.leaked:,} image(s) of val or test are also in train, byte for byte; reports also give the score"
            " without them."
        )


# -- for people -----------------------------------------------------------------------------------------------------

HOW_TO_JUDGE: Final = (
    "What decides is how near your images are to those the backbone was trained on (ImageNet: photographs of"
    " animals, plants, things and scenes). Similar: ordinary photographs. Different: X-rays, microscopy, satellite"
    " images, drawings, documents, spectrograms. Say which with --domain similar or --domain different; or train the"
    " probe and ask again, since its score tells."
)
MIRROR: Final = (
    "Set finetune.augment.horizontal_flip=0 where a mirrored image means something else (digits, letters, left and"
    " right)."
)
WHO: Final = {
    "user": "Domain {}, as you say.",
    "probe": "Domain {}, as the probe's score says.",
    None: "If your images are {}:",
}


def advice_lines(summary: dict[str, Any]) -> Iterator[str]:
    """The screen for the terminal, from what `advise` gives."""
    yield from _fact_lines(summary)
    yield from _bullets(summary["evidence"])
    yield from _bullets((f"Warning: {warning}" for warning in summary["warnings"]), "!")
    answers, shared = summary["recommendations"], 0
    if summary["judged_by"] is None:
        yield from ("", *_wrapped(HOW_TO_JUDGE))
        if shared := _shared_steps(*(answer["steps"] for answer in answers)):
            yield from ("", "Either way, first:", *_step_lines(answers[0]["steps"][:shared]))
    for answer in answers:
        who = WHO[summary["judged_by"]].format(answer["domain"])
        yield from ("", *_wrapped(f"{who} {answer['title']}"), *_bullets(str(Why(**why)) for why in answer["reasons"]))
        if shared == len(answer["steps"]):
            yield "  Nothing more to run: `pipeline predict` labels new images with the probe."
        yield from _step_lines(answer["steps"][shared:], first=shared + 1)
    if any("pipeline finetune" in step["shell"] for answer in answers for step in answer["steps"]):
        yield from ("", *_wrapped(MIRROR))


def _shared_steps(*answers: list[dict[str, Any]]) -> int:
    """How many steps all answers begin with."""
    return sum(1 for _ in takewhile(lambda steps: all(step == steps[0] for step in steps), zip(*answers, strict=False)))


def _fact_lines(summary: dict[str, Any]) -> Iterator[str]:
    others = "".join(f", {summary[name]:,} {name}" for name in ("val", "test") if name in summary)
    about = "about " if summary["train_is_estimated"] else ""
    yield f"{about}{summary['train']:,} training images{others}, in {summary['classes']} classes"
    small, large = summary["smallest"], summary["largest"]
    sizes = f"smallest {small['n']:,} ({small['label']!r}), median {summary['median']:,g}, largest {large['n']:,}"
    text = f"images a class: {sizes} ({large['label']!r}); largest to smallest {summary['imbalance']:.1f}"
    yield from _wrapped(text, "  ", "    ")
    yield f"  always naming {large['label']!r} would be right for {percent(summary['majority_share'])} of them"
    if summary["duplicates"]:
        yield f"  {summary['duplicates']:,} files repeat another one byte for byte"


def _step_lines(steps: Sequence[dict[str, Any]], first: int = 1) -> Iterator[str]:
    for number, step in enumerate(steps, first):
        yield from _wrapped(step["what"], f"  {number}. ", "     ")
        yield from (f"       {line}" for line in (step["make"], step["shell"]) if line)


def _bullets(texts: Iterable[str], mark: str = "-") -> Iterator[str]:
    for text in texts:
        yield from _wrapped(text, f"  {mark} ", "    ")


def _wrapped(text: str, first: str = "", rest: str = "") -> list[str]:
    wrap = textwrap.TextWrapper(WIDTH, first, rest, break_long_words=False, break_on_hyphens=False)
    return wrap.wrap(text)
