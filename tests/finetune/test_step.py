"""One step: the loss that adds up, class weights, precision."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import DeviceError, FinetuneError
from pipeline.finetune.augment import mix_images
from pipeline.finetune.step import (
    Objective,
    Setup,
    Stepper,
    TrainableClassifier,
    correct_sum,
    resolve_class_weights,
    resolve_setup,
    resolve_training_dtype,
)
from pipeline.runtime.distributed import World

from .support import TRANSFORM, labelled, tiny_classifier, tiny_params

CPU = torch.device("cpu")


def test_loss_is_torchs_weighted_mean() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(10, 3), torch.arange(10) % 3
    weights = np.array([1.0, 2.0, 0.5])
    objective = Objective(0.0, weights, CPU)
    mean = objective.loss_sum(logits, targets, None) / objective.weight_sum(targets.numpy())
    torch.testing.assert_close(mean, F.cross_entropy(logits, targets, torch.tensor(weights, dtype=torch.float32)))
    parts = [objective.loss_sum(logits[half], targets[half], None) for half in (slice(0, 4), slice(4, 10))]
    torch.testing.assert_close(sum(parts) / objective.weight_sum(targets.numpy()), mean)


def test_mixed_loss_counts_both_targets() -> None:
    logits, targets = torch.randn(6, 3), torch.arange(6) % 3
    mix = mix_images(torch.randn(6, 3, 8, 8), mixup=0.4, cutmix=0.0, place=(0, 1, 2))
    assert mix is not None
    objective = Objective(0.1, None, CPU)
    soft = mix.share * F.one_hot(targets, 3) + (1 - mix.share) * F.one_hot(targets[mix.partners], 3)
    expected = F.cross_entropy(logits, soft.float(), label_smoothing=0.1, reduction="sum")
    torch.testing.assert_close(objective.loss_sum(logits, targets, mix), expected)
    assert 0 <= float(correct_sum(logits, targets, mix)) <= 6


def test_balanced_weights_are_those_of_sklearn() -> None:
    from sklearn.utils.class_weight import compute_class_weight

    targets = np.array([0, 0, 0, 1, 2, 2])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=targets)
    balanced = tiny_params(class_weight="balanced")
    np.testing.assert_allclose(resolve_class_weights(balanced, targets, "abc"), expected)
    assert resolve_class_weights(balanced, targets, "abcd")[3] == 1.0


def test_class_weights_by_name() -> None:
    targets = np.array([0, 1, 2])
    assert resolve_class_weights(tiny_params(), targets, "abc") is None
    assert resolve_class_weights(tiny_params(class_weight={"b": 3.0}), targets, "abc").tolist() == [1.0, 3.0, 1.0]
    with pytest.raises(FinetuneError, match="'d'"):
        resolve_class_weights(tiny_params(class_weight={"d": 1.0}), targets, "abc")


def test_precision() -> None:
    assert resolve_training_dtype("float32", CPU) == torch.float32
    assert resolve_training_dtype("bfloat16", CPU) == torch.bfloat16
    assert resolve_training_dtype("auto", CPU) in (torch.float32, torch.bfloat16)
    with pytest.raises(DeviceError, match="float16"):
        resolve_training_dtype("float16", CPU)


class Synchronised(nn.SyncBatchNorm):
    """Keeps whether it would have met the others in the statistics of each pass."""

    met: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.met.append(self.training)
        return images


def test_a_process_with_a_single_image_still_meets_the_others_in_their_statistics() -> None:
    """The others wait for it: where it kept away, the training hung."""
    model = TrainableClassifier(tiny_classifier(), tiny_params(), Setup(batchnorm="train"))
    model.classifier.backbone[0][1] = Synchronised(8)
    model.train_mode()
    logits = model.forward(torch.randn(1, 3, 16, 16))
    assert Synchronised.met == [True] and logits.shape == (1, 3)
    plain = model.classifier.backbone[1][1]
    assert plain.training and plain.num_batches_tracked == 0


@pytest.mark.parametrize(("batchnorm", "converted"), [("train", True), ("frozen", False)])
def test_only_statistics_that_move_are_synchronised(
    monkeypatch: pytest.MonkeyPatch, batchnorm: str, converted: bool
) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(nn.SyncBatchNorm, "convert_sync_batchnorm", lambda module: seen.append(True) or module)
    monkeypatch.setattr(nn.Module, "to", lambda module, *_a, **_k: module)
    monkeypatch.setattr(sys.modules["pipeline.finetune.step"], "DistributedDataParallel", lambda module, **_k: module)
    setup = Setup(torch.device("cuda:0"), batchnorm=batchnorm, world=World(size=2))  # type: ignore[arg-type]
    TrainableClassifier(tiny_classifier(), tiny_params(sync_batchnorm=True), setup)
    assert bool(seen) == converted


@pytest.mark.gpu
def test_a_step_never_waits_for_the_gpu(cuda: torch.device) -> None:
    images = labelled(16)
    params = tiny_params(batch_size=8, class_weight={"b": 2.0}, mixup=0.2)
    setup = resolve_setup(params, cuda, targets=images.targets, class_names="abc")
    model = TrainableClassifier(tiny_classifier(), params, setup)
    stepper = Stepper(model, images, TRANSFORM)
    model.train_mode()
    batches = stepper.plan(1)
    for number, (batch, pixels) in enumerate(zip(batches, stepper.prepare(batches, 1), strict=True)):
        torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first makes what is made once
        try:
            stepper.add_gradients(batch, pixels, 1)
            stepper.step(1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
