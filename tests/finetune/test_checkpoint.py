"""Checkpoints: whole, known by their fingerprint, and no more of them than are needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.errors import FinetuneError
from pipeline.finetune.checkpoint import CHECKPOINT, Checkpoints
from pipeline.runtime.distributed import World


def test_a_damaged_checkpoint_says_so(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "x", World())
    assert checkpoints.load() is None
    checkpoints.save({"numbers": [1.5, None, "text"]}, keep=set())
    assert (checkpoints.load() or {})["numbers"] == [1.5, None, "text"]
    data = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(data[: len(data) // 2])
    with pytest.raises(FinetuneError, match="cannot be used"):
        checkpoints.load()


def test_only_named_states_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "x", World())
    for epoch in range(4):
        checkpoints.save_weights(epoch, torch.nn.Linear(1, 1))
    (tmp_path / ".tmp-1-dead-checkpoint.pt").write_bytes(b"half")
    checkpoints.save({}, keep={0, 2})
    assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKPOINT, "state-0000.pt", "state-0002.pt"]
