"""The finder of learning rates, and the interpolation between probe and fine-tuned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.errors import FinetuneError
from pipeline.finetune import Score, Setting, Sweep, find_learning_rates, interpolate, sweeps_plot
from pipeline.finetune.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint, save_state
from pipeline.finetune.selection import SelectionSet
from pipeline.finetune.wiseft import mix_states, reestimate_statistics

from .support import (
    TRANSFORM,
    Pictures,
    labelled,
    state_digest,
    tiny_backbone,
    tiny_classifier,
    tiny_params,
    train_tiny,
)


def test_sweeps_end_where_the_loss_gives_way(tmp_path: Path) -> None:
    classifier = tiny_classifier()
    before = state_digest(dict(classifier.state_dict()))
    sweeps = find_learning_rates(
        classifier, labelled(40), TRANSFORM, tiny_params(optimizer="sgd"), Setting(tmp_path, "x"), steps=25
    )
    assert [sweep.name for sweep in sweeps] == ["head_lr", "backbone_lr"]
    for sweep in sweeps:
        assert len(sweep.rates) == len(sweep.losses) > 5
        assert sweep.rates[0] / 10 <= sweep.suggestion <= sweep.rates[-1] / 10 * 1.06
    assert state_digest(dict(classifier.state_dict())) == before
    assert b"<svg" in sweeps_plot(sweeps)


def test_suggestion_is_a_tenth_of_the_last_good_rate() -> None:
    falling = Sweep("head_lr", (1e-4, 1e-3, 1e-2, 1e-1, 1.0), (2.0, 1.9, 1.0, 0.99, 2.5))
    assert falling.suggestion == pytest.approx(1e-2)
    flat = Sweep("head_lr", (1e-4, 1e-3, 1e-2, 1e-1), (0.1, 0.1, 0.1, 0.4))
    assert flat.suggestion == pytest.approx(1e-3)


def test_interpolation_finds_the_better_middle() -> None:
    classifier = tiny_classifier()
    start = {name: torch.zeros_like(value) for name, value in classifier.state_dict().items()}
    tuned = {name: torch.ones_like(value) for name, value in start.items()}

    def score(module: torch.nn.Module) -> Score:
        return Score(abs(module.head.linear0.weight[0, 0].item() - 0.3), 0.5, 10)

    found = interpolate(classifier, start, tuned, score)
    assert found.share == pytest.approx(0.3) and sorted(found.scores)[0] == 0 and sorted(found.scores)[-1] == 1
    assert classifier.head.linear0.weight[0, 0].item() == pytest.approx(0.3)
    assert float(found.state["head.linear0.weight"][0, 0]) == pytest.approx(0.3)


def test_the_ends_of_the_line_are_the_two_states(tmp_path: Path) -> None:
    outcome, _ = train_tiny(tmp_path, tiny_params(epochs=1))
    assert state_digest(mix_states(outcome.start, outcome.tuned, 0.0)) == state_digest(outcome.start)
    assert state_digest(mix_states(outcome.start, outcome.tuned, 1.0)) == state_digest(outcome.tuned)


def test_moved_statistics_are_estimated_anew(tmp_path: Path) -> None:
    outcome, classifier = train_tiny(tmp_path, tiny_params(epochs=1), batchnorm="train")
    images = torch.randn(64, 3, 16, 16)
    calls = 0

    def batches() -> list[torch.Tensor]:
        nonlocal calls
        calls += 1
        return [images]

    selection = SelectionSet(labelled(9), TRANSFORM, torch.device("cpu"), tiny_params())
    interpolate(classifier, outcome.start, outcome.tuned, selection.score, images=batches, shares=(0.5,))
    assert calls == 1


def test_estimated_statistics_are_those_of_the_images() -> None:
    network = tiny_backbone()
    images = torch.randn(64, 3, 16, 16)
    reestimate_statistics(network, images.split(16))
    seen = network[0][0](images)
    torch.testing.assert_close(network[0][1].running_mean, seen.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    assert network[0][1].momentum == 0.1 and not network[0][1].training


def test_selection_pixels_are_prepared_once() -> None:
    pictures = Pictures(9)
    images = labelled(9)
    object.__setattr__(images, "source", pictures)
    selection = SelectionSet(images, TRANSFORM, torch.device("cpu"), tiny_params(batch_size=4))
    classifier = tiny_classifier()
    first, second = selection.score(classifier), selection.score(classifier)
    assert first == second and first.n == 9 and pictures.decoded == 9
    assert selection.logits(classifier).shape == (9, 3)
    assert not torch.is_inference_mode_enabled()


def test_a_damaged_checkpoint_says_so(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path, fingerprint="x") is None
    save_checkpoint(tmp_path, {"fingerprint": "x", "numbers": [1.5, None, "text"]}, states=set())
    assert (load_checkpoint(tmp_path, fingerprint="x") or {})["numbers"] == [1.5, None, "text"]
    data = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(data[: len(data) // 2])
    with pytest.raises(FinetuneError, match="cannot be used"):
        load_checkpoint(tmp_path, fingerprint="x")


def test_only_named_states_stay(tmp_path: Path) -> None:
    for epoch in range(4):
        save_state(tmp_path, epoch, {"a": torch.zeros(1)})
    (tmp_path / ".tmp-1-dead-checkpoint.pt").write_bytes(b"half")
    save_checkpoint(tmp_path, {"fingerprint": "x"}, states={0, 2})
    assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKPOINT, "state-0000.pt", "state-0002.pt"]
