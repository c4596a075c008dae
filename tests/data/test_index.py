"""The index saves reading, and never vouches for a file that may have changed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.folder import scan_folder
from pipeline.data.index import SAFE_NS, DigestIndex
from pipeline.files import lock_file

NOW = 10**18
PATHS = ["a/1.jpg", "a/2 \n.jpg", "b/\udcff.jpg", "b/ü.jpg"]


def make_columns(count: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Stats long before NOW, digests, and everything known."""
    stats = np.arange(count * 4, dtype=np.int64).reshape(count, 4) + 100
    digests = np.random.default_rng(0).integers(1, 256, (count, 16), np.uint8)
    return stats, digests, np.ones(count, bool)


def make_index() -> DigestIndex:
    stats, digests, known = make_columns()
    return DigestIndex().updated(PATHS, stats, digests, known, read_ns=NOW)


def test_saved_and_loaded_index_knows_the_unchanged_tree(tmp_path: Path) -> None:
    stats, digests, _ = make_columns()
    make_index().save(tmp_path / "sub/index")
    found, known = DigestIndex.load(tmp_path / "sub/index").lookup(PATHS, stats)
    assert known.all() and (found == digests).all() and found.dtype == np.uint8


@pytest.mark.parametrize("column", range(4))
def test_any_change_of_stat_is_noticed(column: int) -> None:
    stats, digests, _ = make_columns()
    stats[2, column] += 1
    found, known = make_index().lookup(PATHS, stats)
    assert known.tolist() == [True, True, False, True]
    assert not found[2].any() and (found[known] == digests[known]).all()


def test_files_that_come_go_and_swap(tmp_path: Path) -> None:
    stats, digests, _ = make_columns()
    rows = [3, 0, 2]
    paths = [PATHS[row] for row in rows]
    found, known = make_index().lookup([*paths, "new.jpg"], np.concatenate([stats[rows], stats[:1]]))
    assert known.tolist() == [True, True, True, False] and (found[:3] == digests[rows]).all()
    swapped = [PATHS[1], PATHS[0], *PATHS[2:]]
    assert make_index().lookup(swapped, stats)[1].tolist() == [False, False, True, True]


def test_empty_index_and_empty_tree(tmp_path: Path) -> None:
    stats, digests, known = make_columns(0)
    empty = DigestIndex().updated([], stats, digests, known, read_ns=NOW)
    empty.save(tmp_path / "index")
    loaded = DigestIndex.load(tmp_path / "index")
    assert len(loaded) == 0 and loaded.warning is None
    assert not loaded.lookup(PATHS, make_columns()[0])[1].any()
    assert len(make_index().lookup([], stats)[1]) == 0


@pytest.mark.parametrize("column", [1, 2])
def test_recent_files_are_not_remembered(column: int) -> None:
    stats, digests, known = make_columns()
    stats[1, column] = NOW - SAFE_NS + 1
    stats[2, column] = NOW - SAFE_NS
    stats[3, column] = NOW + SAFE_NS  # a clock set back since it was written
    index = DigestIndex().updated(PATHS, stats, digests, known, read_ns=NOW)
    assert index.lookup(PATHS, stats)[1].tolist() == [True, False, True, False]


def test_update_keeps_what_is_trusted_adds_what_was_read_and_forgets_the_rest() -> None:
    stats, digests, _ = make_columns()
    stats[0, 0] += 1  # changed and read anew
    stats[1, 0] += 1  # changed and not read
    fresh = digests.copy()
    fresh[0] = 7
    known = np.array([True, False, True])
    # The rows that were only looked up have no time of reading; they stay trusted all the same.
    index = make_index().updated(PATHS[:3], stats[:3], fresh[:3], known, read_ns=np.array([NOW, 0, 0]))
    found, held = index.lookup(PATHS[:3], stats[:3])
    assert held.tolist() == [True, False, True] and len(index) == 2
    assert found[0].tolist() == [7] * 16 and (found[2] == digests[2]).all()


def test_missing_file_is_an_empty_index(tmp_path: Path) -> None:
    index = DigestIndex.load(tmp_path / "none")
    assert len(index) == 0 and index.warning is None


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "index"
    make_index().save(file)
    whole = file.read_bytes()
    damaged = [bytes([*whole[:i], whole[i] ^ 1 << i % 8, *whole[i + 1 :]]) for i in range(len(whole))]
    damaged += [whole[:i] for i in range(1, len(whole))] + [b"something else altogether"]
    for data in damaged:
        file.write_bytes(data)
        index = DigestIndex.load(file)
        assert len(index) == 0 and index.warning and str(file) in index.warning
        assert not index.lookup(PATHS, make_columns()[0])[1].any()


def test_what_is_learnt_is_put_behind_what_is_there(tmp_path: Path) -> None:
    stats, digests, known = make_columns()
    file = tmp_path / "sub/index"
    make_index().append(file)
    before, fresh = file.read_bytes(), digests[1:2] ^ 255
    changed = stats[1:2] + 1
    DigestIndex().updated(PATHS[1:2], changed, fresh, known[:1], read_ns=NOW).append(file)
    assert file.read_bytes().startswith(before)
    stats[1], digests[1] = changed, fresh
    found, held = DigestIndex.load(file).lookup(PATHS, stats)
    assert held.all() and (found == digests).all()
    assert DigestIndex.compact(file, PATHS, stats)
    index = DigestIndex.load(file)
    assert (len(index), index.first, index.blocks) == (4, 4, 1) and (index.lookup(PATHS, stats)[0] == digests).all()


def test_a_block_that_was_cut_or_spoilt_costs_no_other(tmp_path: Path) -> None:
    stats, digests, known = make_columns()
    file, blocks = tmp_path / "index", []
    for row in range(4):
        mine = slice(row, row + 1)
        before = file.stat().st_size if row else 0
        DigestIndex().updated(PATHS[mine], stats[mine], digests[mine], known[mine], read_ns=NOW).append(file)
        blocks.append(file.read_bytes()[before:])
    for spoilt in (blocks[1][:20], blocks[1][:-1], blocks[1][:-1] + b"?", b"", b"x"):
        file.write_bytes(blocks[0] + spoilt + blocks[2] + blocks[3])
        index = DigestIndex.load(file)
        assert index.lookup(PATHS, stats)[1].tolist() == [True, False, True, True] and index.warning is None


def test_an_index_that_somebody_appends_to_is_not_made_anew(tmp_path: Path) -> None:
    file = tmp_path / "index"
    make_index().append(file)
    before = file.read_bytes()
    with open(file, "ab") as other:
        lock_file(other.fileno(), shared=True, blocking=True)
        assert not DigestIndex.compact(file, PATHS, make_columns()[0])
    assert file.read_bytes() == before


def test_replaced_file_with_equal_size_and_restored_mtime(tmp_path: Path) -> None:
    file = tmp_path / "cat/a.jpg"
    file.parent.mkdir()
    file.write_bytes(b"old")
    before = scan_folder(tmp_path, layout="auto", extensions=(".jpg",))
    index = DigestIndex().updated(
        before.paths, before.stamps, np.ones((1, 16), np.uint8), np.ones(1, bool), read_ns=time.time_ns() + 2 * SAFE_NS
    )
    assert index.lookup(before.paths, before.stamps)[1].all()
    status = file.stat()
    time.sleep(0.02)  # more than a tick of the kernel's clock for ctime
    file.write_bytes(b"new")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = scan_folder(tmp_path, layout="auto", extensions=(".jpg",))
    assert after.stamps[0, 1] == before.stamps[0, 1]
    assert not index.lookup(after.paths, after.stamps)[1].any()
