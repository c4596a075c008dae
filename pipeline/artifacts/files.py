"""Read ``model.json`` and ``metrics.json`` of a run folder; damaged and foreign files are errors that name them."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from ..errors import RunError
from .schema import FORMAT_VERSION, PROGRAM, Record, RunMetrics, RunModel

MODEL_FILE = "model.json"
METRICS_FILE = "metrics.json"
PARAMS_FILE = "params.yaml"
PREDICTIONS_FILE = "predictions.csv"
REPORT_FILE = "report.html"
# Far above anything written here (1000 classes make a metrics.json of about 10 MB): what is larger is something else.
SIZE_LIMITS = {MODEL_FILE: 64 << 20, METRICS_FILE: 256 << 20}

R = TypeVar("R", bound=Record)


def read_model(folder: Path) -> RunModel:
    """``model.json`` of a run folder.

    Raises:
        RunError: no such file, not ours, damaged, or made by a newer version.
    """
    return _read(folder, MODEL_FILE, RunModel)


def read_metrics(folder: Path) -> RunMetrics:
    """``metrics.json`` of a run folder.

    Raises:
        RunError: as `read_model`.
    """
    return _read(folder, METRICS_FILE, RunMetrics)


def _read(folder: Path, name: str, record: type[R]) -> R:
    file = folder / name
    value = _load(file)
    _check_origin(value, file)
    try:
        return record.model_validate(value)
    except ValidationError as error:
        raise _damaged(file, _first_problem(error)) from error


def _load(file: Path) -> Any:
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise _damaged(file, "it is not a regular file")
        if status.st_size > SIZE_LIMITS[file.name]:
            raise _damaged(file, f"it has {status.st_size} bytes, more than any such file can have")
        return json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RunError(
            f"{file.parent} is not a run folder.",
            where=file.parent,
            why=f"it has no {file.name}",
            remedy="name a folder made by train-head or finetune, its name under runs.dir, or `latest`",
        ) from error
    except OSError as error:
        raise RunError(f"{file.name} cannot be read.", where=file, why=str(error)) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"it is not JSON ({error})") from error


def _check_origin(value: Any, file: Path) -> None:
    if not isinstance(value, dict) or value.get("program") != PROGRAM:
        raise RunError(
            f"{file.name} was not made by this program.",
            where=file,
            why=f"it does not say `program: {PROGRAM}`",
            remedy="name a folder made by train-head or finetune",
        )
    version = value.get("format_version")
    if isinstance(version, int) and not isinstance(version, bool) and version > FORMAT_VERSION:
        raise RunError(
            f"{file.name} was made by a newer version of this program.",
            where=file,
            why=f"its format version is {version}; this program reads up to {FORMAT_VERSION}",
            remedy="upgrade this program",
        )


def _damaged(file: Path, why: str) -> RunError:
    return RunError(f"{file.name} is damaged.", where=file, why=why, remedy="make the run again")


def _first_problem(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_input=False)
    first = problems[0]
    key = ".".join(str(part) for part in first["loc"]) or "(file)"
    message = first["msg"].removeprefix("Value error, ")
    more = f", and {len(problems) - 1} more problems" if len(problems) > 1 else ""
    return f"{key}: {message}{more}"
