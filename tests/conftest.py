"""Fixtures every test may use."""

from __future__ import annotations

import os
from pathlib import Path

# Tiny tensors: threads would only wait for one another. Set before torch is imported; child processes inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real images and weights, named by PIPELINE_SHARED (default: beside the project)."""
    folder = Path(os.environ.get("PIPELINE_SHARED", PROJECT.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no real images: {folder} is not there (set PIPELINE_SHARED)")
    return folder


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """The first GPU, for tests marked ``gpu``."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")
    return torch.device("cuda:0")
