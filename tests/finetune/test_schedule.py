"""Schedules: torch's one-cycle, a cosine that ends at nothing, steps at their epochs."""

from __future__ import annotations

import pytest
import torch

from pipeline.finetune.schedule import make_schedule

from .support import tiny_params


def test_one_cycle_is_that_of_torch() -> None:
    schedule = make_schedule(tiny_params(schedule="one_cycle", one_cycle_peak=10.0, epochs=4), 5)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=10.0, total_steps=20, cycle_momentum=False)
    for step in range(20):
        assert schedule(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        if step < 19:
            reference.step()


def test_cosine_warms_up_then_falls_to_zero() -> None:
    schedule = make_schedule(tiny_params(schedule="cosine", warmup_epochs=0.5, epochs=2), 10)
    factors = [schedule(step) for step in range(20)]
    assert factors[:5] == sorted(factors[:5]) and 0 < factors[0] < 0.2
    assert factors[5] == 1.0
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert schedule(20) == pytest.approx(0.0)


def test_step_and_none() -> None:
    schedule = make_schedule(tiny_params(schedule="step", step_epochs=2, step_gamma=0.1, epochs=5), 3)
    assert [schedule(epoch * 3) for epoch in range(5)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert {make_schedule(tiny_params(schedule="none"), 3)(step) for step in range(9)} == {1.0}


def test_a_single_step_has_a_rate() -> None:
    for name in ("one_cycle", "cosine", "step", "none"):
        assert make_schedule(tiny_params(schedule=name, epochs=1), 1)(0) > 0
