"""What was chosen, in words: the values of a search, the edge of its grid, and no raw JSON."""

from __future__ import annotations

import pytest

from pipeline.artifacts import CurvePoint
from pipeline.evaluate.advice import curve_sentence
from pipeline.evaluate.chosen import TITLES, choice_words, chosen_facts, other_facts, plain, tried, tried_sentence
from pipeline.heads.crossval import edges

SEARCH = {
    "search": [
        {"params": {"C": 1, "kernel": "rbf"}, "cv_accuracy": 0.8, "cv_log_loss": 0.5},
        {"params": {"C": 10, "kernel": "rbf"}, "cv_accuracy": 0.9, "cv_log_loss": 0.4},
    ],
    "params": {"C": 10, "kernel": "rbf", "gamma": "scale"},
    "edges": {"C": "largest"},
}


def test_a_search_is_told_with_its_edge_and_its_scores_best_first() -> None:
    assert choice_words(SEARCH) == "C=10 (the largest tried), kernel=rbf"
    sentence = "Tried for svm, cross-validated: C=10, kernel=rbf 90.0 %; C=1, kernel=rbf 80.0 %"
    assert tried_sentence("svm", SEARCH) == sentence
    assert tried(SEARCH) == [("C=1, kernel=rbf", "80.0 %"), ("C=10, kernel=rbf", "90.0 %")]
    assert choice_words({"C": 0.0316228, "folds": 5}) == "C=0.0316" and tried_sentence("logistic", {"C": 1.0}) == ""
    assert choice_words({"epochs": 12}) == "12 epochs" and choice_words({}) == ""


@pytest.mark.parametrize(
    ("value", "tried_values", "side"),
    [
        (10, [1, 3, 10], "largest"),
        (0.1, [0.1, 1, 10], "smallest"),
        (3, [1, 3, 10], None),
        (1, [1, 3, 10], None),
        (0, [0, 0.5], None),
        (2, [2, 4], "smallest"),
        (5, [5], None),
        ("rbf", ["linear", "rbf"], None),
        (True, [True, False], None),
        (None, [None, 3], None),
    ],
)
def test_a_value_on_the_edge_of_its_grid_is_found(value: object, tried_values: list[object], side: str | None) -> None:
    assert edges({"p": value}, [{"p": each} for each in tried_values]).get("p") == side


def test_facts_are_titled_and_the_rest_is_flat_text() -> None:
    selected = {
        **SEARCH,
        "cv_accuracy": 0.9,
        "difference": 0.012,
        "certificate": {"gap": 5.2e-8, "iterations": 29},
        "path": "coarse",
        "curve": [[0.1, 0.5]],
    }
    facts = chosen_facts(selected)
    assert facts["Parameters"] == "C 10, kernel rbf, gamma scale"
    assert facts["Accuracy, cross-validated"] == "90.0 %" and facts["Gained over the probe"] == "+1.2 points"
    assert list(facts) == [title for key, (title, _) in TITLES.items() if key in selected]
    assert other_facts(selected) == {"certificate gap": "5.2e-08", "certificate iterations": "29", "path": "coarse"}
    assert plain([{"a": [1, None]}, True]) == "a 1, –, yes"


def test_a_learning_curve_ends_in_a_verdict() -> None:
    def curve(*accuracies: float) -> list[CurvePoint]:
        rows = zip((100, 200, 400), accuracies, strict=True)
        return [CurvePoint(images=n, accuracy=a, low=a - 0.01, high=a + 0.01) for n, a in rows]

    assert "still rises" in curve_sentence(curve(0.7, 0.8, 0.9))
    assert "is flat" in curve_sentence(curve(0.8, 0.9, 0.9))
    assert curve_sentence([]) == ""
