"""An image that crashes or hangs its decoder costs one run; the next finds it, sets it aside and goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.data.deadly import install_deadly_decoders

from .conftest import FAST


@pytest.fixture
def command(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`extract` in a process of its own, whose Pillow knows a deadly format."""
    install_deadly_decoders(tmp_path, monkeypatch)
    settings = [*FAST, f"data.root={root}", f"cache.dir={tmp_path / 'cache'}", "extract.part_seconds=0.1"]
    (tmp_path / "params.yaml").touch()
    arguments = [word for setting in settings for word in ("-s", setting)]
    return [sys.executable, "-m", "pipeline", "extract", "--json", "-p", str(tmp_path / "params.yaml"), *arguments]


def run(command: list[str]) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


def test_an_image_that_crashes_the_decoder_is_set_aside_by_the_next_run(command: list[str], root: Path) -> None:
    (root / "train" / "cat" / "killer.jpg").write_bytes(b"DEADLY crash")
    assert run(command)[0] == -signal.SIGABRT
    status, summary, told = run(command)
    assert status == 0
    assert (summary["images"], summary["quarantined"], summary["embedded"] + summary["reused"]) == (25, 1, 24)
    assert "kills the decoder" in told and "killer.jpg" in told
    assert not list((root.parent / "cache" / "journal").iterdir())


def test_an_image_that_hangs_the_decoder_is_set_aside_by_the_next_run(
    command: list[str], root: Path, tmp_path: Path
) -> None:
    (root / "train" / "cat" / "killer.jpg").write_bytes(b"DEADLY hang")
    hanging = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal, deadline = tmp_path / "cache" / "journal", time.monotonic() + 120
    while time.monotonic() < deadline and not any(b"killer" in file.read_bytes() for file in journal.glob("*.slots")):
        time.sleep(0.05)
    hanging.kill()
    hanging.wait()
    # The limit is a minute; a run cannot be told another, so the child is.
    site = tmp_path / "site" / "sitecustomize.py"
    hurry = "import signal\nsignal.setitimer = lambda w, s, a=signal.setitimer: a(w, 2 if s else 0)\n"
    site.write_text(site.read_text() + hurry)
    status, summary, told = run(command)
    assert (status, summary["quarantined"], summary["embedded"] + summary["reused"]) == (0, 1, 24)
    assert "kills the decoder" in told
