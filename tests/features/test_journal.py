"""What was being decoded when a process was killed is found by the next one, once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.features.journal import Suspect, journal, suspects_left_behind

HOLD_AND_DIE = """
import os, signal, sys
from pathlib import Path
from pipeline.features.journal import journal
with journal(Path(sys.argv[1]), 3) as opened, opened.in_hand("/data/first", b"a" * 16):
    with opened.in_hand("/data/done", b"b" * 16):
        pass
    with opened.in_hand("/data/odd \\udcff\\n", b"c" * 16):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def left_behind(cache: Path) -> list[Suspect]:
    with suspects_left_behind(cache) as suspects:
        return suspects


def test_a_killed_process_leaves_what_it_had_in_hand(tmp_path: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", HOLD_AND_DIE, tmp_path], check=False)
    assert killed.returncode == -signal.SIGKILL
    expected = {Suspect("/data/first", b"a" * 16), Suspect("/data/odd \udcff\n", b"c" * 16)}
    assert set(left_behind(tmp_path)) == expected
    assert left_behind(tmp_path) == [] and not list((tmp_path / "journal").iterdir())


def test_suspects_stay_where_trying_them_failed(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", HOLD_AND_DIE, tmp_path], check=False)
    with pytest.raises(KeyboardInterrupt), suspects_left_behind(tmp_path):
        raise KeyboardInterrupt
    assert len(left_behind(tmp_path)) == 2


def test_suspects_that_others_have_are_left_to_them_for_a_day(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", HOLD_AND_DIE, tmp_path], check=False)
    for _ in range(2):
        with suspects_left_behind(tmp_path) as suspects:
            assert len(suspects) == 2
            suspects.pop()
    (file,) = (tmp_path / "journal").iterdir()
    os.utime(file, (1e9, 1e9))
    with suspects_left_behind(tmp_path) as suspects:
        suspects.clear()
    assert not file.exists()


def test_a_living_process_is_not_suspected_and_leaves_nothing(tmp_path: Path) -> None:
    with journal(tmp_path, 1) as opened, opened.in_hand("/data/image", b"a" * 16):
        assert left_behind(tmp_path) == []
    assert left_behind(tmp_path) == [] and not list((tmp_path / "journal").iterdir())


def test_a_slot_is_free_again_after_an_error(tmp_path: Path) -> None:
    with journal(tmp_path, 1) as opened:
        for _ in range(3):
            with pytest.raises(ValueError, match="bad"), opened.in_hand("/data/image", b"a" * 16):
                raise ValueError("bad")


@pytest.mark.parametrize("data", [b"", b"\xff" * 9000, b"\x09" + bytes(9000), b"\x01"])
def test_a_damaged_journal_is_forgotten(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "x.slots").write_bytes(data)
    assert left_behind(tmp_path) == []
    assert not list((tmp_path / "journal").iterdir())
