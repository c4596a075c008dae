"""What is published comes back bit for bit; what is damaged is found, named and computed again."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.digests import Digests
from pipeline.errors import CacheError, MissingFeaturesError
from pipeline.features.parts import VERIFIED_FILE, build_part, check_part, part_name
from pipeline.features.rounding import as_stored
from pipeline.features.store import SPEC_FILE, USED_FILE, FeatureStore, read_spec
from pipeline.files import canonical_json, digest_bytes, file_lock

from .examples import DIM, SPEC, features_of, fill, make_digests, make_store, spec_with


def settle(folder: Path) -> None:
    """Give every file of a folder a time long past, so that a proof of wholeness may be remembered."""
    for file in folder.iterdir():
        os.utime(file, (1e9, 1e9))


@pytest.fixture
def remembers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """ctime cannot be set back; without this a test would have to wait for two seconds."""
    monkeypatch.setattr("pipeline.features.parts.SAFE_NS", -(10**12))


def test_rows_come_back_in_any_order(tmp_path: Path) -> None:
    digests = make_digests(30)
    for part in (digests[:10], digests[10:11], digests[11:]):
        fill(make_store(tmp_path), part)
    store = make_store(tmp_path)
    order = np.random.default_rng(1).permutation(30)
    assert store.read(digests[order]).tobytes() == features_of(digests[order]).tobytes()
    assert len(store.parts) == 3
    assert store.contains(make_digests(32)).tolist() == [True] * 30 + [False] * 2


def test_a_missing_row_is_never_replaced(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    fill(store, make_digests(4))
    with pytest.raises(MissingFeaturesError, match="1 of 5 images have no feature"):
        store.read(make_digests(5))


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["float16", "float32"]),
    st.lists(st.sampled_from([1e-9, 1.0, 3e5]), min_size=1, max_size=8),
    st.integers(0, 99),
)
def test_what_is_stored_is_as_stored(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, scales: list[float], seed: int
) -> None:
    features = np.random.default_rng(seed).standard_normal((len(scales), DIM)) * np.array(scales)[:, None]
    exact, digests = features.astype(np.float32), make_digests(len(scales), seed=seed)
    store = make_store(tmp_path_factory.mktemp("cache"), dtype=dtype)
    with store.writing():
        parts = store.publish(exact, digests)
    assert store.read(digests).tobytes() == as_stored(exact, dtype).tobytes()
    assert len(parts) <= 2 - (dtype == "float32")


def test_plain_h5py_reads_a_part_and_sees_why_it_is_wide(tmp_path: Path) -> None:
    digests, features = make_digests(2), features_of(make_digests(2))
    features[1, 0] = 1e6
    store = make_store(tmp_path)
    with store.writing():
        narrow, wide = store.publish(features, digests)
    with h5py.File(narrow) as part, h5py.File(wide) as wide_part:
        assert part["features"].dtype == np.float16 and wide_part["features"].dtype == np.float32
        assert part["digest"][:].tolist() == digests[:1].tolist()
        assert json.loads(part.attrs["spec"]) == SPEC.as_dict() and part.attrs["key"] == SPEC.key.encode()
        assert "widened" not in part.attrs and b"float16" in wide_part.attrs["widened"]


def test_a_content_published_twice_is_stored_once(tmp_path: Path) -> None:
    digests = make_digests(3)
    store = make_store(tmp_path)
    fill(store, digests[[0, 1, 0, 2, 1]])
    assert [part.digests.tolist() for part in store.parts] == [digests.tolist()]


def test_equal_rows_give_equal_bytes() -> None:
    digests = make_digests(5)
    features = features_of(digests).astype(np.float16)
    assert build_part(features, digests, SPEC) == build_part(features.copy(), digests.copy(), SPEC)


def test_the_spec_stands_readable_beside_the_parts(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    fill(store, make_digests(1))
    assert json.loads((store.folder / SPEC_FILE).read_text()) == SPEC.as_dict()
    assert store.folder == tmp_path / SPEC.folder_name
    assert read_spec(store.folder / SPEC_FILE) == SPEC


def test_reading_an_empty_cache_makes_nothing(tmp_path: Path) -> None:
    store = make_store(tmp_path / "cache")
    store.touch()
    assert not store.contains(make_digests(1)).any() and not (tmp_path / "cache").exists()


def test_publishing_says_that_the_features_are_used(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    fill(store, make_digests(1))
    os.utime(store.folder / USED_FILE, (1, 1))
    store.touch()
    assert (store.folder / USED_FILE).stat().st_mtime > time.time() - 60


def test_two_stores_see_each_others_rows_after_refresh(tmp_path: Path) -> None:
    digests = make_digests(6)
    one, two = make_store(tmp_path), make_store(tmp_path)
    fill(one, digests[:4])
    fill(two, digests[2:])
    assert one.contains(digests).tolist() == [True] * 4 + [False] * 2
    one.refresh()
    assert one.read(digests).tobytes() == features_of(digests).tobytes()


def test_a_writer_sees_what_others_published_before_it_began(tmp_path: Path) -> None:
    early = make_store(tmp_path)
    fill(make_store(tmp_path), make_digests(2))
    with early.writing():
        assert early.contains(make_digests(2)).all()


def test_writers_share_a_lock_that_keeps_the_collector_out(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"

    def collect() -> None:
        with file_lock(lock, shared=False, blocking=False):
            pass

    with make_store(tmp_path).writing(), make_store(tmp_path).writing(), pytest.raises(BlockingIOError):
        collect()
    collect()


def flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def damaged_store(cache: Path, damage: Callable[[Path], None]) -> tuple[FeatureStore, Digests, Path]:
    """A store of two parts reopened after ``damage`` was done to the first; the digests; that part's path."""
    digests = make_digests(8)
    store = make_store(cache)
    first = fill(store, digests[:5])[0]
    fill(store, digests[5:])
    damage(first)
    return make_store(cache), digests, first


def check_mended(store: FeatureStore, digests: Digests, part: Path) -> None:
    """The damaged part is set aside and named, its rows count as missing, and can be published again."""
    assert store.contains(digests).tolist() == [False] * 5 + [True] * 3
    assert part.name in " ".join(store.warnings)
    assert not part.exists() and part.with_name(f"damaged-{part.name}").exists()
    fill(store, digests[:5])
    assert make_store(store.cache_dir).read(digests).tobytes() == features_of(digests).tobytes()
    assert make_store(store.cache_dir).warnings == []


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_flipped_bit_of_a_part_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    def damage(path: Path) -> None:
        whole = path.read_bytes()
        path.write_bytes(flip(whole, data.draw(st.integers(0, len(whole) * 8 - 1))))

    check_mended(*damaged_store(tmp_path_factory.mktemp("cache"), damage))


@pytest.mark.parametrize("size", [0, 1, 8, 500, -1])
def test_a_truncated_part_is_found(tmp_path: Path, size: int) -> None:
    def damage(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:size])

    check_mended(*damaged_store(tmp_path, damage))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (build_part(features_of(make_digests(5)), make_digests(5), spec_with(layer="layer3")), "belongs to the key"),
        (build_part(features_of(make_digests(5), 3), make_digests(5), SPEC), "it holds features"),
        (build_part(features_of(make_digests(5)), make_digests(4), SPEC), "it holds features"),
        (build_part(features_of(make_digests(5)).astype(np.float64), make_digests(5), SPEC), "it holds features"),
        (b"no HDF5 at all", "not a part"),
        (b"", "not a part"),
    ],
    ids=["other key", "other width", "rows differ", "float64", "no HDF5", "empty"],
)
def test_a_foreign_part_is_set_aside(tmp_path: Path, content: bytes, reason: str) -> None:
    store = make_store(tmp_path)
    fill(store, make_digests(2, seed=9))
    (store.folder / part_name(content)).write_bytes(content)
    again = make_store(tmp_path)
    assert len(again.digests) == 2 and (store.folder / f"damaged-{part_name(content)}").exists()
    assert reason in again.warnings[0]


def test_a_part_without_datasets_is_not_a_part() -> None:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.attrs["key"] = np.bytes_(SPEC.key)
        file.create_group("features")
        file.create_dataset("digest", data=make_digests(1))
    data = buffer.getvalue()
    assert "not simply stored" in str(check_part(part_name(data), data, SPEC.key, DIM))


@pytest.mark.parametrize("name", [".tmp-7-abcd-part-00.h5", "part-00.h5.tmp", "damaged-part-00.h5"])
def test_what_is_not_yet_or_no_longer_a_part_is_passed_over(tmp_path: Path, name: str) -> None:
    store = make_store(tmp_path)
    fill(store, make_digests(2))
    (store.folder / name).write_bytes(b"half")
    again = make_store(tmp_path)
    assert len(again.digests) == 2 and again.warnings == [] and (store.folder / name).exists()


@pytest.mark.usefixtures("remembers_at_once")
def test_a_part_proven_whole_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(make_store(tmp_path), make_digests(3))
    make_store(tmp_path)
    checked: list[str] = []
    monkeypatch.setattr("pipeline.features.parts.check_part", lambda name, *_: checked.append(name))
    assert len(make_store(tmp_path).digests) == 3 and checked == []


@pytest.mark.usefixtures("remembers_at_once")
@pytest.mark.parametrize("keep_size", [True, False])
def test_a_part_that_changed_since_it_was_proven_is_proven_again(tmp_path: Path, keep_size: bool) -> None:
    def damage(path: Path) -> None:
        make_store(tmp_path)
        settle(path.parent)
        whole = path.read_bytes()
        # Among the values, where HDF5 itself would see nothing wrong.
        values = whole.index(features_of(make_digests(5)).astype(np.float16).tobytes())
        path.write_bytes(flip(whole, values * 8) if keep_size else whole[:-1])
        os.utime(path, (1e9, 1e9))

    check_mended(*damaged_store(tmp_path, damage))


def test_a_part_written_a_moment_ago_is_not_remembered_as_whole(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    fill(store, make_digests(3))
    make_store(tmp_path)
    assert not (store.folder / VERIFIED_FILE).exists()


def sealed(value: object) -> bytes:
    body = canonical_json(value).encode()
    return digest_bytes(body).hex().encode() + b"\n" + body


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", sealed({})[1:], sealed([1]), sealed({"a": 1}), sealed({"a": [1]}), b"\n" + b"[" * 100_000],
    ids=["empty", "no text", "no seal", "list", "number", "short", "deep"],
)
@pytest.mark.usefixtures("remembers_at_once")
def test_a_damaged_note_of_whole_parts_only_costs_reading(tmp_path: Path, content: bytes) -> None:
    store = make_store(tmp_path)
    fill(store, make_digests(3))
    (store.folder / VERIFIED_FILE).write_bytes(content)
    assert make_store(tmp_path).read(make_digests(3)).tobytes() == features_of(make_digests(3)).tobytes()


@pytest.mark.usefixtures("remembers_at_once")
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_a_flipped_bit_of_the_note_is_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    cache = tmp_path_factory.mktemp("cache")
    fill(make_store(cache), make_digests(3))
    note = make_store(cache).folder / VERIFIED_FILE
    note.write_bytes(flip(note.read_bytes(), data.draw(st.integers(0, note.stat().st_size * 8 - 1))))
    assert make_store(cache).read(make_digests(3)).tobytes() == features_of(make_digests(3)).tobytes()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_flipped_bit_of_the_spec_is_found_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    store = make_store(cache)
    fill(store, make_digests(3))
    spec = store.folder / SPEC_FILE
    spec.write_bytes(flip(spec.read_bytes(), data.draw(st.integers(0, spec.stat().st_size * 8 - 1))))
    again = make_store(cache)
    harmless = read_spec(spec) if spec.exists() else None
    assert (harmless is not None and harmless.key == SPEC.key) or "spec is damaged" in again.warnings[0]
    fill(again, make_digests(4)[3:])
    assert read_spec(spec) is not None
    assert make_store(cache).contains(make_digests(4)).all()


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000, b"\xff", b'{"transform": NaN}'])
def test_a_damaged_spec_is_set_aside_and_written_again(tmp_path: Path, content: bytes) -> None:
    store = make_store(tmp_path)
    fill(store, make_digests(3))
    (store.folder / SPEC_FILE).write_bytes(content)
    again = make_store(tmp_path)
    assert again.contains(make_digests(3)).all() and "spec is damaged" in again.warnings[0]
    fill(again, make_digests(4)[3:])
    assert (store.folder / f"damaged-{SPEC_FILE}").read_bytes() == content
    assert json.loads((store.folder / SPEC_FILE).read_text()) == SPEC.as_dict()


def test_a_lost_spec_comes_back_when_the_features_are_used(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    fill(store, make_digests(1))
    (store.folder / SPEC_FILE).unlink()
    make_store(tmp_path).touch()
    assert read_spec(store.folder / SPEC_FILE) == SPEC


def test_the_spec_of_another_key_counts_as_damaged(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    fill(store, make_digests(1))
    other = spec_with(precision="bfloat16").as_dict()
    (store.folder / SPEC_FILE).write_text(json.dumps(other))
    assert "spec is damaged" in make_store(tmp_path).warnings[0]


def refuse_writes(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Make everything under ``cache`` read-only, for root too: as a file system mounted read-only answers."""
    real_open, real_builtin = os.open, open

    def check(path: object, writes: bool) -> None:
        if writes and isinstance(path, (str, os.PathLike)) and str(path).startswith(str(cache)):
            raise OSError(30, "Read-only file system", str(path))

    def open_(path: str, flags: int, *args: int, **named: int) -> int:
        check(path, bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))
        return real_open(path, flags, *args, **named)

    def builtin(path: object, mode: str = "r", *args: object, **named: object) -> object:
        check(path, bool(set(mode) & set("wax+")))
        return real_builtin(path, mode, *args, **named)  # type: ignore[call-overload]

    def refuse(path: object, *_args: object, **_named: object) -> None:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr("builtins.open", builtin)
    for owner, name in ((os, "mkdir"), (os, "rename"), (Path, "touch")):
        monkeypatch.setattr(owner, name, refuse)


def test_a_read_only_cache_is_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = make_digests(8)
    store = make_store(tmp_path)
    fill(store, digests[:4])
    broken = fill(store, digests[4:])[0]
    broken.write_bytes(b"broken")
    refuse_writes(monkeypatch, tmp_path)
    again = make_store(tmp_path)
    again.touch()
    assert again.read(digests[:4]).tobytes() == features_of(digests[:4]).tobytes()
    assert f"{broken} is ignored" in again.warnings[0] and broken.exists()


def test_a_read_only_cache_says_that_it_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_writes(monkeypatch, tmp_path)
    with pytest.raises(CacheError, match="cannot be written") as caught, make_store(tmp_path / "cache").writing():
        pass
    assert "Read-only" in str(caught.value) and "cache.dir" in str(caught.value)


def test_a_full_disk_keeps_what_was_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path)
    fill(store, make_digests(3))

    def fsync(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CacheError, match="No space left"):
        fill(store, make_digests(3, seed=5))
    monkeypatch.undo()
    again = make_store(tmp_path)
    assert again.read(make_digests(3)).tobytes() == features_of(make_digests(3)).tobytes()
    assert not again.contains(make_digests(3, seed=5)).any()
    assert not [file for file in store.folder.iterdir() if file.name.startswith(".tmp-")]


def test_a_foreign_error_while_writing_is_not_blamed_on_the_cache(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match="an image"), make_store(tmp_path).writing():
        raise PermissionError(13, "an image")


@pytest.mark.parametrize("vanish", ["stat", "read"])
def test_a_part_that_vanishes_while_it_is_opened_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vanish: str
) -> None:
    part = fill(make_store(tmp_path), make_digests(2))[0]
    if vanish == "stat":
        monkeypatch.setattr("pipeline.features.store.part_names", lambda _folder: ["part-gone.h5"])
    else:
        real = Path.read_bytes
        monkeypatch.setattr(Path, "read_bytes", lambda path: real(path.with_name("gone") if path == part else path))
    store = make_store(tmp_path)
    assert len(store.digests) == 0 and store.warnings == []


def test_a_part_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    fill(store, make_digests(2))
    (store.folder / "part-00.h5").mkdir()
    again = make_store(tmp_path)
    assert len(again.digests) == 2 and "part-00.h5 is passed over" in again.warnings[0]


def test_rows_of_a_part_removed_after_opening_are_missing(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    part = fill(store, make_digests(2))[0]
    part.unlink()
    with pytest.raises(MissingFeaturesError, match="2 of 2 images have no feature"):
        store.read(make_digests(2))
    assert not store.contains(make_digests(2)).any()


def test_a_cache_folder_that_is_a_file_ends_in_a_message(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("not a folder")
    with pytest.raises(CacheError, match="cannot be read"):
        make_store(tmp_path / "cache")
