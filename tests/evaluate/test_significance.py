"""McNemar against scipy's exact binomial test, Holm by hand."""

from __future__ import annotations

import pytest
from scipy.stats import binomtest

from pipeline.evaluate import holm, mcnemar_exact


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (5, 5), (3, 14), (0, 30), (120, 161), (900, 1200)])
def test_mcnemar_is_the_exact_binomial_test(first: int, second: int) -> None:
    expected = binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar_exact(first, second) == pytest.approx(expected, rel=1e-9)
    assert mcnemar_exact(first, second) == mcnemar_exact(second, first)


def test_mcnemar_of_huge_counts_neither_underflows_nor_overflows() -> None:
    assert mcnemar_exact(20_000, 20_000) == 1.0
    assert 0 <= mcnemar_exact(100, 30_000) < 1e-300


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []
