"""Corrections: which rows are meant, what is refused, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.data.corrections import read_corrections
from pipeline.errors import DataError

NAMES = ("ant", "bee")
DIGESTS = np.arange(48, dtype=np.uint8).reshape(3, 16)
PATHS = ["ant/1.jpg", "bee/2.jpg", "bee/3.jpg"]
TARGETS = np.array([0, 1, 1])


def hexed(row: int) -> str:
    return DIGESTS[row].tobytes().hex()


def write(folder: Path, *rows: str, header: str = "path,digest,correction") -> Path:
    file = folder / "corrections.csv"
    file.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return file


def apply(file: Path) -> tuple[list[int], int]:
    corrections = read_corrections(file)
    corrections.check(NAMES)
    targets, unmatched = corrections.apply(PATHS, DIGESTS, TARGETS, NAMES)
    return targets.tolist(), unmatched


def test_a_row_is_about_its_path_else_about_its_digest(tmp_path: Path) -> None:
    file = write(
        tmp_path, f"ant/1.jpg,{hexed(1)},bee", f"moved.jpg,{hexed(2)},-", f"gone.jpg,{'0' * 32},ant", "bee/2.jpg,,"
    )
    assert apply(file) == ([1, 1, -1], 1)
    assert TARGETS.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("correction,path", "ant,bee/2.jpg"),
        ("digest,correction", f"{'101112131415161718191a1b1c1d1e1f'},ant"),
        ("path,x,correction,y", "bee/2.jpg,1,ant,2"),
    ],
)
def test_any_table_with_these_columns_will_do(tmp_path: Path, header: str, row: str) -> None:
    assert apply(write(tmp_path, row, header=header)) == ([0, 0, 1], 0)


def test_the_same_said_twice_is_said_once(tmp_path: Path) -> None:
    assert apply(write(tmp_path, "ant/1.jpg,,bee", "ant/1.jpg,,bee")) == ([1, 1, 1], 0)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (("ant/1.jpg,,bea",), "did you mean bee"),
        (("ant/1.jpg,,bee", "ant/1.jpg,,-"), "corrected to 'bee' and to '-'"),
        ((f",{hexed(0)},bee", f",{hexed(0)},-"), "corrected to 'bee' and to '-'"),
        (("ant/1.jpg,,-", f"x.jpg,{hexed(0)},bee"), "corrected to '-' and to 'bee'"),
        (("x.jpg,12,bee",), "'12' is no digest"),
        ((",,bee",), "is no digest"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, rows: tuple[str, ...], says: str) -> None:
    with pytest.raises(DataError, match="The corrections cannot be used") as caught:
        apply(write(tmp_path, *rows))
    assert says in str(caught.value) and "corrections.csv" in str(caught.value)


def test_tables_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.corrections"):
        read_corrections(tmp_path / "none.csv")
    with pytest.raises(DataError, match="column correction"):
        read_corrections(write(tmp_path, "a,b", header="path,label"))
