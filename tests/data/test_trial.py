"""Suspect contents are decoded in a child under limits; only what is seen to end the child is a killer."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pipeline.data.decode import Decoder
from pipeline.data.trial import find_killers
from tests.data.deadly import install_deadly_decoders

DECODER = Decoder(background=(255, 255, 255), exif=True, max_pixels=10**6, draft_size=(32, 32))


@pytest.fixture(autouse=True)
def _deadly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_deadly_decoders(tmp_path, monkeypatch)
    monkeypatch.syspath_prepend(tmp_path / "site")  # the child looks where this process does


def image() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (9, 90, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def test_only_what_ends_the_process_is_a_killer() -> None:
    names = ("fine", "crash", "hang", "gorge", "exit", "broken", "last")
    contents = {name.encode(): f"DEADLY {name}".encode() for name in names}
    contents |= {b"broken": b"no image at all", b"fine": image(), b"last": image()}
    assert find_killers(contents, DECODER, seconds=2, memory=1 << 30) == {
        b"crash": "decoding ended the process with SIGABRT",
        b"hang": "decoding took longer than 2 s",
        b"gorge": "decoding took more than 1024 MiB of memory",
        b"exit": "decoding ended the process with status 7",
    }


def test_without_suspects_no_process_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.run", None)
    assert find_killers({}, DECODER) == {}


@pytest.mark.parametrize("executable", ["/bin/false", "/nowhere/python"])
def test_a_child_that_cannot_start_proves_nothing(monkeypatch: pytest.MonkeyPatch, executable: str) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    assert find_killers({b"a": image(), b"b": b"DEADLY crash"}, DECODER) == {}


def test_a_child_that_is_killed_from_outside_proves_nothing(tmp_path: Path) -> None:
    site = tmp_path / "site" / "sitecustomize.py"
    site.write_text(site.read_text().replace("os.abort()", "os.kill(os.getpid(), 9)"))
    assert find_killers({b"a": b"DEADLY crash", b"b": b"DEADLY exit"}, DECODER) == {
        b"b": "decoding ended the process with status 7"
    }


def test_a_system_that_refuses_a_limit_still_finds_what_crashes(tmp_path: Path) -> None:
    site = tmp_path / "site" / "sitecustomize.py"
    refuse = "import resource\ndef refuse(*_): raise ValueError('not here')\nresource.setrlimit = refuse\n"
    site.write_text(site.read_text() + refuse)
    assert set(find_killers({b"a": image(), b"b": b"DEADLY crash"}, DECODER)) == {b"b"}


def test_the_package_need_not_be_installed(tmp_path: Path) -> None:
    """As in a notebook that has put the project on sys.path."""
    package = Path(__file__).resolve().parents[2]
    script = (
        f"import sys; sys.path.insert(0, {str(package)!r}); sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "from pipeline.data.decode import Decoder; from pipeline.data.trial import find_killers\n"
        f"contents = {{b'good': {image()!r}, b'bad': b'DEADLY crash'}}\n"
        "print(find_killers(contents, Decoder((0, 0, 0), True, 10**6)))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "{b'bad': 'decoding ended the process with SIGABRT'}", done.stderr
