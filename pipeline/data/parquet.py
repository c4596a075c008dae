"""Images in Parquet, as `datasets` of Hugging Face writes them, or paths of images in a column. Needs pyarrow.

Read by row groups, the last few of which are kept: those that are large lie in nameless temporary files meanwhile.
The layout (``image: {bytes, path}``, names of a ClassLabel in the schema's metadata) is that of
huggingface.co/docs/datasets.
"""

from __future__ import annotations

import json
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import DataError
from ..params import DataParams
from .labels import Columns, as_samples, described, find_columns, some, splits_of_files
from .shards import Members, Shards, find_shards, list_members, warnings_of
from .source import Samples, Source, Stamp
from .stores import join, name_of, parent_of, stamp_of_piece, stamps_of_pieces
from .table import TableSource, cell

SUFFIXES = (".parquet",)
GROUPS_KEPT = 4
LARGE = 64 << 20  # bytes of a row group's images that are not kept in memory
BATCH = 64  # rows decoded at a time


def open_parquet(data: DataParams, cache_dir: Path) -> Source | None:
    """The images or the paths in the Parquet files that ``data.root`` names, if it names some.

    Raises:
        DataError: they cannot be read, or name no images.
    """
    shards = find_shards(data.root, SUFFIXES)
    if shards is None:
        return None
    schema = _file(shards, shards.names[0]).schema_arrow
    where = described(data.root)
    images = [field.name for field in schema if _holds_images(field.type)]
    wanted = data.columns.path
    if wanted in images or (images and not wanted):
        return ParquetSource(data, shards, cache_dir, _image_column(images, data))
    found, _ = find_columns(schema.names, data.columns, where=where)
    if "path" not in found:
        raise DataError(
            "The Parquet files name no images.",
            where=where,
            why=f"no column holds bytes, or paths under a usual name; the columns are {some(schema.names)}",
            remedy="name the column with data.columns.path",
        )
    return TableSource(data, lambda: _texts(shards, list(found.values())))


class ParquetSource:
    """One image a row; a sample is called ``FILE/ROW``, counted from 0. A row without an image is an empty image."""

    def __init__(self, data: DataParams, shards: Shards, cache_dir: Path, column: str) -> None:
        self._data, self._shards, self._cache_dir, self._column = data, shards, cache_dir, column
        self._groups = _Recent(self._group, GROUPS_KEPT)
        self._starts: dict[str, tuple[Stamp, list[int]]] = {}
        self._lock = threading.Lock()
        self.name = name_of(data.root)

    def list_samples(self) -> Samples:
        """From the index, or from the columns beside the images of files that are new to it."""
        settings = [self._column, self._data.columns.model_dump()]
        members, stamps = list_members(self._shards, self._cache_dir, settings, self._scan)
        by_shard = (splits_of_files(self._shards.names) or {}) if self._data.layout != "flat" else {}
        columns: list[list[str]] = [[], [], []]
        paths: list[str] = []
        for shard, held in zip(self._shards.names, members, strict=True):
            count = len(held.starts)
            paths += [f"{shard}/{row}" for row in held.starts]
            for column, values in zip(columns, (held.labels, held.splits, held.groups), strict=True):
                column += values or [""] * count
            if by_shard:
                columns[1][len(columns[1]) - count :] = [by_shard[shard]] * count
        labels, splits, groups = columns
        if not paths:
            raise DataError(
                "The Parquet files have no rows.", where=described(self._data.root), remedy="check data.root"
            )
        return as_samples(
            self._shards.base,
            paths,
            Columns(labels, None if self._data.layout == "flat" else splits, groups),
            np.concatenate([stamps_of_pieces(s, m.starts, m.sizes) for s, m in zip(stamps, members, strict=True)]),
            where=described(self._data.root),
            warnings=warnings_of(self._shards, members),
            reads_at_once=self._shards.store.reads_at_once,
        )

    def read(self, path: str) -> tuple[bytes, Stamp]:
        """The bytes of a row; of one that holds a path alone those of the file there, relative to the Parquet file."""
        shard, _, row = path.rpartition("/")
        stamp, starts = self._layout(shard)
        group = int(np.searchsorted(starts, int(row), "right")) - 1
        value = self._groups((shard, stamp.tobytes(), group))[int(row) - starts[group]].as_py()
        if isinstance(value, dict):
            data, file = value.get("bytes"), value.get("path")
            if data is None and file:
                data, _ = self._shards.store.read(join(parent_of(self._shards.path(shard)), file))
        else:
            data = value
        return data or b"", stamp_of_piece(stamp, int(row), 0)

    def _scan(self, path: str) -> Members:
        file = _open(self._shards, path)
        rows = file.metadata.num_rows
        found, warnings = find_columns(
            [name for name in file.schema_arrow.names if name != self._column],
            self._data.columns.model_copy(update={"path": None}),
            where=described(path),
        )
        found.pop("path", None)
        texts = _columns_as_text(file, list(found.values()))
        column = {key: texts[name] for key, name in found.items()}
        return Members(
            [],
            list(range(rows)),
            [0] * rows,
            labels=column.get("label"),
            splits=column.get("split"),
            groups=column.get("group"),
            warnings=[f"({text})" for text in warnings],
        )

    def _layout(self, shard: str) -> tuple[Stamp, list[int]]:
        """The file's stamp now, and the first row of each of its groups."""
        stamp = self._shards.store.stamp(self._shards.path(shard))
        with self._lock:
            kept = self._starts.get(shard)
            if kept is None or (kept[0] != stamp).any():
                metadata = _file(self._shards, shard).metadata
                counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
                kept = self._starts[shard] = stamp, [0, *np.cumsum(counts).tolist()][: len(counts)]
        return kept

    def _group(self, key: tuple[str, bytes, int]) -> Any:
        """The images of one row group."""
        import pyarrow as pa

        shard, _, group = key
        try:
            file = _file(self._shards, shard)
            size = sum(
                column.total_uncompressed_size
                for column in (file.metadata.row_group(group).column(i) for i in range(file.metadata.num_columns))
                if column.path_in_schema.split(".")[0] == self._column
            )
            batches = file.iter_batches(BATCH, row_groups=[group], columns=[self._column])
            table = _through_a_file(batches, self._cache_dir) if size > LARGE else pa.Table.from_batches(batches)
        except (pa.ArrowException, DataError) as error:
            raise OSError(f"row group {group} of {shard} cannot be read ({error})") from error
        return table.column(0)


class _Recent:
    """The last few results of ``make``, each made once, by whoever asks first."""

    def __init__(self, make: Callable[[Any], Any], size: int) -> None:
        self._make, self._size, self._lock = make, size, threading.Lock()
        self._made: OrderedDict[Any, Future[Any]] = OrderedDict()

    def __call__(self, key: Any) -> Any:
        with self._lock:
            known = self._made.get(key)
            future = known or Future()
            self._made[key] = future
            self._made.move_to_end(key)
            while len(self._made) > self._size:
                self._made.popitem(last=False)
        if known is None:
            try:
                future.set_result(self._make(key))
            except BaseException as error:  # noqa: BLE001 - raised by whoever asks
                future.set_exception(error)
                with self._lock:
                    self._made.pop(key, None)  # so that it may succeed when it is asked for again
        return future.result()


def _through_a_file(batches: Any, folder: Path) -> Any:
    """A table that lies in a temporary file, mapped into memory: gone with its last user."""
    import pyarrow as pa

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".tmp-", suffix=".arrow") as file:
        first = next(batches)
        with pa.ipc.new_file(file.name, first.schema) as writer:
            writer.write_batch(first)
            for batch in batches:
                writer.write_batch(batch)
        return pa.ipc.open_file(pa.memory_map(file.name)).read_all()


def _file(shards: Shards, name: str) -> Any:
    return _open(shards, shards.path(name))


def _open(shards: Shards, path: str) -> Any:
    return parquet_file(lambda: shards.store.open(path), path)


def parquet_file(opens: Callable[[], BinaryIO], path: str) -> Any:
    """A `pyarrow.parquet.ParquetFile`, of which the footer is read.

    Raises:
        DataError: pyarrow is not installed, or it is no Parquet file.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(
            "Parquet cannot be read yet.",
            where=described(path),
            why=str(error),
            remedy='pip install "image-transfer-pipeline[parquet]"',
        ) from error
    try:
        return pq.ParquetFile(opens(), buffer_size=1 << 20)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            "A Parquet file cannot be read.", where=described(path), why=str(error), remedy="fetch or write it again"
        ) from error


def _holds_images(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_images(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _image_column(images: Sequence[str], data: DataParams) -> str:
    if data.columns.path in images:
        return str(data.columns.path)
    found, _ = find_columns(
        images, data.columns.model_copy(update={"label": None, "split": None, "group": None}), where=""
    )
    if len(images) > 1 and "path" not in found:
        raise DataError(
            "Several columns hold images.",
            where=described(data.root),
            why=f"they are {some(images)}",
            remedy="name one with data.columns.path",
        )
    return found.get("path", images[0])


def _texts(shards: Shards, names: list[str]) -> dict[str, list[str]]:
    columns: dict[str, list[str]] = {name: [] for name in names}
    for shard in shards.names:
        for name, values in _columns_as_text(_file(shards, shard), names).items():
            columns[name] += values
    return columns


def _columns_as_text(file: Any, names: list[str]) -> dict[str, list[str]]:
    """Columns as text; the numbers of a ClassLabel as its names."""
    if not names:
        return {}
    table, classes = file.read(columns=names), _class_labels(file.schema_arrow)
    return {name: [_named(value, classes.get(name)) for value in table.column(name).to_pylist()] for name in names}


def _named(value: Any, names: list[str] | None) -> str:
    if names is not None and isinstance(value, int):
        return names[value] if 0 <= value < len(names) else ""
    return cell(value)


def _class_labels(schema: Any) -> dict[str, list[str]]:
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: kind["names"] for name, kind in features.items() if "names" in kind}
    except (KeyError, ValueError, TypeError):
        return {}
