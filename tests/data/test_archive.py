"""Tars and zips give the bytes that went into them, by name; what is odd or damaged in them is told, never lost."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data import archive
from pipeline.data.images import Images, open_given, open_images
from pipeline.errors import DataError
from pipeline.params import DataParams

from .test_folder import labels

Files = Iterable[tuple[str, bytes]]
CLASSES = [(f"{label}/{n}.jpg", f"{label} {n}".encode()) for label in ("ants", "bees") for n in range(3)]


def make_tar(path: Path, files: Files, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, data in files:
            add(tar, name, data)
    return path


def add(tar: tarfile.TarFile, name: str, data: bytes, kind: bytes = tarfile.REGTYPE, target: str = "") -> None:
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = len(data), kind, target
    tar.addfile(member, io.BytesIO(data))


def images_of(root: Path | str, cache: Path, **params: Any) -> Images:
    return open_images(DataParams.model_validate({"root": root, **params}), cache)


def contents(images: Images) -> dict[str, bytes | None]:
    return {path: images.read(position) for position, path in enumerate(images.paths)}


def samples_of(key: str, label: str, kind: str = "cls") -> list[tuple[str, bytes]]:
    """An image and its label, as WebDataset has them."""
    return [(f"{key}.jpg", key.encode()), (f"{key}.{kind}", label.encode())]


def test_class_folders_in_a_tar(tmp_path: Path) -> None:
    images = images_of(
        make_tar(tmp_path / "all.tar", [*CLASSES, ("ants/notes.md", b""), ("ants/.x.jpg", b"")]), tmp_path
    )
    assert labels(images.samples) == {f"all.tar/{name}": name[:4] for name, _ in CLASSES}
    assert contents(images) == {f"all.tar/{name}": data for name, data in CLASSES}
    assert images.path(0) == f"{tmp_path}/all.tar/ants/0.jpg" and images.position_of(images.path(3)) == 3
    assert images.samples.ignored == {".md": 1} and images.warnings == []


def test_one_folder_around_everything_is_no_class_and_splits_are_found(tmp_path: Path) -> None:
    files = [(f"photos/{split}/{name}", data) for split in ("train", "val") for name, data in CLASSES]
    images = images_of(make_tar(tmp_path / "all.tar", files), tmp_path)
    assert images.class_names == ("ants", "bees") and images.samples.splits is not None
    assert images.samples.splits.tolist() == [0] * 6 + [1] * 6


def test_shards_as_webdataset_groups_them(tmp_path: Path) -> None:
    for number in range(3):
        files = [item for n in range(2) for item in samples_of(f"./{number}{n}", ("cat", "dog")[n])]
        make_tar(tmp_path / "shards" / f"s-{number:03}.tar", files)
    expected = {f"s-{number:03}.tar/{number}{n}.jpg": ("cat", "dog")[n] for number in range(3) for n in range(2)}
    for root in (tmp_path / "shards", f"{tmp_path}/shards/s-{{000..002}}.tar"):
        images = images_of(root, tmp_path)
        assert labels(images.samples) == expected
        assert contents(images)["s-001.tar/10.jpg"] == b"./10"
    with pytest.raises(DataError, match="2 of 5 shards"):
        images_of(f"{tmp_path}/shards/s-{{000..004}}.tar", tmp_path)


def test_labels_of_json_by_field_with_splits_and_groups(tmp_path: Path) -> None:
    rows = [{"class": "cat", "kind": "x", "patient": "P1", "split": "train"},
            {"class": "dog", "kind": "y", "patient": "P1", "split": "test"},
            {"class": "cat", "kind": "y", "split": "train"},
            {"class": "dog", "kind": "x", "split": "train"}]  # fmt: skip
    files = [item for n, row in enumerate(rows) for item in samples_of(str(n), json.dumps(row), "json")]
    root = make_tar(tmp_path / "all.tar", files)
    images = images_of(root, tmp_path)
    assert list(labels(images.samples).values()) == ["cat", "dog", "cat", "dog"]
    assert images.samples.splits is not None and images.samples.splits.tolist() == [0, 2, 0, 0]
    assert images.samples.groups == ["P1", "P1", "", ""]
    other = images_of(root, tmp_path, columns={"label": "kind"}, layout="flat")
    assert list(labels(other.samples).values()) == ["x", "y", "y", "x"] and other.samples.splits is None


def test_captions_are_no_classes(tmp_path: Path) -> None:
    files = [item for n in range(30) for item in samples_of(str(n), f"a picture of number {n}", "txt")]
    images = images_of(make_tar(tmp_path / "all.tar", files), tmp_path)
    assert set(images.targets.tolist()) == {-1} and any("captions" in text for text in images.warnings)


def test_splits_by_the_names_of_shards(tmp_path: Path) -> None:
    make_tar(tmp_path / "s" / "train-0.tar", CLASSES)
    make_tar(tmp_path / "s" / "val-0.tar", CLASSES[1:4])
    images = images_of(tmp_path / "s", tmp_path)
    assert images.samples.splits is not None and images.samples.splits.tolist() == [0] * 6 + [1] * 3
    assert images.paths[-1] == "val-0.tar/bees/0.jpg" and images.class_names == ("ants", "bees")
    assert images_of(tmp_path / "s", tmp_path, layout="flat").samples.splits is None


def test_an_unchanged_shard_costs_a_stamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.shards.SAFE_NS", 0)
    monkeypatch.setattr("pipeline.data.index.SAFE_NS", 0)
    root = make_tar(tmp_path / "all.tar", CLASSES)
    images = images_of(root, tmp_path)
    images.read_unknown(quiet=True)
    with monkeypatch.context() as patched:
        patched.setattr(archive.ArchiveSource, "_scan", None)
        again = images_of(root, tmp_path)
        assert again.known.all() and (again.digests == images.digests).all()
    make_tar(root, [*CLASSES, ("bees/9.jpg", b"new")])
    changed = images_of(root, tmp_path)
    assert len(changed) == 7 and not changed.known.any()


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_odd_names_links_and_repeated_members(tmp_path: Path, form: int) -> None:
    long, odd = "x" * 200 + "/" + "y" * 200 + ".jpg", "a b/\u00fc\udcff\n.jpg"
    with tarfile.open(tmp_path / "odd.tar", "w", format=form) as tar:
        for name in ("../up.jpg", "/abs/x.jpg", long, odd, "./a b/twice.jpg"):
            add(tar, name, name.encode("utf-8", "surrogateescape"))
        add(tar, "a b/twice.jpg", b"the last counts")
        add(tar, "abs/hard.jpg", b"", tarfile.LNKTYPE, "a b/twice.jpg")
        add(tar, "abs/soft.jpg", b"", tarfile.SYMTYPE, "../abs/hard.jpg")
        add(tar, "abs/lost.jpg", b"", tarfile.SYMTYPE, "/etc/passwd")
        add(tar, "abs/empty.jpg", b"")
    images = images_of(tmp_path / "odd.tar", tmp_path)
    assert contents(images) == {
        "odd.tar/../up.jpg": b"../up.jpg",
        "odd.tar/abs/x.jpg": b"/abs/x.jpg",
        f"odd.tar/{long}": long.encode(),
        f"odd.tar/{odd}": odd.encode("utf-8", "surrogateescape"),
        "odd.tar/a b/twice.jpg": b"the last counts",
        "odd.tar/abs/hard.jpg": b"the last counts",
        "odd.tar/abs/soft.jpg": b"the last counts",
        "odd.tar/abs/empty.jpg": b"",
    }
    assert images.class_names == ("..", "a b", "abs", "x" * 200)
    told = " ".join(images.warnings)
    assert "'abs/lost.jpg'" in told and "more than once" in told and "'a b/twice.jpg'" in told


def test_a_sparse_member_is_put_together(tmp_path: Path) -> None:
    import subprocess

    (tmp_path / "c").mkdir()
    for label in ("cat", "dog"):
        (tmp_path / "c" / label).mkdir()
        with open(tmp_path / "c" / label / "holes.jpg", "wb") as file:
            file.seek(1 << 20)
            file.write(label.encode())
    done = subprocess.run(["tar", "--sparse", "-cf", "sparse.tar", "c"], cwd=tmp_path, check=False)
    if done.returncode:
        pytest.skip("no GNU tar")
    found = contents(images_of(tmp_path / "sparse.tar", tmp_path))
    assert found["sparse.tar/c/cat/holes.jpg"] == bytes(1 << 20) + b"cat"


def test_a_tar_that_is_cut_gives_what_it_has_and_says_so(tmp_path: Path) -> None:
    root = make_tar(tmp_path / "all.tar", CLASSES)
    data = root.read_bytes()
    for cut, count, word in (
        (512 * 5 + 3, 3, "cut short"),
        (512 * 7 + 100, 4, "cut short"),
        (512 * 8, 4, "no end mark"),
    ):
        root.write_bytes(data[:cut])
        images = images_of(root, tmp_path / str(cut))
        assert len(images) == count and any(word in text for text in images.warnings), images.warnings
        found = list(contents(images).values())
        assert found[:2] == [b"ants 0", b"ants 1"] and not images.failures
    root.write_bytes(b"not a tar" * 100)
    with pytest.raises(DataError, match="archive cannot be read"):
        images_of(root, tmp_path / "none")


@pytest.mark.parametrize(("suffix", "pack"), [(".tar.gz", gzip.compress), (".tar.bz2", bz2.compress)])
def test_a_compressed_tar_is_read_and_called_slow(tmp_path: Path, suffix: str, pack: Any) -> None:
    data = make_tar(tmp_path / "x.tar", CLASSES).read_bytes()
    root = tmp_path / f"packed{suffix}"
    root.write_bytes(pack(data))
    images = images_of(root, tmp_path / "cache")
    assert list(contents(images).values()) == [data for _, data in CLASSES] and "slow" in images.warnings[0]
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_file()] == []
    if suffix == ".tar.gz":
        root.write_bytes(pack(data)[:-30])
        assert len(images_of(root, tmp_path / "cache")) > 0


def test_no_images_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No image was found"):
        images_of(make_tar(tmp_path / "none.tar", [("a/b.txt", b"x"), ("c.md", b"")]), tmp_path)
    with pytest.raises(DataError, match="No image was found"):
        images_of(make_tar(tmp_path / "empty.tar", []), tmp_path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_a_zip_of_class_folders_as_it_is_sent(tmp_path: Path, method: int) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w", method) as zipped:
        for name, data in CLASSES:
            zipped.writestr(f"my photos/{name}", data * 50)
        zipped.writestr("__MACOSX/my photos/ants/._0.jpg", b"x")
        zipped.writestr("my photos/ants/.DS_Store", b"x")
        zipped.mkdir("my photos/empty")
    images = images_of(tmp_path / "photos.zip", tmp_path)
    assert labels(images.samples) == {f"photos.zip/my photos/{name}": name[:4] for name, _ in CLASSES}
    assert list(contents(images).values()) == [data * 50 for _, data in CLASSES]


def test_a_damaged_zip_is_told(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, data in CLASSES:
            zipped.writestr(name, data * 50)
        middle = zipped.infolist()[2].header_offset + 45
    data = bytearray((tmp_path / "photos.zip").read_bytes())
    data[middle] ^= 0xFF
    (tmp_path / "photos.zip").write_bytes(data)
    images = images_of(tmp_path / "photos.zip", tmp_path)
    images.read_unknown(quiet=True)
    assert list(images.failures) == [2] and "damaged in the zip" in images.failures[2]
    (tmp_path / "photos.zip").write_bytes(data[:-30])
    with pytest.raises(DataError, match="archive cannot be read"):
        images_of(tmp_path / "photos.zip", tmp_path)


def test_archives_and_folders_can_be_given_together(tmp_path: Path) -> None:
    root = make_tar(tmp_path / "all.tar", CLASSES)
    (tmp_path / "one.jpg").write_bytes(b"one")
    images = open_given([root, tmp_path / "one.jpg"], DataParams(), tmp_path / "cache")
    assert images.path(0) == f"{tmp_path}/all.tar/ants/0.jpg" and images.path(6) == str(tmp_path / "one.jpg")
    assert [images.read(0), images.read(6)] == [b"ants 0", b"one"]
    assert (images.targets == -1).all() and images.position_of(images.path(2)) == 2


def test_webdataset_writes_what_is_read(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
    with wds.ShardWriter(f"{tmp_path}/w-%03d.tar", maxcount=4, verbose=0) as sink:
        for n in range(10):
            sink.write({"__key__": f"k{n:04}", "png": pixels, "cls": n % 3})
    images = images_of(f"{tmp_path}/w-{{000..002}}.tar", tmp_path)
    assert len(images) == 10 and images.class_names == ("0", "1", "2")
    assert images.targets.tolist() == [n % 3 for n in range(10)]
    assert (images.read(0) or b"").startswith(b"\x89PNG")
