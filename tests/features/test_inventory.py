"""What a cache holds is listed as it is, and every flipped bit is found."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import CacheError
from pipeline.features.inventory import leftovers, list_keys, temporaries, verify_key
from pipeline.features.parts import VERIFIED_FILE, build_part, part_name
from pipeline.features.store import SPEC_FILE, USED_FILE

from .examples import DIM, SPEC, features_of, fill, make_digests, make_store, spec_with

OTHER = spec_with(precision="bfloat16")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Two keys: five rows in two parts, used last; three rows in one. Beside them what a cache folder also holds."""
    store = make_store(tmp_path)
    fill(store, make_digests(5)[:2])
    fill(store, make_digests(5)[2:])
    other = make_store(tmp_path, precision="bfloat16")
    fill(other, make_digests(3))
    os.utime(other.folder / USED_FILE, (10**9, 10**9))
    for folder in ("index", "quarantine", "resnet18-no-key", "resnet18-0123456789ABCDEF"):
        (tmp_path / folder).mkdir()
    (tmp_path / "resnet18-0123456789abcdef").write_text("a file")
    return tmp_path


def test_keys_are_listed_the_last_used_first(cache: Path) -> None:
    first, second = list_keys(cache)
    assert (first.spec, first.key, first.rows, first.parts, first.feature_dim) == (SPEC, SPEC.key, 5, 2, DIM)
    assert (second.spec, second.name, second.rows, second.used) == (OTHER, OTHER.folder_name, 3, 1e9)
    assert first.size == sum(file.stat().st_size for file in first.folder.iterdir())
    assert first.damaged == first.problems == second.problems == ()


def test_no_cache_has_no_keys(tmp_path: Path) -> None:
    assert list_keys(tmp_path / "nowhere") == []
    assert not (tmp_path / "nowhere").exists()


def test_a_cache_that_is_a_file_ends_in_a_message(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(CacheError, match="cannot be read"):
        list_keys(tmp_path / "cache")


def test_listing_shows_damage_and_changes_nothing(cache: Path) -> None:
    folder = make_store(cache).folder
    part = sorted(folder.glob("part-*"))[0]
    part.write_bytes(b"broken")
    (folder / "damaged-part-ff.h5").write_bytes(b"older damage")
    before = sorted(path.name for path in folder.iterdir())
    entry = list_keys(cache)[0]
    assert set(entry.damaged) == {part.name, "damaged-part-ff.h5"} and entry.parts == 1
    assert f"{part.name}: its bytes do not match" in " ".join(entry.problems)
    assert sorted(path.name for path in folder.iterdir() if path.name != VERIFIED_FILE) == before


@pytest.mark.parametrize("content", [None, b"", b"{}"])
def test_a_lost_spec_is_read_from_the_parts(cache: Path, content: bytes | None) -> None:
    spec = make_store(cache).folder / SPEC_FILE
    spec.unlink() if content is None else spec.write_bytes(content)
    entry = list_keys(cache)[0]
    assert entry.spec == SPEC and entry.problems == (f"{SPEC_FILE} is missing or damaged",)


def test_a_key_without_spec_and_parts_is_still_listed(tmp_path: Path) -> None:
    (tmp_path / SPEC.folder_name).mkdir()
    (entry,) = list_keys(tmp_path)
    assert (entry.spec, entry.rows, entry.feature_dim, entry.key) == (None, 0, None, SPEC.key)
    assert entry.used > time.time() - 60


def test_a_part_of_another_width_is_damage(cache: Path) -> None:
    folder = make_store(cache).folder
    strange = build_part(features_of(make_digests(2), DIM - 1), make_digests(2), SPEC)
    (folder / part_name(strange)).write_bytes(strange)
    proof = verify_key(folder)
    assert len(proof.problems) >= 1


def test_a_whole_key_verifies(cache: Path) -> None:
    folder = make_store(cache).folder
    proof = verify_key(folder)
    assert (proof.parts, proof.rows, proof.problems) == (2, 5, ())
    assert proof.size == sum(file.stat().st_size for file in folder.glob("part-*"))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_every_flipped_bit_of_part_or_spec_is_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    store = make_store(tmp_path_factory.mktemp("cache"))
    fill(store, make_digests(5))
    file = data.draw(st.sampled_from([store.folder / SPEC_FILE, store.parts[0].path]))
    content = bytearray(file.read_bytes())
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    proof = verify_key(store.folder)
    whitespace = file.name == SPEC_FILE and not proof.problems
    assert whitespace or (len(proof.problems) == 1 and str(file) in proof.problems[0])
    assert proof.rows == (0 if file.suffix == ".h5" else 5)
    if whitespace:  # the flip did not change what the spec says
        assert make_store(store.cache_dir).warnings == []


def test_verify_reads_again_what_was_remembered_as_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.features.parts.SAFE_NS", -(10**12))
    store = make_store(tmp_path)
    (part,) = fill(store, make_digests(5))
    make_store(tmp_path)
    stat = part.stat()
    part.write_bytes(part.read_bytes()[:-1] + b"\xff")
    as_before = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    monkeypatch.setattr("pipeline.features.parts._stat", lambda _path: as_before)
    assert make_store(tmp_path).warnings == [], "a disk that decays under an unchanged stat is for verify to find"
    assert len(verify_key(store.folder).problems) == 1
    assert part.with_name(f"damaged-{part.name}").exists()


def ended_process() -> int:
    """The id of a process that has ended."""
    done = subprocess.Popen([sys.executable, "-S", "-c", ""])
    done.wait()
    return done.pid


def test_leftovers_are_those_of_ended_processes(cache: Path) -> None:
    dead, alive, now = ended_process(), os.getpid(), time.time()
    folder = make_store(cache).folder
    ages = {
        folder / f".tmp-{dead}-aa-part-1.h5": 700.0,
        folder / f".tmp-{dead}-bb-part-2.h5": 60.0,  # perhaps of a process on another machine
        cache / "index" / f".tmp-{alive}-cc-x.idx": 700.0,
        cache / "index" / f".tmp-{alive}-dd-x.idx": 90_000.0,  # the number was given away again
        cache / f".tmp-{dead}-ee-folder": 700.0,
        folder / ".tmp-notes": 90_000.0,
    }
    for path, age in ages.items():
        path.mkdir() if path.name.endswith("folder") else path.write_bytes(b"half")
        os.utime(path, (now - age, now - age))
    assert {path.name[-9:] for path in leftovers(cache, now=now)} == {"part-1.h5", "-dd-x.idx", "ee-folder"}
    assert len(list(temporaries(cache))) == 5
