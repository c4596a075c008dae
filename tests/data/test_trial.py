"""Suspect files are decoded in a child under limits; only what ends the child is a killer."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.data.decode import Decoder
from pipeline.data.trial import find_killers
from tests.data.deadly import install_deadly_decoders
from tests.stages.conftest import write_image

DECODER = Decoder(background=(255, 255, 255), exif=True, max_pixels=10**6, draft_size=(32, 32))


@pytest.fixture(autouse=True)
def _deadly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_deadly_decoders(tmp_path, monkeypatch)


def test_only_what_ends_the_process_is_a_killer(tmp_path: Path) -> None:
    names = ["crash", "hang", "gorge", "exit", "broken", "absent", "fine"]
    files = {name: tmp_path / f"{name} \udcff.png" for name in names}
    for name in ("crash", "hang", "gorge", "exit"):
        files[name].write_bytes(f"DEADLY {name}".encode())
    files["broken"].write_bytes(b"no image at all")
    write_image(files["fine"].with_suffix(".jpg"), 1)
    files["fine"].with_suffix(".jpg").rename(files["fine"])
    killers = find_killers(list(files.values()), DECODER, seconds=2, memory=1 << 30)
    assert {path.name.split()[0]: end for path, end in killers.items()} == {
        "crash": "decoding ended the process with SIGABRT",
        "hang": "decoding took longer than 2 s",
        "gorge": "decoding took more than 1024 MiB of memory",
        "exit": "decoding ended the process with status 7",
    }


def test_without_suspects_no_process_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.run", None)
    assert find_killers([], DECODER) == {}
