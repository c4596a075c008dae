"""The finder of learning rates."""

from __future__ import annotations

import pytest

from pipeline.finetune import RateCurve, Setup, find_learning_rates, rate_curves_plot

from .support import (
    TRANSFORM,
    labelled,
    state_digest,
    tiny_classifier,
    tiny_params,
)


def test_curves_end_where_the_loss_gives_way() -> None:
    classifier = tiny_classifier()
    before = state_digest(dict(classifier.state_dict()))
    curves = find_learning_rates(classifier, labelled(40), TRANSFORM, tiny_params(optimizer="sgd"), Setup(), steps=25)
    assert [curve.name for curve in curves] == ["head_lr", "backbone_lr"]
    for curve in curves:
        assert len(curve.rates) == len(curve.losses) > 5
        assert curve.rates[0] / 10 <= curve.suggestion <= curve.rates[-1] / 10 * 1.06
    assert state_digest(dict(classifier.state_dict())) == before
    assert b"<svg" in rate_curves_plot(curves)


def test_suggestion_is_a_tenth_of_the_last_good_rate() -> None:
    falling = RateCurve("head_lr", (1e-4, 1e-3, 1e-2, 1e-1, 1.0), (2.0, 1.9, 1.0, 0.99, 2.5))
    assert falling.suggestion == pytest.approx(1e-2)
    flat = RateCurve("head_lr", (1e-4, 1e-3, 1e-2, 1e-1), (0.1, 0.1, 0.1, 0.4))
    assert flat.suggestion == pytest.approx(1e-3)
