"""Killed by SIGKILL, resumed, the same weights; several processes, the same loss."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.params.sections import FinetuneParams

from .support import STILL, state_digest, tiny_params, train_tiny

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(params: FinetuneParams, folder: Path, *, environment: dict[str, str] | None = None, **task: Any) -> Any:
    task = {"params": params.model_dump_json(), "folder": str(folder), "batchnorm": "train", **task}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.finetune.support", json.dumps(task)],
        cwd=PROJECT,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process: Any) -> dict[str, Any]:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return dict(json.loads(out.splitlines()[-1]))


def test_killed_and_resumed_ends_with_the_same_weights(tmp_path: Path) -> None:
    params = tiny_params(ema=0.9, dropout=0.2, mixup=0.2, checkpoint_minutes=1e-9)
    whole, _ = train_tiny(tmp_path / "whole", params, batchnorm="train")
    # Within the first epoch; within a rename that publishes a state or a checkpoint.
    for how in ({"kill_at": 3}, {"kill_in_rename": 4}):
        process = start(params, tmp_path / "killed", **how)
        process.communicate(timeout=120)
        assert process.returncode == -9
    resumed, _ = train_tiny(tmp_path / "killed", params, batchnorm="train")
    assert state_digest(resumed.tuned) == state_digest(whole.tuned)
    assert [row.train_loss for row in resumed.history] == [row.train_loss for row in whole.history]
    left = sorted(path.name for path in (tmp_path / "killed").iterdir())
    states = sorted({"state-0000.pt", f"state-{whole.tuned_epoch:04d}.pt"})
    assert left == [".lock", "checkpoint.pt", *states]


def test_two_processes_compute_what_one_does_with_the_doubled_batch(tmp_path: Path) -> None:
    count = 33  # four equal shares, and one image that is left for the first process alone
    doubled = tiny_params(augment=STILL, batch_size=8, epochs=2)
    one, _ = train_tiny(tmp_path / "one", doubled, count=count)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    halved = doubled.model_copy(update={"batch_size": 4})
    processes = [
        start(
            halved,
            tmp_path / "two",
            environment={**world, "RANK": rank, "LOCAL_RANK": rank},
            batchnorm="frozen",
            count=count,
        )
        for rank in ("0", "1")
    ]
    results = [finish(process) for process in processes]
    assert results[0]["tuned"] == results[1]["tuned"]
    for row, (_, train_loss, selection_loss, accuracy) in zip(one.history, results[0]["history"], strict=True):
        assert train_loss == (None if row.train_loss is None else pytest.approx(row.train_loss, rel=1e-5))
        assert selection_loss == pytest.approx(row.selection_loss, rel=1e-5)
        assert accuracy == row.selection_accuracy
