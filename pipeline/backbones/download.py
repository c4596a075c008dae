"""Fetch torchvision's weights into torch's own checkpoint folder, once, and say what to do where that fails."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import torch

from ..errors import WeightsError
from ..files import sync_folder, temporary_name
from ..runtime.progress import ProgressBar

# For connecting and for each read: a machine without internet must say so at once.
TIMEOUT_SECONDS = 15.0
_PIECE = 1 << 20
_HASH = re.compile(r"-([a-f0-9]{8,})\.[^.]+$")


def checkpoint_file(weights: Any) -> Path:
    """Where torch keeps, or would keep, the file of torchvision ``weights`` (TORCH_HOME moves it)."""
    name = os.path.basename(urlsplit(str(weights.url)).path)
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def fetch_checkpoint(weights: Any) -> Path:
    """The file of torchvision ``weights``, downloaded where it is not there yet.

    Written under a temporary name, checked against the digest in its name, then renamed.

    Raises:
        WeightsError: the download failed; the message names the ways out.
    """
    path = checkpoint_file(weights)
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _download(weights.url, path)
    except (OSError, URLError, http.client.HTTPException, ValueError) as error:
        raise WeightsError(
            f"The weights {weights} could not be downloaded.",
            where=f"{weights.url} -> {path}",
            why=str(getattr(error, "reason", None) or error) or type(error).__name__,
            remedy="without internet, either set backbone.weights to a weights file (.safetensors, .pth), "
            f"or put {path.name} into the folder checkpoints of another torch cache and set TORCH_HOME "
            "(TORCH_HOME/hub/checkpoints)",
        ) from error
    return path


def _download(url: str, path: Path) -> None:
    temporary = temporary_name(path)
    try:
        with urlopen(Request(url, headers={"User-Agent": "torch.hub"}), timeout=TIMEOUT_SECONDS) as answer:
            digest = _save(answer, temporary, f"downloading {path.name} (MB)")
        expected = _HASH.search(path.name)
        if expected and not digest.startswith(expected.group(1)):
            raise ValueError("the file that arrived is not the one its name promises (digest differs)")
        os.rename(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
    sync_folder(path.parent)


def _save(answer: Any, path: Path, label: str) -> str:
    """Write the answer to ``path``; its SHA-256 in hex."""
    state = hashlib.sha256()
    size = int(answer.headers.get("Content-Length") or 0)
    received = 0
    with open(path, "xb") as file, ProgressBar(label, size >> 20) as bar:
        while piece := answer.read(_PIECE):
            state.update(piece)
            file.write(piece)
            bar.advance(((received + len(piece)) >> 20) - (received >> 20))
            received += len(piece)
        file.flush()
        os.fsync(file.fileno())
    if size and received != size:
        raise OSError(f"the connection ended after {received} of {size} bytes")
    return state.hexdigest()
