"""A table of labels becomes samples as people write such tables; what is unclear is said or refused, never guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.images import Images, open_images
from pipeline.errors import DataError
from pipeline.params import DataParams

from .test_folder import labels, make

JPGS = [f"{name}.jpg" for name in "abcd"]


def table(folder: Path, text: str, name: str = "labels.csv", **params: Any) -> Images:
    """The images of a table in ``folder``, beside those called a to d."""
    make(folder, *JPGS)
    (folder / name).write_text(text, encoding="utf-8")
    data = DataParams.model_validate({"root": folder / name, **params})
    return open_images(data, folder / "cache")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.csv", "path,label\na.jpg,cat\nb.jpg,dog\nc.jpg,cat\n"),
        ("labels.csv", "\ufeffImage_ID;Class\r\na;cat\r\nb;dog\r\nc;cat\r\n"),
        ("labels.tsv", "file name\tcategory\nc.jpg\tcat\nb.jpg\tdog\na.jpg\tcat\n"),
        ("labels.csv", "id,what it is\na,cat\nb,dog\nc,cat\n"),
        ("x.jsonl", '{"file_name": "a.jpg", "label": "cat"}\n\n{"file_name":"b.jpg","label":["dog"]}\n'
                    '{"file_name": "c.jpg", "label": "cat", "more": 1}\n'),
    ],
)  # fmt: skip
def test_usual_columns_delimiters_and_ids_without_extension(tmp_path: Path, name: str, text: str) -> None:
    images = table(tmp_path, text, name)
    assert labels(images.samples) == {"a.jpg": "cat", "b.jpg": "dog", "c.jpg": "cat"}
    assert images.read(0) == b"a.jpg" and images.path(0) == str(tmp_path / "a.jpg")
    assert images.position_of(str(tmp_path / "b.jpg")) == 1
    assert images.warnings == []


def test_columns_and_the_folder_of_the_images_can_be_named(tmp_path: Path) -> None:
    make(tmp_path / "photos", "deep/a.jpg", "b.jpg", "c.jpg")
    text = "label,what,who,pic,part\n1,cat,P1,deep/a.jpg,train\n2,dog,P2,b.jpg,valid\n3,dog,,c.jpg,train\n"
    columns = {"label": "what", "path": "pic", "split": "part", "group": "who"}
    images = table(tmp_path, text, images=tmp_path / "photos", columns=columns)
    assert labels(images.samples) == {"deep/a.jpg": "cat", "b.jpg": "dog", "c.jpg": "dog"}
    assert images.samples.groups == ["P2", "", "P1"]
    assert images.samples.splits is not None and images.samples.splits.tolist() == [1, 0, 0]
    with pytest.raises(DataError, match="'nothing' is not there"):
        table(tmp_path, text, columns={"label": "nothing"})


def test_groups_of_the_table_keep_images_on_one_side_and_a_pattern_goes_before_them(tmp_path: Path) -> None:
    text = "path,label,patient_id\n" + "".join(f"{x}.jpg,{x in 'ab'},{'P' if x in 'abc' else ''}\n" for x in "abcd")
    images = table(tmp_path, text)
    images.read_unknown(quiet=True)
    units = images.groups_of(np.arange(4))
    assert len(set(units[:3].tolist())) == 1 and len(set(units.tolist())) == 2
    images = table(tmp_path, text, group_pattern="^([ab])")
    images.read_unknown(quiet=True)
    assert len(set(images.groups_of(np.arange(4)).tolist())) == 4


def test_rows_without_label_or_image_and_rows_that_repeat(tmp_path: Path) -> None:
    text = "path,label\na.jpg,cat\nb.jpg,\nc.jpg,dog\nc.jpg,cat\nd.jpg,dog\nd.jpg,dog\ngone.jpg,dog\n"
    images = table(tmp_path, text)
    assert images.paths == JPGS and images.targets.tolist() == [0, -1, -1, 1]
    told = " ".join(images.warnings)
    assert "1 images have several labels" in told and "'c.jpg'" in told
    assert "2 images more than once" in told and "1 of 7 images" in told and "'gone.jpg'" in told
    with pytest.raises(DataError, match="several splits"):
        table(tmp_path, "path,label,split\na.jpg,x,train\na.jpg,x,test\nb.jpg,y,train\n")


def test_numbers_are_classes_and_are_told_of(tmp_path: Path) -> None:
    images = table(tmp_path, "path,label\na.jpg,1.0\nb.jpg,2\nc.jpg,\nd.jpg,1\n")
    assert labels(images.samples) | {"c.jpg": ""} == {"a.jpg": "1", "b.jpg": "2", "c.jpg": "", "d.jpg": "1"}
    assert "taken as 2 classes" in images.warnings[0]
    make(tmp_path, *(f"{i}.png" for i in range(30)))
    with pytest.raises(DataError, match="measurements"):
        table(tmp_path, "path,label\n" + "".join(f"{i}.png,{i / 7}\n" for i in range(30)))


@pytest.mark.parametrize("cell", ["cat dog", "cat|dog", '"cat, dog"'])
def test_several_labels_in_a_cell_are_refused(tmp_path: Path, cell: str) -> None:
    with pytest.raises(DataError, match="several labels"):
        table(tmp_path, f"path,label\na.jpg,cat\nb.jpg,dog\nc.jpg,{cell}\n")
    assert table(tmp_path, "path,label\na.jpg,hot dog\nb.jpg,dog\n").class_names == ("dog", "hot dog")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg,cat\nb.jpg,dog\n", "first line with the names"),
        ("what,else,more\n1,2,3\n", "data.columns.path"),
        ("path,label\n", "empty"),
        ("", "empty"),
        ("path,label\na.jpg,x,y\n", "quotes around"),
        ("path,label\nx.jpg,cat\n", "data.images"),
        ("path,label,split\na.jpg,x,train\nb.jpg,y,test\n", "'y'"),
    ],
)
def test_what_is_no_table_of_images_is_explained(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError) as error:
        table(tmp_path, text)
    assert message in str(error.value)


def test_splits_that_are_none_are_not_used(tmp_path: Path) -> None:
    images = table(tmp_path, "path,label,fold\na.jpg,x,1\nb.jpg,y,2\n")
    assert images.samples.splits is None and "none of train, val and test" in images.warnings[0]


def test_a_table_beside_class_folders_is_told_of_and_not_used(tmp_path: Path) -> None:
    make(tmp_path, "cat/a.jpg", "dog/b.jpg", "labels.csv", "shard.tar")
    images = open_images(DataParams(root=tmp_path), tmp_path / "cache")
    assert images.paths == ["cat/a.jpg", "dog/b.jpg"]
    assert f"set data.root={tmp_path}/labels.csv" in images.warnings[0] and "'shard.tar'" in images.warnings[0]
