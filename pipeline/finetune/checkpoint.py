"""Checkpoints of a training: whole or not there, read back without unpickling objects.

``checkpoint.pt`` holds all that the training needs to go on; ``state-EPOCH.pt`` the weights of the best epoch, and
``state-0000.pt`` those training started from. Weights are published before the checkpoint that names them, and removed
only after one that does not: a process killed at any moment leaves a checkpoint whose weights are all there.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import FinetuneError
from ..files import TEMPORARY_PREFIX, canonical_json, digest_bytes, file_lock, publish_file
from ..heads import Layers
from ..params import FinetuneParams
from ..runtime.distributed import World

FORMAT = 2
CHECKPOINT = "checkpoint.pt"
WITHOUT_EFFECT = {"workers", "image_cache_mb", "checkpoint_minutes", "minutes", "tensorboard"}  # change no number
Result = TypeVar("Result")


def training_fingerprint(
    params: FinetuneParams,
    *,
    backbone: Mapping[str, Any],
    transform: Mapping[str, Any],
    images: NDArray[Any],
    selection: NDArray[Any],
    head: Layers,
) -> str:
    """Digest of all that the result of a training depends on, by which its checkpoint is known.

    Args:
        backbone, transform: their identities, as plain values.
        images, selection: digests (n, 16) of what trains and of what selects the epoch, in order.
        head: what training starts from.
    """
    layers = [array.tolist() for layer in zip(head.weights, head.biases, strict=True) for array in layer]
    # What came later is left out at its default, so that trainings begun before it can go on.
    left_out = WITHOUT_EFFECT | ({"compile"} if not params.compile else set())
    facts = {
        "params": params.model_dump(mode="json", exclude=left_out),
        "backbone": backbone,
        "transform": transform,
        "images": digest_bytes(images.tobytes()).hex(),
        "selection": digest_bytes(selection.tobytes()).hex(),
        "head": digest_bytes(canonical_json(layers).encode()).hex(),
    }
    return digest_bytes(canonical_json(facts).encode()).hex()


@dataclass(frozen=True)
class Checkpoints:
    """Those of one training in ``folder``: the first process writes and reads, and tells the others what it read.

    Attributes:
        fingerprint: see `training_fingerprint`; a checkpoint with another one is refused.
    """

    folder: Path
    fingerprint: str
    world: World

    def lock(self) -> AbstractContextManager[object]:
        """Keep other trainings out of the folder.

        Raises:
            BlockingIOError: another one is in it.
        """
        return file_lock(self.folder / ".lock", shared=False, blocking=False) if self.world.is_main else nullcontext()

    def save(self, content: Mapping[str, Any], *, keep: set[int]) -> None:
        """Publish ``content`` and remove the weights of epochs other than ``keep``, and leftovers of killed writers."""
        if not self.world.is_main:
            return
        _publish(self.folder / CHECKPOINT, {"format": FORMAT, "fingerprint": self._of_all_processes, **content})
        kept = {weights_name(epoch) for epoch in keep}
        for file in self.folder.iterdir():
            stale = file.name.startswith("state-") and file.name not in kept
            if stale or file.name.startswith(TEMPORARY_PREFIX):
                with suppress(OSError):
                    file.unlink()

    def load(self) -> dict[str, Any] | None:
        """The checkpoint's content; None where there is none yet.

        Raises:
            FinetuneError: it cannot be read, or belongs to other params, data or weights.
        """
        return self._by_main(self._read_checkpoint)

    def save_weights(self, epoch: int, module: nn.Module) -> None:
        """Publish the weights that ``module`` has in ``epoch``."""
        if self.world.is_main:
            weights = {
                name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
                for name, value in module.state_dict().items()
            }
            _publish(self.folder / weights_name(epoch), weights)

    def load_weights(self, epoch: int) -> dict[str, Tensor]:
        """The weights of ``epoch``, on the CPU.

        Raises:
            FinetuneError: they are not there or cannot be read.
        """
        return self._by_main(lambda: _read(self.folder / weights_name(epoch)))

    @property
    def _of_all_processes(self) -> str:
        return f"{self.fingerprint}/{self.world.size}"

    def _read_checkpoint(self) -> dict[str, Any] | None:
        path = self.folder / CHECKPOINT
        if not path.exists():
            return None
        content = _read(path)
        if content.get("format") != FORMAT:
            raise _unusable(path, f"its format is {content.get('format')}, this version reads {FORMAT}")
        if content.get("fingerprint") != self._of_all_processes:
            raise FinetuneError(
                "The checkpoint belongs to another training run.",
                where=path,
                why="params, data, starting weights or number of processes have changed since it was written",
                remedy="resume with what the run was started with, or start a new run without --resume",
            )
        return content

    def _by_main(self, compute: Callable[[], Result]) -> Result:
        """``compute`` in the first process, its result in every one: only that process needs to see the files."""
        result = [compute() if self.world.is_main else None]
        if self.world.size > 1:
            torch.distributed.broadcast_object_list(result)
        return result[0]  # type: ignore[return-value]


def weights_name(epoch: int) -> str:
    """The file name of an epoch's weights."""
    return f"state-{epoch:04d}.pt"


def _publish(path: Path, content: Mapping[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    publish_file(path, buffer.getvalue())


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
