"""A table that says where images lie and what they show: CSV, TSV, JSON lines; also the columns of Parquet."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..params import DataParams, Place, is_url
from .labels import Columns, as_samples, described, find_columns, some
from .source import Samples, Stamp
from .stores import join, name_of, parent_of, store_at
from .walk import registered_extensions

SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
DELIMITERS = ",;\t"
Rows = Mapping[str, list[str]]


class TableSource:
    """The images that a table names, one a row, relative to ``data.images`` or to the table's own folder.

    Args:
        rows: the table as text, column by column; read from ``data.root`` when it is asked for.
    """

    def __init__(self, data: DataParams, rows: Callable[[], Rows] | None = None) -> None:
        self._data, self._table = data, data.root
        self._root = data.images or parent_of(data.root)
        self._store = store_at(self._root)
        self._rows = rows or (lambda: read_table(data.root))
        self.name = name_of(self._table, self._root)

    @classmethod
    def at(cls, data: DataParams, _cache_dir: Path) -> TableSource | None:
        """The table ``data.root``, if it is one."""
        return cls(data) if str(data.root).lower().endswith(SUFFIXES) else None

    def list_samples(self) -> Samples:
        """The rows whose image is there; those named twice once, and without a label where the labels differ."""
        rows, where = self._rows(), described(self._table)
        found, warnings = find_columns(list(rows), self._data.columns, where=where)
        if "path" not in found:
            raise _no_paths(rows, where)
        stamps = self._stamps(rows[found["path"]])
        kept = [place for place, path in enumerate(stamps) if path is not None]
        named = [path for path in stamps if path is not None]
        warnings += self._missing(rows[found["path"]], stamps, where)
        values = {key: [rows[name][place].strip() for place in kept] for key, name in found.items() if key != "path"}
        paths, columns = _once_each([path for path, _ in named], values, where, warnings)
        if self._data.layout == "flat":
            columns.pop("split", None)
        stamp_of = dict(named)
        array = np.array([stamp_of[path] for path in paths], np.int64)
        return as_samples(
            self._root,
            paths,
            Columns(columns.get("label"), columns.get("split"), columns.get("group")),
            array,
            where=where,
            warnings=warnings,
            reads_at_once=self._store.reads_at_once,
        )

    def read(self, path: str) -> tuple[bytes, Stamp]:
        """The image at ``path``."""
        return self._store.read(join(self._root, path))

    def _stamps(self, names: list[str]) -> list[tuple[str, Stamp] | None]:
        """Path and stamp of each image, None where there is none; the extension that ids lack is found by trying."""
        listed = self._store.find(str(self._root)) if is_url(self._root) else None
        endings = sorted(registered_extensions() if self._data.extensions == "all" else self._data.extensions)
        stamps: list[tuple[str, Stamp] | None] = []
        for name in names:
            stamps.append(None)
            for ending in ["", *endings] if name else []:
                if (stamp := self._stamp(name + ending, listed)) is not None:
                    stamps[-1] = (name + ending, stamp)
                    if ending:  # the next one most likely has the same
                        endings.remove(ending)
                        endings.insert(0, ending)
                    break
        return stamps

    def _stamp(self, path: str, listed: Mapping[str, Stamp] | None) -> Stamp | None:
        if listed is not None:
            return listed.get(path)
        with suppress(OSError, ValueError):
            full = join(self._root, path)
            if not os.path.isdir(full):
                return self._store.stamp(full)
        return None

    def _missing(self, names: list[str], stamps: list[tuple[str, Stamp] | None], where: str) -> Iterator[str]:
        missing = [name for name, stamp in zip(names, stamps, strict=True) if stamp is None]
        if len(missing) == len(names):
            raise DataError(
                "No image of the table was found.",
                where=where,
                why=f"{len(names)} rows; looked for {some(missing)} in {described(self._root)}",
                remedy="name the folder that the paths are relative to with data.images, or their column with "
                "data.columns.path",
            )
        if missing:
            yield (
                f"{len(missing)} of {len(names)} images that {where} names are not in {described(self._root)}, and are "
                f"left out: {some(missing)}."
            )


def read_table(place: Place) -> Rows:
    """A table as text, column by column; what is missing is "".

    Raises:
        DataError: it cannot be read, or is no table.
    """
    where = described(place)
    try:
        data, _ = store_at(place).read(str(place))
    except OSError as error:
        raise DataError(
            "The table cannot be read.", where=where, why=error.strerror, remedy="correct data.root"
        ) from error
    text = data.decode("utf-8-sig", "surrogateescape")
    suffix = os.path.splitext(str(place))[1].lower()
    rows = _json_rows(text, where) if suffix in (".jsonl", ".ndjson") else _csv_rows(text, suffix, where)
    if not rows or not next(iter(rows.values())):
        raise DataError("The table is empty.", where=where, why="it has no row below its header", remedy="fill it")
    return rows


def cell(value: Any) -> str:
    """A value as the text of a cell; a list of one value is that value, one of several is marked as such."""
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return "|".join(cell(item) for item in value)
    if isinstance(value, float) and value != value:
        return ""
    return str(value)


def _csv_rows(text: str, suffix: str, where: str) -> Rows:
    head = text.partition("\n")[0]
    delimiter = "\t" if suffix == ".tsv" else max(DELIMITERS, key=head.count)
    try:
        table = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]
    except csv.Error as error:
        raise DataError(
            "The table cannot be read.", where=where, why=str(error), remedy="write it as plain CSV"
        ) from error
    if not table:
        return {}
    names, rows = [name.strip() for name in table[0]], table[1:]
    odd = [number for number, row in enumerate(rows, 2) if len(row) > len(names)]
    if odd:
        raise DataError(
            "Rows of the table have more cells than it has columns.",
            where=where,
            why=f"{len(odd)} of them, the first is row {odd[0]}; the columns are {some(names)}",
            remedy='put quotes around cells that hold the delimiter ("a, b")',
        )
    return {name: [row[i] if i < len(row) else "" for row in rows] for i, name in enumerate(names)}


def _json_rows(text: str, where: str) -> Rows:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            row = error
        if not isinstance(row, dict):
            why = (
                f"line {number} is no JSON object ({row})"
                if isinstance(row, Exception)
                else f"line {number} is no object"
            )
            raise DataError("The table cannot be read.", where=where, why=why, remedy="one JSON object a line")
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [cell(row.get(name)) for row in rows] for name in names}


def _once_each(
    paths: list[str], values: dict[str, list[str]], where: str, warnings: list[str]
) -> tuple[list[str], dict[str, list[str]]]:
    """Different paths, sorted, with their values; a label on which rows disagree is none."""
    places: dict[str, int] = {}
    differ: dict[str, set[str]] = {key: set() for key in values}
    for place, path in enumerate(paths):
        first = places.setdefault(path, place)
        for key, column in values.items():
            if column[place] != column[first]:
                differ[key].add(path)
    if torn := differ.get("split"):
        raise DataError(
            "Images of the table are in several splits.",
            where=where,
            why=f"{len(torn)} of them: {some(sorted(torn))}",
            remedy="keep each in one split; what is tested must not be trained on",
        )
    if len(places) < len(paths):
        warnings.append(f"{where} names {len(paths) - len(places)} images more than once; each is taken once.")
    if unsure := differ.get("label"):
        warnings.append(
            f"{len(unsure)} images have several labels in {where}, and are taken as unlabelled: {some(sorted(unsure))}."
        )
    order = sorted(places)
    columns = {key: [column[places[path]] for path in order] for key, column in values.items()}
    for path in differ.get("label", ()):
        columns["label"][order.index(path)] = ""
    return order, columns


def _no_paths(rows: Rows, where: str) -> DataError:
    names = list(rows)
    headless = any(os.path.splitext(name)[1].lower() in registered_extensions() for name in names)
    return DataError(
        "The table has no column that names the images.",
        where=where,
        why=f"its first line is taken as the names of the columns: {some(names)}",
        remedy="put a first line with the names of the columns (path,label) into it" if headless
        else "name the column with data.columns.path",
    )  # fmt: skip
