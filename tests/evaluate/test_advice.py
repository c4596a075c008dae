"""Advice: the bounds of the table, what one's own runs change, and commands that can be typed as they stand."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

import pytest

from pipeline.artifacts import CurvePoint
from pipeline.evaluate.advice import (
    DOMAINS,
    TABLE,
    TUNABLE_HEADS,
    Domain,
    Facts,
    Finetuned,
    Probe,
    TypedOptions,
    advice_lines,
    find_rule,
)
from pipeline.evaluate.advice import advise as advise_typed
from pipeline.heads import kinds_of_layers
from pipeline.params import load_params


def curve(*points: tuple[int, float, float]) -> tuple[CurvePoint, ...]:
    return tuple(CurvePoint(images=n, accuracy=accuracy, low=accuracy, high=high) for n, accuracy, high in points)


RISING = curve((40, 0.7, 0.72), (70, 0.75, 0.76), (100, 0.8, 0.8))
FLAT = curve((40, 0.8, 0.82), (70, 0.81, 0.82), (100, 0.8, 0.8))
GOOD = Probe("one", "resnet50", "val", 500, 0.97, [0.95, 0.98], 0.5)


def facts(*counts: int, **changes: Any) -> Facts:
    by_name = {f"class {number}": count for number, count in enumerate(counts)}
    return Facts(**{"counts": by_name, "others": {"val": 9}, "backbone": "resnet50", **changes})


def advise(known: Facts, domain: Domain | None = None) -> dict[str, Any]:
    return advise_typed(known, domain, TypedOptions())


def strategies(advice: dict[str, Any]) -> list[str]:
    return [each["strategy"] for each in advice["recommendations"]]


def settings(advice: dict[str, Any]) -> list[list[str]]:
    return [step["settings"] for step in advice["recommendations"][0]["steps"]]


def texts(advice: dict[str, Any]) -> str:
    return " ".join([*advice["evidence"], *advice["warnings"]])


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
    assert [find_rule(train, domain)["strategy"] for domain in DOMAINS] == [similar, different]


def test_every_rule_names_its_sources_and_settings_that_exist() -> None:
    for rule in TABLE["rules"]:
        assert rule["domain"] in DOMAINS and rule["strategy"] in TABLE["strategies"]
        assert rule["reasons"] and all(reason["text"] and reason["source"] for reason in rule["reasons"])
        for step in rule["steps"]:
            assert step["what"] and set(step["verbs"].split()) <= {"extract", "train-head", "finetune", "compare"}
            load_params("params.yaml", step.get("settings", "").split())


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_domain_that_is_said_gives_one_answer(domain: Domain) -> None:
    advice = advise(facts(300, 300), domain)
    assert (advice["domain"], advice["judged_by"], len(advice["recommendations"])) == (domain, "user", 1)


def test_without_a_domain_both_answers_are_given_until_a_probe_tells() -> None:
    unknown = facts(300, 300)
    assert strategies(advise(unknown)) == ["probe", "probe-then-finetune"]
    judged = advise(replace(unknown, probe=GOOD))
    assert (judged["domain"], judged["judged_by"], strategies(judged)) == ("similar", "probe", ["probe"])
    assert "at most the 3.0 points" in texts(judged)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "similar"),
        ({"interval": [0.7, 0.98]}, None),
        ({"accuracy": 0.6, "interval": [0.55, 0.65]}, "different"),
        ({"accuracy": 0.6, "interval": [0.55, 0.65], "backbone": "starter"}, None),
    ],
)
def test_a_probes_score_is_held_against_chance(changes: dict[str, Any], verdict: str | None) -> None:
    assert advise(facts(300, 300, probe=GOOD._replace(**changes)))["domain"] == verdict


def test_a_probe_no_better_than_chance_sends_to_the_labels() -> None:
    poor = GOOD._replace(accuracy=0.52, interval=[0.48, 0.56])
    assert "Check the labels" in texts(advise(facts(300, 300, probe=poor)))


def test_random_weights_tell_nothing_of_the_domain() -> None:
    random = advise(facts(300, 300, probe=GOOD, pretrained=False))
    assert random["domain"] is None
    assert "nothing is transferred" in texts(random)


def test_a_rising_and_a_flat_curve_are_told_apart() -> None:
    rising, flat, short = (advise(facts(300, 300, curve=points), "similar") for points in (RISING, FLAT, RISING[1:]))
    assert "learning curve" not in texts(short)
    assert "more labelled images are the surest way" in texts(rising)
    assert "more images of the same kind would not help" in texts(flat)
    ranks = [any("--rank" in step["shell"] for step in each["recommendations"][0]["steps"]) for each in (rising, flat)]
    assert ranks == [False, True]


def test_a_probe_that_is_there_is_not_asked_for_again() -> None:
    there = facts(300, 300, probe=GOOD, curve=RISING)
    assert [len(settings(advise(there, domain))) for domain in DOMAINS] == [0, 1]
    assert any("Nothing more to run" in line for line in advice_lines(advise(there)))


def test_a_noisy_rise_is_no_rise() -> None:
    assert "is flat" in texts(advise(facts(300, 300, curve=curve((40, 0.7, 0.83), (100, 0.8, 0.8)))))


def test_what_fine_tuning_brought_before_is_said() -> None:
    assert "+1.5 points" in texts(advise(facts(300, 300, finetuned=Finetuned("two", 0.015, 0.4)), "similar"))


def test_imbalance_brings_class_weights_into_the_commands() -> None:
    even, uneven = advise(facts(90, 900), "different"), advise(facts(89, 900), "different")
    assert not even["warnings"] and "balanced accuracy" in texts(uneven)
    assert {"head.class_weight=balanced", "finetune.class_weight=balanced"} <= {
        setting for step in settings(uneven) for setting in step
    }
    weighted = advise(facts(89, 900, weighted=True), "different")
    assert not any("class_weight" in setting for step in settings(weighted) for setting in step)


def test_tiny_classes_are_named() -> None:
    assert "'class 0' 4" in texts(advise(facts(4, 5, 20)))
    assert not advise(facts(5, 20))["warnings"]


def test_few_images_a_class_dampen_the_hope_in_fine_tuning() -> None:
    (answer,) = advise(facts(*[10] * 200), "similar")["recommendations"]
    assert answer["strategy"] == "probe-then-finetune"
    assert "The middle class has 10" in answer["reasons"][-1]["text"]


def test_a_head_that_cannot_be_tuned_is_replaced_where_fine_tuning_follows() -> None:
    probe, tune = (advise(facts(300, 300, tunable=False), domain) for domain in DOMAINS)
    assert not any(settings(probe))
    assert all("head.kind=logistic" in each for each in settings(tune))
    assert set(kinds_of_layers()) == TUNABLE_HEADS


def test_commands_repeat_what_the_user_typed_and_survive_the_shell() -> None:
    options = TypedOptions("my params.yaml", ("data.root=my photos", "data.group_pattern=^(P\\d+)_"))
    (step,) = advise_typed(facts(300, 300), "similar", options)["recommendations"][0]["steps"]
    make, shell = step["make"], step["shell"]
    assert "ARGS=--curve" in shlex.split(make)
    assert r"SET=data.root=my photos data.group_pattern=^(P\d+)_" in shlex.split(make)
    words = ["-p", "my params.yaml", "-s", "data.root=my photos", "-s", r"data.group_pattern=^(P\d+)_"]
    assert shlex.split(shell) == ["pipeline", "train-head", "--extract", "--curve", *words]


def test_the_screen_shows_shared_steps_once_and_fits_a_page() -> None:
    lines = list(advice_lines(advise(facts(300, 300, backbone="starter"))))
    assert "Either way, first:" in lines
    assert sum("Train the probe" in line for line in lines) == 1
    assert sum("Look for a stronger backbone" in line for line in lines) == 1
    assert any(line.startswith("If your images are different:") for line in lines)
    assert max(len(line) for line in lines if not line.startswith(" " * 7)) <= 100  # commands stay whole


def test_json_values_hold_facts_and_both_commands() -> None:
    values = advise(facts(40, 10), "similar")
    assert (values["train"], values["median"], values["imbalance"], values["majority_share"]) == (50, 25, 4, 0.8)
    (step,) = values["recommendations"][0]["steps"]
    assert step["make"] == 'make train-head SET="extract.views=4"'
