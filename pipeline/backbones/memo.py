"""Remember what resolving a backbone found out, so that a run with nothing to do neither loads nor hashes weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..files import canonical_json, publish_file, seal_json, unseal_json

FORMAT = 2
# A file changed within the granularity of its time stamps after being read would look unchanged.
SAFE_NS = 2_000_000_000

Stat = tuple[int, int, int, int]


def stat_of(path: Path) -> Stat | None:
    """(size, mtime_ns, ctime_ns, inode) of a file; ``None`` where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


class WeightsMemo:
    """A small sealed JSON file of facts, each under a key of what it depends on.

    It is a memory and nothing more: a missing, damaged or foreign file is an empty memory, and one that cannot be
    written changes nothing but speed. Facts about a file hold as long as its `stat_of` is what it was.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._facts = self._read()

    def get(
        self, key: Mapping[str, Any], stat: Stat | None = None, *, whatever_stat: bool = False
    ) -> dict[str, Any] | None:
        """The fact under ``key``, if it was learnt of a file with this ``stat`` (``None``: of no file)."""
        entry = self._facts.get(canonical_json(key))
        if not isinstance(entry, dict):
            return None
        if entry.get("stat") != (list(stat) if stat else None) and not whatever_stat:
            return None
        fact = entry.get("fact")
        return fact if isinstance(fact, dict) else None

    def put(
        self, key: Mapping[str, Any], fact: Mapping[str, Any], *, stat: Stat | None = None, read_ns: int = 0
    ) -> None:
        """Remember ``fact``, read at ``read_ns`` (epoch); dropped where the file's times lie too near before that."""
        if stat is not None and max(stat[1], stat[2]) + SAFE_NS > read_ns:
            return
        entry = {"stat": list(stat) if stat else None, "fact": dict(fact)}
        self._facts = {**self._read(), **self._facts, canonical_json(key): entry}
        with suppress(OSError):  # a cache that cannot be written is for its own writer to report
            publish_file(self._file, seal_json({"format": FORMAT, "facts": self._facts}))

    def _read(self) -> dict[str, Any]:
        try:
            content = unseal_json(self._file.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            return {}
        facts = content.get("facts")
        return facts if isinstance(facts, dict) else {}
