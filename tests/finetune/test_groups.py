"""Parameter groups: every trainable parameter once, frozen ones nowhere, rates by depth and along the schedule."""

from __future__ import annotations

import pytest
import torch
import torchvision

from pipeline.backbones import make_module
from pipeline.errors import FinetuneError
from pipeline.finetune.groups import (
    backbone_groups,
    backbone_rate,
    describe_groups,
    find_blocks,
    first_groups,
    head_groups,
    head_rate,
    make_schedule,
    unfrozen_blocks,
)
from pipeline.finetune.step import Setup, TrainableClassifier

from .support import tiny_backbone, tiny_classifier, tiny_params


@pytest.mark.parametrize(
    ("name", "first", "last", "count"),
    [
        ("resnet18", "model.conv1", "model.layer4", 5),
        ("mobilenet_v3_small", "model.features.0", "model.classifier", 14),
        ("convnext_tiny", "model.features.0", "model.features.7", 8),
        ("vit_b_16", "model.conv_proj", "model.encoder.layers.encoder_layer_11", 13),
    ],
)
def test_blocks_of_known_architectures(name: str, first: str, last: str, count: int) -> None:
    network, _ = make_module(name)
    blocks = find_blocks(network)
    assert (blocks[0].name, blocks[-1].name) == (first, last)
    assert len(blocks) == count
    named = [name for block in blocks for name, _ in block.parameters]
    assert sorted(named) == sorted(name for name, _ in network.named_parameters())


def test_every_parameter_is_in_one_group_without_decay_for_vectors() -> None:
    classifier, params = tiny_classifier(), tiny_params(weight_decay=0.1, layer_decay=0.5)
    blocks = find_blocks(classifier.backbone)
    groups = head_groups(classifier, params) + backbone_groups(blocks, range(len(blocks)), params)
    ids = [id(parameter) for group in groups for _, parameter in group.parameters]
    assert sorted(ids) == sorted(id(parameter) for parameter in classifier.parameters())
    for group in groups:
        for _, parameter in group.parameters:
            assert group.weight_decay == (0.1 if parameter.ndim > 1 else 0.0)


def test_layer_decay_lowers_the_rate_with_the_distance_from_the_head() -> None:
    classifier, params = tiny_classifier(), tiny_params(layer_decay=0.5, backbone_lr=0.4)
    groups = backbone_groups(find_blocks(classifier.backbone), range(3), params)
    assert {group.name.split(" ")[0]: group.lr for group in groups} == {
        "backbone.2": 0.4,
        "backbone.1": 0.2,
        "backbone.0": pytest.approx(0.1),
    }


@pytest.mark.parametrize("unfreeze", ["none", "last-1", "last-2", "all"])
def test_frozen_parameters_are_in_no_optimizer(unfreeze: str) -> None:
    model = TrainableClassifier(tiny_classifier(), tiny_params(unfreeze=unfreeze), Setup())
    held = {id(parameter) for group in model.optimizer.param_groups for parameter in group["params"]}
    trainable = {id(parameter) for parameter in model.classifier.parameters() if parameter.requires_grad}
    assert held == trainable
    opened = {"none": 0, "last-1": 1, "last-2": 2, "all": 3}[unfreeze]
    assert len(model.open) == opened
    model.train_mode()
    modes = [block.modules[0].training for block in model.blocks]
    assert modes == [index >= 3 - opened for index in range(3)]


def test_zero_rates_freeze() -> None:
    model = TrainableClassifier(tiny_classifier(), tiny_params(backbone_lr=0.0), Setup())
    assert model.trainable == sum(parameter.numel() for parameter in model.classifier.head.parameters())
    with pytest.raises(FinetuneError, match="Nothing is left to train"):
        first_groups(tiny_classifier(), tiny_params(backbone_lr=0.0, head_lr=0.0))


def test_gradual_unfreezing_ends_with_everything_and_keeps_the_optimizer() -> None:
    model = TrainableClassifier(tiny_classifier(), tiny_params(unfreeze="gradual"), Setup())
    optimizer, counts = model.optimizer, [model.trainable]
    for epoch in (2, 3):
        model.advance(epoch)
        counts.append(model.trainable)
    assert counts == sorted(set(counts)) and counts[-1] == sum(one.numel() for one in model.classifier.parameters())
    assert model.optimizer is optimizer
    assert len(unfrozen_blocks("gradual", 13, epoch=1, epochs=5)) == 0
    assert len(unfrozen_blocks("gradual", 13, epoch=5, epochs=5)) == 13


def test_too_many_blocks_is_an_error_that_names_the_limit() -> None:
    with pytest.raises(FinetuneError, match="3 blocks"):
        unfrozen_blocks("last-4", 3, epoch=1, epochs=1)


def test_the_table_adds_up() -> None:
    classifier, params = tiny_classifier(), tiny_params()
    groups = first_groups(classifier, params)
    total = sum(parameter.numel() for parameter in classifier.parameters())
    assert sum(group.count for group in groups) == total
    assert f"trainable {total:,} of {total:,} parameters (100.0 %)" in describe_groups(groups, total)


def test_blocks_of_a_plain_torchvision_model_cover_it() -> None:
    model = torchvision.models.squeezenet1_0(weights=None)
    named = [name for block in find_blocks(model) for name, _ in block.parameters]
    assert len(named) == len(set(named)) == len(list(model.parameters()))


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


def test_automatic_rates_follow_batch_start_and_kind() -> None:
    def rates(backbone: torch.nn.Module, **changes: object) -> tuple[float, float]:
        params = tiny_params(backbone_lr="auto", head_lr="auto", **changes)
        return backbone_rate(params, find_blocks(backbone)), head_rate(params)

    layered = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 4))
    assert rates(tiny_backbone(), batch_size=32) == (3e-4, 1e-4)
    assert rates(tiny_backbone(), batch_size=32, accumulate=4) == (6e-4, 2e-4)
    assert rates(layered, batch_size=32, start="random") == (3e-5, 1e-3)
