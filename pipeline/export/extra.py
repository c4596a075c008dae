"""What the extra `export` brings, imported where it is used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..errors import ExportError


def need(module: str) -> Any:
    """The module of that name.

    Raises:
        ExportError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ExportError(
            f"{module.partition('.')[0]} is not installed.",
            why=str(error),
            remedy="install the extra: pip install 'image-transfer-pipeline[export]'",
        ) from error
