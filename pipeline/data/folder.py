"""From a folder of images to paths, targets and splits, in an order that does not depend on the file system.

Two layouts: ``root/CLASS/...`` and ``root/{train,val|valid|validation,test}/CLASS/...``. As in torchvision's
ImageFolder, every folder below a class belongs to it and symbolic links are followed.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..params import DataParams, Place
from .source import SPLITS, UNLABELLED, Samples, Stamp
from .walk import Extensions, Identity, ListedTree, Listing, Walker, join_listings, read_file, shown

SPLIT_OF_FOLDER = {"train": 0, "val": 1, "valid": 1, "validation": 1, "test": 2}
NAMES_SHOWN = 5
# What may hold images or their labels, too; see table.py, archive.py and parquet.py.
OTHER_SOURCES = (".csv", ".tsv", ".jsonl", ".parquet", ".tar", ".tar.gz", ".tgz", ".zip")
Layout = Literal["auto", "flat", "split"]


class FolderSource:
    """A folder of images with one folder a class, with or without splits; see the module's text."""

    def __init__(self, root: Path, layout: Layout, extensions: Extensions) -> None:
        self._root, self._layout, self._extensions = root, layout, extensions
        self.name = os.fsencode(os.path.realpath(root))

    @classmethod
    def at(cls, data: DataParams, _cache_dir: Path) -> FolderSource:
        """The folder ``data.root``."""
        return cls(Path(data.root), data.layout, data.extensions)

    def list_samples(self) -> Samples:
        """As `scan_folder`; tables and archives that lie there are no part of it, and are told of."""
        samples = scan_folder(self._root, layout=self._layout, extensions=self._extensions)
        beside = sorted(name for name in os.listdir(self._root) if name.lower().endswith(OTHER_SOURCES))
        return replace(samples, warnings=(*samples.warnings, *(_beside(self._root, beside) if beside else ())))

    def read(self, path: str) -> tuple[bytes, Stamp]:
        """As `read_file`."""
        return read_file(os.path.join(self._root, path))


@dataclass(frozen=True)
class _ClassFolder:
    """One class folder of one split with all that lies below it."""

    name: str
    split: int
    listings: list[Listing]

    @property
    def count(self) -> int:
        return sum(len(listing.names) for listing in self.listings)


def scan_folder(root: Path, *, layout: Layout = "auto", extensions: Extensions) -> Samples:
    """Find the images below ``root``.

    Args:
        layout: ``split`` when ``root`` holds ``train`` and at least one of val and test; ``auto`` looks whether
            it does, and whether those hold class folders.
        extensions: lower-case, with the dot; ``all`` for everything that Pillow registers. Hidden files and
            folders are never taken.

    Raises:
        DataError: there is nothing to scan, a folder cannot be read, or the folders contradict each other.
    """
    if not root.is_dir():
        why = "it is a file" if root.exists() else "there is no such folder"
        raise DataError("The data folder cannot be scanned.", where=shown(root), why=why, remedy="correct data.root")
    return scan_tree(Walker(root, extensions), Walker(root, extensions), root, layout)


def scan_tree(walker: Walker | ListedTree, probe: Walker | ListedTree, root: Place, layout: Layout) -> Samples:
    """As `scan_folder`, of any tree of folders.

    Args:
        probe: the same tree, so that what is only looked at is not counted as ignored.
    """
    top = walker.list_folder("")
    tops = {name: probe.list_folder(f"{name}/") for name in top.folders if name in SPLIT_OF_FOLDER}
    split = layout == "split" or (layout == "auto" and _looks_split(tops))
    tree = _scan_split(walker, root, top, tops) if split else _scan_flat(walker, root, top)
    if not tree.paths:
        raise no_images(tree)
    return tree


def _looks_split(tops: dict[str, Listing]) -> bool:
    with_classes = {SPLIT_OF_FOLDER[name] for name, listing in tops.items() if listing.folders}
    return 0 in with_classes and len(with_classes) > 1


def _scan_flat(walker: Walker | ListedTree, root: Place, top: Listing) -> Samples:
    warnings = [
        f"The folder {name!r} is read as a class: a layout with splits has train and at least one of val and test, "
        "with class folders in them."
        for name in top.folders
        if name in SPLIT_OF_FOLDER
    ]
    return _assemble(walker, root, [(0, top)], (), warnings, split=False)


def _scan_split(walker: Walker | ListedTree, root: Place, top: Listing, tops: dict[str, Listing]) -> Samples:
    _refuse_odd_splits(root, tops)
    other = [name for name in top.folders if name not in tops]
    warnings = [f"Folders beside the splits are left out: {_some(other)}."] if other else []
    if top.names:
        warnings.append(f"{_images(len(top.names))} directly in the data folder, outside of the splits, left out.")
    parts = [(SPLIT_OF_FOLDER[name], walker.list_folder(listing.prefix)) for name, listing in tops.items()]
    return _assemble(walker, root, parts, (top.identity,), warnings, split=True)


def _refuse_odd_splits(root: Place, tops: dict[str, Listing]) -> None:
    validation = [name for name in tops if SPLIT_OF_FOLDER[name] == 1]
    if len(validation) > 1:
        raise DataError(
            f"The data folder has {len(validation)} validation splits.",
            where=shown(root),
            why=f"it holds {_some(validation)}, which mean the same",
            remedy="keep one of them; merge or move the other",
        )
    if "train" not in tops or len(tops) < 2:
        raise DataError(
            "The data folder has no splits.",
            where=shown(root),
            why=f"data.layout is split, which needs train and at least one of val and test; found: {_some(tops)}",
            remedy="add the missing folders, or set data.layout to auto or flat and let the program split",
        )


def _assemble(
    walker: Walker | ListedTree,
    root: Place,
    parts: list[tuple[int, Listing]],
    parents: tuple[Identity, ...],
    warnings: list[str],
    *,
    split: bool,
) -> Samples:
    """The samples of ``parts``: for each split (0 for all of a flat layout) the listing of the folder of its classes.

    Args:
        split: whether the folders say which split an image is in.
    """
    folders = [
        _ClassFolder(name, split, walker.gather(f"{listing.prefix}{name}/", (*parents, listing.identity)))
        for split, listing in parts
        for name in listing.folders
    ]
    labelled = bool(folders)
    if labelled:
        warnings += [
            f"{_images(len(listing.names))} directly in {shown(os.path.join(root, listing.prefix))}, outside of the "
            "class folders, left out."
            for _, listing in parts
            if listing.names
        ]
    else:
        folders = [_ClassFolder("", split, [listing]) for split, listing in parts]
    class_names = tuple(sorted({folder.name for folder in folders if folder.split == 0})) if labelled else ()
    if labelled:
        _refuse_unknown_classes(root, parts, folders, class_names)
        warnings += _class_warnings(folders, class_names, {split for split, _ in parts})
    paths, targets, splits, stamps = _columns(folders, class_names)
    return Samples(
        root,
        class_names,
        paths,
        targets,
        splits if split else None,
        stamps,
        dict(sorted(walker.ignored.items())),
        (*walker.warnings, *warnings),
    )


def _columns(
    folders: list[_ClassFolder], class_names: tuple[str, ...]
) -> tuple[list[str], NDArray[np.int32], NDArray[np.int8], NDArray[np.int64]]:
    target_of = {name: i for i, name in enumerate(class_names)}
    listings = [listing for folder in folders for listing in folder.listings]
    owners = [folder for folder in folders for _ in folder.listings]
    paths, stamps, rows = join_listings(listings)
    targets = np.array([target_of.get(folder.name, UNLABELLED) for folder in owners], np.int32)
    splits = np.array([folder.split for folder in owners], np.int8)
    return paths, targets[rows], splits[rows], stamps


def _refuse_unknown_classes(
    root: Place, parts: list[tuple[int, Listing]], folders: list[_ClassFolder], class_names: tuple[str, ...]
) -> None:
    prefixes = {split: listing.prefix for split, listing in parts}
    for folder in folders:
        if folder.name not in class_names and folder.count:
            near = difflib.get_close_matches(folder.name, class_names, 3, 0.5)
            hint = f"near names in train: {_some(near)}; " if near else ""
            raise DataError(
                f"{SPLITS[folder.split]} has a class that train does not have: {folder.name!r}.",
                where=shown(os.path.join(root, prefixes[folder.split], folder.name)),
                why=f"train has {len(class_names)} classes: {_some(class_names)}",
                remedy=f"{hint}rename the folder, or add the class to train",
            )


def _class_warnings(folders: list[_ClassFolder], class_names: tuple[str, ...], splits: set[int]) -> list[str]:
    filled = {(folder.split, folder.name) for folder in folders if folder.count}
    warnings = []
    for split in sorted(splits):
        empty = [name for name in class_names if (split, name) not in filled]
        if empty and len(splits) == 1:
            warnings.append(f"Class folders without an image: {_some(empty)}.")
        elif empty:
            warnings.append(f"Classes without an image in {SPLITS[split]}: {_some(empty)}.")
    return warnings


def no_images(tree: Samples, where: str | None = None) -> DataError:
    """The error for a place that holds no image."""
    ignored = sorted(tree.ignored.items(), key=lambda item: -item[1])[:NAMES_SHOWN]
    counts = ", ".join(f"{count} {extension or 'without extension'}" for extension, count in ignored)
    return DataError(
        "No image was found.",
        where=where or shown(tree.root),
        why=f"files ignored for their extension: {counts}" if counts else "there are no files, but for hidden ones",
        remedy="name the folder that holds the class folders, or name the extensions in data.extensions (or `all`)",
    )


def _beside(root: Path, names: list[str]) -> Iterator[str]:
    yield f"{_some(names)} beside the images is not read; to use it, set data.root={shown(root / names[0])}."


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _some(names: Iterable[str]) -> str:
    """The first few names, quoted, and how many more."""
    names = list(names)
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return (", ".join(map(repr, names[:NAMES_SHOWN])) or "none of them") + more
