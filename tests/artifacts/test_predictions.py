"""predictions.csv repeats every bit of every name and number."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.artifacts import Predictions, read_predictions, write_predictions
from pipeline.errors import RunError

names = st.one_of(
    st.binary(min_size=1, max_size=12).map(lambda data: os.fsdecode(data.replace(b"\0", b"?").replace(b"/", b"_"))),
    st.sampled_from(['"', ",", "\r", "\n", "\r\n", " a ", "p_", '""\n,', "'", "\ufeff", "caf\udce9"]),
)
numbers = st.floats(min_value=0, max_value=1, allow_subnormal=True)


@st.composite
def tables(draw: st.DrawFn) -> Predictions:
    classes = tuple(draw(st.lists(names, min_size=1, max_size=3, unique=True)))
    n = draw(st.integers(0, 4))
    column = st.lists(names, min_size=n, max_size=n)
    data = draw(st.binary(min_size=16 * n, max_size=16 * n))
    values = st.lists(numbers, min_size=n * len(classes), max_size=n * len(classes))
    drawn = draw(values) if n and draw(st.booleans()) else None
    return Predictions(
        paths=draw(column),
        digests=np.frombuffer(data, dtype=np.uint8).reshape(n, 16),
        splits=draw(column),
        labels=draw(st.lists(st.one_of(st.just(""), names), min_size=n, max_size=n)),
        predicted=draw(column),
        class_names=classes,
        probabilities=None if drawn is None else np.array(drawn).reshape(n, len(classes)),
    )


def _write(folder: Path, table: Predictions) -> bytes:
    with open(folder / "predictions.csv", "wb") as file:
        write_predictions(file, table)
    return (folder / "predictions.csv").read_bytes()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=tables())
def test_everything_survives(tmp_path: Path, table: Predictions) -> None:
    data = _write(tmp_path, table)
    back = read_predictions(tmp_path)
    for name in ("paths", "splits", "labels", "predicted", "class_names"):
        assert getattr(back, name) == getattr(table, name)
    assert np.array_equal(back.digests, table.digests)
    if table.probabilities is None:
        assert back.probabilities is None
    else:
        assert back.probabilities is not None and back.probabilities.tobytes() == table.probabilities.tobytes()
    assert _write(tmp_path, back) == data
    assert read_predictions(tmp_path, probabilities=False).probabilities is None


def _small() -> Predictions:
    digests = np.arange(32, dtype=np.uint8).reshape(2, 16)
    values = np.array([[0.1, 0.9], [1 / 3, 2 / 3]])
    return Predictions(["a,1.jpg", "b.jpg"], digests, ["val"] * 2, ["x", ""], ["y", "y"], ("x", "y"), values)


def test_the_file_is_plain_csv(tmp_path: Path) -> None:
    text = _write(tmp_path, _small()).decode()
    rows = list(csv.reader(io.StringIO(text)))
    assert rows[0] == ["path", "digest", "split", "label", "predicted", "p_x", "p_y"]
    assert rows[1][0] == "a,1.jpg" and rows[1][1] == bytes(range(16)).hex() and rows[1][5:] == ["0.1", "0.9"]
    assert rows[2][5:] == ["0.3333333333333333", "0.6666666666666666"]


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("path,", "file,", "line 1"),
        ("p_y", "q_y", "line 1"),
        ("0.9", "", "row 1"),
        ("0.9", "nan", "row 1"),
        ("0.9", "0.9,1", "row 1"),
        ("0.1,0.9", ",", "some rows"),
        (bytes(range(16)).hex(), "00", "row 1"),
        (bytes(range(16)).hex(), "zz" * 16, "hex"),
        ('"a,1.jpg"', '"a,1.jpg', "row|end of"),
        ("path,digest", "", "line 1"),
    ],
)
def test_damage_is_named(tmp_path: Path, old: str, new: str, named: str) -> None:
    text = _write(tmp_path, _small()).decode()
    assert old in text
    (tmp_path / "predictions.csv").write_text(text.replace(old, new, 1))
    with pytest.raises(RunError, match=named) as caught:
        read_predictions(tmp_path)
    assert str(tmp_path / "predictions.csv") in str(caught.value)


def test_missing_and_empty_files_are_run_errors(tmp_path: Path) -> None:
    with pytest.raises(RunError):
        read_predictions(tmp_path)
    (tmp_path / "predictions.csv").write_bytes(b"")
    with pytest.raises(RunError, match="line 1"):
        read_predictions(tmp_path)
