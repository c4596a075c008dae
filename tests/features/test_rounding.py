"""What float16 would spoil is stored wide, each row decided by itself alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.features.rounding import Features, as_stored, survives_float16

scales = st.sampled_from([0.0, 1e-30, 1e-8, 6e-5, 1e-3, 1.0, 300.0, 7e4, 1e30])


@st.composite
def feature_rows(draw: st.DrawFn) -> Features:
    """Rows of many magnitudes, some all zero, some mixing small and large values."""
    count, dim = draw(st.integers(1, 7)), draw(st.sampled_from([1, 3, 17, 700]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    row_scales = np.array(draw(st.lists(scales, min_size=count, max_size=count)))[:, None]
    mixed = np.where(random.random((count, dim)) < 0.2, 1e-6, 1.0)
    return np.asarray(random.standard_normal((count, dim)) * row_scales * mixed, np.float32)


@settings(max_examples=80, deadline=None)
@given(feature_rows())
def test_a_row_is_stored_alike_alone_and_in_company(features: Features) -> None:
    together = as_stored(features, "float16")
    alone = np.concatenate([as_stored(features[row : row + 1], "float16") for row in range(len(features))])
    columnwise = as_stored(np.asfortranarray(features), "float16")
    assert together.tobytes() == alone.tobytes() == np.ascontiguousarray(columnwise).tobytes()


@settings(max_examples=60, deadline=None)
@given(feature_rows())
def test_storing_twice_changes_nothing(features: Features) -> None:
    once = as_stored(features, "float16")
    assert as_stored(once, "float16").tobytes() == once.tobytes()


@settings(max_examples=60, deadline=None)
@given(feature_rows())
def test_the_direction_of_a_row_survives(features: Features) -> None:
    exact, stored = features.astype(np.float64), as_stored(features, "float16").astype(np.float64)
    norms = np.linalg.norm(exact, axis=1) * np.linalg.norm(stored, axis=1)
    cosine = (exact * stored).sum(axis=1)[norms > 0] / norms[norms > 0]
    assert (cosine > 0.99989).all()
    assert ((norms > 0) == exact.any(axis=1)).all()


@pytest.mark.parametrize(
    ("row", "survives"),
    [
        ([1.0, 2.0, 3.0], True),
        ([0.0, 0.0, 0.0], True),
        ([1.0, 65504.0, 3.0], True),
        ([1.0, 70000.0, 3.0], False),
        ([1e-9, 2e-9, 3e-9], False),
        ([1e-7, 2e-7, 3e-7], False),
        ([1e-9, 1.0, 1e-9], True),
        ([1.0, np.inf, 1.0], False),
        ([1.0, np.nan, 1.0], False),
    ],
)
def test_overflow_and_underflow_do_not_survive(row: list[float], survives: bool) -> None:
    features = np.array([[1.0, 1.0, 1.0], row], np.float32)
    assert survives_float16(features).tolist() == [True, survives]
    if not survives:
        assert as_stored(features, "float16")[1].tobytes() == features[1].tobytes()


def test_float32_is_kept_as_it_is() -> None:
    features = np.array([[1 / 3, 1e-9, 1e9]], np.float32)
    assert as_stored(features, "float32").tobytes() == features.tobytes()
    assert as_stored(features, "float16").tobytes() == features.tobytes()
    assert as_stored(features[:, :1], "float16")[0, 0] == np.float32(np.float16(1 / 3))
