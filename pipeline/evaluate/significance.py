"""Whether two classifiers differ on the same images: McNemar's exact test, Holm's correction for many tests."""

from __future__ import annotations

import math
from collections.abc import Sequence


def mcnemar_exact(only_first_right: int, only_second_right: int) -> float:
    """Two-sided p-value of McNemar's exact test from the images that exactly one of two classifiers gets right.

    Under the null hypothesis each of them is a fair coin; images that both get right or wrong say nothing.
    Source: Q. McNemar, Psychometrika 12 (1947); the exact form is the binomial sign test.
    """
    n, smaller = only_first_right + only_second_right, min(only_first_right, only_second_right)
    # Logarithms, because 2**-n underflows from 1075 on; fsum keeps the many small terms.
    constant = math.lgamma(n + 1) - n * math.log(2)
    terms = (math.exp(constant - math.lgamma(k + 1) - math.lgamma(n - k + 1)) for k in range(smaller + 1))
    return min(1.0, 2 * math.fsum(terms))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: comparing them with alpha bounds the chance of any false claim.

    Source: S. Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
