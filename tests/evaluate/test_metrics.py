"""Metrics against scikit-learn and hand-checked values."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)

from pipeline.artifacts import Leak, RunMetrics, read_metrics, read_model
from pipeline.evaluate import (
    METRICS,
    Metric,
    Provenance,
    Weighted,
    compare_runs,
    comparison_markdown,
    metric_lines,
    wilson,
)
from pipeline.evaluate.calibration import calibration_error
from pipeline.evaluate.intervals import resample_weights
from pipeline.evaluate.protocol import find_leak, leak_sentence, protocol_sentence
from pipeline.heads import Selection
from pipeline.report import Content, render_report

from ..artifacts.examples import make_run, score_of


def _example(n: int = 400, classes: int = 8, seed: int = 0):
    generator = np.random.default_rng(seed)
    y = generator.integers(classes, size=n)
    logits = generator.normal(size=(n, classes)) + 1.5 * np.eye(classes)[y]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return y, probabilities.argmax(axis=1), probabilities, [f"class {index}" for index in range(classes)]


def test_values_equal_those_of_scikit_learn() -> None:
    y, predicted, probabilities, names = _example()
    result = score_of(y, predicted, probabilities, names)
    metrics = result.metrics
    assert metrics["accuracy"] == pytest.approx((y == predicted).mean())
    assert metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, predicted))
    assert metrics["macro_f1"] == pytest.approx(f1_score(y, predicted, average="macro"))
    assert metrics["log_loss"] == pytest.approx(log_loss(y, probabilities))
    assert metrics["top5"] == pytest.approx(top_k_accuracy_score(y, probabilities, k=5))
    assert result.confusion == confusion_matrix(y, predicted).tolist()
    precision, recall, f1, support = precision_recall_fscore_support(y, predicted)
    for index, row in enumerate(result.per_class):
        assert [row.precision, row.recall, row.f1, row.n] == pytest.approx(
            [precision[index], recall[index], f1[index], support[index]]
        )
        assert row.recall_ci95 == wilson(round(recall[index] * support[index]), int(support[index]))
    assert RunMetrics.model_validate(json.loads(result.to_json())) == result


def test_reliability_by_hand() -> None:
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.45, 0.55]])
    result = score_of([0, 1, 1, 1], probabilities.argmax(axis=1), probabilities, ["a", "b"])
    # Bins of 1/15: 0.9 -> two images, half of them right; 0.7 and 0.55 -> one right image each.
    assert [(row.n, row.accuracy) for row in result.reliability] == [(1, 1), (1, 1), (2, 0.5)]
    assert [row.confidence for row in result.reliability] == pytest.approx([0.55, 0.7, 0.9])


def _sure_and_right(n: int, cooled: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Confidences (n,) of a head with two classes that is calibrated after division of its logits by ``cooled``."""
    generator = np.random.default_rng(seed)
    logits = np.abs(generator.normal(0, 3, n))
    return 1 / (1 + np.exp(-logits)), generator.random(n) < 1 / (1 + np.exp(-logits / cooled))


@pytest.mark.parametrize(("cooled", "truth"), [(1.0, 0.0), (2.0, 0.1018)])
def test_the_calibration_error_is_covered(cooled: float, truth: float) -> None:
    """Of a calibrated head, whose plain error is 3 to 4 % on so few images, and of one that is too sure."""
    covered, values = 0, []
    for seed in range(30):
        value, (low, high) = calibration_error(*_sure_and_right(300, cooled, seed), np.arange(300))
        assert 0 <= low <= value <= high <= 1
        values.append(value)
        covered += low <= truth <= high
    assert covered >= 27
    assert abs(np.mean(values) - truth) < 0.025


def test_the_calibration_error_of_many_images_is_the_plain_one() -> None:
    sure, right = _sure_and_right(200_000, 2.0, 0)
    value, (low, high) = calibration_error(sure, right, np.arange(len(sure)))
    assert value == pytest.approx(0.1018, abs=0.003) and low < value < high < low + 0.01


def test_a_head_without_doubts_and_mistakes_is_calibrated() -> None:
    value, (low, high) = calibration_error(np.ones(9), np.ones(9, bool), np.arange(9))
    assert (value, low, high) == (0, 0, 0)


def test_wilson_hand_checked() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3: 81/263, 15/148, 0/20, 1/29.
    assert wilson(81, 263) == pytest.approx([0.2553, 0.3662], abs=5e-5)
    assert wilson(15, 148) == pytest.approx([0.0624, 0.1605], abs=5e-5)
    assert wilson(0, 20) == pytest.approx([0, 0.1611], abs=5e-5)
    assert wilson(1, 29) == pytest.approx([0.0061, 0.1718], abs=5e-5)
    assert wilson(7, 7)[1] == 1.0 and wilson(0, 0) is None


def test_bootstrap_intervals_hold_the_value_and_repeat() -> None:
    y, predicted, probabilities, names = _example()
    first = score_of(y, predicted, probabilities, names).metrics
    for name in ("balanced_accuracy", "macro_f1", "log_loss"):
        low, high = first[f"{name}_ci95"]
        assert low < first[name] < high
    assert first == score_of(y, predicted, probabilities, names).metrics


def test_bootstrap_agrees_with_scoring_each_resample_by_scikit_learn() -> None:
    y, predicted, probabilities, names = _example(n=60, classes=4)
    weights = np.concatenate(list(resample_weights(np.arange(60))))
    assert weights.shape == (1000, 60) and (weights.sum(axis=1) == 60).all()
    rows = [np.repeat(np.arange(60), row.astype(int)) for row in weights]
    with np.errstate(all="ignore"):
        f1 = [f1_score(y[row], predicted[row], average="macro") for row in rows[:100]]
        loss = [log_loss(y[row], probabilities[row], labels=range(4)) for row in rows[:200]]
    metrics = score_of(y, predicted, probabilities, names).metrics
    assert metrics["log_loss_ci95"] == pytest.approx(np.percentile(loss, (2.5, 97.5)), abs=0.03)
    assert metrics["macro_f1_ci95"] == pytest.approx(np.percentile(f1, (2.5, 97.5)), abs=0.03)


def test_metrics_that_need_probabilities_are_null_with_the_heads_reason() -> None:
    y, predicted, _, names = _example()
    result = score_of(y, predicted, None, names, why_none="NearestCentroid has no scores")
    for name in ("log_loss", "ece", "top5"):
        assert result.metrics[name] is None and result.metrics[f"{name}_ci95"] is None
        assert result.reasons[name] == "NearestCentroid has no scores"
    assert result.reliability is None and result.metrics["balanced_accuracy"] is not None


def test_top5_only_for_more_than_five_classes() -> None:
    y, predicted, probabilities, names = _example(classes=5)
    assert "top5" not in score_of(y, predicted, probabilities, names).metrics


def test_one_image_and_no_image() -> None:
    one = score_of([1], [1], [[0.2, 0.8]], ["a", "b"], train_counts=[3, 1])
    assert one.metrics["accuracy"] == 1.0 and one.metrics["accuracy_ci95"] == wilson(1, 1)
    assert one.metrics["log_loss_ci95"] is None and "log_loss_ci95" in one.reasons
    assert one.baseline_accuracy == 0.0 and one.baseline_class == "a"
    none = score_of([], [], None, ["a", "b"], train_counts=[3, 1])
    assert none.n == 0 and none.metrics["accuracy"] is None and "accuracy" in none.reasons
    assert none.per_class[0].recall is None


def test_perfect_predictions_do_not_claim_certainty() -> None:
    result = score_of([0, 1, 0, 1], [0, 1, 0, 1], None, ["a", "b"])
    assert result.metrics["balanced_accuracy"] == 1.0
    assert result.metrics["balanced_accuracy_ci95"] is None and result.reasons["balanced_accuracy_ci95"]
    assert result.metrics["accuracy_ci95"][0] < 0.7


def test_classes_without_images_are_left_out_of_averages_and_named() -> None:
    result = score_of([0, 0, 1], [0, 1, 1], None, ["a", "b", "never\udcff"])
    assert result.metrics["balanced_accuracy"] == pytest.approx(0.75)
    assert result.metrics["macro_f1"] == pytest.approx(f1_score([0, 0, 1], [0, 1, 1], average="macro"))
    assert "never\udcff" in result.warnings[0]
    assert result.per_class[2].model_dump() == {
        "label": "never\udcff",
        "n": 0,
        "predicted": 0,
        "precision": None,
        "recall": None,
        "recall_ci95": None,
        "f1": None,
    }


def test_a_certain_mistake_has_a_finite_loss() -> None:
    result = score_of([0, 1], [1, 1], [[0.0, 1.0], [0.0, 1.0]], ["a", "b"])
    assert result.metrics["log_loss"] == pytest.approx(-np.log(np.finfo(float).eps) / 2)


def test_majority_baseline_is_that_of_train() -> None:
    result = score_of([0, 0, 0, 1], [0, 0, 0, 0], None, ["a", "b"], train_counts=[10, 90])
    assert result.baseline_accuracy == 0.25 and result.baseline_class == "b"


@pytest.mark.parametrize(
    ("y", "predicted", "probabilities"),
    [
        ([0, 2], [0, 0], None),
        ([0, -1], [0, 0], None),
        ([0, 1], [0, 5], None),
        ([0, 1], [0], None),
        ([0.0, 1.0], [0, 1], None),
        ([0, 1], [0, 1], [[1.0, 0.0]]),
        ([0, 1], [0, 1], [[1.0, 0.0], [0.5, np.nan]]),
        ([0, 1], [0, 1], [[1.0, 0.0], [0.9, 0.9]]),
    ],
)
def test_what_does_not_fit_is_refused(y, predicted, probabilities) -> None:
    with pytest.raises(ValueError, match=r"must|rows"):
        score_of(y, predicted, probabilities, ["a", "b"])


def test_confused_pairs_come_most_frequent_first_even_without_a_matrix() -> None:
    names = [str(index) for index in range(1001)]
    result = score_of([7, 7, 7, 3, 3], [9, 9, 7, 3, 4], None, names)
    assert result.confusion is None and "confusion" in result.reasons
    pairs = [(pair.label, pair.predicted, pair.n) for pair in result.confused]
    assert pairs == [("7", "9", 2), ("3", "4", 1)]


def test_ties_at_the_fifth_place_do_not_depend_on_the_block() -> None:
    probabilities = np.full((2, 6), 1 / 6)
    result = score_of([4, 5], [0, 0], probabilities, list("abcdef"))
    assert result.metrics["top5"] == 0.5


def test_many_rows_and_classes_stay_quick() -> None:
    y, predicted, probabilities, names = _example(n=20_000, classes=200)
    start = time.perf_counter()
    score_of(y, predicted, probabilities, names)
    assert time.perf_counter() - start < 20


def test_leaked_images_are_counted_and_left_out() -> None:
    digests, right = np.arange(64, dtype=np.uint8).reshape(4, 16), np.array([True, True, False, False])
    every, alone = np.ones(4, bool), np.arange(4)
    leak = find_leak(digests[[1, 3, 3]], digests, alone, every, right)
    assert leak == Leak(leaked=2, n=2, accuracy=0.5, accuracy_ci95=wilson(1, 2))
    everything = find_leak(digests, digests, alone, every, right)
    assert everything is not None and everything.n == 0 and everything.accuracy is None
    assert find_leak(digests[:0], digests, alone, every, right) is None
    both = find_leak(digests[[1]], digests, np.array([0, 0, 1, 2]), every, right)
    assert both == Leak(leaked=2, by_group=1, n=2, accuracy=0.0, accuracy_ci95=wilson(0, 2))


def test_leak_in_a_sentence() -> None:
    leak = Leak(leaked=2, n=98, accuracy=0.5, accuracy_ci95=wilson(49, 98))
    assert leak_sentence(leak, "val") == (
        "2 of the 100 images of val are also in train, byte for byte. "
        "Without them the accuracy is 50.0 % (95 %: 40.3 to 59.7 %, 98 images)."
    )
    grouped = leak.model_copy(update={"leaked": 5, "by_group": 3, "n": 95})
    assert leak_sentence(grouped, "val").startswith(
        "5 of the 100 images of val are of groups that train has too (2 of them byte for byte). Without them"
    )
    assert "nothing about new images" in leak_sentence(Leak(leaked=2, n=0, accuracy=None, accuracy_ci95=None), "val")


def test_protocol_in_a_sentence() -> None:
    chosen = Selection("the strength C", "by 5-fold cross-validation", "train")

    def sentence(*selections: Selection) -> str:
        provenance = Provenance(
            "the logistic head", np.zeros((0, 16), np.uint8), np.array([200, 44]), selections=selections
        )
        return protocol_sentence(provenance, "val", 1, 1)

    assert sentence(chosen) == (
        "The strength C was chosen by 5-fold cross-validation on train and the logistic head was fitted on 244 images "
        "of train; reported are 1 image of val, on which nothing was chosen."
    )
    biased = sentence(chosen, Selection("the kind of head", "by accuracy", "val"))
    assert "which also chose the kind of head, so the score is too good" in biased
    assert sentence().startswith("The logistic head was fitted")
    own = Provenance("the logistic head", np.zeros((0, 16), np.uint8), np.array([200, 44]))
    assert "of train, which it was fitted on" in protocol_sentence(own, "train", 244, 244)


def _brier(of: Weighted) -> NDArray[np.float64]:
    images = of.images
    own = np.eye(images.probabilities.shape[1])[images.y]
    return of.mean(((images.probabilities - own) ** 2).sum(axis=1))


def test_a_metric_is_one_entry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One written outside the package is computed with its interval, stored, summed up, printed, compared, shown."""
    metric = Metric("Brier score", _brier, is_share=False, lower_is_better=True, needs_probabilities=True)
    monkeypatch.setitem(METRICS, "brier", metric)
    y, predicted, probabilities, names = _example(n=100, classes=3)
    metrics = score_of(y, predicted, probabilities, names)
    value, (low, high) = metrics.metrics["brier"], metrics.metrics["brier_ci95"]
    assert value == pytest.approx(((probabilities - np.eye(3)[y]) ** 2).sum(axis=1).mean()) and low < value < high
    assert metrics.summary("/runs/x")["metrics"]["brier_ci95"] == [low, high]
    shown = f"Brier score       {value:.3f}  (95 % interval {low:.3f} to {high:.3f})"
    assert any(shown in line for line in metric_lines(metrics))
    unsure = score_of(y, predicted, 0.5 * probabilities + 1 / 6, names)
    without = score_of(y, predicted, None, names, why_none="it votes")
    assert (without.metrics["brier"], without.reasons["brier"]) == (None, "it votes")

    runs = [
        make_run(tmp_path, name, [0, 1], [0, 1], class_names=names, metrics=each)
        for name, each in (("unsure", unsure), ("sure", metrics), ("without", without))
    ]
    assert read_metrics(runs[1]) == metrics
    comparison = compare_runs(runs, sort="brier")
    assert [run.path.name for run in comparison.runs] == ["sure", "unsure", "without"]
    assert comparison.as_dict()["runs"][0]["metrics"]["brier"] == value
    table = comparison_markdown(comparison).splitlines()
    assert "| Brier score |" in table[0] and f"{value:.3f} [{low:.3f}–{high:.3f}]" in table[2]

    report = render_report(Content("sure", read_model(runs[1]), metrics))
    assert f"<span>Brier score</span><b>{value:.3f}</b><span>95&nbsp;%: {low:.3f} to {high:.3f}</span>" in report
