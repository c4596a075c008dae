"""Advice: the usual table of transfer learning (``advice.yaml``), what the user's own runs say beside it, and the
commands that follow."""

from __future__ import annotations

import shlex
import statistics
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final, Literal, NamedTuple

import yaml

from ..artifacts import CurvePoint
from .text import percent, percent_range

Domain = Literal["similar", "different"]
Row = dict[str, Any]
TABLE: Final[Row] = yaml.safe_load(files(__package__).joinpath("advice.yaml").read_text(encoding="utf-8"))
DOMAINS: Final[tuple[Domain, ...]] = ("similar", "different")
SMALL_BACKBONE, STRONG_BACKBONES = "starter", ("resnet50", "efficientnet_b0")
TUNABLE_HEADS: Final = frozenset({"logistic", "linear", "mlp"})
FEW_IN_A_CLASS, SMALL_MEDIAN, IMBALANCED = 5, 20, 10.0
# Of the mistakes of always naming the largest class, the share that a probe removes: our own rule of thumb.
FITS, MISFITS = 0.75, 0.5
RISE, HALF = 0.01, 0.6  # of accuracy, from about half of the images to all of them


class TypedOptions(NamedTuple):
    """``-p`` and ``-s`` as the user typed them: every suggested command repeats them."""

    file: str | None = None
    settings: tuple[str, ...] = ()


class Probe(NamedTuple):
    """A run of stage two over these images, and the score of always naming the largest class."""

    run: str
    backbone: str
    split: str
    n: int
    accuracy: float
    interval: Sequence[float]
    chance: float
    note: str = ""


class Finetuned(NamedTuple):
    """A fine-tuned run over these images against its probe, in accuracy."""

    run: str
    difference: float
    p: float


@dataclass(frozen=True)
class Facts:
    """What the folder, the params and earlier runs say; None is what is not known before `extract`."""

    counts: dict[str, int]  # training images of each class
    others: dict[str, int]  # images of the other splits
    backbone: str
    estimated: bool = False  # the counts are shares of all images, since the splits are not known
    duplicates: int | None = None  # files whose bytes occurred before
    leaked: int | None = None  # images of the other splits that train has too, byte for byte or by their group
    pretrained: bool = True
    weighted: bool = False  # the params weight the classes
    tunable: bool = True  # fine-tuning can start from every kind of head of the params
    probe: Probe | None = None
    finetuned: Finetuned | None = None
    curve: Sequence[CurvePoint] = ()

    @property
    def imbalance(self) -> float:
        """Images of the largest class over those of the smallest that has any."""
        return max(self.counts.values()) / min(n for n in self.counts.values() if n)


def find_rule(train: int, domain: Domain) -> Row:
    """The row of the table for ``train`` images."""
    rule: Row = next(row for row in TABLE["rules"] if row["domain"] == domain and train < row["below"])
    return rule


def advise(facts: Facts, domain: Domain | None, options: TypedOptions) -> Row:
    """The summary of ``--json``: the table's answer for ``domain``, else for what a probe's score tells, else both."""
    (probe, verdict), (curve, rises) = _read_probe(facts), _read_curve(facts.curve)
    judged, small = domain or verdict, facts.backbone == SMALL_BACKBONE
    weak = small or (rises is False and verdict != "similar")  # the backbone is what limits the score
    evidence = (probe, curve, _read_finetuned(facts.finetuned), _say("small_backbone") if small else "")
    smallest, largest = (pick(facts.counts.items(), key=lambda item: item[1]) for pick in (min, max))
    train = sum(facts.counts.values())
    return {
        "train": train,
        "train_is_estimated": facts.estimated,
        **facts.others,
        "classes": len(facts.counts),
        "smallest": dict(zip(("label", "n"), smallest, strict=True)),
        "median": float(statistics.median(facts.counts.values())),
        "largest": dict(zip(("label", "n"), largest, strict=True)),
        "imbalance": facts.imbalance,
        "majority_share": largest[1] / train,
        "duplicates": facts.duplicates,
        "leaked": facts.leaked,
        "probe": facts.probe and facts.probe._asdict(),
        "finetuned": facts.finetuned and facts.finetuned._asdict(),
        "curve": [point.model_dump() for point in facts.curve],
        "domain": judged,
        "judged_by": "user" if domain else "probe" if judged else None,
        "evidence": [text for text in evidence if text],
        "recommendations": [
            _recommend(facts, find_rule(train, each), weak, options) for each in DOMAINS if judged in (None, each)
        ],
        "warnings": list(_warnings(facts)),
    }


def _recommend(facts: Facts, rule: Row, weak: bool, options: TypedOptions) -> Row:
    steps, reasons, median = rule["steps"], rule["reasons"], statistics.median(facts.counts.values())
    if rule["strategy"] != "probe" and median < SMALL_MEDIAN:
        reasons = [*reasons, {"text": _say("little_hope", median=median), "source": None}]
    if facts.probe and facts.probe.backbone == facts.backbone and facts.curve and facts.tunable:
        steps = [step for step in steps if "--curve" not in step.get("options", "")]  # it is there already
    if weak:
        names = " ".join(dict.fromkeys((facts.backbone, *STRONG_BACKBONES)))
        what = _say("stronger", backbone=facts.backbone)
        steps = [{"what": what, "verbs": "backbones", "options": f"--rank {names}", "make": False}, *steps]
    return {
        "domain": rule["domain"],
        "strategy": rule["strategy"],
        "title": TABLE["strategies"][rule["strategy"]],
        "reasons": reasons,
        "steps": [_commands(step, _settings(step, facts, rule["strategy"]), options) for step in steps],
    }


def _settings(step: Row, facts: Facts, strategy: str) -> list[str]:
    """The step's own, class weights where classes are far apart, and a head that fine-tuning can start from."""
    settings = step.get("settings", "").split()
    sections = {"train-head": ["head"], "finetune": ["head", "finetune"]}.get(step["verbs"].split()[-1], [])
    if facts.imbalance > IMBALANCED and not facts.weighted:
        settings += [f"{section}.class_weight=balanced" for section in sections]
    return [*settings, "head.kind=logistic"] if sections and strategy != "probe" and not facts.tunable else settings


def _commands(step: Row, settings: list[str], options: TypedOptions) -> Row:
    """The step as it is typed for make, None where it has no target, and for this program."""
    verbs, own, every = step["verbs"].split(), step.get("options", ""), [*options.settings, *settings]
    variables = {"SET": " ".join(every), "ARGS": own}
    make = ["make", verbs[-1], *([f"PARAMS={shlex.quote(options.file)}"] if options.file else [])]
    make += [f"{name}={_quoted(text)}" for name, text in variables.items() if text]
    common = [*(["-p", options.file] if options.file else []), *(word for each in every for word in ("-s", each))]
    if verbs == ["extract", "train-head"]:
        verbs, own = verbs[1:], f"--extract {own}"
    lines = [shlex.join(["pipeline", verb, *(own.split() if verb == verbs[-1] else []), *common]) for verb in verbs]
    made = " ".join(make) if step.get("make", True) else None
    return {"what": step["what"], "settings": settings, "make": made, "shell": " && ".join(lines)}


def _quoted(text: str) -> str:
    """In double quotes, as people write it, where nothing in it means something to the shell."""
    return f'"{text}"' if not set(text) & set('"\\$`!') else shlex.quote(text)


def _say(text: str, **values: object) -> str:
    said: str = TABLE["texts"][text].format(**values)
    return said


# -- what the user's own data say -------------------------------------------------------------------------------------


def _read_probe(facts: Facts) -> tuple[str, Domain | None]:
    """What a probe's score says, also of the domain: a good one shows that the features fit, a poor one may be the
    fault of a small backbone as well."""
    if (probe := facts.probe) is None:
        return "", None
    low, high = ((bound - probe.chance) / max(1 - probe.chance, 1e-9) for bound in probe.interval)
    says = "fits" if low >= FITS else "chance" if low <= 0 else "misfits" if high <= MISFITS else "between"
    shown = {"accuracy": percent(probe.accuracy), "chance": percent(probe.chance)}
    text = _say("probe", **{**probe._asdict(), **shown, "interval": percent_range(probe.interval)})
    text += _say(f"probe_{says if facts.pretrained else 'random'}", missing=100 * (1 - probe.accuracy))
    poor = high <= MISFITS and probe.backbone != SMALL_BACKBONE
    return text, None if not facts.pretrained else "similar" if says == "fits" else "different" if poor else None


def _read_curve(curve: Sequence[CurvePoint]) -> tuple[str, bool | None]:
    """Whether accuracy still grew from about half of the images to all, by more than noise; None: it cannot tell."""
    points = sorted(curve, key=lambda point: point.images)
    halves = [point for point in points if point.images <= HALF * points[-1].images]
    if not halves:
        return "", None
    half, last = halves[-1], points[-1]
    rises = last.accuracy - half.accuracy >= RISE and last.accuracy > half.high
    shares = {"half": percent(half.accuracy), "all": percent(last.accuracy)}
    return _say("curve_rises" if rises else "curve_flat", few=half.images, many=last.images, **shares), rises


def curve_sentence(curve: Sequence[CurvePoint]) -> str:
    """Whether more labelled images would help, by a learning curve; "" where it cannot tell."""
    return _read_curve(curve)[0] if curve else ""


def _read_finetuned(tuned: Finetuned | None) -> str:
    if tuned is None:
        return ""
    verdict = "the difference is real" if tuned.p < 0.05 else "they are not shown to differ"
    return _say("finetuned", run=tuned.run, points=100 * tuned.difference, p=tuned.p, verdict=verdict)


def _warnings(facts: Facts) -> Iterator[str]:
    rows = sorted(facts.counts.items(), key=lambda row: row[::-1])
    if few := [f"{name!r} {count}" for name, count in rows if count < FEW_IN_A_CLASS]:
        shown = ", ".join(few[:5]) + (f" and {len(few) - 5} more" if len(few) > 5 else "")
        yield _say("few", count=len(few), least=FEW_IN_A_CLASS, shown=shown)
    if facts.imbalance > IMBALANCED:
        done = "The params weight the classes" if facts.weighted else "The commands set class_weight=balanced"
        yield _say("imbalanced", times=facts.imbalance, done=done)
    if not facts.pretrained:
        yield _say("random_weights")
    if facts.leaked:
        yield _say("leaked", count=facts.leaked)


# -- for people -------------------------------------------------------------------------------------------------------


def advice_lines(summary: Row) -> Iterator[str]:
    """The screen for the terminal, from what `advise` gives."""
    about = "about " if summary["train_is_estimated"] else ""
    others = "".join(f", {summary[name]:,} {name}" for name in ("val", "test") if name in summary)
    values = {**summary, "about": about, "others": others, "share": percent(summary["majority_share"])}
    for text in ("images", "sizes", "majority", *(["duplicates"] if summary["duplicates"] else [])):
        yield from _wrapped(_say(text, **values), "", "    ")
    for mark, texts in (("  - ", summary["evidence"]), ("  ! Warning: ", summary["warnings"])):
        for text in texts:
            yield from _wrapped(text, mark, "    ")
    answers, judged_by = summary["recommendations"], summary["judged_by"]
    shared = [step for step in answers[0]["steps"] if len(answers) > 1 and step in answers[1]["steps"]]
    yield from ("", *_wrapped(_say("how_to_judge"))) if judged_by is None else ()
    yield from ("", _say("shared"), *_step_lines(shared, 1)) if shared else ()
    for answer in answers:
        yield from ("", *_wrapped(_say(f"said_by_{judged_by or 'nobody'}", **answer)))
        for reason in answer["reasons"]:
            source = f" [{reason['source']}]" if reason["source"] else ""
            yield from _wrapped(reason["text"] + source, "  - ", "    ")
        own = [step for step in answer["steps"] if step not in shared]
        yield from _step_lines(own, len(shared) + 1) if own else [_say("nothing")]


def _step_lines(steps: Sequence[Row], first: int) -> Iterator[str]:
    for number, step in enumerate(steps, first):
        yield from _wrapped(step["what"], f"  {number}. ", "     ")
        yield from (f"       {line}" for line in (step["make"], step["shell"]) if line)


def _wrapped(text: str, first: str = "", rest: str = "") -> list[str]:
    return textwrap.TextWrapper(100, first, rest, break_long_words=False, break_on_hyphens=False).wrap(text)
