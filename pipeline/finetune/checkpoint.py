"""Checkpoints of a training run: whole or not there, read back without unpickling objects.

``checkpoint.pt`` holds all that the run needs to go on; ``state-EPOCH.pt`` the weights of the best epoch, and
``state-0000.pt`` those training started from. A state is published before the checkpoint that names it, and removed
only after one that does not: a process killed at any moment leaves a checkpoint whose states are all there.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import FinetuneError
from ..files import TEMPORARY_PREFIX, publish_file

FORMAT = 1
CHECKPOINT = "checkpoint.pt"


def save_checkpoint(folder: Path, content: Mapping[str, Any], *, states: set[int]) -> None:
    """Publish ``content`` and remove the states of epochs other than ``states``, and leftovers of killed writers."""
    publish_file(folder / CHECKPOINT, _to_bytes({"format": FORMAT, **content}))
    kept = {state_name(epoch) for epoch in states}
    for file in folder.iterdir():
        stale = file.name.startswith("state-") and file.name not in kept
        if stale or file.name.startswith(TEMPORARY_PREFIX):
            with suppress(OSError):
                file.unlink()


def load_checkpoint(folder: Path, *, fingerprint: str) -> dict[str, Any] | None:
    """The checkpoint's content; None where there is none yet.

    Raises:
        FinetuneError: it cannot be read, or belongs to other params, data or weights.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    content = _read(path)
    if content.get("format") != FORMAT:
        raise _unusable(path, f"its format is {content.get('format')}, this version reads {FORMAT}")
    if content.get("fingerprint") != fingerprint:
        raise FinetuneError(
            "The checkpoint belongs to another training run.",
            where=path,
            why="params, data, starting weights or number of processes have changed since it was written",
            remedy="resume with what the run was started with, or start a new run without --resume",
        )
    return content


def save_state(folder: Path, epoch: int, state: Mapping[str, Tensor]) -> None:
    """Publish the weights of ``epoch``."""
    publish_file(folder / state_name(epoch), _to_bytes(dict(state)))


def load_state(folder: Path, epoch: int) -> dict[str, Tensor]:
    """The weights of ``epoch``, on the CPU.

    Raises:
        FinetuneError: they are not there or cannot be read.
    """
    return _read(folder / state_name(epoch))


def state_name(epoch: int) -> str:
    """The file name of an epoch's weights."""
    return f"state-{epoch:04d}.pt"


def _to_bytes(content: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise _unusable(path, " ".join(str(error).split())[:200]) from error
    if not isinstance(content, dict):
        raise _unusable(path, f"it holds a {type(content).__name__}")
    return content


def _unusable(path: Path, why: str) -> FinetuneError:
    return FinetuneError(
        "A checkpoint cannot be used.",
        where=os.fspath(path),
        why=why,
        remedy="start a new run without --resume",
    )
