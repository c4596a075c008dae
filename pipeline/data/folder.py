"""From a folder of images to paths, targets and splits, in an order that does not depend on the file system.

Two layouts: ``root/CLASS/...`` and ``root/{train,val,test}/CLASS/...``, with the other usual names of splits. As in
torchvision's ImageFolder, every folder below a class belongs to it and symbolic links are followed. What people
download besides is recognised: a folder around everything, train alone, and a val or test without labels, which is
left for ``predict``. What may mean two things is refused; ``data.layout`` or ``data.root`` then decide.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..params import DataParams, Place
from .labels import SPLIT_NAMES
from .source import SPLITS, UNLABELLED, Samples, Stamp
from .walk import Extensions, Identity, ListedTree, Listing, Walker, join_listings, read_file, shown

NAMES_SHOWN = 5
FEW = 4  # folders, of which some may be splits in other words, as seg_train; among more they are classes
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
        """As `scan_folder`; tables and archives that lie there are no part of it, and are told of.

        Raises:
            DataError: as there; or the labels seem to be in such a table, since fewer than two folders are classes.
        """
        samples = scan_folder(self._root, layout=self._layout, extensions=self._extensions)
        beside = _beside(self._root)
        if beside and len(samples.class_names) < 2 and self._layout == "auto":
            raise DataError(
                "The labels seem not to be in the folders.",
                where=shown(self._root),
                why=f"{len(samples.class_names) or 'no'} class folder was found, and beside the images {_some(beside)}",
                remedy=f"set data.root={shown(self._root / beside[0])}, or data.layout=flat to read the folders alone",
            )
        if beside:
            remedy = f"to use it, set data.root={shown(self._root / beside[0])}"
            told = f"{_some(beside)} beside the images: not read; {remedy}."
            samples = replace(samples, warnings=(*samples.warnings, told))
        return samples

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
    require_folder(root)
    return scan_tree(Walker(root, extensions), Walker(root, extensions), root, layout)


def require_folder(root: Path) -> None:
    """Refuse a data folder that is not there.

    Raises:
        DataError: with the names beside it that are near.
    """
    if root.is_dir():
        return
    beside = os.listdir(root.parent) if root.parent.is_dir() else []
    near = difflib.get_close_matches(root.name, beside, 3, 0.5)
    raise DataError(
        "The data folder cannot be scanned.",
        where=shown(root),
        why=("it is a file" if root.exists() else "there is no such folder")
        + (f"; beside it there is {_some(near)}" if near and not root.exists() else ""),
        remedy="set data.root to the folder of your images (`pipeline demo-data FOLDER` writes some to try)",
    )


def scan_tree(walker: Walker | ListedTree, probe: Walker | ListedTree, root: Place, layout: Layout) -> Samples:
    """As `scan_folder`, of any tree of folders.

    Args:
        probe: the same tree, so that what is only looked at is not counted as ignored.
    """
    top, around = walker.list_folder(""), list[Identity]()
    while layout == "auto" and (inner := _wrapped(probe, top)):
        around.append(top.identity)
        top = walker.list_folder(inner.prefix)
    tops = {name: probe.list_folder(f"{top.prefix}{name}/") for name in top.folders if name.lower() in SPLIT_NAMES}
    if layout == "auto":
        _refuse_two_meanings(root, top, tops)
    split = layout == "split" or (layout == "auto" and 0 in _with_classes(tops))
    if split:
        _refuse_odd_splits(root, tops, layout)
    tree = (_scan_split if split else _scan_flat)(walker, probe, root, top, tops, tuple(around))
    if not tree.paths:
        raise no_images(tree)
    if around:
        note = f"The folder {top.prefix[:-1]!r} is the only one, and is read as if it were the data folder."
        tree = replace(tree, warnings=(note, *tree.warnings))
    return tree


def _wrapped(probe: Walker | ListedTree, top: Listing) -> Listing | None:
    """The one folder that holds everything, with folders alone in it, as archives unpack: ``insects/{ants,bees}``."""
    if top.names or len(top.folders) != 1 or top.folders[0].lower() in SPLIT_NAMES:
        return None
    inner = probe.list_folder(f"{top.prefix}{top.folders[0]}/")
    return inner if inner.folders and not inner.names else None


def _with_classes(tops: dict[str, Listing]) -> set[int]:
    return {SPLIT_NAMES[name.lower()] for name, listing in tops.items() if listing.folders}


def _refuse_two_meanings(root: Place, top: Listing, tops: dict[str, Listing]) -> None:
    """Folders that may be splits, or classes that are called so."""
    classes, others = _with_classes(tops), [name for name in top.folders if name not in tops]
    place = shown(os.path.join(root, top.prefix))
    flat = "if they are classes, set data.layout=flat"
    if others and classes == {0} and len(tops) == 1:
        why = f"'train' holds folders, so that it may be a split, and beside it are {_some(others)}"
        remedy = f"set data.root={os.path.join(place, next(iter(tops)))} to use it alone; {flat}"
    elif not others and len(tops) > 1 and not classes:
        why = f"{_some(tops)} hold images, but no class folders"
        remedy = f"give each class a folder in them, or set data.root to a table of the labels (.csv); {flat}"
    elif not others and classes and 0 not in classes:
        why = f"{_some(tops)} hold class folders, and there is no train with any"
        remedy = f"name train; to score a run on them, evaluate --data {os.path.join(place, next(iter(tops)))}; {flat}"
    elif 0 in (like := _like_splits(others)) and len(like) > 1 and len(others) <= FEW:
        why = f"{_some(others)} are called like splits"
        remedy = f"rename them to train, val and test (a folder of links will do, too); {flat}"
    else:
        return
    raise DataError("The folders may be splits or classes.", where=place, why=why, remedy=remedy)


def _like_splits(names: list[str]) -> set[int]:
    words = {word for name in names for word in re.split(r"[^a-z]+", name.lower())}
    return {SPLIT_NAMES[word] for word in words & SPLIT_NAMES.keys()}


def _scan_flat(
    walker: Walker | ListedTree,
    _probe: Walker | ListedTree,
    root: Place,
    top: Listing,
    _tops: dict[str, Listing],
    around: tuple[Identity, ...],
) -> Samples:
    warnings = [
        f"The folder {name!r} is read as a class: a layout with splits has train with class folders in it."
        for name in top.folders
        if name.lower() in SPLIT_NAMES
    ]
    return _assemble(walker, root, [(0, top)], around, warnings, split=False)


def _scan_split(
    walker: Walker | ListedTree,
    probe: Walker | ListedTree,
    root: Place,
    top: Listing,
    tops: dict[str, Listing],
    around: tuple[Identity, ...],
) -> Samples:
    unlabelled = _unlabelled(tops)
    tops = {name: listing for name, listing in tops.items() if name not in unlabelled}
    other = [name for name in top.folders if name not in tops and name not in unlabelled]
    warnings = [f"Folders beside the splits are left out: {_some(other)}."] if other else []
    for name, listing in unlabelled.items():
        count = sum(len(below.names) for below in probe.gather(listing.prefix))
        place = shown(os.path.join(root, listing.prefix[:-1]))
        left = f"{_images(count)} in {name!r} without class folders, left out; `pipeline predict latest {place}`"
        warnings += [f"{left} classifies them."] if count else []
    if top.names:
        warnings.append(f"{_images(len(top.names))} directly in the data folder, outside of the splits, left out.")
    parts = [(SPLIT_NAMES[name.lower()], walker.list_folder(listing.prefix)) for name, listing in tops.items()]
    return _assemble(walker, root, parts, (*around, top.identity), warnings, split=len(parts) > 1)


def _unlabelled(tops: dict[str, Listing]) -> dict[str, Listing]:
    """The splits beside train whose images have no labels: no folders, or one that is called like no class."""
    known = {folder for name, listing in tops.items() if SPLIT_NAMES[name.lower()] == 0 for folder in listing.folders}

    def has_labels(folders: list[str]) -> bool:
        alone = len(folders) == 1 and len(known) > 1
        return bool(folders) and not (alone and not difflib.get_close_matches(folders[0], known, 1, 0.5))

    beside = [name for name in tops if known and SPLIT_NAMES[name.lower()] != 0]
    return {name: tops[name] for name in beside if not has_labels(tops[name].folders)}


def _refuse_odd_splits(root: Place, tops: dict[str, Listing], layout: Layout) -> None:
    for number, split in enumerate(("train", "validation", "test")):
        same = [name for name in tops if SPLIT_NAMES[name.lower()] == number]
        if len(same) > 1:
            raise DataError(
                f"The data folder has {len(same)} {split} splits.",
                where=shown(root),
                why=f"it holds {_some(same)}, which mean the same",
                remedy="keep one of them; merge or move the other",
            )
        if (not same and number == 0) or (layout == "split" and len(tops) < 2):
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


def _beside(root: Path) -> list[str]:
    """Tables and archives in the folder, those first that are called like the labels of train."""
    names = [name for name in os.listdir(root) if name.lower().endswith(OTHER_SOURCES) and not name.startswith(".")]
    return sorted(names, key=lambda name: (not any(word in name.lower() for word in ("train", "label")), name))


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _some(names: Iterable[str]) -> str:
    """The first few names, quoted, and how many more."""
    names = list(names)
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return (", ".join(map(repr, names[:NAMES_SHOWN])) or "none of them") + more
