"""Corrections of labels that the user keeps in a table: another class for an image, or leave it out."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from ..files import DIGEST_BYTES, digest_bytes
from ..params import Place
from .digests import Digests
from .labels import described
from .source import UNLABELLED
from .stores import store_at
from .table import read_table

LEAVE_OUT = "-"
SHOWN = 5


@dataclass(frozen=True)
class Corrections:
    """What a table with a column ``correction``, and ``path`` or ``digest`` or both, says of images.

    A row is about the image at its path; where none lies there, about all with its digest.

    Attributes:
        digest: hex, of the table's bytes.
        rows: (path, digest in hex, correction), "" where there is none; only those that correct something.
    """

    file: Place
    digest: str
    rows: tuple[tuple[str, str, str], ...]

    def check(self, class_names: Sequence[str]) -> None:
        """Refuse labels that are no class.

        Raises:
            DataError: with the names that are none.
        """
        unknown = sorted({label for *_, label in self.rows} - {LEAVE_OUT, *class_names})
        if unknown:
            near = difflib.get_close_matches(unknown[0], class_names, 3, 0.5)
            hint = f"did you mean {', '.join(near)}? " if near else ""
            raise _wrong(
                self.file,
                f"no class is called {_some(unknown)}",
                f"{hint}write one of {_some(class_names)}, or {LEAVE_OUT} to leave the image out",
            )

    def apply(
        self, paths: Sequence[str], digests: Digests, targets: NDArray[np.int64], names: Sequence[str]
    ) -> tuple[NDArray[np.int64], int]:
        """Targets (n,) of the images at ``paths`` with ``digests`` (n, 16) as corrected, -1 where one is left out.

        Also how many rows match no image.

        Raises:
            DataError: an image is corrected in two ways.
        """
        place = {path: row for row, path in enumerate(paths)}
        by_digest: dict[str, list[int]] = {}
        if any(path not in place for path, _, _ in self.rows):
            for row, digest in enumerate(digests):
                by_digest.setdefault(digest.tobytes().hex(), []).append(row)
        chosen: dict[int, str] = {}
        unmatched = 0
        for path, digest, label in self.rows:
            rows = [place[path]] if path in place else by_digest.get(digest, [])
            unmatched += not rows
            for row in rows:
                if chosen.setdefault(row, label) != label:
                    raise self._contradiction(paths[row], {chosen[row], label})
        corrected = targets.copy()
        for row, label in chosen.items():
            corrected[row] = UNLABELLED if label == LEAVE_OUT else names.index(label)
        return corrected, unmatched

    def _contradiction(self, path: str, labels: set[str]) -> DataError:
        why = f"{path!r} is corrected to {' and to '.join(map(repr, sorted(labels)))}"
        return _wrong(self.file, why, "keep one of them; identical images that differ in path are told apart by it")


def read_corrections(file: Place) -> Corrections:
    """The corrections in a table; all other columns, and rows without a correction, mean nothing.

    Raises:
        DataError: it cannot be read, has not the columns, or corrects one image in two ways.
    """
    try:
        table = read_table(file)
    except DataError as error:
        raise _wrong(file, error.why or error.what, "name a CSV file as `inspect` writes it, filled in") from error
    if "correction" not in table or not {"path", "digest"} & set(table):
        why = f"its columns are {_some(list(table))}"
        raise _wrong(file, why, "it needs a column correction, and path or digest; insights.csv of `inspect` has all")
    count = len(table["correction"])
    paths, digests = (table.get(name, [""] * count) for name in ("path", "digest"))
    rows = [
        (path, digest.strip().lower(), label.strip())
        for path, digest, label in zip(paths, digests, table["correction"], strict=True)
        if label.strip()
    ]
    if odd := [digest for path, digest, _ in rows if (digest or not path) and not _is_digest(digest)]:
        raise _wrong(file, f"{odd[0]!r} is no digest", f"digests have {2 * DIGEST_BYTES} hexadecimal digits")
    _refuse_contradictions(file, rows)
    return Corrections(file, _file_digest(file), tuple(dict.fromkeys(rows)))


def _refuse_contradictions(file: Place, rows: Sequence[tuple[str, str, str]]) -> None:
    first: dict[tuple[str, str], str] = {}
    for path, digest, label in rows:
        named = (path, "") if path else ("", digest)
        if first.setdefault(named, label) != label:
            why = f"{path or digest!r} is corrected to {first[named]!r} and to {label!r}"
            raise _wrong(file, why, "keep one of the two rows")


def _file_digest(file: Place) -> str:
    data, _ = store_at(file).read(str(file))
    return digest_bytes(data).hex()


def _is_digest(text: str) -> bool:
    try:
        return len(bytes.fromhex(text)) == DIGEST_BYTES
    except ValueError:
        return False


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(map(repr, list(names)[:SHOWN])) + more


def _wrong(file: Place, why: str, remedy: str) -> DataError:
    return DataError(
        "The corrections cannot be used.", where=f"data.corrections: {described(file)}", why=why, remedy=remedy
    )
