"""A folder becomes the same samples on every file system, and what is odd about it is said."""

from __future__ import annotations

import os
from pathlib import Path
from threading import current_thread

import numpy as np
import pytest

from pipeline.data import walk
from pipeline.data.folder import FolderSource, scan_folder
from pipeline.data.source import UNLABELLED, Samples
from pipeline.data.walk import FileChanged, as_int64, read_file
from pipeline.errors import DataError

EXTENSIONS = (".jpg", ".png")


def make(root: Path, *names: str | bytes) -> Path:
    """Files with their own name as content; a name that ends in / is a folder."""
    for name in names:
        raw = os.fsencode(name)
        path = os.path.join(os.fsencode(root), raw)
        os.makedirs(path if raw.endswith(b"/") else os.path.dirname(path), exist_ok=True)
        if not raw.endswith(b"/"):
            with open(path, "wb") as file:
                file.write(raw)
    return root


def scan(root: Path, layout: str = "auto", extensions: object = EXTENSIONS) -> Samples:
    return scan_folder(root, layout=layout, extensions=extensions)  # type: ignore[arg-type]


def labels(tree: Samples) -> dict[str, str]:
    return {path: tree.class_names[target] for path, target in zip(tree.paths, tree.targets, strict=True)}


def test_flat_layout_nested_folders_and_ignored_files(tmp_path: Path) -> None:
    make(tmp_path, "cat/b.jpg", "cat/a/deep/er.PNG", "cat/a.jpg", "cat-big/x.jpg", "cat/notes.txt", "README", "a/z.gif")
    make(tmp_path, ".hidden/x.jpg", "cat/.x.jpg", "cat/.thumbs/x.jpg", "a/1.jpg", "cat/dir.jpg/inner.jpg")
    tree = scan(tmp_path)
    assert tree.splits is None
    assert tree.class_names == ("a", "cat", "cat-big")
    assert tree.paths == sorted(tree.paths)
    assert labels(tree) == {
        "a/1.jpg": "a",
        "cat-big/x.jpg": "cat-big",
        "cat/a.jpg": "cat",
        "cat/a/deep/er.PNG": "cat",
        "cat/b.jpg": "cat",
        "cat/dir.jpg/inner.jpg": "cat",
    }
    assert tree.ignored == {"": 1, ".gif": 1, ".txt": 1}
    assert tree.warnings == ()


def test_stats_are_those_of_the_files(tmp_path: Path) -> None:
    make(tmp_path, "b/second.jpg", "a/first.jpg", "a/long name.jpg")
    tree = scan(tmp_path)
    for path, row in zip(tree.paths, tree.stamps.tolist(), strict=True):
        status = (tmp_path / path).stat()
        assert row == [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def test_stats_that_wait_are_waited_for_in_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, *(f"cat/{number}.jpg" for number in range(300)), "cat/folder.jpg/1.jpg")
    (tmp_path / "cat/dead.jpg").symlink_to("nowhere")
    quick = scan(tmp_path)
    seen = set[str]()
    fields = walk._fields_and_mode
    monkeypatch.setattr(walk, "_fields_and_mode", lambda status: seen.add(current_thread().name) or fields(status))
    monkeypatch.setattr(walk, "SLOW_SECONDS", -1.0)
    slow = scan(tmp_path)
    assert slow.paths == quick.paths and (slow.stamps == quick.stamps).all() and slow.warnings == quick.warnings
    assert len(slow.paths) == 301 and "leads nowhere" in slow.warnings[0] and any("stat" in name for name in seen)


def test_inodes_above_63_bits_survive() -> None:
    values = [1, (1 << 64) - 1, 5]
    assert as_int64(values).view(np.uint64).tolist() == values


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_split_layout(tmp_path: Path, val: str) -> None:
    make(tmp_path, "train/ant/1.jpg", "train/bee/2.jpg", f"{val}/ant/3.jpg", f"{val}/bee/4.jpg", "test/bee/5.jpg")
    tree = scan(tmp_path)
    assert tree.splits is not None and tree.class_names == ("ant", "bee")
    splits = dict(zip(tree.paths, tree.splits.tolist(), strict=True))
    assert splits == {
        "train/ant/1.jpg": 0,
        "train/bee/2.jpg": 0,
        f"{val}/ant/3.jpg": 1,
        f"{val}/bee/4.jpg": 1,
        "test/bee/5.jpg": 2,
    }
    assert labels(tree)["test/bee/5.jpg"] == "bee"
    assert tree.warnings == ("Classes without an image in test: 'ant'.",)


def test_train_alone_is_split_by_the_program(tmp_path: Path) -> None:
    tree = scan(make(tmp_path, "train/ant/1.jpg", "train/bee/2.jpg"))
    assert tree.splits is None and tree.class_names == ("ant", "bee")
    assert tree.paths == ["train/ant/1.jpg", "train/bee/2.jpg"] and not tree.warnings


@pytest.mark.parametrize("test", ["test/5.jpg", "test/images/5.jpg", "Testing/5.jpg"])
def test_a_test_without_labels_is_left_for_predict(tmp_path: Path, test: str) -> None:
    tree = scan(make(tmp_path, "train/ant/1.jpg", "train/bee/2.jpg", test))
    assert tree.splits is None and tree.class_names == ("ant", "bee") and len(tree.paths) == 2
    folder = test.partition("/")[0]
    assert f"1 image in '{folder}'" in tree.warnings[0] and f"predict latest {tmp_path / folder}" in tree.warnings[0]
    tree = scan(make(tmp_path, "val/ant/3.jpg", "val/bee/4.jpg"))
    assert tree.splits is not None and tree.splits.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("names", [("Training", "Testing"), ("TRAIN", "Test"), ("train", "dev")])
def test_other_usual_names_of_splits(tmp_path: Path, names: tuple[str, str]) -> None:
    tree = scan(make(tmp_path, *(f"{split}/{name}/{split}.jpg" for split in names for name in ("ant", "bee"))))
    assert tree.class_names == ("ant", "bee") and tree.splits is not None and 0 in tree.splits


def test_a_folder_around_everything_is_no_class(tmp_path: Path) -> None:
    tree = scan(make(tmp_path / "a", "insects/ants/1.jpg", "insects/bees/2.jpg", "__MACOSX/insects/._1.jpg"))
    assert tree.class_names == ("ants", "bees") and tree.paths == ["insects/ants/1.jpg", "insects/bees/2.jpg"]
    assert "'insects'" in tree.warnings[0]
    tree = scan(make(tmp_path / "b", "data/insects/train/ants/1.jpg", "data/insects/val/ants/2.jpg"))
    assert tree.class_names == ("ants",) and tree.splits is not None
    assert scan(make(tmp_path / "c", "ants/1.jpg", "ants/small/2.jpg")).class_names == ("ants",)
    assert scan(tmp_path / "a", layout="flat").class_names == ("insects",)


def test_labels_in_a_table_beside_are_asked_for(tmp_path: Path) -> None:
    root = make(tmp_path, "images/1.jpg", "images/2.jpg", "sample_submission.csv", "train_labels.csv")
    with pytest.raises(DataError) as caught:
        FolderSource(root, "auto", EXTENSIONS).list_samples()
    assert f"data.root={root / 'train_labels.csv'}" in str(caught.value) and "data.layout=flat" in str(caught.value)
    assert FolderSource(root, "flat", EXTENSIONS).list_samples().class_names == ("images",)


def test_flat_can_be_asked_for(tmp_path: Path) -> None:
    tree = scan(make(tmp_path, "train/ant/1.jpg", "test/ant/2.jpg"), layout="flat")
    assert tree.class_names == ("test", "train") and tree.splits is None


def test_images_in_the_root_have_no_class(tmp_path: Path) -> None:
    tree = scan(make(tmp_path, "b.jpg", "a.jpg"))
    assert tree.paths == ["a.jpg", "b.jpg"] and tree.class_names == ()
    assert tree.targets.tolist() == [UNLABELLED, UNLABELLED]


def test_stray_images_and_empty_classes_are_warned_of(tmp_path: Path) -> None:
    tree = scan(make(tmp_path, "stray.jpg", "cat/a.jpg", "dog/", "cow/readme.txt"))
    assert tree.class_names == ("cat", "cow", "dog") and tree.paths == ["cat/a.jpg"]
    assert any("1 image directly in" in warning for warning in tree.warnings)
    assert any("'cow', 'dog'" in warning for warning in tree.warnings)
    split = scan(make(tmp_path / "s", "train/cat/1.jpg", "val/cat/2.jpg", "val/stray.jpg", "0.jpg", "extra/x.jpg"))
    assert len(split.paths) == 2 and len(split.warnings) == 3


@pytest.mark.parametrize(
    ("names", "layout", "words"),
    [
        (["a/x.gif", "a/y.gif", "a/z.txt"], "auto", ["No image", "2 .gif", "data.extensions"]),
        (["a/"], "auto", ["No image"]),
        (["train/horse/1.jpg", "val/horse/2.jpg", "val/hores/3.jpg"], "auto", ["'hores'", "'horse'", "rename"]),
        (["train/a/1.jpg", "val/a/2.jpg", "valid/a/3.jpg"], "auto", ["2 validation splits", "'valid'"]),
        (["train/a/1.jpg"], "split", ["no splits", "data.layout"]),
        (["a/1.jpg"], "split", ["no splits"]),
        (["train/1.jpg", "test/2.jpg"], "auto", ["'test', 'train'", "class folders", "data.layout=flat"]),
        (["train/a/1.jpg", "bus/2.jpg"], "auto", ["'bus'", "data.root=", "data.layout=flat"]),
        (["seg_train/a/1.jpg", "seg_test/a/2.jpg", "seg_pred/3.jpg"], "auto", ["'seg_train'", "data.layout=flat"]),
        (["val/a/1.jpg", "test/a/2.jpg"], "auto", ["no train", "evaluate --data", "data.layout=flat"]),
    ],
)
def test_errors_name_folder_and_remedy(tmp_path: Path, names: list[str], layout: str, words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        scan(make(tmp_path, *names), layout=layout)
    message = str(caught.value)
    assert str(tmp_path) in message and "remedy" in message
    assert all(word in message for word in words), message


def test_missing_root_and_file_as_root(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        scan(tmp_path / "nowhere")
    make(tmp_path, "file.jpg")
    with pytest.raises(DataError, match="it is a file"):
        scan(tmp_path / "file.jpg")


def test_links_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    make(tmp_path, "data/cat/a.jpg", "elsewhere/b.jpg", "elsewhere/more/c.jpg")
    os.symlink(tmp_path / "elsewhere", tmp_path / "data/dog")
    os.symlink(tmp_path / "elsewhere/b.jpg", tmp_path / "data/cat/linked.jpg")
    os.symlink("..", tmp_path / "data/cat/up")
    os.symlink(".", tmp_path / "elsewhere/self")
    os.symlink("gone.jpg", tmp_path / "data/cat/dead.jpg")
    os.symlink("round.jpg", tmp_path / "data/cat/round.jpg")
    tree = scan(tmp_path / "data")
    assert tree.paths == ["cat/a.jpg", "cat/linked.jpg", "dog/b.jpg", "dog/more/c.jpg"]
    warnings = "\n".join(tree.warnings)
    assert all(f"{name!r} lead" in warnings for name in ("cat/up", "dog/self", "cat/dead.jpg", "cat/round.jpg"))
    linked = tree.stamps[1].tolist()
    assert linked[3] == (tmp_path / "elsewhere/b.jpg").stat().st_ino


def test_pipes_are_no_images(tmp_path: Path) -> None:
    make(tmp_path, "cat/a.jpg")
    os.mkfifo(tmp_path / "cat/pipe.jpg")
    tree = scan(tmp_path)
    assert tree.paths == ["cat/a.jpg"] and tree.ignored == {".jpg": 1}


def test_odd_names(tmp_path: Path) -> None:
    names = ["c l a s s/a b.jpg", "c l a s s/new\nline.jpg", "ü/ß.jpg", "ü/雪.jpg"]
    make(tmp_path, *names, b"raw\xff/\xfe.jpg")
    tree = scan(tmp_path)
    assert set(tree.paths) == {*names, "raw\udcff/\udcfe.jpg"} and tree.paths == sorted(tree.paths)
    for path in tree.paths:
        assert (tmp_path / path).read_bytes() == os.fsencode(path)


def test_a_folder_out_of_reach_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "cat/a.jpg", "cat/locked/b.jpg")
    real = os.open

    def refuse(path: str, *arguments: int) -> int:
        if "locked" in path:
            raise PermissionError(13, "Permission denied", path)
        return real(path, *arguments)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DataError, match=r"cannot be read[\s\S]*locked[\s\S]*chmod"):
        scan(tmp_path)


def test_all_extensions(tmp_path: Path) -> None:
    make(tmp_path, "a/x.jp2", "a/y.QOI", "a/z.txt", "a/w.gif")
    assert scan(tmp_path, extensions="all").paths == ["a/w.gif", "a/x.jp2", "a/y.QOI"]


def test_real_images_in_the_order_of_image_folder(shared: Path) -> None:
    from torchvision.datasets import ImageFolder

    root = shared / "data/hymenoptera_data/train"
    tree = scan_folder(root, layout="auto", extensions=(".jpg", ".jpeg", ".png"))
    ours = [(str(root / path), target) for path, target in zip(tree.paths, tree.targets.tolist(), strict=True)]
    assert ours == sorted(ImageFolder(str(root)).samples) and len(ours) == 244


def test_a_file_is_read_with_the_stamp_of_what_was_read(tmp_path: Path) -> None:
    file = tmp_path / "ü \n.jpg"
    file.write_bytes(b"content")
    data, row = read_file(file)
    status = file.stat()
    assert data == b"content"
    assert row.tolist() == [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(b"content")
    real, calls = os.fstat, []

    def grow(descriptor: int) -> os.stat_result:
        calls.append(descriptor)
        if len(calls) == 2:
            file.write_bytes(b"longer content")
        return real(descriptor)

    monkeypatch.setattr("pipeline.data.walk.os.fstat", grow)
    with pytest.raises(FileChanged, match="changed"):
        read_file(file)


def test_what_cannot_be_read_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "gone.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(OSError, match="regular"):
        read_file(tmp_path / "pipe.jpg")
    with pytest.raises(OSError):  # noqa: PT011 - a folder fails at opening or at reading, with different numbers
        read_file(tmp_path)
