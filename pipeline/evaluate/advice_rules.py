"""The usual table of transfer learning as data: what to train, by the size of the data and the nearness of the domain.

The bands of sizes are those of tutorials: conventions, not sharp limits. What stands in the table comes from the
sources named beside it; the rates are those this program starts from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Literal

Domain = Literal["similar", "different"]
Strategy = Literal["probe", "probe-then-finetune", "finetune", "from-scratch"]

DOMAINS: Final[tuple[Domain, ...]] = ("similar", "different")

CS231N: Final = "Stanford CS231n, notes on transfer learning"
YOSINSKI: Final = "Yosinski et al. 2014, How transferable are features in deep neural networks?"
KORNBLITH: Final = "Kornblith et al. 2019, Do better ImageNet models transfer better?"
KUMAR: Final = "Kumar et al. 2022, Fine-tuning can distort pretrained features"
HOWARD: Final = "Howard and Ruder 2018, Universal language model fine-tuning for text classification"
HE: Final = "He et al. 2019, Rethinking ImageNet pre-training"


@dataclass(frozen=True)
class Reason:
    """Why, in a sentence or two, and where that is written; None where the user's own data say it."""

    text: str
    source: str | None = None


@dataclass(frozen=True)
class Step:
    """What to run next.

    Attributes:
        what: for people.
        verbs: in their order; the last one is what the step is about and takes ``options``.
        settings: ``key.path=value``.
        target: the Make target that does the same, None where there is none.
    """

    what: str
    verbs: tuple[str, ...]
    settings: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    target: str | None = None


@dataclass(frozen=True)
class Rule:
    """Holds for fewer than ``below`` training images of a domain, where no smaller ``below`` does."""

    below: float
    domain: Domain
    strategy: Strategy
    reasons: tuple[Reason, ...]
    steps: tuple[Step, ...]


TITLES: Final[dict[Strategy, str]] = {
    "probe": "Probe only: train a head on frozen features.",
    "probe-then-finetune": "Probe, then fine-tune at a small rate, and keep whichever is better.",
    "finetune": "Fine-tune the whole network, backbone and head each at a rate of its own.",
    "from-scratch": "Train from scratch, and compare with full fine-tuning.",
}

PROBE: Final = Step(
    "Train the probe; --curve shows whether more labels would help.",
    ("extract", "train-head"),
    options=("--curve",),
    target="train-head",
)
PROBE_WITH_VIEWS: Final = Step(
    "Train the probe on four augmented views of each image beside the plain one.",
    ("extract", "train-head"),
    ("extract.views=4",),
    target="train-head",
)
TUNE_GENTLY: Final = Step(
    "Fine-tune from the probe at a small rate; the probe is kept if no epoch beats it.",
    ("finetune",),
    ("finetune.epochs=10", "finetune.backbone_lr=1e-5", "finetune.head_lr=1e-4", "finetune.patience=3"),
    target="finetune",
)
TUNE_GRADUALLY: Final = Step(
    "Fine-tune from the probe at a small rate, opening the network from its output on.",
    ("finetune",),
    (
        *("finetune.epochs=10", "finetune.backbone_lr=3e-5", "finetune.head_lr=1e-4", "finetune.unfreeze=gradual"),
        "finetune.augment.trivial_augment=true",
    ),
    target="finetune",
)
FIND_RATES: Final = Step(
    "Draw loss against learning rate: it suggests both rates (use them below).",
    ("finetune",),
    options=("--find-lr",),
    target="finetune",
)
TUNE_FULLY: Final = Step(
    "Fine-tune everything from the probe, earlier layers more slowly.",
    ("finetune",),
    (
        *("finetune.epochs=20", "finetune.backbone_lr=1e-4", "finetune.head_lr=1e-3", "finetune.layer_decay=0.8"),
        *("finetune.augment.trivial_augment=true", "finetune.patience=5"),
    ),
    target="finetune",
)
SCRATCH: Final = Step(
    "Train from random weights, for long and with strong augmentation.",
    ("extract", "finetune"),
    (
        *("backbone.weights=random", "finetune.start=random", "finetune.epochs=100", "finetune.warmup_epochs=5"),
        *("finetune.backbone_lr=1e-3", "finetune.head_lr=1e-3", "finetune.weight_decay=0.05"),
        *("finetune.label_smoothing=0.1", "finetune.mixup=0.2", "finetune.augment.trivial_augment=true"),
    ),
)
COMPARE: Final = Step("See which differences are real.", ("compare",), target="compare")

OVERFITS: Final = Reason(
    "So few images would overfit millions of weights; where the domain is near, the last features fit as they are.",
    CS231N,
)
STRONG_BASELINE: Final = Reason(
    "With few examples logistic regression on frozen features does as well as fine-tuning, or better.", KORNBLITH
)
EARLIER: Final = Reason(
    "The last layers are the most tied to the images they were trained on; an earlier one (backbone.layer, such as"
    " layer3 of a ResNet) may serve better.",
    CS231N,
)
LESS_TRANSFERABLE: Final = Reason(
    "Features transfer less well the further the task is from the one they were learned on, and still better than"
    " random ones.",
    YOSINSKI,
)
PROBE_FIRST: Final = Reason(
    "Starting from a trained head keeps fine-tuning from distorting good features; it did better than either alone,"
    " above all on images unlike those of training.",
    KUMAR,
)
GRADUALLY: Final = Reason(
    "Opening layer by layer from the output on, at small rates, keeps what the early layers know.", HOWARD
)
ENOUGH: Final = Reason("So many images can be trusted not to overfit when the whole network is tuned.", CS231N)
TUNING_WINS: Final = Reason("With more data fine-tuning overtakes the probe.", KORNBLITH)
RATES: Final = Reason("Early layers are general and need little change: rates that fall towards the input.", HOWARD)
AFFORDS_SCRATCH: Final = Reason(
    "So many images allow training from scratch; starting from pretrained weights is often still better, so run both.",
    CS231N,
)
CATCHES_UP: Final = Reason(
    "With enough images and a long enough training, random weights reach pretrained ones, which mainly train faster.",
    HE,
)

_GENTLE, _FULL = (PROBE, TUNE_GENTLY), (PROBE, FIND_RATES, TUNE_FULLY)
RULES: Final[tuple[Rule, ...]] = (
    Rule(100, "similar", "probe", (OVERFITS, STRONG_BASELINE), (PROBE_WITH_VIEWS,)),
    Rule(100, "different", "probe", (STRONG_BASELINE, EARLIER), (PROBE_WITH_VIEWS,)),
    Rule(1_000, "similar", "probe", (OVERFITS, STRONG_BASELINE), (PROBE,)),
    Rule(
        1_000,
        "different",
        "probe-then-finetune",
        (LESS_TRANSFERABLE, PROBE_FIRST, GRADUALLY, EARLIER),
        (PROBE, TUNE_GRADUALLY),
    ),
    Rule(100_000, "similar", "probe-then-finetune", (PROBE_FIRST, ENOUGH), _GENTLE),
    Rule(100_000, "different", "finetune", (LESS_TRANSFERABLE, ENOUGH, PROBE_FIRST, RATES), _FULL),
    Rule(1_000_000, "similar", "finetune", (ENOUGH, TUNING_WINS, RATES), _FULL),
    Rule(1_000_000, "different", "finetune", (ENOUGH, LESS_TRANSFERABLE, RATES), _FULL),
    Rule(math.inf, "similar", "finetune", (ENOUGH, TUNING_WINS, CATCHES_UP), _FULL),
    Rule(
        math.inf,
        "different",
        "from-scratch",
        (AFFORDS_SCRATCH, CATCHES_UP),
        (*_FULL, SCRATCH, COMPARE),
    ),
)


def find_rule(train: int, domain: Domain) -> Rule:
    """The row of the table for ``train`` images."""
    return next(rule for rule in RULES if rule.domain == domain and train < rule.below)
