"""From what a table says of each image (label, split, group, as text) to samples; what is no class is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..params import ColumnParams, Place
from .source import SPLITS, UNLABELLED, Samples
from .walk import shown

SPLIT_NAMES = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "dev": 1, "test": 2, "testing": 2}
# What people call the columns, the surest first; compared in lower case without marks.
SYNONYMS = {
    "path": (
        *("path", "filepath", "filename", "file", "imagepath", "imagefile", "imagefilename", "image", "img"),
        *("imgpath", "imageid", "imgid", "imagename", "imgname", "picture", "photo", "id", "name"),
    ),
    "label": (
        *("label", "labels", "class", "classname", "labelname", "category", "target", "labelid", "classid"),
        *("species", "breed", "diagnosis", "dx", "y"),
    ),
    "split": ("split", "subset", "fold", "partition", "set", "dataset"),
    "group": ("group", "groupid", "patient", "patientid", "subject", "subjectid", "lesionid", "video", "videoid"),
}
SEPARATORS = ("|", ";", ",", " ")
# More numbers than this, most of them different, are a measurement.
FEW_NUMBERS = 20
SHOWN = 5


@dataclass(frozen=True)
class Columns:
    """What is known of n images beside their names; "" and None: nothing is."""

    labels: list[str] | None = None
    splits: list[str] | None = None
    groups: list[str] | None = None


def find_columns(names: Sequence[str], params: ColumnParams, *, where: str) -> tuple[dict[str, str], list[str]]:
    """Which column is what: ``{"path": NAME, ...}`` of those there are, and warnings.

    Raises:
        DataError: a column that the params name is not there.
    """
    found: dict[str, str] = {}
    warnings: list[str] = []
    plain = {_plain(name): name for name in reversed(names)}
    for key, synonyms in SYNONYMS.items():
        if wanted := getattr(params, key):
            if wanted not in names:
                raise DataError(
                    f"The column {wanted!r} is not there.",
                    where=where,
                    why=f"data.columns.{key} names it; the columns are {some(names)}",
                    remedy="correct data.columns",
                )
            found[key] = wanted
            continue
        hits = [plain[word] for word in synonyms if word in plain and plain[word] not in found.values()]
        if hits:
            found[key] = hits[0]
        if len(hits) > 1 and key == "label":
            warnings.append(f"The labels are taken from the column {hits[0]!r}; data.columns.label can name another.")
    rest = [name for name in names if name not in found.values()]
    if "path" in found and "label" not in found and len(names) == 2 and rest:
        found["label"] = rest[0]
    return found, warnings


def as_samples(
    root: Place,
    paths: list[str],
    columns: Columns,
    stamps: NDArray[np.int64],
    *,
    where: str,
    warnings: Iterable[str] = (),
    ignored: dict[str, int] | None = None,
    reads_at_once: int = 0,
) -> Samples:
    """The samples that a table describes.

    Args:
        paths: n different names.
        where: the table, for messages.

    Raises:
        DataError: several labels in a cell, measurements for labels, unknown splits, a class that train lacks.
    """
    told = list(warnings)
    labels = _one_class_each(columns.labels or [""] * len(paths), where, told)
    splits = _splits(columns.splits, where, told)
    names = tuple(sorted({label for label in labels if label}))
    if splits is not None:
        _refuse_unknown(names, labels, splits, where)
    target_of = {name: i for i, name in enumerate(names)} | {"": UNLABELLED}
    groups = columns.groups if columns.groups and any(columns.groups) else None
    targets = np.array([target_of[label] for label in labels], np.int32)
    return Samples(root, names, paths, targets, splits, stamps, ignored or {}, tuple(told), groups, reads_at_once)


def split_of_name(name: str) -> str:
    """The split that a file's or a folder's name begins with (``train-00000-of-00002``), or ""."""
    word = name.rpartition("/")[2].lower()
    known = sorted(SPLIT_NAMES, key=len, reverse=True)
    return next((split for split in known if word.startswith(split) and not word[len(split) :][:1].isalpha()), "")


def splits_of_files(names: Sequence[str]) -> dict[str, str] | None:
    """The split of each file by its own name or its folder's, where all tell one, train and another among them."""
    of = {name: split_of_name(name) or split_of_name(name.rpartition("/")[0]) for name in names}
    kinds = {SPLIT_NAMES.get(split, -1) for split in of.values()}
    return of if 0 in kinds and len(kinds) > 1 and -1 not in kinds else None


def some(names: Iterable[object]) -> str:
    """The first few, quoted, and how many more."""
    listed = list(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(repr(name) for name in listed[:SHOWN]) + more


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def _one_class_each(labels: list[str], where: str, told: list[str]) -> list[str]:
    counts = Counter(label for label in labels if label)
    if counts and (numbers := _numbers(counts)):
        _refuse_measurements(numbers, counts, where)
        texts = {label: str(int(value)) if value == int(value) else label for label, value in numbers.items()}
        told.append(f"The labels of {where} are numbers; they are taken as {len(set(texts.values()))} classes.")
        return [texts.get(label, "") for label in labels]
    for label in counts:
        for mark in SEPARATORS:
            parts = [part.strip() for part in label.split(mark)]
            if len(parts) > 1 and all(part in counts for part in parts):
                raise DataError(
                    "Images have several labels, and a classifier here gives each exactly one.",
                    where=where,
                    why=f"the label {label!r} holds {some(parts)}, which are labels themselves",
                    remedy="keep one label an image, or name another column with data.columns.label",
                )
    return labels


def _numbers(counts: Counter[str]) -> dict[str, float] | None:
    """Each label as a number, if all are finite ones."""
    try:
        numbers = {label: float(label) for label in counts}
    except ValueError:
        return None
    return numbers if all(np.isfinite(value) for value in numbers.values()) else None


def _refuse_measurements(numbers: dict[str, float], counts: Counter[str], where: str) -> None:
    different = len(set(numbers.values()))
    whole = all(value == int(value) for value in numbers.values())
    if different > FEW_NUMBERS and (not whole or 2 * different > counts.total()):
        raise DataError(
            "The labels are measurements rather than classes.",
            where=where,
            why=f"{different} different numbers for {counts.total()} images: {some(numbers)}",
            remedy="write classes into a column of their own (for instance ranges) and name it in data.columns.label",
        )


def _splits(splits: list[str] | None, where: str, told: list[str]) -> NDArray[np.int8] | None:
    if splits is None or not any(splits):
        return None
    unknown = sorted({split for split in splits if split.strip().lower() not in SPLIT_NAMES})
    if unknown:
        told.append(
            f"The splits of {where} are not used: {some(unknown)} {'is' if len(unknown) == 1 else 'are'} "
            "none of train, val and test."
        )
        return None
    found = np.array([SPLIT_NAMES[split.strip().lower()] for split in splits], np.int8)
    return found if len(np.unique(found)) > 1 else None


def _refuse_unknown(names: tuple[str, ...], labels: list[str], splits: NDArray[np.int8], where: str) -> None:
    if not (splits == 0).any():
        raise DataError(
            "The table has no train split.",
            where=where,
            why="its split column names val and test only",
            remedy="add the images of train, or name another column with data.columns.split",
        )
    trained = {label for label, split in zip(labels, splits.tolist(), strict=True) if split == 0}
    for label, split in zip(labels, splits.tolist(), strict=True):
        if label and label not in trained:
            raise DataError(
                f"{SPLITS[split]} has a class that train does not have: {label!r}.",
                where=where,
                why=f"train has {len(trained - {''})} of the {len(names)} classes",
                remedy="correct the labels or the splits of the table",
            )


def described(where: Place) -> str:
    """A place fit for a message."""
    return shown(str(where))
