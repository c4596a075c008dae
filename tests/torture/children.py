"""Jobs for processes forked from a warm server, which meet their fate at a chosen event."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["tests.torture.jobs"])

HANGS = 400.0
# What an audit hook hears of; each is a moment at which a process may be killed.
EVENTS = frozenset(
    ("open", "os.rename", "os.mkdir", "os.scandir", "os.listdir", "os.remove", "os.rmdir", "os.truncate", "fcntl.flock",
     "shutil.rmtree")
)  # fmt: skip
# The phase of a moment is told by the functions that are running; the first that fits names it.
PHASES = {
    "gc": ("features/inventory.py",),
    "checkpoint": ("finetune/checkpoint.py",),
    "run publish": ("stages/run.py", "artifacts/"),
    "quarantine": ("features/quarantine.py",),
    "index update": ("data/index.py",),
    "scan": ("data/folder.py", "data/walk.py"),
    "merge": ("features/merge.py",),
    "part write": ("features/parts.py", "features/store.py"),
    "read and decode": ("features/prepare.py", "features/journal.py", "data/decode.py"),
    "forward": ("features/extractor.py",),
    "weights": ("backbones/",),
    "training": ("finetune/", "heads/"),
}


@dataclass(frozen=True)
class Fate:
    """Where a child is killed: at its event number ``at``, or after ``seconds``; never, by default."""

    at: int = 0
    seconds: float = 0.0


def spawn(job: Callable[..., Any], *arguments: Any, fate: Fate | None = None, note: Path) -> ForkServerProcess:
    """Start ``job(*arguments)``; what it returns, the events it saw and where it died are written beside ``note``."""
    process = context.Process(target=_run, args=(job, arguments, fate or Fate(), str(note)))
    process.start()
    return process


def run(job: Callable[..., Any], *arguments: Any, fate: Fate | None = None, note: Path) -> dict[str, Any]:
    """As `spawn`, and wait: ``exit``, with ``result``, ``events`` and ``phases``, or ``phase``, if the child told."""
    for file in (note, note.with_suffix(".phase")):
        file.unlink(missing_ok=True)
    process = spawn(job, *arguments, fate=fate, note=note)
    if fate and fate.seconds:
        time.sleep(fate.seconds)
        process.kill()
    process.join(HANGS)
    if process.exitcode is None:
        process.kill()
        raise AssertionError("the child hangs")
    phase = note.with_suffix(".phase")
    told = json.loads(note.read_text()) if note.exists() else {}
    return {"exit": process.exitcode, "phase": phase.read_text() if phase.exists() else "by the clock", **told}


def _run(job: Callable[..., Any], arguments: tuple[Any, ...], fate: Fate, note: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    clock = _Countdown(fate.at, note)
    clock.install()
    result = job(*arguments)
    clock.left = -1
    Path(note).write_text(json.dumps({"result": result, "events": clock.seen, "phases": clock.phases}))


class _Countdown:
    def __init__(self, at: int, note: str) -> None:
        self.left, self.note, self.seen = at, note, 0
        self.phases: dict[str, list[int]] = {}  # the numbers of each one's events

    def install(self) -> None:
        """Count file operations, syncs, writes to the journal, and calls of the decoder and the backbone."""
        from pipeline.backbones import Forward
        from pipeline.data.decode import Decoder

        sys.addaudithook(lambda event, _args: self.tick() if event in EVENTS else None)
        for owner, name in ((os, "fsync"), (os, "pwrite"), (Decoder, "__call__"), (Forward, "_forward")):
            setattr(owner, name, self._before_and_after(getattr(owner, name)))

    def _before_and_after(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            self.tick()
            result = function(*arguments, **options)
            self.tick()
            return result

        return called

    def tick(self) -> None:
        phase = _phase()
        if phase is None or self.left < 0:
            return
        self.seen += 1
        self.phases.setdefault(phase, []).append(self.seen)
        if self.seen == self.left:
            self.left = -1
            with open(Path(self.note).with_suffix(".phase"), "w") as file:
                file.write(phase)
            os.kill(os.getpid(), signal.SIGKILL)


def _phase() -> str | None:
    """The phase that the running functions of the package belong to; None outside of it (imports, Python's own)."""
    files, frame = [], sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith("<frozen importlib"):
            return None
        _, found, tail = name.rpartition("/pipeline/")
        if found:
            files.append(tail)
        frame = frame.f_back  # type: ignore[assignment]
    for phase, places in PHASES.items():
        if any(file.startswith(places) for file in files):
            return phase
    return "elsewhere" if files else None


def fates(seed: int, tries: int, events: int) -> list[Fate]:
    """Seeded moments spread over all events of an uninterrupted run."""
    draw = random.Random(seed)
    return [Fate(at=draw.randint(1, events)) for _ in range(tries)]


def fates_of_phases(seed: int, tries: int, phases: Mapping[str, Sequence[int]]) -> list[Fate]:
    """Seeded moments of each phase of an uninterrupted run, also of those that have few."""
    draw = random.Random(seed)
    return [Fate(at=at) for each in phases.values() for at in draw.sample(each, min(tries, len(each)))]
