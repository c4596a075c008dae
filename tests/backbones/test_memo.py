"""The memory of weights is trusted only as far as the file's stat allows."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pipeline.backbones.memo import SAFE_NS, WeightsMemo, stat_of

KEY, FACT = {"about": "test", "n": 1}, {"digest": "ab", "feature_dim": 3}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    file = tmp_path / "weights.pth"
    file.write_bytes(b"tensors")
    return file


def after(file: Path) -> int:
    return file.stat().st_ctime_ns + SAFE_NS


def test_a_fact_is_found_by_another_process_while_the_file_is_unchanged(tmp_path: Path, weights: Path) -> None:
    WeightsMemo(tmp_path / "memo.json").put(KEY, FACT, stat=stat_of(weights), read_ns=after(weights))
    again = WeightsMemo(tmp_path / "memo.json")
    assert again.get(KEY, stat_of(weights)) == FACT
    assert again.get({**KEY, "n": 2}, stat_of(weights)) is None
    assert again.get(KEY) is None
    os.utime(weights, ns=(0, 0))
    assert again.get(KEY, stat_of(weights)) is None


def test_a_file_changed_just_before_it_was_read_is_not_remembered(tmp_path: Path, weights: Path) -> None:
    memo = WeightsMemo(tmp_path / "memo.json")
    os.utime(weights, ns=(0, 0))  # the modification time can be set back, the change time cannot
    memo.put(KEY, FACT, stat=stat_of(weights), read_ns=time.time_ns())
    assert memo.get(KEY, stat_of(weights)) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 1, "facts": []}', b'{"format": 9}', b"\xff\x00"])
def test_a_damaged_memory_is_empty_and_written_anew(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "memo.json"
    file.write_bytes(content)
    memo = WeightsMemo(file)
    assert memo.get(KEY) is None
    memo.put(KEY, FACT)
    assert WeightsMemo(file).get(KEY) == FACT


def test_a_flipped_bit_anywhere_empties_the_memory(tmp_path: Path) -> None:
    file = tmp_path / "memo.json"
    WeightsMemo(file).put(KEY, FACT)
    whole = file.read_bytes()
    for position in range(len(whole)):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        assert WeightsMemo(file).get(KEY) is None


def test_two_writers_keep_each_others_facts(tmp_path: Path) -> None:
    first, second = WeightsMemo(tmp_path / "memo.json"), WeightsMemo(tmp_path / "memo.json")
    first.put({"n": 1}, FACT)
    second.put({"n": 2}, FACT)
    assert WeightsMemo(tmp_path / "memo.json").get({"n": 1}) == FACT


def test_a_folder_that_cannot_be_written_costs_only_the_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    memo = WeightsMemo(tmp_path / "file" / "memo.json")
    memo.put(KEY, FACT)
    assert memo.get(KEY) == FACT
