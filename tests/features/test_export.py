"""An export is one whole file that plain h5py reads, or nothing."""

from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from pipeline.errors import CacheError
from pipeline.features.cache import FeatureTable
from pipeline.features.export import export_table

from .examples import features_of, make_digests

NAMES = [os.fsdecode(b"ant/caf\xe9.jpg"), "bee/line\nbreak.jpg", "bee/émile.jpg", "loose.jpg"]


def make_table(root: Path = Path("/images")) -> FeatureTable:
    digests = make_digests(4)
    return FeatureTable(
        root=root,
        class_names=("ant", os.fsdecode(b"b\xe9e")),
        features=features_of(digests),
        targets=np.array([0, 1, 1, -1]),
        paths=NAMES,
        splits=np.array([0, 2, 1, 0], np.int8),
        digests=digests,
        groups=np.arange(4),
    )


def test_plain_h5py_reads_it(tmp_path: Path) -> None:
    file, table = tmp_path / "new folder" / "features.h5", make_table()
    assert export_table(table, file) == file.stat().st_size
    with h5py.File(file) as found:
        assert found["features"].dtype == np.float32
        assert found["features"][:].tobytes() == table.features.tobytes()
        assert found["labels"][:].tolist() == [0, 1, 1, -1]
        assert found["digest"][:].tolist() == table.digests.tolist()
        assert [os.fsdecode(path) for path in found["paths"][:]] == NAMES
        assert [os.fsdecode(name) for name in found["class_names"][:]] == list(table.class_names)
        assert found["split"].asstr()[:].tolist() == ["train", "test", "val", "train"]


def test_an_earlier_export_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "features.h5"
    export_table(make_table(Path("/old")), file)
    export_table(make_table(Path("/new")), file)
    with h5py.File(file) as found:
        assert found.attrs["root"] == "/new"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("kind", ["text", "hdf5", "folder"])
def test_something_else_is_not_replaced(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "thesis"
    if kind == "text":
        file.write_text("the only copy")
    elif kind == "hdf5":
        h5py.File(file, "w").close()
    else:
        file.mkdir()
    before = file.read_bytes() if file.is_file() else b""
    with pytest.raises(CacheError, match="a file of that name") as caught:
        export_table(make_table(), file)
    assert str(file) in str(caught.value)
    assert before == (file.read_bytes() if file.is_file() else b"")


def test_a_failure_leaves_the_earlier_export_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "features.h5"
    export_table(make_table(Path("/old")), file)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CacheError, match="No space left"):
        export_table(make_table(Path("/new")), file)
    assert list(tmp_path.iterdir()) == [file]
    with h5py.File(file) as found:
        assert found.attrs["root"] == "/old"
