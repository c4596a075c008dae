"""Nothing in use is ever proposed or removed; what goes, goes whole."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

import pytest

from pipeline.errors import CacheError
from pipeline.features.inventory import DAY, Garbage, find_garbage, keys_named_by_runs, remove_garbage
from pipeline.features.quarantine import BadContent, Quarantine
from pipeline.features.store import USED_FILE

from .examples import SPEC, fill, make_digests, make_store, spec_with

OTHER = spec_with(precision="bfloat16")


def set_age(path: Path, days: float) -> None:
    moment = time.time() - days * DAY
    os.utime(path, (moment, moment))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A key unused for forty days, and one for ten."""
    folder = tmp_path / "cache"
    for changes, days in (({}, 40), ({"precision": "bfloat16"}, 10)):
        store = make_store(folder, **changes)
        fill(store, make_digests(3))
        set_age(store.folder / USED_FILE, days)
    return folder


def proposed(cache: Path, *, days: float = 30, named: Collection[str] = ()) -> dict[str, str]:
    return {item.path.name: item.kind for item in find_garbage(cache, days=days, named_keys=named)}


def remove(cache: Path, *, days: float = 30, named: Collection[str] = ()) -> list[Garbage]:
    found = find_garbage(cache, days=days, named_keys=named)
    return remove_garbage(cache, found, days=days, named_keys=named)


def test_a_key_long_unused_and_named_by_no_run_can_go(cache: Path) -> None:
    (item,) = find_garbage(cache, days=30, named_keys=())
    assert (item.path.name, item.kind) == (SPEC.folder_name, "key") and "40 days" in item.why
    assert item.size == sum(file.stat().st_size for file in item.path.iterdir())
    assert proposed(cache, days=41) == {}
    assert set(proposed(cache, days=5)) == {SPEC.folder_name, OTHER.folder_name}


@pytest.mark.parametrize("name", [SPEC.key, SPEC.folder_name])
def test_a_key_that_a_run_names_stays(cache: Path, name: str) -> None:
    assert proposed(cache, named=[name]) == {}


def test_a_key_used_in_the_future_stays(cache: Path) -> None:
    """The clock may have been set back since."""
    set_age(make_store(cache).folder / USED_FILE, -100)
    assert SPEC.folder_name not in proposed(cache, days=0)


def test_a_key_without_a_note_of_use_counts_from_its_newest_file(cache: Path) -> None:
    (make_store(cache).folder / USED_FILE).unlink()
    assert proposed(cache) == {}


def test_a_removed_key_is_gone_and_the_others_stay(cache: Path) -> None:
    removed = remove(cache)
    assert [item.path.name for item in removed] == [SPEC.folder_name]
    assert sorted(path.name for path in cache.iterdir()) == [".lock", OTHER.folder_name]
    assert make_store(cache, precision="bfloat16").contains(make_digests(3)).all()


def test_a_key_used_since_it_was_proposed_stays(cache: Path) -> None:
    found = find_garbage(cache, days=30, named_keys=())
    make_store(cache).touch()
    assert remove_garbage(cache, found, days=30, named_keys=()) == []
    assert make_store(cache).contains(make_digests(3)).all()


def test_only_what_was_proposed_is_removed(cache: Path) -> None:
    found = find_garbage(cache, days=30, named_keys=())
    assert [item.path.name for item in remove_garbage(cache, found, days=0, named_keys=())] == [SPEC.folder_name]


def test_while_someone_writes_nothing_is_removed(cache: Path) -> None:
    with make_store(cache, precision="float16").writing(), pytest.raises(CacheError, match="someone is writing"):
        remove(cache)
    assert make_store(cache).contains(make_digests(3)).all()
    assert len(remove(cache)) == 1


def test_damaged_files_and_leftovers_can_go(cache: Path) -> None:
    done = subprocess.Popen([sys.executable, "-S", "-c", ""])
    done.wait()
    folder = make_store(cache, precision="bfloat16").folder
    files = [folder / "damaged-part-ff.h5", folder / "damaged-spec.json", cache / f".tmp-{done.pid}-aa-weights.json"]
    for file in files:
        file.write_bytes(b"12345")
        set_age(file, 0.5)
    assert {item.path: item.size for item in find_garbage(cache, days=30, named_keys=[SPEC.key])} == dict.fromkeys(
        files, 5
    )
    assert len(remove(cache, named=[SPEC.key])) == 3
    assert not any(file.exists() for file in files)
    assert make_store(cache, precision="bfloat16").contains(make_digests(3)).all()


def test_what_lies_in_a_key_that_goes_is_counted_once(cache: Path) -> None:
    (make_store(cache).folder / "damaged-part-ff.h5").write_bytes(b"12345")
    assert proposed(cache) == {SPEC.folder_name: "key"}


def test_old_indexes_can_go_and_those_read_lately_stay(cache: Path) -> None:
    index = cache / "index"
    index.mkdir()
    for name, read, written in (("old.idx", 50, 50), ("read.idx", 1, 50), ("written.idx", 50, 1)):
        (index / name).write_bytes(b"1")
        os.utime(index / name, (time.time() - read * DAY, time.time() - written * DAY))
    assert proposed(cache, named=[SPEC.key]) == {"old.idx": "index"}


def test_a_cache_that_is_not_there_has_no_garbage(tmp_path: Path) -> None:
    assert proposed(tmp_path / "nowhere") == {}


def test_a_key_is_gone_for_readers_in_one_step(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle, removal leaves a temporary folder, never half a key."""

    def killed(_folder: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.features.inventory.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove(cache)
    assert not (cache / SPEC.folder_name).exists()
    (half,) = cache.glob(f".tmp-*-{SPEC.folder_name}")
    monkeypatch.undo()
    set_age(half, 2)
    assert proposed(cache) == {half.name: "leftover"}
    remove(cache)
    assert not half.exists()


def test_runs_name_their_keys(tmp_path: Path) -> None:
    contents: dict[str, str] = {
        "good": json.dumps({"feature_key": "0123456789abcdef", "format_version": 1}),
        "newer": json.dumps({"feature_key": "fedcba9876543210", "unknown": {"deep": []}}),
        "none": json.dumps({"feature_key": None}),
        "without": "{}",
        "list": "[1]",
        "broken": "{",
    }
    for name, text in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.json").write_text(text)
    keys, warnings = keys_named_by_runs(tmp_path)
    assert keys == {"0123456789abcdef", "fedcba9876543210"}
    assert len(warnings) == 1 and "broken" in warnings[0]
    assert keys_named_by_runs(tmp_path / "nowhere") == (set(), [])


def test_old_notes_of_unreadable_images_can_go(cache: Path) -> None:
    quarantine = Quarantine(cache, "rule")
    quarantine.add(b"d" * 16, BadContent("/a.jpg", "truncated", "cut", "copy it again"))
    quarantine.save()
    (folder,) = (cache / "quarantine").iterdir()
    assert folder.name not in proposed(cache)
    for path in (*folder.iterdir(), folder):
        set_age(path, 40)
    assert proposed(cache)[folder.name] == "quarantine"
    remove(cache)
    assert Quarantine(cache, "rule").digests == []


def test_all_keys_that_went_into_a_run_stay(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "model.json").write_text(json.dumps({"feature_key": "a", "feature_keys": ["a", "b", 7]}))
    assert keys_named_by_runs(tmp_path) == ({"a", "b"}, [])


def test_where_there_are_no_locks_nothing_is_removed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(CacheError, match="no locks"):
        remove(cache)
    assert len(proposed(cache)) == 1


def no_locks(_descriptor: int, _operation: int) -> None:
    raise OSError(errno.ENOLCK, "No locks available")
