"""Cached features as a table, every row proven to be the image it claims to be."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..artifacts import data_digest
from ..data.scan import SPLITS, ImageTree
from ..data.splits import assign_splits, group_ids, groups_of
from ..errors import MissingFeaturesError
from ..features.digests import locate, stack_digests
from ..features.prepare import Books
from ..features.quarantine import Quarantine
from ..features.rounding import Features
from ..features.store import FeatureStore
from ..features.table import FeatureTable
from ..features.views import view_name
from ..params import DataParams, Params
from ..runtime.device import usable_cores
from .sources import Origin, Source, open_folder, open_quarantine, open_store, resolve_origin

EXAMPLES = 5
TRAIN = SPLITS.index("train")


@dataclass(frozen=True)
class Opened:
    """A table with where its features come from: the origin and the key of the cache."""

    table: FeatureTable
    origin: Origin
    key: str
    warnings: tuple[str, ...]
    data_digest: str = ""
    views: tuple[Features, ...] = ()  # each (rows of train, d): augmented views of the training images, in order


def load_features(params: Params) -> FeatureTable:
    """The cached features of ``data.root`` with targets, paths, splits and groups; nothing is computed.

    Raises:
        MissingFeaturesError: images without a feature; ``extract`` computes them.
        DataError, BackboneError, CacheError: see their messages.
    """
    return open_features(params).table


def open_features(params: Params) -> Opened:
    """As `load_features`, with where the features come from."""
    source = open_folder(params.data, params.cache)
    origin = resolve_origin(params)
    store = open_store(params, origin)
    quarantine = open_quarantine(params, origin.transform)
    digest_unknown(source)
    rows = usable_rows(source, store, quarantine)
    store.touch()
    table = build_table(source, store, rows, params.data)
    views = tuple(_read_view(params, origin, table, number) for number in range(1, params.extract.views + 1))
    warnings = (*source.warnings, *store.warnings)
    return Opened(table, origin, store.spec.key, warnings, digest_of_data(table), views)


def _read_view(params: Params, origin: Origin, table: FeatureTable, number: int) -> Features:
    """The features (rows of train, d) of an augmented view of the training images."""
    store = open_store(params, origin, view_name(number, params.extract.views_seed))
    digests = table.digests[table.splits == TRAIN]
    try:
        return store.read(digests)
    except MissingFeaturesError as error:
        raise MissingFeaturesError(
            f"View {number} of the training images is not in the cache: {error.what}",
            where=error.where,
            remedy="run `pipeline extract` with the same params (make train-head does so by itself)",
        ) from error


def digest_of_data(table: FeatureTable) -> str:
    """Hex digest of contents, labels and splits, whatever the paths and the order."""
    labels = [table.class_names[target] if target >= 0 else "" for target in table.targets]
    return data_digest(table.digests, labels, [SPLITS[split] for split in table.splits])


def digest_unknown(source: Source) -> None:
    """Read the files whose content is not in the index, to know what they are."""
    unknown = np.flatnonzero(~source.books.known)
    if not len(unknown):
        return
    with ThreadPoolExecutor(usable_cores()) as pool:
        for _ in pool.map(lambda position: source.books.read(int(position)) and None, unknown):
            pass
    source.save_index()


def usable_rows(source: Source, store: FeatureStore, quarantine: Quarantine) -> NDArray[np.int64]:
    """Positions of images with a feature; those known to be unreadable are left out.

    Raises:
        MissingFeaturesError: an image is neither in the cache nor in quarantine.
    """
    books = source.books
    has = books.known & store.contains(books.digests)
    bad = books.known & (locate(stack_digests(quarantine.digests), books.digests) >= 0)
    missing = np.flatnonzero(~has & ~bad)
    if len(missing):
        raise _missing(source.tree, books, store, missing)
    return np.flatnonzero(has)


def split_rows(source: Source, rows: NDArray[np.int64], data: DataParams) -> NDArray[np.int8]:
    """The split of each image at ``rows``: as the folders say, or else by the hash of its content."""
    tree = source.tree
    if tree.splits is not None:
        return tree.splits[rows]
    groups = groups_of([tree.paths[row] for row in rows], data.group_pattern)
    return assign_splits(
        source.books.digests[rows],
        tree.targets[rows],
        groups,
        val_fraction=data.val_fraction,
        test_fraction=data.test_fraction,
        seed=data.seed,
    )


def build_table(source: Source, store: FeatureStore, rows: NDArray[np.int64], data: DataParams) -> FeatureTable:
    """The table of the images at ``rows``."""
    tree, digests = source.tree, source.books.digests[rows]
    paths = [tree.paths[row] for row in rows]
    class_names, targets = _classes_with_images(tree, rows)
    groups = groups_of(paths, data.group_pattern)
    return FeatureTable(
        root=tree.root,
        class_names=class_names,
        features=store.read(digests),
        targets=targets,
        paths=paths,
        splits=split_rows(source, rows, data),
        digests=digests,
        groups=group_ids(digests, groups),
    )


def _classes_with_images(tree: ImageTree, rows: NDArray[np.int64]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The classes that hold any file, and targets (n,) that index them: an empty class folder is no class to learn."""
    used = np.unique(tree.targets[tree.targets >= 0])
    places = np.searchsorted(used, tree.targets[rows])
    return tuple(tree.class_names[target] for target in used), np.where(tree.targets[rows] >= 0, places, -1)


def _missing(tree: ImageTree, books: Books, store: FeatureStore, missing: NDArray[np.int64]) -> MissingFeaturesError:
    examples = ", ".join(repr(tree.paths[position]) for position in missing[:EXAMPLES])
    failures = [books.failures[position] for position in missing.tolist() if position in books.failures]
    return MissingFeaturesError(
        f"{len(missing)} of {len(tree.paths)} images have no feature yet.",
        where=f"{tree.root}: {examples}{' ...' if len(missing) > EXAMPLES else ''}",
        why=f"unreadable now: {failures[0]}" if failures else f"{store.spec.folder_name} does not hold them",
        remedy="run `pipeline extract` with the same params (make train-head does so by itself)",
    )
