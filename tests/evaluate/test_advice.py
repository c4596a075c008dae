"""Advice: the bounds of the table, what one's own runs change, and commands that can be typed as they stand."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

import pytest

from pipeline.evaluate.advice import Advice, advise, curve_rises, judge_domain
from pipeline.evaluate.advice_facts import Facts, Point, Probe, Tuned
from pipeline.evaluate.advice_rules import DOMAINS, RULES, Domain, find_rule
from pipeline.evaluate.advice_text import Given, advice_lines, advice_values, commands, shared_steps
from pipeline.finetune.start import PROBE_KINDS
from pipeline.params import load_params

RISING = (Point(40, 0.7, 0.72), Point(70, 0.75, 0.76), Point(100, 0.8, 0.8))
FLAT = (Point(40, 0.8, 0.82), Point(70, 0.81, 0.82), Point(100, 0.8, 0.8))
GOOD = Probe("one", "resnet50", "val", 500, 0.97, (0.95, 0.98), 0.5)


def facts(*counts: int, **changes: Any) -> Facts:
    names = tuple(f"class {number}" for number in range(len(counts)))
    return Facts(**{"class_names": names, "counts": counts, "others": {"val": 9}, "backbone": "resnet50", **changes})


def strategies(advice: Advice) -> list[str]:
    return [each.strategy for each in advice.recommendations]


def texts(advice: Advice) -> str:
    return " ".join([*(reason.text for reason in advice.evidence), *advice.warnings])


@pytest.mark.parametrize(
    ("train", "similar", "different"),
    [
        (2, "probe", "probe"),
        (99, "probe", "probe"),
        (100, "probe", "probe-then-finetune"),
        (999, "probe", "probe-then-finetune"),
        (1_000, "probe-then-finetune", "finetune"),
        (99_999, "probe-then-finetune", "finetune"),
        (100_000, "finetune", "finetune"),
        (999_999, "finetune", "finetune"),
        (1_000_000, "finetune", "from-scratch"),
        (50_000_000, "finetune", "from-scratch"),
    ],
)
def test_the_table_goes_by_size_and_domain(train: int, similar: str, different: str) -> None:
    assert [find_rule(train, domain).strategy for domain in DOMAINS] == [similar, different]


def test_every_rule_names_its_sources_and_settings_that_exist() -> None:
    for rule in RULES:
        assert rule.reasons and all(reason.source for reason in rule.reasons)
        for step in rule.steps:
            load_params("params.yaml", step.settings)


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_domain_that_is_said_gives_one_answer(domain: Domain) -> None:
    advice = advise(facts(300, 300), domain)
    assert (advice.domain, advice.judged_by, len(advice.recommendations)) == (domain, "user", 1)


def test_without_a_domain_both_answers_are_given_until_a_probe_tells() -> None:
    unknown = facts(300, 300)
    assert strategies(advise(unknown)) == ["probe", "probe-then-finetune"]
    judged = advise(replace(unknown, probe=GOOD))
    assert (judged.domain, judged.judged_by, strategies(judged)) == ("similar", "probe", ["probe"])
    assert "at most the 3.0 points" in texts(judged)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "similar"),
        ({"interval": (0.7, 0.98)}, None),
        ({"accuracy": 0.6, "interval": (0.55, 0.65)}, "different"),
        ({"accuracy": 0.6, "interval": (0.55, 0.65), "backbone": "starter"}, None),
    ],
)
def test_a_probes_score_is_held_against_chance(changes: dict[str, Any], verdict: str | None) -> None:
    assert judge_domain(facts(300, 300, probe=replace(GOOD, **changes))) == verdict


def test_a_probe_no_better_than_chance_sends_to_the_labels() -> None:
    poor = replace(GOOD, accuracy=0.52, interval=(0.48, 0.56))
    assert "Check the labels" in texts(advise(facts(300, 300, probe=poor)))


def test_random_weights_tell_nothing_of_the_domain() -> None:
    random = facts(300, 300, probe=GOOD, pretrained=False)
    assert judge_domain(random) is None
    assert "nothing is transferred" in texts(advise(random))


def test_a_rising_and_a_flat_curve_are_told_apart() -> None:
    assert curve_rises(RISING) is True
    assert curve_rises(FLAT) is False
    assert curve_rises(RISING[1:]) is None
    rising, flat = (advise(facts(300, 300, curve=curve), "similar") for curve in (RISING, FLAT))
    assert "more labelled images are the surest way" in texts(rising)
    assert "more images of the same kind would not help" in texts(flat)
    ranks = [any("--rank" in step.options for step in each.recommendations[0].steps) for each in (rising, flat)]
    assert ranks == [False, True]


def test_a_probe_that_is_there_is_not_asked_for_again() -> None:
    there = facts(300, 300, probe=GOOD, curve=RISING)
    assert [len(advise(there, domain).recommendations[0].steps) for domain in DOMAINS] == [0, 1]
    assert any("Nothing more to run" in line for line in advice_lines(there, advise(there), Given()))


def test_a_noisy_rise_is_no_rise() -> None:
    assert curve_rises((Point(40, 0.7, 0.83), Point(100, 0.8, 0.8))) is False


def test_what_fine_tuning_brought_before_is_said() -> None:
    assert "+1.5 points" in texts(advise(facts(300, 300, tuned=Tuned("two", 0.015, 0.4)), "similar"))


def test_imbalance_brings_class_weights_into_the_commands() -> None:
    even, uneven = advise(facts(90, 900), "different"), advise(facts(89, 900), "different")
    assert not even.warnings and "balanced accuracy" in texts(uneven)
    settings = [setting for step in uneven.recommendations[0].steps for setting in step.settings]
    assert {"head.class_weight=balanced", "finetune.class_weight=balanced"} <= set(settings)
    weighted = advise(facts(89, 900, weighted=True), "different")
    assert not any("class_weight" in s for step in weighted.recommendations[0].steps for s in step.settings)


def test_tiny_classes_are_named() -> None:
    assert "'class 0' 4" in texts(advise(facts(4, 5, 20)))
    assert not advise(facts(5, 20)).warnings


def test_few_images_a_class_dampen_the_hope_in_fine_tuning() -> None:
    (answer,) = advise(facts(*[10] * 200), "similar").recommendations
    assert answer.strategy == "probe-then-finetune"
    assert "The middle class has 10" in answer.reasons[-1].text


def test_a_head_that_cannot_be_tuned_is_replaced_where_fine_tuning_follows() -> None:
    (probe,) = advise(facts(300, 300, head_kinds=("svm",)), "similar").recommendations
    (tune,) = advise(facts(300, 300, head_kinds=("svm",)), "different").recommendations
    assert not any(step.settings for step in probe.steps)
    assert all("head.kind=logistic" in step.settings for step in tune.steps)
    assert {"logistic", "linear", "mlp"} == set(PROBE_KINDS)


def test_commands_repeat_what_the_user_typed_and_survive_the_shell() -> None:
    given = Given("my params.yaml", ("data.root=my photos", "data.group_pattern=^(P\\d+)_"))
    (answer,) = advise(facts(300, 300), "similar").recommendations
    make, shell = commands(answer.steps[0], given)
    assert make is not None and "ARGS=--curve" in shlex.split(make)
    assert r"SET=data.root=my photos data.group_pattern=^(P\d+)_" in shlex.split(make)
    words = ["-p", "my params.yaml", "-s", "data.root=my photos", "-s", r"data.group_pattern=^(P\d+)_"]
    assert shlex.split(shell) == ["pipeline", "extract", *words, "&&", "pipeline", "train-head", "--curve", *words]


def test_the_screen_shows_shared_steps_once_and_fits_a_page() -> None:
    undecided = facts(300, 300, backbone="starter")
    advice = advise(undecided)
    assert shared_steps(advice.recommendations) == 2
    lines = list(advice_lines(undecided, advice, Given()))
    assert sum("Train the probe" in line for line in lines) == 1
    assert any(line.startswith("If your images are different:") for line in lines)
    assert max(len(line) for line in lines if not line.startswith(" " * 7)) <= 100  # commands stay whole


def test_json_values_hold_facts_and_both_commands() -> None:
    tiny = facts(40, 10)
    values = advice_values(tiny, advise(tiny, "similar"), Given())
    assert (values["train"], values["median"], values["imbalance"], values["majority_share"]) == (50, 25, 4, 0.8)
    (step,) = values["recommendations"][0]["steps"]
    assert step["make"] == 'make train-head SET="extract.views=4"'
