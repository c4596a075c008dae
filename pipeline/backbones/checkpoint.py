"""Read and write files of tensors: safetensors, and PyTorch's own through its weights-only loader."""

from __future__ import annotations

import json
import math
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..errors import WeightsError
from .transform import Transform

TRANSFORM_KEY, NAME_KEY = "transform", "backbone"

# Where training programs put the state dict inside what they save; the first that holds tensors is taken.
_NESTS = ("state_dict", "model_state_dict", "model", "backbone", "network", "net", "module")
_MAX_NESTING = 4


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file by name, as stored, and the transform that its metadata names."""

    tensors: dict[str, Tensor]
    transform: Transform | None = None
    nest: tuple[str, ...] = field(default=())


def read_checkpoint(path: Path) -> Checkpoint:
    """The tensors of a weights file; its format is told from its first bytes, not from its name.

    Raises:
        WeightsError: the file is missing, unreadable, damaged, would run code, or holds no tensors.
    """
    try:
        if path.exists() and not path.is_file():
            _fail(path, "it is not a regular file", "name the file itself in backbone.weights")
        with open(path, "rb") as file:
            head = file.read(200)
    except OSError as error:
        _fail(path, error.strerror or str(error), "check backbone.weights; a relative path is relative to params.yaml")
    if head.startswith(b"version ") and b"git-lfs" in head:
        _fail(path, "it is a git-LFS pointer, not the file itself", "run `git lfs pull`")
    if head.lstrip()[:1] == b"<":
        _fail(path, "it is a web page, not weights", "download the file again")
    return _read_safetensors(path) if head[8:9] == b"{" and head[:2] != b"PK" else _read_torch(path)


def checkpoint_bytes(tensors: Mapping[str, Tensor], transform: Transform, *, name: str) -> bytes:
    """A safetensors file of ``tensors`` that carries its transform and the backbone's name in its metadata."""
    whole = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    return safetensors.torch.save(whole, {TRANSFORM_KEY: json.dumps(transform.as_dict()), NAME_KEY: name})


def _read_safetensors(path: Path) -> Checkpoint:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (
        safetensors.SafetensorError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        OverflowError,
    ) as error:
        _fail(path, f"it is no valid safetensors file ({error})", "make or download it again")
    if not tensors:
        _fail(path, "it holds no tensors", "save the model's state_dict()")
    return Checkpoint(tensors, _stored_transform(path, metadata.get(TRANSFORM_KEY)))


def _stored_transform(path: Path, text: str | None) -> Transform | None:
    if text is None:
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WeightsError(
            "The transform in the metadata of the weights file is not JSON.",
            where=path,
            why=str(error),
            remedy="write the file again with a transform as JSON under the metadata key `transform`, or without it",
        ) from error
    return Transform.from_dict(values, where=path)


def _read_torch(path: Path) -> Checkpoint:
    try:
        with warnings.catch_warnings(action="ignore"):  # about formats; whatever matters raises
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        _fail(
            path,
            f"torch's weights-only loader refuses it ({_first_line(error)})",
            "save only tensors: torch.save(model.state_dict(), FILE), or convert the file to safetensors",
        )
    except Exception as error:  # noqa: BLE001 (damaged pickles and archives fail in every way there is)
        _fail(path, f"it cannot be read: {type(error).__name__}: {_first_line(error)}", "make or download it again")
    nest: tuple[str, ...] = ()
    while isinstance(content, Mapping) and len(nest) < _MAX_NESTING:
        tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
        inner = next((key for key in _NESTS if _holds_tensors(content.get(key))), None)
        if inner is None:
            if not tensors:
                break
            return Checkpoint(tensors, nest=nest)
        content, nest = content[inner], (*nest, inner)
    _fail(path, f"it holds no state dict but {_describe(content)}", "save the model's state_dict()")


def _holds_tensors(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    return any(isinstance(item, Tensor) or (key in _NESTS and _holds_tensors(item)) for key, item in value.items())


def _describe(content: Any) -> str:
    if isinstance(content, Mapping):
        return "the keys " + ", ".join(str(key)[:40] for key in list(content)[:6]) if content else "nothing"
    return f"a {type(content).__name__}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


def _fail(path: Path, why: str, remedy: str) -> NoReturn:
    raise WeightsError("The weights file cannot be used.", where=path, why=why, remedy=remedy)


def problem_of_tensor(tensor: Tensor, shape: torch.Size) -> str | None:
    """Why a stored tensor cannot take the place of one of ``shape``; ``None`` when it can."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.device.type != "cpu":
        return "is not a plain tensor of real numbers"
    if tensor.shape != shape:
        return f"has shape {tuple(tensor.shape)} instead of {tuple(shape)}"
    if math.prod(shape) and not torch.isfinite(tensor.float()).all():
        return "holds values that are not finite"
    return None
