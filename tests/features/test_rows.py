"""Features that stay in a file are the features, whatever their parts are, and are made once."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import CacheError, MissingFeaturesError
from pipeline.features.inventory import find_garbage, verify_key
from pipeline.features.merge import MERGE_AT
from pipeline.features.rows import Rows, take_rows
from pipeline.files import temporary_name

from .examples import DIM, features_of, fill, make_digests, make_store


def flat_of(cache: Path, digests: np.ndarray) -> Rows:
    return make_store(cache).flat(digests)


def test_rows_stand_in_the_order_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = make_digests(40)
    for start in range(0, 40, 7):
        fill(make_store(tmp_path), digests[start : start + 7])
    order = np.random.default_rng(3).integers(0, 40, 60)  # some contents twice
    monkeypatch.setattr("pipeline.features.rows.SCATTERED", 7)
    rows, expected = flat_of(tmp_path, digests[order]), features_of(digests[order])
    assert rows.shape == (60, DIM) and rows.stored_dtype == np.float16
    assert (np.asarray(rows) == expected).all()
    mask = np.arange(60) % 3 > 0
    for chosen in (slice(5, 9), mask, np.array([7, 7, 59, 0]), slice(0, 0)):
        assert rows[chosen].dtype == np.float32 and (rows[chosen] == expected[chosen]).all()
        assert (rows.take(chosen)[:] == expected[chosen]).all()
    assert (take_rows(rows, mask).take(slice(3, 30))[:] == take_rows(expected, mask)[3:30]).all()


def test_one_wide_row_makes_all_wide(tmp_path: Path) -> None:
    digests = make_digests(3)
    store = make_store(tmp_path)
    with store.writing():
        store.publish(features_of(digests) * np.float32([[1], [1e5], [1]]), digests)
    assert flat_of(tmp_path, digests[[0, 2]]).stored_dtype == np.float16
    rows = flat_of(tmp_path, digests)
    assert rows.stored_dtype == np.float32 and (rows[1:2] == features_of(digests[1:2]) * np.float32(1e5)).all()


def test_the_file_is_made_once_and_whatever_the_parts(tmp_path: Path) -> None:
    digests = make_digests(MERGE_AT)
    for row in range(MERGE_AT - 1):
        fill(make_store(tmp_path), digests[row : row + 1])
    first = flat_of(tmp_path, digests[: MERGE_AT - 1])
    written = first.file.stat().st_mtime_ns, first.file.stat().st_ino
    fill(make_store(tmp_path), digests[-1:])  # merges
    os.utime(first.file, (1, 1))
    again = flat_of(tmp_path, digests[: MERGE_AT - 1])
    assert again.file == first.file and again.file.stat().st_ino == written[1]
    assert again.file.stat().st_mtime > 1  # it was of use
    assert len(list(again.file.parent.glob("rows-*"))) == 1


def test_what_a_killed_process_left_unfinished_goes(tmp_path: Path) -> None:
    digests = make_digests(5)
    fill(make_store(tmp_path), digests)
    left = temporary_name(make_store(tmp_path).folder / "rows-ab-.npy")
    left.write_bytes(b"half")
    assert (flat_of(tmp_path, digests)[:] == features_of(digests)).all() and not left.exists()


def test_missing_rows_are_told_and_leave_nothing(tmp_path: Path) -> None:
    fill(make_store(tmp_path), make_digests(3))
    with pytest.raises(MissingFeaturesError):
        flat_of(tmp_path, make_digests(5))
    assert not [path for path in make_store(tmp_path).folder.iterdir() if "rows-" in path.name]


def test_a_full_disk_is_told_before_anything_is_written_through_a_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = make_digests(40)
    fill(make_store(tmp_path), digests)

    def full(descriptor: int, offset: int, size: int) -> None:
        assert (offset, size) == (0, os.fstat(descriptor).st_size) and size > 40 * DIM * 2
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(CacheError, match="free space"):
        flat_of(tmp_path, digests)
    assert not list(tmp_path.rglob("*rows-*.npy"))


def test_damage_is_found_and_disuse_is_garbage(tmp_path: Path) -> None:
    digests = make_digests(5)
    fill(make_store(tmp_path), digests)
    rows = flat_of(tmp_path, digests)
    assert verify_key(rows.file.parent).problems == ()
    late = time.time() + 40 * 86_400
    os.utime(rows.file.parent / "used", (late, late))
    (item,) = find_garbage(tmp_path, days=30, named_keys=(), now=late)
    assert (item.path, item.kind) == (rows.file, "rows")
    data = bytearray(rows.file.read_bytes())
    data[-1] ^= 1
    rows.file.write_bytes(data)
    (problem,) = verify_key(rows.file.parent).problems
    assert "set aside" in problem
    assert (flat_of(tmp_path, digests)[:] == features_of(digests)).all()
