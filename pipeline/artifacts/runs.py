"""Name, publish, list and find run folders. A run is published by renaming a finished folder, never over another."""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ..errors import RunError
from ..files import digest_bytes, file_lock, publishing_folder, read_regular_file
from ..params import Place
from .files import MODEL_FILE, read_model

LATEST = "latest"
LOCK_FILE = ".lock"
_SHOWN = 8
# Letters that lose more than a mark when they are written in ASCII.
SPELT_OUT = str.maketrans(
    {"ä": "ae", "ö": "oe", "ü": "ue", "Ä": "Ae", "Ö": "Oe", "Ü": "Ue", "ß": "ss", "æ": "ae", "ø": "o", "ł": "l"}
)


@dataclass(frozen=True)
class RunEntry:
    """One folder under ``runs.dir``; ``created`` is None and ``problem`` says why where it cannot be read."""

    path: Path
    created: datetime | None
    problem: str | None = None

    @property
    def name(self) -> str:
        return self.path.name


def default_run_name(data_root: Place, backbone: str, head: str, *, now: datetime | None = None) -> str:
    """``20261121-143005-hymenoptera-mobilenet_v2-logistic``: local time, data, backbone, head."""
    moment = (now or datetime.now()).strftime("%Y%m%d-%H%M%S")
    words = (_word(Path(data_root).absolute().name), _word(backbone), _word(head))
    return "-".join([moment, *(word for word in words if word)])


def has_default_name(name: str) -> bool:
    """Whether a run is called as `default_run_name` calls it."""
    return re.match(r"\d{8}-\d{6}-", name) is not None


def run_id(folder: Path) -> str:
    """A short name of a run, of 7 hexadecimal digits: those that the digest of its ``model.json`` begins with."""
    return _digest(folder)[:7]


def _digest(folder: Path) -> str:
    return digest_bytes(read_regular_file(folder / MODEL_FILE)).hex()


def check_run_name(runs_dir: Path, name: str) -> None:
    """Complain before hours of work that a chosen name cannot be used.

    Raises:
        RunError: the name is taken, or means something else.
    """
    if name == LATEST:
        raise RunError(f"A run cannot be called {LATEST}.", where=name, why="the word stands for the newest run")
    if os.path.lexists(runs_dir / name):
        raise RunError(
            f"The run {name} exists already.",
            where=runs_dir / name,
            why="a finished run is never overwritten",
            remedy="choose another runs.name, or leave it out and get a name of its own",
        )


@contextmanager
def publishing_run(runs_dir: Path, name: str) -> Iterator[tuple[Path, Path]]:
    """Yield a temporary folder to fill, and the path it gets when the block ends well.

    Should ``name`` be taken, the run becomes ``name-2`` and so on, so that finished work is never lost to a name.
    A lock on ``runs_dir`` keeps two processes from settling on one name.

    Raises:
        RunError: the folder cannot be written.
    """
    try:
        with file_lock(runs_dir / LOCK_FILE, shared=False):
            final = _free_path(runs_dir, name)
            with publishing_folder(final) as temporary:
                yield temporary, final
    except OSError as error:
        raise RunError(
            "The run folder cannot be written.",
            where=error.filename or runs_dir,
            why=str(error),
            remedy="make room or choose another runs.dir",
        ) from error


def list_runs(runs_dir: Path) -> list[RunEntry]:
    """The finished runs under ``runs_dir``, newest first; damaged ones come last with their problem."""
    try:
        folders = [entry for entry in runs_dir.iterdir() if not entry.name.startswith(".")]
    except OSError:
        return []
    entries = [_entry(folder) for folder in folders if (folder / MODEL_FILE).exists()]
    oldest = datetime.min.replace(tzinfo=UTC)
    return sorted(entries, key=lambda entry: (entry.created or oldest, entry.name), reverse=True)


def resolve_run(runs_dir: Path, text: str) -> Path:
    """The absolute folder of a run given as a path, as a name or the beginning of an id, or as ``latest``.

    Raises:
        RunError: there is no such run; the message names those there are.
    """
    if text == LATEST:
        return _latest(runs_dir)
    is_path = os.sep in text or text in {"", ".", ".."} or text.startswith("~")
    candidates = [Path(text).expanduser()] if is_path else [runs_dir / text, Path(text)]
    for folder in candidates:
        if (folder / MODEL_FILE).exists():
            return Path(os.path.abspath(folder))
    if re.fullmatch("[0-9a-f]{4,32}", text):
        of_id = [entry.path for entry in list_runs(runs_dir) if _digest(entry.path).startswith(text)]
        if len(of_id) > 1:
            names = ", ".join(folder.name for folder in of_id)
            raise RunError(f"More than one run has an id that begins with {text}.", where=runs_dir, why=names)
        if of_id:
            return Path(os.path.abspath(of_id[0]))
    found = next((folder for folder in candidates if os.path.lexists(folder)), None)
    raise _not_found(runs_dir, text, found)


def _latest(runs_dir: Path) -> Path:
    for entry in list_runs(runs_dir):
        if entry.created is not None:
            return Path(os.path.abspath(entry.path))
    raise RunError("There is no run yet.", where=runs_dir, remedy="make one with train-head")


def _entry(folder: Path) -> RunEntry:
    try:
        return RunEntry(folder, read_model(folder).created)
    except RunError as error:
        return RunEntry(folder, None, f"{error.what} {error.why}")


def _not_found(runs_dir: Path, text: str, found: Path | None) -> RunError:
    names = [entry.name for entry in list_runs(runs_dir)]
    near = difflib.get_close_matches(text, names, n=3, cutoff=0.5) or [name for name in names if text and text in name]
    if near:
        remedy = f"did you mean {' or '.join(near[:3])}?"
    elif names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        remedy = f"runs under {runs_dir}: {', '.join(names[:_SHOWN])}{more}"
    else:
        remedy = f"there are no runs under {runs_dir} yet; make one with train-head"
    if found is not None:
        return RunError(f"{text} is not a run.", where=found, why=f"it has no {MODEL_FILE}", remedy=remedy)
    return RunError(f"There is no run {text}.", where=runs_dir, remedy=remedy)


def _free_path(runs_dir: Path, name: str) -> Path:
    path, number = runs_dir / name, 1
    while os.path.lexists(path):
        number += 1
        path = runs_dir / f"{name}-{number}"
    return path


def _word(text: str) -> str:
    """``text`` as a part of a folder name, at most 40: what has no letter near it in ASCII, `.` or `_` becomes `_`."""
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFC", text).translate(SPELT_OUT))
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return re.sub(r"[^A-Za-z0-9._]+", "_", plain).strip("._")[:40]
