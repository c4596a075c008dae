"""Comparison of runs: matched by content, tested exactly, marked only where the difference is real."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import binomtest

from pipeline.artifacts import Predictions
from pipeline.errors import RunError, UsageError
from pipeline.evaluate import compare_runs, comparison_markdown, comparison_notes, comparison_table
from pipeline.evaluate.compare import holm, mcnemar_exact, pair_tests, sort_columns

from ..artifacts.examples import make_run, model_values, predictions

Y = [0, 1] * 20


def _wrong(*indices: int) -> list[int]:
    return [1 - k if index in indices else k for index, k in enumerate(Y)]


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    bad = make_run(tmp_path, "bad", Y, _wrong(*range(15)), seconds=100.0)
    good = make_run(tmp_path, "good", Y, _wrong(30), seconds=3.0)
    near = make_run(tmp_path, "near", Y, _wrong(31, 32), seconds=9.0)
    return [bad, good, near]


def _take(rows: Predictions, indices: list[int]) -> Predictions:
    columns = {name: [getattr(rows, name)[i] for i in indices] for name in ("paths", "splits", "labels", "predicted")}
    return replace(rows, digests=rows.digests[indices], **columns)


def test_only_real_differences_are_marked(runs: list[Path]) -> None:
    result = compare_runs(runs)
    assert [run.path.name for run in result.runs] == ["good", "near", "bad"]
    assert result.better_than(0) == [2] and result.better_than(1) == [2] and result.better_than(2) == []
    tests = {(pair.first, pair.second): pair for pair in result.pairs}
    assert tests[0, 1].p == pytest.approx(1.0) and tests[0, 1].n == 40
    expected = sorted([binomtest(15, 16).pvalue, binomtest(15, 17).pvalue])
    assert tests[0, 2].p == pytest.approx(expected[0]) and tests[0, 2].p_adjusted == pytest.approx(3 * expected[0])
    assert tests[1, 2].p_adjusted == pytest.approx(2 * expected[1])
    assert result.notes == []


def test_json_is_json_and_numbers_runs_from_one(runs: list[Path]) -> None:
    value = json.loads(json.dumps(compare_runs(runs).as_dict(), allow_nan=False))
    assert [row["number"] for row in value["runs"]] == [1, 2, 3]
    assert value["runs"][0]["better_than"] == [3] and value["runs"][0]["metrics"]["accuracy_ci95"]
    assert {"first": 1, "second": 3, "better": 1, "only_first": 15, "only_second": 1}.items() <= value["pairs"][
        1
    ].items()
    assert {"data", "backbone", "head", "split", "n", "seconds"} <= set(value["runs"][0])


@pytest.mark.parametrize("key", sort_columns())
def test_every_column_sorts_both_ways(runs: list[Path], key: str) -> None:
    def order(sort: str) -> list[str]:
        return [run.path.name for run in compare_runs(runs, sort=sort).runs]

    expected = {"accuracy": ["good", "near", "bad"], "seconds": ["good", "near", "bad"], "run": ["bad", "good", "near"]}
    if key in expected:
        assert order(key) == expected[key] and order(f"-{key}") == expected[key][::-1]
    else:
        assert sorted(order(key)) == sorted(order(f"-{key}"))


def test_an_unknown_column_is_a_usage_error(runs: list[Path]) -> None:
    with pytest.raises(UsageError, match="accuracy"):
        compare_runs(runs, sort="beauty")


def test_oldest_first_by_creation(tmp_path: Path) -> None:
    late = make_run(tmp_path, "a", Y, Y, created=datetime(2026, 2, 1, tzinfo=UTC))
    early = make_run(tmp_path, "b", Y, Y, created=datetime(2026, 1, 1, tzinfo=UTC))
    assert [run.path for run in compare_runs([late, early], sort="created").runs] == [early, late]


def test_sets_that_differ_are_compared_on_what_they_share(tmp_path: Path) -> None:
    whole = make_run(tmp_path, "whole", Y, _wrong(*range(10, 25)))
    half = make_run(tmp_path, "half", Y[:20], Y[:20], rows=predictions(Y[:20], Y[:20]))
    far = make_run(tmp_path, "far", Y, Y, rows=predictions(Y, Y, first=1000))
    result = compare_runs([whole, half, far], sort="run")
    tests = {(pair.first, pair.second): pair for pair in result.pairs}
    assert tests[1, 2].n == 20 and tests[1, 2].only_first == 10 and not tests[1, 2].same_set
    assert tests[0, 1].p is None and tests[0, 2].p_adjusted is None
    assert tests[1, 2].p_adjusted == tests[1, 2].p
    assert any("different sets (20 and 40 images); tested on the 20 shared" in note for note in result.notes)
    assert any("share no images" in note for note in result.notes)


def test_copies_count_once_and_in_any_order_alike() -> None:
    one, two = predictions(Y, Y), predictions(Y, _wrong(*range(8)))
    doubled = [*range(40), *range(8), *range(8)]
    copies = replace(_take(two, doubled), paths=[f"{place:03}.jpg" for place in range(len(doubled))])
    plain = pair_tests([one, two])
    assert pair_tests([one, copies]) == plain
    assert pair_tests([_take(one, list(range(39, -1, -1))), two]) == plain
    assert plain[0].only_first == 8 and plain[0].n == 40 and plain[0].same_set


def test_images_under_different_labels_are_left_out() -> None:
    one, two = predictions(Y, Y), predictions(Y, Y)
    relabelled = replace(two, labels=["other", *two.labels[1:]])
    test = pair_tests([one, relabelled])[0]
    assert test.n == 39 and test.labels_disagree == 1
    both_ways = replace(one, digests=one.digests[[0, 0, *range(2, 40)]])
    assert pair_tests([both_ways, both_ways])[0].n == 38


def test_only_rows_of_the_reported_split_count(tmp_path: Path) -> None:
    rows = predictions(Y, _wrong(0))
    other = replace(rows, splits=["train", *rows.splits[1:]])
    runs = [make_run(tmp_path, "a", Y, Y), make_run(tmp_path, "b", Y, Y, rows=other)]
    assert compare_runs(runs).pairs[0].n == 39


def test_damaged_runs_are_errors_or_notes(tmp_path: Path, runs: list[Path]) -> None:
    (runs[0] / "predictions.csv").unlink()
    with pytest.raises(RunError):
        compare_runs(runs)
    result = compare_runs(runs, skip_damaged=True)
    assert len(result.runs) == 2 and result.notes[0].startswith("bad is left out")


def test_text_and_markdown_hold_the_numbers_and_no_markup_of_names(tmp_path: Path) -> None:
    hostile = {**model_values()["backbone"], "name": "[bold]|x\x1b[31m\udcff"}
    good = make_run(tmp_path, "good", Y, _wrong(30), backbone=hostile)
    bad = make_run(tmp_path, "bad", Y, _wrong(*range(15)))
    result = compare_runs([bad, good, good])
    stream = io.StringIO()
    Console(file=stream, width=200).print(comparison_table(result))
    text = stream.getvalue()
    text.encode("utf-8")
    assert "[bold]|x\\x1b[31m\\udcff" in text and "\x1b" not in text
    assert "97.5 %" in text and "[87.1–99.6]" in text and "split val" in text
    markdown = comparison_markdown(result)
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and "beats" in rows[0] and "\\|x" in rows[2]
    assert any("not shown to differ" in note for note in comparison_notes(result))


def test_one_run_alone(runs: list[Path]) -> None:
    result = compare_runs(runs[:1])
    assert result.pairs == [] and comparison_notes(result) == []
    assert comparison_markdown(result).count("\n| 1 |  |") == 1


def test_many_runs_of_many_images_stay_quick() -> None:
    y = np.random.default_rng(0).integers(2, size=5000).tolist()
    rows = [predictions(y, np.random.default_rng(seed).integers(2, size=5000).tolist()) for seed in range(20)]
    assert len(pair_tests(rows)) == 190


def test_comparing_needs_neither_torch_nor_plots() -> None:
    code = "import sys, pipeline.evaluate; sys.exit(bool({'torch', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def mcnemar(first: int, second: int) -> float:
    """From how many images only the first and only the second gets right, and seven that both do."""
    only_first, only_second = np.repeat([True, False], [first, second]), np.repeat([False, True], [first, second])
    both = np.ones(7, bool)
    return mcnemar_exact(np.concatenate([only_first, both]), np.concatenate([only_second, both]))


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (5, 5), (3, 14), (0, 30), (120, 161), (900, 1200)])
def test_mcnemar_is_the_exact_binomial_test(first: int, second: int) -> None:
    expected = binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(first, second) == mcnemar(second, first)


def test_mcnemar_of_huge_counts_neither_underflows_nor_overflows() -> None:
    assert mcnemar(20_000, 20_000) == 1.0
    assert 0 <= mcnemar(100, 30_000) < 1e-300


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
