"""Many small parts become few, in passing, as log-structured stores do it (O'Neil et al. 1996).

Parts of one size class, each eight times the last, are merged when there are `MERGE_AT` of them, so that a row is
copied a handful of times at most, however it came. Rows keep their bytes. The sources go once the new part is there: a
kill in between leaves rows twice, never none, and a reader that misses a part looks again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..data.digests import first_occurrences
from ..files import publish_file
from .parts import Part, build_part, check_part, part_name, stored_rows
from .spec import FeatureSpec

# So many small parts of a size class become one.
MERGE_AT = 16
# What is smaller is small; what comes of it is at most as large as the second.
SMALL_BYTES, MOST_BYTES = 4 << 20, 64 << 20


def parts_to_merge(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Groups of at least `MERGE_AT` small parts, of one type and size class each, that fit into one part."""
    classes: dict[tuple[str, int], list[Part]] = {}
    for part in parts:
        if 0 < part.size < SMALL_BYTES:
            classes.setdefault((part.dtype, (len(part.digests).bit_length() - 1) // 3), []).append(part)
    for members in classes.values():
        # Numbers of groups: how often the size of what stands before has filled a part.
        ends = np.cumsum([part.size for part in members])
        number = ends // (MOST_BYTES - SMALL_BYTES)
        groups = np.split(np.arange(len(members)), np.flatnonzero(np.diff(number)) + 1)
        yield from ([members[i] for i in group.tolist()] for group in groups if len(group) >= MERGE_AT)


def merge_parts(parts: Sequence[Part], spec: FeatureSpec) -> None:
    """Publish one part with the rows of all of them, then remove them; nothing where one of them is damaged.

    Raises:
        OSError: one cannot be read or has gone, or the folder cannot be written.
    """
    contents = [part.path.read_bytes() for part in parts]
    for part, data in zip(parts, contents, strict=True):
        if check_part(part.path.name, data, spec.key, part.width):
            return  # since it was opened: the next opening sets it aside
    digests = np.concatenate([part.digests for part in parts])
    once = first_occurrences(digests)
    data = build_part(np.concatenate([stored_rows(data) for data in contents])[once], digests[once], spec)
    publish_file(parts[0].path.with_name(part_name(data)), data)
    for part in parts:
        part.path.unlink(missing_ok=True)
