"""``predictions.csv``: one row an image, exact to the last bit of every probability.

Columns are ``path,digest,split,label,predicted,p_<class>...``. Floats are written as their shortest text that reads
back to the same number. Names are bytes to the file system; those that are no UTF-8 are written as the bytes they are.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import RunError
from ..files import DIGEST_BYTES
from .files import PREDICTIONS_FILE

COLUMNS = ("path", "digest", "split", "label", "predicted")
PROBABILITY_PREFIX = "p_"
_MUST_QUOTE = frozenset(',"\r\n')


@dataclass(frozen=True)
class Predictions:
    """The rows of a ``predictions.csv``, in its order.

    Args:
        paths: n paths relative to the data's root, "/"-joined.
        digests: (n, 16) uint8, of the images' bytes.
        splits: n names of splits.
        labels: n class names, "" where the truth is not known.
        predicted: n class names.
        class_names: the c classes of the head, in the order of the columns of ``probabilities``.
        probabilities: (n, c) float64, or None where the head has none or they were not read.
    """

    paths: list[str]
    digests: NDArray[np.uint8]
    splits: list[str]
    labels: list[str]
    predicted: list[str]
    class_names: tuple[str, ...]
    probabilities: NDArray[np.float64] | None

    def __len__(self) -> int:
        return len(self.paths)

    def of_split(self, split: str) -> Predictions:
        """Only the labelled rows of ``split``, without probabilities."""
        labelled = zip(self.splits, self.labels, strict=True)
        rows = [row for row, (name, label) in enumerate(labelled) if name == split and label]
        columns = (self.paths, self.splits, self.labels, self.predicted)
        paths, splits, labels, predicted = ([column[row] for row in rows] for column in columns)
        return Predictions(paths, self.digests[rows], splits, labels, predicted, self.class_names, None)


def write_predictions(file: BinaryIO, predictions: Predictions) -> None:
    """Write ``predictions`` as UTF-8 CSV with ``\\n`` line ends to an open binary file."""
    header = [*COLUMNS, *(PROBABILITY_PREFIX + name for name in predictions.class_names)]
    file.write(_encode(",".join(map(_field, header))))
    for line in _lines(predictions):
        file.write(_encode(line))


def read_predictions(folder: Path, *, probabilities: bool = True) -> Predictions:
    """The predictions of a run folder; without ``probabilities`` those columns are skipped, which is much faster.

    Raises:
        RunError: the file is missing, damaged or something else.
    """
    file = folder / PREDICTIONS_FILE
    try:
        with open(file, encoding="utf-8", errors="surrogateescape", newline="") as lines:
            return _parse(csv.reader(lines, strict=True), probabilities)
    except OSError as error:
        raise RunError("The predictions of a run cannot be read.", where=file, why=str(error)) from error
    except (ValueError, csv.Error) as error:
        raise RunError(f"{file.name} is damaged.", where=file, why=str(error), remedy="make the run again") from error


def _lines(rows: Predictions) -> Iterator[str]:
    blanks = "," * len(rows.class_names)
    for index, path in enumerate(rows.paths):
        digest = rows.digests[index].tobytes().hex()
        names = (path, digest, rows.splits[index], rows.labels[index], rows.predicted[index])
        start = ",".join(map(_field, names))
        if rows.probabilities is None:
            yield start + blanks
        else:
            yield ",".join((start, *map(repr, rows.probabilities[index].tolist())))


def _encode(line: str) -> bytes:
    return (line + "\n").encode("utf-8", "surrogateescape")


def _field(text: str) -> str:
    """``text`` as one CSV field. Not csv.writer: before Python 3.13 it leaves a lone carriage return unquoted."""
    if _MUST_QUOTE.isdisjoint(text):
        return text
    return '"' + text.replace('"', '""') + '"'


def _parse(rows: Iterator[list[str]], with_probabilities: bool) -> Predictions:
    header = next(rows, [])
    fixed = len(COLUMNS)
    if tuple(header[:fixed]) != COLUMNS or not all(name.startswith(PROBABILITY_PREFIX) for name in header[fixed:]):
        raise ValueError(f"line 1: the columns are not {','.join(COLUMNS)},{PROBABILITY_PREFIX}<class>...")
    class_names = tuple(name.removeprefix(PROBABILITY_PREFIX) for name in header[fixed:])
    columns: tuple[list[str], ...] = tuple([] for _ in COLUMNS)
    numbers: list[NDArray[np.float64] | None] = []
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise ValueError(f"row {number}: {len(row)} fields instead of {len(header)}")
        for column, text in zip(columns, row, strict=False):
            column.append(text)
        if with_probabilities:
            numbers.append(_probabilities(row[fixed:], number))
    paths, digests, splits, labels, predicted = columns
    return Predictions(paths, _digests(digests), splits, labels, predicted, class_names, _stack(numbers))


def _probabilities(texts: Sequence[str], number: int) -> NDArray[np.float64] | None:
    if not any(texts):
        return None
    try:
        values = [float(text) for text in texts]
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from error
    if not all(map(math.isfinite, values)):
        raise ValueError(f"row {number}: a probability is not a finite number")
    return np.array(values)


def _stack(rows: list[NDArray[np.float64] | None]) -> NDArray[np.float64] | None:
    present = [row for row in rows if row is not None]
    if not present:
        return None
    if len(present) != len(rows):
        raise ValueError("some rows have probabilities and some have none")
    return np.stack(present)


def _digests(texts: list[str]) -> NDArray[np.uint8]:
    for number, text in enumerate(texts, start=1):
        if len(text) != 2 * DIGEST_BYTES:
            raise ValueError(f"row {number}: the digest does not have {2 * DIGEST_BYTES} hexadecimal digits")
    data = bytes.fromhex("".join(texts))
    return np.frombuffer(data, dtype=np.uint8).reshape(len(texts), DIGEST_BYTES)
