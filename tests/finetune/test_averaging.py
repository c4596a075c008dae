"""Averages of weights: the moving one follows and steps aside, the interpolated one is the best of its line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.finetune import Setup
from pipeline.finetune.averaging import MovingAverage, interpolate, mix_states, reestimate_statistics
from pipeline.finetune.history import SelectionScore
from pipeline.finetune.selection import SelectionSet

from .support import (
    TRANSFORM,
    labelled,
    state_digest,
    tiny_backbone,
    tiny_classifier,
    tiny_params,
    train_tiny,
)


def test_moving_average_follows_and_steps_aside() -> None:
    module = nn.Linear(2, 1)
    average = MovingAverage(module, 0.5)
    start = module.weight.detach().clone()
    with torch.no_grad():
        module.weight += 1
    average.update()
    with average.applied():
        torch.testing.assert_close(module.weight.detach(), start + 0.9)  # the first decay is 1/10
    torch.testing.assert_close(module.weight.detach(), start + 1)
    twin = MovingAverage(module, 0.5)
    twin.restore(average.state(), average.steps)
    for each in (average, twin):
        each.update()
    assert torch.equal(average.state()["weight"], twin.state()["weight"])


def test_interpolation_finds_the_better_middle() -> None:
    classifier = tiny_classifier()
    start = {name: torch.zeros_like(value) for name, value in classifier.state_dict().items()}
    tuned = {name: torch.ones_like(value) for name, value in start.items()}

    seen = []

    def score(module: torch.nn.Module) -> SelectionScore:
        seen.append(module.head.linear0.weight[0, 0].item())
        return SelectionScore(abs(seen[-1] - 0.3), 0.5)

    share, state = interpolate(classifier, start, tuned, score, by="log_loss", images=lambda: [], judges=9)
    assert share == pytest.approx(0.25) and seen[0] == 0 and seen[-1] == 1
    assert classifier.head.linear0.weight[0, 0].item() == pytest.approx(0.25)
    assert float(state["head.linear0.weight"][0, 0]) == pytest.approx(0.25)
    # What it gains, 0.25 an image, is chance where 7 images say so.
    share, state = interpolate(classifier, start, tuned, score, by="log_loss", images=lambda: [], judges=7)
    assert share == 0 and classifier.head.linear0.weight[0, 0].item() == 0


def test_the_ends_of_the_line_are_the_two_states(tmp_path: Path) -> None:
    result, _ = train_tiny(tmp_path, tiny_params(epochs=1))
    assert state_digest(mix_states(result.start, result.tuned, 0.0)) == state_digest(result.start)
    assert state_digest(mix_states(result.start, result.tuned, 1.0)) == state_digest(result.tuned)


def test_moved_statistics_are_estimated_anew(tmp_path: Path) -> None:
    result, classifier = train_tiny(tmp_path, tiny_params(epochs=1), batchnorm="train")
    images = torch.randn(64, 3, 16, 16)
    calls = 0

    def batches() -> list[torch.Tensor]:
        nonlocal calls
        calls += 1
        return [images]

    selection = SelectionSet(labelled(9), TRANSFORM, tiny_params(), Setup())
    interpolate(classifier, result.start, result.tuned, selection.score, by="log_loss", images=batches, judges=9)
    assert calls == 3


def test_estimated_statistics_are_those_of_the_images() -> None:
    network = tiny_backbone()
    images = torch.randn(64, 3, 16, 16)
    reestimate_statistics(network, images.split(16))
    seen = network[0][0](images)
    torch.testing.assert_close(network[0][1].running_mean, seen.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    assert network[0][1].momentum == 0.1 and not network[0][1].training
