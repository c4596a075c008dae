"""A world to torture, and the table of what was tried."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.features.inventory import key_folders
from pipeline.features.parts import check_part, part_names, part_of
from tests.stages.conftest import FAST, write_image

from . import children, jobs

IMAGES = 24
TALLY: list[tuple[str, int, int, int]] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of this is longer than the default run allows."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line a fault: how often it was tried, features that were lost, features that were wrong."""
    if TALLY:
        terminalreporter.write_sep("-", "fault, tries, lost, wrong")
        for fault, tries, lost, wrong in TALLY:
            terminalreporter.write_line(f"{fault:58} {tries:6} {lost:5} {wrong:5}")


@dataclass
class Tally:
    """Counts of one fault, shown at the end of the session."""

    fault: str
    tries: int = 0
    lost: int = 0
    wrong: int = 0

    def close(self) -> None:
        """Show the counts, and hold that nothing was lost or wrong."""
        TALLY.append((self.fault, self.tries, self.lost, self.wrong))
        assert self.tries and self.lost == self.wrong == 0


@dataclass
class Ground:
    """Images, and what an uninterrupted run makes of them."""

    folder: Path
    root: Path
    features: dict[bytes, bytes] = field(default_factory=dict)
    events: int = 0
    phases: dict[str, list[int]] = field(default_factory=dict)

    def settings(self, cache: Path, *more: str, root: Path | None = None) -> list[str]:
        """Overrides for a cache; every batch becomes a part."""
        places = (f"data.root={root or self.root}", f"cache.dir={cache}", f"runs.dir={cache.parent / 'runs'}")
        return [*FAST, "extract.part_seconds=1e-6", *places, *more]

    def note(self) -> Path:
        """Where a child writes what it has to tell."""
        return self.folder / "note.json"

    def run(self, job: Callable[..., Any], *arguments: Any, fate: children.Fate | None = None) -> dict[str, Any]:
        """Run a job in a child; without a fate it must end well."""
        told = children.run(job, *arguments, fate=fate, note=self.note())
        assert fate or told["exit"] == 0, told
        return told

    def judge(self, cache: Path, tally: Tally, *, complete: bool) -> set[bytes]:
        """Hold every published row against the uninterrupted run; the contents that have one."""
        rows = read_rows(cache)
        for digest, row in rows.items():
            tally.wrong += self.features.get(digest) != row
        if complete:
            tally.lost += len(self.features.keys() - rows.keys())
        return set(rows)


def read_rows(cache: Path) -> dict[bytes, bytes]:
    """Content to stored bytes of all published parts; the same content in two parts must have the same row."""
    rows: dict[bytes, bytes] = {}
    for folder in key_folders(cache):
        key = folder.name.rpartition("-")[2]
        for name in part_names(folder):
            data = (folder / name).read_bytes()
            if check_part(name, data, key, None) is None:
                part = part_of(folder / name, data)
                for digest, row in zip(part.digests, part.read().astype(np.float32), strict=True):
                    assert rows.setdefault(digest.tobytes(), row.tobytes()) == row.tobytes()
    return rows


@contextmanager
def mounted(disk: Path, size: str) -> Iterator[Path]:
    """A small file system of its own."""
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system can only be mounted by root; the limit on file sizes stands in for it")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    """Two dozen images in the split layout, their features, and which events extracting them has."""
    folder = tmp_path_factory.mktemp("ground")
    for number in range(IMAGES):
        split, label = "val" if number % 3 == 0 else "train", ("cat", "dog")[number % 2]
        write_image(folder / "images" / split / label / f"{number:02}.jpg", number)
    made = Ground(folder, folder / "images")
    told = made.run(jobs.extract_job, made.settings(folder / "cache"))
    made.features, made.events, made.phases = read_rows(folder / "cache"), told["events"], told["phases"]
    assert told["result"]["forwarded"] == len(made.features) == IMAGES
    return made


@pytest.fixture
def reference(ground: Ground, tmp_path: Path) -> Path:
    """The features of the uninterrupted run as an archive, for children."""
    digests = np.array([np.frombuffer(digest, np.uint8) for digest in ground.features])
    features = np.array([np.frombuffer(row, np.float32) for row in ground.features.values()])
    np.savez(tmp_path / "reference.npz", digests=digests, features=features)
    return tmp_path / "reference.npz"


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Tally]]:
    """Begin a count; it is closed when the test has ended."""
    begun: list[Tally] = []

    def begin(fault: str) -> Tally:
        begun.append(Tally(fault))
        return begun[-1]

    yield begin
    for each in begun:
        each.close()
