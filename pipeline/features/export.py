"""One flat HDF5 file of a data set's features, for programs that know nothing of the cache."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np

from ..data.source import SPLITS
from ..errors import CacheError
from ..files import sync_folder, temporary_name
from .cache import FeatureTable
from .parts import HDF5_ERRORS

FORMAT = "image-transfer-pipeline features 1"


def export_table(table: FeatureTable, file: Path) -> int:
    """Publish a table atomically as HDF5; plain h5py reads it. Names are UTF-8, or the bytes they have on disk.

    Datasets, a row an image: ``features`` float32 (n, d), ``labels`` int64 (n,) into ``class_names`` (-1: none),
    ``paths``, ``split`` (train, val or test), ``digest`` uint8 (n, 16); and ``class_names`` (c,).

    Returns:
        the size of the file in bytes.

    Raises:
        CacheError: the file cannot be written, or is something else than an earlier export.
    """
    file = file.absolute()
    _refuse_to_replace(file)
    temporary = temporary_name(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(temporary, "x") as target:
            _write(target, table)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        size = temporary.stat().st_size
        os.rename(temporary, file)
        sync_folder(file.parent)
    except HDF5_ERRORS as error:
        raise CacheError(
            "The features cannot be exported.",
            where=file,
            why=str(error),
            remedy="free space, give write permission, or choose another file",
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return size


def _write(target: h5py.File, table: FeatureTable) -> None:
    target.create_dataset("features", data=np.asarray(table.features, np.float32))
    target.create_dataset("labels", data=np.asarray(table.targets, np.int64))
    target.create_dataset("digest", data=np.asarray(table.digests, np.uint8))
    names = {
        "paths": table.paths,
        "class_names": list(table.class_names),
        "split": [SPLITS[split] for split in table.splits],
    }
    for name, texts in names.items():
        # As bytes, because h5py refuses names that are no UTF-8.
        values = np.array([os.fsencode(text) for text in texts], dtype=object)
        target.create_dataset(name, data=values, dtype=h5py.string_dtype())
    target["labels"].attrs["meaning"] = "index into class_names; -1: the image has no class folder"
    target.attrs.update({"format": FORMAT, "root": os.fsencode(table.root)})


def _refuse_to_replace(file: Path) -> None:
    """Only an earlier export may be replaced: a slip of the keyboard must not cost somebody's file."""
    if not os.path.lexists(file):
        return
    with suppress(*HDF5_ERRORS), h5py.File(file, "r") as found:
        if str(found.attrs.get("format", "")).startswith(FORMAT.rpartition(" ")[0]):
            return
    raise CacheError(
        "There is a file of that name already.",
        where=file,
        why="it is not an earlier export, so it is not replaced",
        remedy="choose another name, or remove it yourself",
    )
