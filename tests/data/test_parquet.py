"""Parquet as `datasets` and others write it gives the bytes of each row, with bounded memory."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import parquet
from pipeline.errors import DataError

from .test_archive import contents, images_of
from .test_folder import labels, make

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
NAMES = ["cat", "dog", "eel"]


def write(path: Path, columns: dict[str, Any], *, classes: dict[str, list[str]] | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if classes:
        features = {name: {"names": names, "_type": "ClassLabel"} for name, names in classes.items()}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, **options)
    return path


def image(number: int) -> dict[str, Any]:
    return {"bytes": f"image {number}".encode(), "path": f"{number}.jpg"}


def test_images_with_class_labels_nulls_and_row_groups(tmp_path: Path) -> None:
    values = {
        "image": [*map(image, range(8)), None, {"bytes": None, "path": None}],
        "label": [0, 1, 2, -1, 0, None, 1, 1, 2, 2],
    }
    root = write(tmp_path / "x.parquet", values, classes={"label": NAMES}, row_group_size=3)
    images = images_of(root, tmp_path / "cache")
    named = [NAMES[target] if target >= 0 else "" for target in images.targets]
    assert named == ["cat", "dog", "eel", "", "cat", "", "dog", "dog", "eel", "eel"]
    assert images.paths[9] == "x.parquet/9" and images.path(9) == f"{root}/9"
    assert list(contents(images).values()) == [*(f"image {n}".encode() for n in range(8)), b"", b""]
    assert not images.failures


def test_a_folder_of_files_with_splits_in_their_names(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write(tmp_path / "data" / f"{name}.parquet", {"img": [b"a" + name.encode(), b"b"], "fine_label": [0, 1]})
    images = images_of(tmp_path / "data", tmp_path / "cache", columns={"label": "fine_label"})
    assert images.samples.splits is not None and images.samples.splits.tolist() == [2, 2, 0, 0, 0, 0]
    assert images.paths[0] == "test-00000-of-00001.parquet/0" and images.class_names == ("0", "1")
    pattern = f"{tmp_path}/data/train-{{00000..00001}}-of-00002.parquet"
    assert len(images_of(pattern, tmp_path / "cache", columns={"label": "fine_label"})) == 4


def test_columns_of_paths_are_a_table(tmp_path: Path) -> None:
    make(tmp_path, "a.jpg", "b.jpg")
    root = write(
        tmp_path / "x.parquet", {"file_name": ["a", "b"], "label": [0, 1], "w": [0.5, 1.0]}, classes={"label": NAMES}
    )
    assert labels(images_of(root, tmp_path / "cache").samples) == {"a.jpg": "cat", "b.jpg": "dog"}
    with pytest.raises(DataError, match="name no images"):
        images_of(write(tmp_path / "y.parquet", {"w": [1.0]}), tmp_path / "cache")
    with pytest.raises(DataError, match="Several columns"):
        images_of(write(tmp_path / "z.parquet", {"u": [b"x"], "v": [b"y"]}), tmp_path / "cache")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="Parquet file cannot be read"):
        images_of(tmp_path / "bad.parquet", tmp_path / "cache")


def test_large_row_groups_lie_in_files_and_only_a_few_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"image": [image(n) for n in range(400)], "label": [str(n % 3) for n in range(400)]}
    root = write(tmp_path / "x.parquet", values, row_group_size=20)
    made = []
    real = parquet.ParquetSource._group
    monkeypatch.setattr(parquet.ParquetSource, "_group", lambda self, key: made.append(key) or real(self, key))
    for large in (1 << 30, 0):
        monkeypatch.setattr(parquet, "LARGE", large)
        made.clear()
        images = images_of(root, tmp_path / "cache")
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(images.read, range(400)))
        assert found == [f"image {n}".encode() for n in range(400)]
        # A thread that was held up may find its group gone and read it again.
        assert 20 <= len(made) < 60 and len(images.source._groups._made) == parquet.GROUPS_KEPT  # type: ignore[attr-defined]
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_file()] == []


def test_an_unchanged_file_costs_a_stamp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.shards.SAFE_NS", 0)
    monkeypatch.setattr("pipeline.data.index.SAFE_NS", 0)
    root = write(tmp_path / "x.parquet", {"image": [image(0), image(1)], "label": ["a", "b"]})
    images_of(root, tmp_path).read_unknown(quiet=True)
    monkeypatch.setattr(parquet.ParquetSource, "_scan", None)
    assert images_of(root, tmp_path).known.all()


def test_datasets_writes_what_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    pil = pytest.importorskip("PIL.Image")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    rows = {"image": [pil.new("RGB", (9, 8), (n, 0, 0)) for n in range(6)], "label": [n % 3 for n in range(6)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "x.parquet"))
    images = images_of(tmp_path / "x.parquet", tmp_path / "cache")
    assert images.class_names == tuple(NAMES) and images.targets.tolist() == [0, 1, 2, 0, 1, 2]
    assert (images.read(5) or b"").startswith(b"\x89PNG") and images.warnings == []
