"""Objective, mixing, moving average, image cache, head, history: the small parts of training."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.errors import DeviceError
from pipeline.finetune.classifier import Standardise, fold_head, make_head_module, make_random_head
from pipeline.finetune.ema import MovingAverage
from pipeline.finetune.history import EpochRow, Score, history_csv, history_plot
from pipeline.finetune.images import CachedImages, LabelledImages, cache_budget
from pipeline.finetune.mixing import mix_images
from pipeline.finetune.objective import balanced_weights, correct_sum, make_objective
from pipeline.finetune.precision import resolve_training_dtype

from .support import Pictures, labelled

CPU = torch.device("cpu")


def test_loss_is_torchs_weighted_mean() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(10, 3), torch.arange(10) % 3
    weights = np.array([1.0, 2.0, 0.5])
    objective = make_objective(0.0, weights, CPU)
    mean = objective.loss_sum(logits, targets, None) / objective.weight_sum(targets.numpy())
    torch.testing.assert_close(mean, F.cross_entropy(logits, targets, torch.tensor(weights, dtype=torch.float32)))
    parts = [objective.loss_sum(logits[half], targets[half], None) for half in (slice(0, 4), slice(4, 10))]
    torch.testing.assert_close(sum(parts) / objective.weight_sum(targets.numpy()), mean)


def test_mixed_loss_counts_both_targets() -> None:
    logits, targets = torch.randn(6, 3), torch.arange(6) % 3
    mix = mix_images(torch.randn(6, 3, 8, 8), mixup=0.4, cutmix=0.0, place=(0, 1, 2))
    assert mix is not None
    objective = make_objective(0.1, None, CPU)
    soft = mix.share * F.one_hot(targets, 3) + (1 - mix.share) * F.one_hot(targets[mix.partners], 3)
    expected = F.cross_entropy(logits, soft.float(), label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(objective.loss_sum(logits, targets, mix), expected)
    assert 0 <= float(correct_sum(logits, targets, mix)) <= 6


def test_balanced_weights_are_those_of_sklearn() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    targets = np.array([0, 0, 0, 1, 2, 2])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=targets)
    np.testing.assert_allclose(balanced_weights(targets, 3), expected)
    assert balanced_weights(targets, 4)[3] == 1.0


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_mixing_is_drawn_from_its_place(mixup: float, cutmix: float) -> None:
    images = torch.randn(5, 3, 8, 8)
    first = mix_images(images, mixup=mixup, cutmix=cutmix, place=(0, 1, 2))
    torch.manual_seed(99)
    again = mix_images(images, mixup=mixup, cutmix=cutmix, place=(0, 1, 2))
    assert first and again
    assert torch.equal(first.images, again.images) and first.share == again.share
    others = [mix_images(images, mixup=mixup, cutmix=cutmix, place=(0, 1, batch)) for batch in range(9)]
    assert len({mix.share for mix in others if mix}) > 5
    assert mix_images(images, mixup=0.0, cutmix=0.0, place=(0, 1, 2)) is None


def test_cutmix_share_is_the_area_that_stayed() -> None:
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16)
    mix = mix_images(images, mixup=0.0, cutmix=1.0, place=(3, 1, 0))
    assert mix is not None
    for own, partner, mixed in zip(range(4), mix.partners.tolist(), mix.images, strict=True):
        if own != partner:
            assert (mixed == own).float().mean().item() == pytest.approx(mix.share)
            assert (mixed == partner).float().mean().item() == pytest.approx(1 - mix.share)


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


def test_images_are_decoded_once_within_the_budget() -> None:
    pictures = Pictures(4)
    cached = CachedImages(pictures, budget=3 * 16 * 16 * 3)
    for _ in range(3):
        for index in range(4):
            assert np.array_equal(np.asarray(cached.image(index)), pictures.arrays[index])
    assert cached.kept == 3 and pictures.decoded == 3 + 3
    assert cache_budget(5) == 5_000_000 and 0 < cache_budget("auto") <= 4 << 30


def test_targets_must_fit_their_images() -> None:
    with pytest.raises(ValueError, match="4 images but 3 targets"):
        LabelledImages(Pictures(4), np.zeros(3, np.int64))
    assert len(labelled(4)) == 4


@pytest.mark.parametrize("widths", [(5, 3), (5, 7, 3)])
def test_head_module_and_folded_layers_agree(widths: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    pairs = zip(widths[1:], widths[:-1], strict=True)
    layers = [(random.normal(size=pair), random.normal(size=pair[0])) for pair in pairs]
    mean, scale = random.normal(size=5), random.uniform(0.5, 2, size=5)
    head = make_head_module(layers, mean=mean, scale=scale, dropout=0.3).eval()
    assert "mean" not in dict(head.named_parameters()) and any(isinstance(part, Standardise) for part in head)
    X = random.normal(size=(6, 5))
    expected = (X - mean) / scale
    for position, (weight, bias) in enumerate(layers):
        expected = expected @ weight.T + bias
        if position < len(layers) - 1:
            expected = np.maximum(expected, 0)
    with torch.no_grad():
        np.testing.assert_allclose(head(torch.tensor(X, dtype=torch.float32)).numpy(), expected, atol=1e-4)
    values = X
    for position, (weight, bias) in enumerate(fold_head(head)):
        values = (np.maximum(values, 0) if position else values) @ weight.T + bias
    np.testing.assert_allclose(values, expected, atol=1e-4)


def test_random_heads_depend_on_their_seed_alone() -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first, again, other = (make_random_head(4, 2, hidden=[3], seed=seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(first.linear0.weight, again.linear0.weight)
    assert not torch.equal(first.linear0.weight, other.linear0.weight)


def test_scores_are_ordered_by_accuracy_then_loss() -> None:
    assert Score(9.0, 0.8, 10).beats(Score(0.1, 0.7, 10))
    assert Score(0.1, 0.8, 10).beats(Score(0.2, 0.8, 10))
    assert not Score(0.1, 0.8, 10).beats(Score(0.1, 0.8, 10))
    assert not Score(float("nan"), 0.9, 10).beats(Score(0.2, 0.5, 10))


def test_history_as_table_and_picture() -> None:
    start = EpochRow(0, None, None, 1.0, 0.5, 0.1, None, None, None, 10, True)
    row = EpochRow(1, 0.9, 0.6, 0.8, 0.7, 2.0, 100.0, 1e-3, 1e-5, 10, True)
    table = list(csv.DictReader(io.StringIO(history_csv([start, row]))))
    assert [line["epoch"] for line in table] == ["0", "1"] and table[0]["train_loss"] == ""
    assert float(table[1]["backbone_lr"]) == 1e-5
    assert b"<svg" in history_plot([start, row])
    assert "epoch 1" in row.as_text() and "100.0 images/s" in row.as_text()


def test_precision() -> None:
    assert resolve_training_dtype("float32", CPU) == torch.float32
    assert resolve_training_dtype("bfloat16", CPU) == torch.bfloat16
    assert resolve_training_dtype("auto", CPU) in (torch.float32, torch.bfloat16)
    with pytest.raises(DeviceError, match="float16"):
        resolve_training_dtype("float16", CPU)
