"""Files and folders appear whole or not at all; locks are dropped by the kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import files
from pipeline.files import (
    canonical_json,
    digest_bytes,
    digest_file,
    file_lock,
    human_bytes,
    publish_file,
    publishing_folder,
)


def failing(name: str) -> object:
    """A stand-in for a function of ``os`` that finds the disk full."""

    def fail(*_: object) -> None:
        raise OSError(28, f"No space left on device ({name})")

    return fail


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestPublishFile:
    def test_makes_the_folders_and_replaces_what_was_there(self, tmp_path: Path) -> None:
        file = tmp_path / "a b" / "c" / "file.bin"
        publish_file(file, b"old")
        publish_file(file, b"new")
        assert file.read_bytes() == b"new"
        assert names_in(file.parent) == ["file.bin"]

    @pytest.mark.parametrize("step", ["fsync", "rename"])
    def test_a_failing_write_leaves_the_old_file_and_no_leftovers(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        file = tmp_path / "file.bin"
        publish_file(file, b"old")
        monkeypatch.setattr(files.os, step, failing(step))
        with pytest.raises(OSError, match="No space left"):
            publish_file(file, b"new")
        assert file.read_bytes() == b"old"
        assert names_in(tmp_path) == ["file.bin"]

    def test_a_failing_first_write_leaves_no_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(files.os, "rename", failing("rename"))
        with pytest.raises(OSError, match="No space left"):
            publish_file(tmp_path / "file.bin", b"new")
        assert names_in(tmp_path) == []

    def test_the_content_is_synced_before_the_name_appears(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file, seen = tmp_path / "file.bin", []
        real = os.fsync

        def watch(descriptor: int) -> None:
            seen.append((os.path.isdir(f"/proc/self/fd/{descriptor}"), file.exists()))
            real(descriptor)

        monkeypatch.setattr(files.os, "fsync", watch)
        publish_file(file, b"data")
        assert seen == [(False, False), (True, True)]  # the file, still under its temporary name; then the folder

    def test_a_killed_writer_leaves_the_old_file(self, tmp_path: Path) -> None:
        file = tmp_path / "file.bin"
        publish_file(file, b"old")
        code = """
import os, signal, sys
from pathlib import Path
from pipeline import files
files.os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
files.publish_file(Path(sys.argv[1]), b"new")
"""
        assert subprocess.run([sys.executable, "-c", code, file], check=False).returncode == -9
        assert file.read_bytes() == b"old"
        leftovers = [name for name in names_in(tmp_path) if name != "file.bin"]
        assert [name.startswith(files.TEMPORARY_PREFIX) for name in leftovers] == [True]


class TestPublishingFolder:
    def test_the_folder_appears_when_the_block_ends(self, tmp_path: Path) -> None:
        run = tmp_path / "runs" / "one"
        with publishing_folder(run) as folder:
            (folder / "deep").mkdir()
            (folder / "deep" / "file").write_bytes(b"data")
            assert folder.parent == run.parent
            assert not run.exists()
        assert (run / "deep" / "file").read_bytes() == b"data"
        assert names_in(run.parent) == ["one"]

    def test_a_failing_block_leaves_nothing(self, tmp_path: Path) -> None:
        def fail_halfway() -> None:
            with publishing_folder(tmp_path / "one") as folder:
                (folder / "file").write_bytes(b"data")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fail_halfway()
        assert names_in(tmp_path) == []

    @pytest.mark.parametrize("durable", [True, False])
    def test_an_existing_folder_is_left_alone(self, tmp_path: Path, durable: bool) -> None:
        (tmp_path / "one").mkdir()
        with (
            pytest.raises(FileExistsError, match="one exists already"),
            publishing_folder(tmp_path / "one", durable=durable) as folder,
        ):
            (folder / "file").write_bytes(b"data")
        assert names_in(tmp_path) == ["one"]
        assert names_in(tmp_path / "one") == []

    def test_an_existing_file_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "one").write_bytes(b"mine")
        with pytest.raises(FileExistsError), publishing_folder(tmp_path / "one"):
            pass
        assert (tmp_path / "one").read_bytes() == b"mine"
        assert names_in(tmp_path) == ["one"]


HOLD = """
import sys
from pathlib import Path
from pipeline.files import file_lock
with file_lock(Path(sys.argv[1]), shared=sys.argv[2] == "shared"):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(path: Path, mode: str) -> subprocess.Popen[bytes]:
    """Another process that holds the lock until it is ended."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, path, mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def is_free(path: Path, *, shared: bool) -> bool:
    try:
        with file_lock(path, shared=shared, blocking=False):
            return True
    except BlockingIOError:
        return False


@pytest.mark.parametrize(("mode", "open_to_shared"), [("shared", True), ("exclusive", False)])
def test_two_processes_share_a_lock_or_do_not(tmp_path: Path, mode: str, open_to_shared: bool) -> None:
    lock = tmp_path / "cache" / ".lock"
    with holder(lock, mode) as process:
        assert is_free(lock, shared=True) is open_to_shared
        assert not is_free(lock, shared=False)
        process.kill()  # the kernel drops the lock of a process that dies
        process.wait()
        assert is_free(lock, shared=False)


class TestCanonicalJson:
    def test_equal_values_give_the_same_text(self) -> None:
        assert canonical_json({"b": [1, 2.5], "a": "é"}) == canonical_json({"a": "é", "b": [1, 2.5]})
        assert canonical_json({"b": 1, "a": "é"}) == '{"a":"\\u00e9","b":1}'

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}])
    def test_numbers_that_are_none_are_refused(self, value: object) -> None:
        with pytest.raises(ValueError, match="not JSON compliant"):
            canonical_json(value)


@given(st.binary(max_size=200))
def test_digests_are_those_of_the_content(data: bytes) -> None:
    assert digest_bytes(data) == digest_bytes(memoryview(data)) == digest_bytes(bytearray(data))
    assert len(digest_bytes(data)) == files.DIGEST_BYTES
    assert digest_bytes(data) != digest_bytes(data + b"\0")


def test_a_file_read_in_pieces_has_the_digest_of_its_bytes(tmp_path: Path) -> None:
    data = os.urandom(2**20 + 7)
    (tmp_path / "file").write_bytes(data)
    assert digest_file(tmp_path / "file") == digest_bytes(data)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (123456, "123.5 kB"),
        (999_960, "1.0 MB"),
        (5.2e9, "5.2 GB"),
        (3e15, "3000.0 TB"),
    ],
)
def test_bytes_for_people(count: float, text: str) -> None:
    assert human_bytes(count) == text
