"""Keys that are filled an image at a time stay quick, and nothing is lost on the way."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.data.digests import first_occurrences
from pipeline.features import merge
from pipeline.features import store as store_module
from pipeline.features.merge import MERGE_AT
from pipeline.features.parts import part_names
from pipeline.features.store import FeatureStore

from .examples import features_of, fill, make_digests, make_store


def count(cache: Path) -> int:
    return len(list(part_names(make_store(cache).folder)))


def fill_one_by_one(cache: Path, rows: int, start: int = 0) -> None:
    digests = make_digests(start + rows)
    for row in range(start, start + rows):
        fill(make_store(cache), digests[row : row + 1])


def assert_whole(store: FeatureStore, rows: int) -> None:
    digests = make_digests(rows)
    assert (store.read(digests) == features_of(digests)).all()
    assert len(store.digests) == rows and first_occurrences(store.digests).all() and not store.warnings


def test_many_small_parts_become_few_and_keep_every_row(tmp_path: Path) -> None:
    fill_one_by_one(tmp_path, 300)
    assert count(tmp_path) < 3 * MERGE_AT
    assert_whole(make_store(tmp_path), 300)


def test_large_parts_are_left_alone(tmp_path: Path) -> None:
    digests = make_digests(2)
    large = np.repeat(digests[:1], 5000, axis=0)
    large[:, :8] = np.arange(5000, dtype=np.int64)[:, None].view(np.uint8)
    fill(make_store(tmp_path), large)
    before = {path.name for path in make_store(tmp_path).folder.glob("part-*")}
    fill_one_by_one(tmp_path, MERGE_AT)
    assert before <= {path.name for path in make_store(tmp_path).folder.glob("part-*")}


def test_rows_keep_the_type_they_were_stored_in(tmp_path: Path) -> None:
    digests = make_digests(2 * MERGE_AT)
    for row, digest in enumerate(digests):
        store = make_store(tmp_path)
        with store.writing():
            store.publish(features_of(digest[None]) * (1e5 if row % 2 else 1), digest[None])
    store = make_store(tmp_path)
    assert sorted(part.dtype for part in store.parts) == ["float16", "float32"]
    wide = features_of(digests) * np.where(np.arange(len(digests)) % 2, 1e5, 1).astype(np.float32)[:, None]
    assert (store.read(digests) == wide).all()


def test_a_reader_whose_parts_are_merged_looks_again(tmp_path: Path) -> None:
    fill_one_by_one(tmp_path, MERGE_AT - 1)
    reader = make_store(tmp_path)
    fill_one_by_one(tmp_path, 1, start=MERGE_AT - 1)
    assert count(tmp_path) == 1
    digests = make_digests(MERGE_AT - 1)
    assert (reader.read(digests) == features_of(digests)).all()


def test_a_part_that_goes_while_libhdf5_opens_it_is_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_one_by_one(tmp_path, MERGE_AT - 1)
    reader, opened, real = make_store(tmp_path), list[Path](), h5py.File

    def open_late(path: Path, mode: str) -> h5py.File:
        opened.append(path)
        if len(opened) == 1:
            monkeypatch.setattr(h5py, "File", real)
            fill_one_by_one(tmp_path, 1, start=MERGE_AT - 1)
            raise OSError("Unable to synchronously open file (can't retrieve stat info for file)")
        return real(path, mode)

    monkeypatch.setattr(h5py, "File", open_late)
    digests = make_digests(MERGE_AT - 1)
    assert (reader.read(digests) == features_of(digests)).all() and opened


@pytest.mark.parametrize("listed", [slice(None), slice(0, 0), slice(0, 5)])
def test_parts_that_are_merged_while_a_reader_opens_them_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: slice
) -> None:
    """A listing may hold what has gone a moment later, or neither that nor what came of it."""
    fill_one_by_one(tmp_path, MERGE_AT - 1)
    names = list(part_names(make_store(tmp_path).folder))[listed]
    fill_one_by_one(tmp_path, 1, start=MERGE_AT - 1)
    listings = iter([names])
    monkeypatch.setattr(store_module, "part_names", lambda folder: next(listings, None) or part_names(folder))
    assert_whole(make_store(tmp_path), MERGE_AT)


def test_damage_gains_no_valid_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill_one_by_one(tmp_path, MERGE_AT - 1)
    spoilt = sorted(make_store(tmp_path).folder.glob("part-*"))[3]
    writer = make_store(tmp_path)
    with writer.writing():
        writer.publish(features_of(make_digests(MERGE_AT)[-1:]), make_digests(MERGE_AT)[-1:])
        # Opened while it was whole, and spoilt since with equal size and times.
        monkeypatch.setattr(FeatureStore, "refresh", lambda _self: None)
        data = bytearray(spoilt.read_bytes())
        data[-1] ^= 1
        spoilt.write_bytes(data)
    monkeypatch.undo()
    again = make_store(tmp_path)
    assert len(again.warnings) == 1 and len(again.digests) == MERGE_AT - 1


@pytest.mark.parametrize("after", range(4))
def test_a_merge_that_is_cut_short_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """At the publishing, before anything is removed, and in the middle of the removal."""
    fill_one_by_one(tmp_path, MERGE_AT - 1)
    real_publish, real_unlink, left = merge.publish_file, Path.unlink, [after]

    def step() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError("cut short")

    def publish(path: Path, data: bytes) -> None:
        if path.name.startswith("part-") and count(tmp_path) >= MERGE_AT:
            step()
        real_publish(path, data)

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith("part-"):
            step()
        real_unlink(path, missing_ok)

    for module in (merge, store_module):
        monkeypatch.setattr(module, "publish_file", publish)
    monkeypatch.setattr(Path, "unlink", unlink)
    fill_one_by_one(tmp_path, 1, start=MERGE_AT - 1)
    monkeypatch.undo()
    again, digests = make_store(tmp_path), make_digests(MERGE_AT)
    assert (again.read(digests) == features_of(digests)).all() and not again.warnings


@pytest.mark.slow
def test_no_part_grows_beyond_the_largest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of long before there was any merging come in any number."""
    with monkeypatch.context() as before:
        before.setattr(merge, "MERGE_AT", 10_000)
        fill_one_by_one(tmp_path, 200)
    size = make_store(tmp_path).parts[0].size
    monkeypatch.setattr(merge, "MOST_BYTES", 50 * size)
    monkeypatch.setattr(merge, "SMALL_BYTES", 2 * size)
    fill_one_by_one(tmp_path, 1, start=200)
    again = make_store(tmp_path)
    assert len(again.parts) < 5 + MERGE_AT and max(part.size for part in again.parts) <= 50 * size
    assert_whole(again, 201)


def test_a_few_rows_of_a_large_part_are_read_alone(tmp_path: Path) -> None:
    digests = make_digests(100)
    fill(make_store(tmp_path), digests)
    some = digests[[90, 3, 3, 41]]
    assert (make_store(tmp_path).read(some) == features_of(some)).all()


def test_where_there_are_no_locks_nothing_is_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_descriptor: int, _operation: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    fill_one_by_one(tmp_path, MERGE_AT + 2)
    assert count(tmp_path) == MERGE_AT + 2
