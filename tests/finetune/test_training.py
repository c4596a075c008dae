"""The loop: it learns, keeps the best, leaves frozen parts alone, and computes the same however it is cut up."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.errors import FinetuneError, Interrupted
from pipeline.files import file_lock
from pipeline.finetune import Callbacks, Setup, TrainingResult, plan_epochs, seconds_per_image, train_classifier
from pipeline.finetune.batchnorm import batchnorm_modules
from pipeline.finetune.training import _Training

from .support import STILL, TRANSFORM, labelled, state_digest, tiny_classifier, tiny_params, train_tiny


def test_it_learns_and_returns_the_best_epoch(tmp_path: Path) -> None:
    result, classifier = train_tiny(tmp_path, tiny_params(epochs=6, backbone_lr=3e-2, head_lr=3e-2, batch_size=6))
    scores = [-row.selection_cooled for row in result.history]
    assert result.history[0].epoch == 0 and result.history[0].train_loss is None
    assert result.history[result.best_epoch].selection_accuracy > 0.8
    assert scores[result.best_epoch] == max(scores)
    assert state_digest(dict(classifier.state_dict())) == state_digest(result.best)
    assert not classifier.training


def test_the_start_is_kept_where_no_epoch_beats_it(tmp_path: Path) -> None:
    params = tiny_params(epochs=2, backbone_lr=0.0, head_lr=1e-9, schedule="none", weight_decay=0.0)
    classifier = tiny_classifier()
    with torch.no_grad():  # so bad a rate moves nothing; a head that is better by the start than any noise
        classifier.head.linear0.weight.zero_()
        classifier.head.linear0.bias.copy_(torch.tensor([5.0, 0.0, 0.0]))
    before = state_digest(dict(classifier.state_dict()))
    train = labelled(12)
    train = dataclasses.replace(train, targets=np.ones(12, np.int64))  # teaches only the wrong class
    selection = labelled(6, seed=1)
    selection = dataclasses.replace(selection, targets=np.zeros(6, np.int64))
    result = train_classifier(
        classifier,
        train,
        selection,
        TRANSFORM,
        params.model_copy(update={"head_lr": 1.0}),
        Setup(),
        folder=tmp_path,
        fingerprint="x",
    )
    assert result.best_epoch == 0 and result.tuned_epoch > 0
    assert state_digest(result.best) == before == state_digest(dict(classifier.state_dict()))
    assert state_digest(result.tuned) != before


@pytest.mark.parametrize("batchnorm", ["frozen", "train"])
def test_buffers_of_frozen_parts_are_bit_identical(tmp_path: Path, batchnorm: str) -> None:
    params = tiny_params(unfreeze="last-1", epochs=1)
    result, classifier = train_tiny(tmp_path, params, batchnorm=batchnorm)
    changed = {name for name, value in result.tuned.items() if not torch.equal(value, result.start[name])}
    moved = {name for name in changed if "running_" in name or "num_batches" in name}
    assert {name for name in changed if name.startswith("backbone.")} - moved == {
        "backbone.2.0.weight",
        "backbone.2.1.weight",
        "backbone.2.1.bias",
    }
    assert bool(moved) == (batchnorm == "train") and all(name.startswith("backbone.2.") for name in moved)
    assert len(batchnorm_modules(classifier)) == 3


def test_head_only(tmp_path: Path) -> None:
    result, _ = train_tiny(tmp_path, tiny_params(unfreeze="none", epochs=1), batchnorm="train")
    changed = {name for name, value in result.tuned.items() if not torch.equal(value, result.start[name])}
    assert changed == {"head.linear0.weight", "head.linear0.bias"}


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_batch_of_one_image_trains(tmp_path: Path, batch_size: int) -> None:
    params = tiny_params(epochs=1, batch_size=batch_size)
    result, _ = train_tiny(tmp_path, params, count=batch_size + 1, batchnorm="train")
    assert np.isfinite(result.history[1].train_loss)


def test_accumulation_equals_a_larger_batch(tmp_path: Path) -> None:
    together = tiny_params(augment=STILL, batch_size=12, class_weight="balanced", epochs=2)
    apart = together.model_copy(update={"batch_size": 4, "accumulate": 3})
    weights = np.array([1.0, 2.0, 0.5])
    (one, _), (other, _) = (
        train_tiny(tmp_path / str(params.accumulate), params, count=30, class_weights=weights)
        for params in (together, apart)
    )
    for name, value in one.tuned.items():
        torch.testing.assert_close(other.tuned[name], value, atol=1e-4, rtol=1e-3)
    assert other.history[2].train_loss == pytest.approx(one.history[2].train_loss, rel=1e-4)


VARIANTS = {
    "everything": {"mixup": 0.2, "cutmix": 1.0, "ema": 0.9, "dropout": 0.2, "accumulate": 2, "layer_decay": 0.7},
    "gradual": {"unfreeze": "gradual", "optimizer": "adam", "schedule": "one_cycle"},
    "sgd": {"optimizer": "sgd", "schedule": "step", "label_smoothing": 0.1},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, name: str) -> None:
    params = tiny_params(**VARIANTS[name])
    whole, _ = train_tiny(tmp_path / "whole", params, batchnorm="train")
    seen = 0
    for stop_after in (2, 3, 4):
        callbacks = Callbacks()

        def count(images: int, callbacks: Callbacks = callbacks, stop_after: int = stop_after) -> None:
            nonlocal seen
            seen += 1
            if seen >= stop_after:
                callbacks.interruption.request()

        callbacks = dataclasses.replace(callbacks, on_batch=count)
        seen = 0
        with pytest.raises(Interrupted):
            train_tiny(tmp_path / "cut", params, callbacks=callbacks, batchnorm="train")
    torch.manual_seed(123)
    resumed, _ = train_tiny(tmp_path / "cut", params, batchnorm="train")
    assert state_digest(resumed.tuned) == state_digest(whole.tuned)
    for first, second in zip(resumed.history, whole.history, strict=True):
        assert dataclasses.replace(first, seconds=0, images_per_second=0) == dataclasses.replace(
            second, seconds=0, images_per_second=0
        )


def test_a_finished_training_is_not_repeated(tmp_path: Path) -> None:
    first, _ = train_tiny(tmp_path, tiny_params(epochs=1))
    again, _ = train_tiny(tmp_path, tiny_params(epochs=1))
    assert again.history == first.history and state_digest(again.best) == state_digest(first.best)


def test_the_same_numbers_for_any_number_of_threads_that_prepare(tmp_path: Path) -> None:
    one, _ = train_tiny(tmp_path / "1", tiny_params(epochs=1, workers=1))
    four, _ = train_tiny(tmp_path / "4", tiny_params(epochs=1, workers=4, image_cache_mb=0))
    assert state_digest(one.tuned) == state_digest(four.tuned)


def test_the_random_state_outside_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    tiny_classifier()
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    classifier = tiny_classifier()
    torch.random.set_rng_state(state)
    train_classifier(
        classifier,
        labelled(9),
        labelled(6),
        TRANSFORM,
        tiny_params(epochs=1, dropout=0.5),
        Setup(),
        folder=tmp_path,
        fingerprint="x",
    )
    assert torch.equal(torch.rand(3), expected)


def test_early_stopping(tmp_path: Path) -> None:
    params = tiny_params(epochs=20, patience=2, backbone_lr=0.0, head_lr=1e-7, schedule="none")
    result, _ = train_tiny(tmp_path, params, count=12)
    waited = result.history[-1].epoch - result.tuned_epoch
    assert result.history[-1].epoch == 20 or (waited == 2 and "no better for 2 epochs" in result.warnings[0])


def test_divergence_stops_and_keeps_the_start(tmp_path: Path) -> None:
    params = tiny_params(epochs=5, optimizer="sgd", clip_norm=0.0, schedule="none", head_lr=1e30, backbone_lr=1e30)
    result, _ = train_tiny(tmp_path, params)
    assert len(result.history) < 6 and "diverged" in result.warnings[0]
    assert all(torch.isfinite(value).all() for value in result.best.values())


def test_other_params_or_data_cannot_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    train_tiny(tmp_path, tiny_params(epochs=1))
    with pytest.raises(FinetuneError, match="another training run"):
        train_tiny(tmp_path, tiny_params(epochs=1), fingerprint="other")


def test_two_trainings_in_one_folder_are_refused(tmp_path: Path) -> None:
    with file_lock(tmp_path / ".lock", shared=False), pytest.raises(BlockingIOError):
        train_tiny(tmp_path, tiny_params(epochs=1))


def test_without_a_selection_set_the_last_epoch_is_kept_wherever_it_ends(tmp_path: Path) -> None:
    """The epochs are those of the longer training: one that ends early is its beginning."""

    def train(until: int) -> TrainingResult:
        return train_classifier(
            tiny_classifier(),
            labelled(24),
            None,
            TRANSFORM,
            tiny_params(epochs=3),
            Setup(),
            folder=tmp_path / str(until),
            fingerprint="x",
            until=until,
        )

    short, long = train(2), train(3)
    assert (short.best_epoch, long.best_epoch) == (2, 3)
    assert [row.train_loss for row in short.history] == [row.train_loss for row in long.history[:3]]
    assert "selection" not in short.history[2].as_text()


@pytest.mark.parametrize(("minutes", "epochs"), [(None, 5), (10.0, 5), (1.0, 2), (0.01, 1)])
def test_epochs_are_planned_by_time(minutes: float | None, epochs: int) -> None:
    assert plan_epochs(tiny_params(epochs=5, minutes=minutes), 10.0, 12.0) == epochs


def test_the_pace_is_measured_on_a_copy() -> None:
    classifier = tiny_classifier()
    before = state_digest(dict(classifier.state_dict()))
    assert seconds_per_image(classifier, labelled(12), TRANSFORM, tiny_params(), Setup(batchnorm="train")) > 0
    assert state_digest(dict(classifier.state_dict())) == before


def test_between_gpus_a_wish_to_stop_is_heard_a_step_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """By all processes at the same step, and without waiting for what the GPU has still to do."""
    monkeypatch.setattr(
        sys.modules["pipeline.finetune.training"], "Wishes", lambda count: SimpleNamespace(any=lambda: count.wish)
    )
    run = _Training.__new__(_Training)
    run._wishes = None
    gpu, wishes = SimpleNamespace(type="cuda"), (False, True, False)
    assert [run._stops(SimpleNamespace(device=gpu, wish=wish)) for wish in wishes] == [False, False, True]


def test_compiled_steps_lead_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the compiler sees the network, but without a C compiler; batches of 8 and a last one of 1."""
    compiled: list[nn.Module] = []

    def compile_(module: nn.Module, *, dynamic: bool) -> Any:
        compiled.append(module)
        return plain(module, backend="aot_eager", dynamic=dynamic)

    plain = torch.compile
    monkeypatch.setattr(torch, "compile", compile_)
    torch._dynamo.reset()
    ends = []
    for name, own in (("plain", False), ("compiled", True)):
        params = tiny_params(compile=own, unfreeze="gradual", epochs=2, batchnorm="frozen")
        classifier = tiny_classifier()
        result = train_classifier(
            classifier,
            labelled(25),
            labelled(9, seed=1),
            TRANSFORM,
            params,
            Setup(),
            folder=tmp_path / name,
            fingerprint="",
        )
        ends.append(result.tuned)
    assert compiled
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_steps_run_where_there_is_a_compiler(tmp_path: Path) -> None:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("torch.compile needs a C++ compiler")
    ends = []
    for own in (False, True):
        params = tiny_params(compile=own, epochs=2)
        result = train_classifier(
            tiny_classifier(),
            labelled(24),
            None,
            TRANSFORM,
            params,
            Setup(),
            folder=tmp_path / str(own),
            fingerprint="",
        )
        ends.append(result.tuned)
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-3, atol=1e-4)
