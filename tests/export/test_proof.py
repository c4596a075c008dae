"""What the proof lets pass, and what it names."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.evaluate import ClassifierOutput
from pipeline.export.proof import prove, prove_accuracy

NAMES, CLASSES = ["a.jpg", "b.jpg"], ("ant", "bee")


def answers(*first: float, labels: list[int] | None = None) -> ClassifierOutput:
    chances = np.array([[value, 1 - value] for value in first])
    return ClassifierOutput(chances.argmax(1) if labels is None else np.array(labels), chances)


def test_small_differences_pass() -> None:
    proof = prove(answers(0.9, 0.505), answers(0.91, 0.495), NAMES, CLASSES, against="predictions.csv")
    assert (proof.n, proof.agree, proof.problems) == (2, 1, ())
    assert proof.max_difference == pytest.approx(0.01)
    assert proof.as_dict() == {"n": 2, "agree": 1, "max_difference": proof.max_difference, "against": "predictions.csv"}


def test_a_probability_that_moved_is_named() -> None:
    proof = prove(answers(0.9, 0.6), answers(0.9, 0.63), NAMES, CLASSES, against="")
    assert proof.problems == ("1 of 2 probabilities differ by more than 0.02: b.jpg by 0.030",)


def test_another_label_is_named_even_at_the_same_probabilities() -> None:
    proof = prove(answers(0.9, 0.6), answers(0.9, 0.6, labels=[0, 1]), NAMES, CLASSES, against="")
    assert proof.problems == ("1 of 2 labels differ: b.jpg is bee, was ant",)


def test_what_is_no_number_does_not_pass() -> None:
    assert prove(answers(0.9, 0.6), answers(0.9, float("nan"), labels=[0, 0]), NAMES, CLASSES, against="").problems


def test_a_quantised_file_may_differ_but_not_be_worse() -> None:
    y = np.zeros(20, np.int64)
    proof = prove(answers(0.9, 0.6), answers(0.2, 0.1), NAMES, CLASSES, against="")
    better = prove_accuracy(proof, y, np.where(np.arange(20) < 2, 1, y), y)
    assert (better.accuracy, better.run_accuracy, better.p, better.problems) == (0.9, 1.0, 0.5, ())
    (problem,) = prove_accuracy(proof, y, np.where(np.arange(20) < 8, 1, y), y).problems
    assert problem == "its accuracy is 60.0 %, the run's 100.0 % (exact McNemar p = 0.0078)"
