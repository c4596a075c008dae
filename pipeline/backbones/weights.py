"""Weights: fetch, read and write their files, and put their tensors into a network, strictly.

Files are safetensors, or PyTorch's own through its weights-only loader. What is missing, misshapen or left over in
them is named.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import http.client
import json
import math
import os
import pickle
import re
import socket
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..errors import WeightsError
from ..files import DIGEST_BYTES, canonical_json, temporary_name
from .transform import Transform
from .zoo import WALL, FeatureNetwork, WeightsSource, Zoo, import_extra

# For connecting and for each read: a machine without internet must say so at once.
TIMEOUT_SECONDS = 15.0
TRANSFORM_KEY, NAME_KEY = "transform", "backbone"
COUNTER = "num_batches_tracked"

# Where training programs put the state dict inside what they save; the first that holds tensors is taken.
_NESTS = ("state_dict", "model_state_dict", "model", "backbone", "network", "net", "module")
_MAX_NESTING = 4
_PREFIXES = ("module.", "model.", "backbone.", "network.", "net.", "_orig_mod.")
_SHOWN = 4
# The way of torch.hub: the beginning of a file's SHA-256 in its name.
_HASH = re.compile(r"-([a-f0-9]{8,})\.[^.]+$")
# Looking for the network that a file would fit is only help with an error.
_SEARCHED, _SEARCH_SECONDS = 15, 20.0


# -- files -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file by name, as stored, and the transform that its metadata names."""

    tensors: dict[str, Tensor]
    transform: Transform | None = None


def checkpoint_file(url: str) -> Path:
    """Where torch keeps, or would keep, the file behind ``url`` (TORCH_HOME moves it)."""
    return Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(urlsplit(url).path)


def download(url: str, path: Path, *, what: str) -> Path:
    """Fetch the weights ``what`` to ``path``, where they are not there yet: whole and checked, or not at all.

    Returns:
        ``path``.

    Raises:
        WeightsError: the download failed; the message names the ways out.
    """
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _socket_timeout(TIMEOUT_SECONDS):
            _download(url, path)
    except (OSError, http.client.HTTPException, RuntimeError, ValueError) as error:
        raise WeightsError(
            f"The weights {what} could not be downloaded.",
            where=f"{url} -> {path}",
            why=str(getattr(error, "reason", None) or error) or type(error).__name__,
            remedy="without internet, either set backbone.weights to a weights file (.safetensors, .pth), "
            f"or put {path.name} into the folder checkpoints of another torch cache and set TORCH_HOME "
            "(TORCH_HOME/hub/checkpoints)",
        ) from error
    return path


def _download(url: str, path: Path) -> None:
    """By torch.hub, which checks the digest that a name promises, but not that all bytes came."""
    print(f"Downloading {url}", file=sys.stderr)
    promised = _HASH.search(path.name)
    if promised:
        torch.hub.download_url_to_file(url, str(path), promised.group(1), progress=sys.stderr.isatty())
        return
    with urlopen(Request(url, method="HEAD", headers={"User-Agent": "torch.hub"})) as answer:
        expected = answer.headers["Content-Length"]
    unchecked = temporary_name(path)
    try:
        torch.hub.download_url_to_file(url, str(unchecked), progress=sys.stderr.isatty())
        received = unchecked.stat().st_size
        if expected is not None and received != int(expected):
            raise OSError(f"the connection ended after {received} of {expected} bytes")
        os.rename(unchecked, path)
    finally:
        unchecked.unlink(missing_ok=True)


def hub_source(label: str, repo: str, names: Sequence[str], *, extra: str) -> WeightsSource:
    """Pretrained weights that lie on Hugging Face's hub, in its own cache once they were downloaded (HF_HOME moves it).

    Args:
        repo: owner and name.
        names: of the file, the first that is there; all are the same tensors in different formats.
        extra: that brings huggingface_hub.

    Raises:
        BackboneError: the extra is not installed.
    """
    hub = import_extra("huggingface_hub", extra)
    found = (hub.try_to_load_from_cache(repo, name) for name in names)
    path = next((Path(item) for item in found if isinstance(item, str)), None)
    return WeightsSource(label, path, label, partial(_hub_file, hub, repo, names), origin=f"hf-hub:{repo}")


def _hub_file(hub: Any, repo: str, names: Sequence[str]) -> Path:
    reason: Exception | None = None
    for name in names:
        try:
            # Fails at once without internet, where the download itself would try again for a minute.
            hub.get_hf_file_metadata(hub.hf_hub_url(repo, name))
            return Path(hub.hf_hub_download(repo, name))
        except hub.errors.EntryNotFoundError as error:
            reason = error
        except Exception as error:  # noqa: BLE001 (a network fails in every way there is)
            reason = error
            break
    raise WeightsError(
        f"The weights {repo} could not be downloaded.",
        where=f"{hub.constants.ENDPOINT}/{repo} -> {hub.constants.HF_HUB_CACHE}",
        why=_first_line(reason) if reason else None,
        remedy="without internet, either set backbone.weights to a weights file (.safetensors, .pth), or set HF_HOME "
        "to a copy of the folder of a machine that has downloaded them",
    ) from reason


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """A limit for connecting and for each read of whatever is opened meanwhile: torch.hub sets none."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


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
        _fail(
            path,
            error.strerror or str(error),
            "check backbone.weights; a file of params names paths from where it lies",
        )
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
        # Training programs put their parsed arguments beside the tensors: text and numbers.
        namespaces = torch.serialization.safe_globals([argparse.Namespace])
        with warnings.catch_warnings(action="ignore"), namespaces:  # about formats; whatever matters raises
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        _fail(
            path,
            f"torch's weights-only loader refuses it ({_first_line(error)})",
            "save only tensors: torch.save(model.state_dict(), FILE), or convert the file to safetensors",
        )
    except Exception as error:  # noqa: BLE001 (damaged pickles and archives fail in every way there is)
        _fail(path, f"it cannot be read: {type(error).__name__}: {_first_line(error)}", "make or download it again")
    for _ in range(_MAX_NESTING):
        if not isinstance(content, Mapping):
            break
        tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
        inner = next((key for key in _NESTS if _holds_tensors(content.get(key))), None)
        if inner is None:
            if not tensors:
                break
            return Checkpoint(tensors)
        content = content[inner]
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


# -- tensors ---------------------------------------------------------------------------------------------------------


def load_tensors(
    zoo: Zoo, name: str, network: FeatureNetwork, tensors: Mapping[str, Tensor], *, where: object
) -> tuple[str, ...]:
    """Replace the parameters and buffers of the network ``name`` of ``zoo`` by ``tensors`` of a file, as float32.

    All of them must be there, except BatchNorm's counters.

    Args:
        where: shown in messages.

    Returns:
        Notes for the user: a classifier that was dropped, tensors that belong to nothing.

    Raises:
        WeightsError: missing, misshapen or unusable tensors; the first few are named, and the network they would fit.
    """
    expected = network.model.state_dict()
    fitted = _fit_names(zoo, name, network, tensors)
    missing = [key for key in expected if key not in fitted and not key.endswith(COUNTER)]
    present = [key for key in expected if key in fitted]
    unfit = {key: _problem_of_tensor(fitted[key], expected[key].shape) for key in present}
    problems = [f"{key} {problem}" for key, problem in unfit.items() if problem]
    if missing or problems:
        needed = sum(not key.endswith(COUNTER) for key in expected)
        raise _mismatch(zoo, name, fitted, missing, problems, needed, where)
    # Updated in place, because a state dict carries the versions of its modules, without which MNASNet refuses it.
    expected.update({key: _own(fitted[key]) for key in present})
    network.model.load_state_dict(expected, assign=True)
    left = {key: fitted[key] for key in sorted(set(fitted) - set(expected))}
    return tuple(_notes(network, left))


def check_classifier(
    zoo: Zoo, name: str, network: FeatureNetwork, tensors: Mapping[str, Tensor], *, where: object
) -> None:
    """Refuse tensors of a file whose classifier is absent or has not the classes of the whole ``network``.

    Raises:
        WeightsError: with the number of classes that the tensors have.
    """
    head = f"{network.classifier}.weight"
    tensor = _fit_names(zoo, name, network, tensors).get(head)
    classes = (network.classifier_shape or [0])[0]
    if tensor is None or tensor.dim() == 0 or len(tensor) != classes:
        raise WeightsError(
            f"These weights hold no classifier for {classes} classes.",
            where=where,
            why="they hold no classifier" if tensor is None else f"their classifier has shape {tuple(tensor.shape)}",
            remedy=f"use weights with {classes} outputs, or train a head on them and use `pipeline predict`",
        )


def tensors_digest(state: Mapping[str, Tensor]) -> str:
    """BLAKE2b-128, in hex, of the tensors that compute: names, dtypes, shapes and float32 values, counters excluded.

    The same whatever file format or precision the values were stored in.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name in sorted(state):
        if name.endswith(COUNTER):
            continue
        tensor = state[name].detach().cpu()
        tensor = (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
        header = canonical_json([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
        digest.update(len(header).to_bytes(4, "little") + header.encode())
        digest.update(tensor.reshape(-1).numpy().data)
    return digest.hexdigest()


def _fit_names(zoo: Zoo, name: str, network: FeatureNetwork, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """``tensors`` by the names that the network has for them, without the prefixes of training programs."""
    wanted = set(network.model.state_dict())

    def fit(prefix: str) -> tuple[int, int]:
        hits = sum(prefix + key in tensors for key in wanted)
        others = not hits and all(key.startswith(prefix) for key in tensors)  # names that the zoo will translate
        return hits, len(prefix) if others else -len(prefix)

    prefix = max(_prefixes_of(tensors), key=fit)
    inside = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    outside = {key: tensor for key, tensor in tensors.items() if not key.startswith(prefix) and key not in wanted}
    return zoo.adapt(name, network, {**outside, **inside})


def _prefixes_of(names: Iterable[str]) -> set[str]:
    """Every chain of known prefixes with which a name begins, the empty one included."""
    found = {""}
    for name in names:
        prefix = ""
        while step := next((item for item in _PREFIXES if name.startswith(item, len(prefix))), None):
            prefix += step
            found.add(prefix)
    return found


def _problem_of_tensor(tensor: Tensor, shape: torch.Size) -> str | None:
    """Why a stored tensor cannot take the place of one of ``shape``; ``None`` when it can."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.device.type != "cpu":
        return "is not a plain tensor of real numbers"
    if tensor.shape != shape:
        return f"has shape {tuple(tensor.shape)} instead of {tuple(shape)}"
    if math.prod(shape) and not torch.isfinite(tensor.float()).all():
        return "holds values that are not finite"
    return None


def _own(tensor: Tensor) -> Tensor:
    """A float32 (or integer) copy with storage of its own: a file may hold overlapping views."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(dtype).clone(memory_format=torch.contiguous_format)


def _notes(network: FeatureNetwork, left: Mapping[str, Tensor]) -> Iterable[str]:
    """What the user should know about the tensors that are ``left`` over."""
    head = "" if network.classifier is None else f"{network.classifier}."
    of_head = [key for key in left if head and key.startswith(head)]
    classes = next((len(left[key]) for key in of_head if key.endswith("weight")), None)
    own = network.classifier_shape
    if classes is not None and own is not None and classes != own[0]:
        yield f"the classifier of the weights ({classes} outputs) was dropped"
    known = {*network.shapes, *of_head}
    strange = [key for key in left if key not in known and not key.endswith(COUNTER)]
    if strange:
        yield f"{len(strange)} tensors of the weights belong to no part of the backbone: {_some(strange)}"


def _mismatch(
    zoo: Zoo,
    name: str,
    tensors: Mapping[str, Tensor],
    missing: Sequence[str],
    problems: Sequence[str],
    count: int,
    where: object,
) -> WeightsError:
    lines = [f"{len(missing)} of {count} tensors are missing: {_some(missing)}"] if missing else []
    lines += [_some(problems, "; ")] if problems else []
    others = len(missing) + len(problems) > count / 10  # else this is the right network, with something amiss
    nearest = _nearest_network(zoo, name, tensors) if others else None
    remedy = f"they fit {nearest}: set backbone.name={nearest}" if nearest not in (None, name) else None
    return WeightsError(
        f"The weights do not fit {name}.",
        where=where,
        why="; ".join(lines),
        remedy=remedy or f"use weights that were saved from this model (state_dict) by {zoo.version(name)} or similar",
    )


def _nearest_network(zoo: Zoo, name: str, tensors: Mapping[str, Tensor]) -> str | None:
    """The zoo's network of which nearly all tensors are there with their shapes, as far as time allows to look."""
    best, best_share, until = None, 0.9, time.monotonic() + _SEARCH_SECONDS
    names = zoo.names()[::-1]  # what is packaged comes first in a list, and is the same model as a later one
    few = names if len(names) <= WALL else difflib.get_close_matches(name, names, _SEARCHED, cutoff=0.0)
    for name in few:
        state = zoo.make(name).model.state_dict()
        keys = [key for key in state if not key.endswith(COUNTER)]
        share = sum(key in tensors and tensors[key].shape == state[key].shape for key in keys) / max(len(keys), 1)
        if share > best_share:
            best, best_share = name, share
        if share == 1 or time.monotonic() > until:
            break
    return best


def _some(items: Sequence[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return separator.join(items[:_SHOWN]) + more
