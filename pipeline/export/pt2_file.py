"""FILE.pt2: the traced network through `torch.export`, for programs that have torch and nothing of this one."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.export import ExportedProgram

from ..errors import ExportError

METADATA = "metadata.json"


def pt2_bytes(program: ExportedProgram, metadata: Mapping[str, str]) -> bytes:
    """The file; ``metadata`` is its extra file ``metadata.json``."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # torch warns of weights in channels-last order, which it saves as they are: the proof reads them back.
        warnings.filterwarnings("ignore", "No complete tensor found")
        torch.export.save(program, buffer, extra_files={METADATA: json.dumps(dict(metadata))})
    return buffer.getvalue()


class Pt2Classifier:
    """A file of `pt2_bytes`.

    Raises:
        ExportError: it is no such file.
    """

    def __init__(self, data: bytes) -> None:
        extra = {METADATA: ""}
        try:
            program = torch.export.load(io.BytesIO(data), extra_files=extra)
            self.metadata: dict[str, str] = json.loads(extra[METADATA] or "{}")
        except Exception as error:  # a damaged archive shows in many ways
            raise ExportError("torch cannot load the file.", why=str(error).strip().splitlines()[0]) from error
        self._module = program.module()

    def __call__(self, image: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """The outputs by name for one image (height, width, 3)."""
        batched = self.metadata.get("input") == "images"
        pixels = torch.from_numpy(np.array(image))
        with torch.inference_mode():
            values = self._module(pixels[None] if batched else pixels)
        names = json.loads(self.metadata["outputs"])
        return {name: (value[0] if batched else value).numpy() for name, value in zip(names, values, strict=True)}
