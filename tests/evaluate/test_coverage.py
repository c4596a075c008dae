"""Coverage: the surest images first, those of one confidence together, and what can be decided at 99 %."""

from __future__ import annotations

import numpy as np

from pipeline.evaluate.coverage import coverage_curve, coverage_sentence


def test_the_curve_is_the_accuracy_of_the_surest() -> None:
    confidence = np.array([0.9, 0.6, 0.8, 0.6, 0.7])
    right = np.array([True, False, True, True, False])
    points = coverage_curve(confidence, right, np.arange(5))
    assert [(point.n, point.confidence) for point in points] == [(1, 0.9), (2, 0.8), (3, 0.7), (5, 0.6)]
    assert [round(point.accuracy, 3) for point in points] == [1.0, 1.0, 0.667, 0.6]


def test_many_images_give_a_hundred_points_that_end_with_all() -> None:
    generator = np.random.default_rng(0)
    confidence = generator.random(5000)
    points = coverage_curve(confidence, generator.random(5000) < confidence, np.arange(5000))
    assert 95 <= len(points) <= 100 and points[-1].n == 5000 and points[0].n <= 60
    assert "could be decided automatically" in coverage_sentence(points, 5000)


def test_no_image_and_no_sure_image() -> None:
    assert coverage_curve(np.empty(0), np.empty(0, bool), np.empty(0, np.int64)) == []
    points = coverage_curve(np.array([0.9, 0.8]), np.array([False, True]), np.arange(2))
    assert coverage_sentence(points, 2).startswith("No share of the images")
