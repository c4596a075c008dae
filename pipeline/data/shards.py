"""Files that hold many images each: which there are, and what lies in each, remembered by the file's stamp."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..files import digest_bytes, publish_file, seal_json, unseal_json
from ..params import Place, is_url
from ..runtime.cores import usable_cores
from .index import INDEX_FOLDER, SAFE_NS
from .labels import SPLIT_NAMES, described, some
from .source import Stamp
from .stores import Store, join, parent_of, store_at

VERSION = 1
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class Members:
    """What one shard holds: n members, each with where it begins and how long it is.

    Attributes:
        extras: n further numbers that reading needs; empty where it needs none.
        labels, splits, groups: n texts, "" for none; None where the shard says nothing.
        warnings: sentences that go on after the shard's name.
    """

    names: list[str]
    starts: list[int]
    sizes: list[int]
    extras: list[list[int]] = field(default_factory=list)
    labels: list[str] | None = None
    splits: list[str] | None = None
    groups: list[str] | None = None
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Shards:
    """Shards by their names below ``base``."""

    base: Place
    names: list[str]
    store: Store

    def path(self, name: str) -> str:
        """The whole path of a shard."""
        return join(self.base, name)


def find_shards(root: Place, suffixes: tuple[str, ...]) -> Shards | None:
    """The shards that ``root`` names: one, a brace pattern, or those of a folder that holds neither images nor classes.

    Folders named after splits may stand between. None where it names something else.
    """
    text, store = str(root), store_at(root)
    if BRACES.search(text) and text.endswith(suffixes):
        base = parent_of(text.partition("{")[0] if is_url(root) else Path(text.partition("{")[0] + "x"))
        prefix = f"{base}/".replace("//", "/") if not is_url(root) else f"{base}/"
        return Shards(base, [path.removeprefix(prefix) for path in expand_braces(text)], store)
    if text.lower().endswith(suffixes) and not store.is_folder(text):
        base = parent_of(root)
        return Shards(base, [text[len(join(base, "")) :]], store)
    names = _shards_in(store, text, suffixes)
    return Shards(root, names, store) if names else None


def _shards_in(store: Store, folder: str, suffixes: tuple[str, ...]) -> list[str]:
    with suppress(OSError):
        files, folders = store.children(folder)
        if not folders:
            return sorted(name for name in files if name.lower().endswith(suffixes))
        if set(folders) <= set(SPLIT_NAMES):
            below = ((split, *store.children(f"{folder}/{split}")) for split in folders)
            return sorted(
                f"{split}/{name}"
                for split, names, deeper in below
                if not deeper
                for name in names
                if name.endswith(suffixes)
            )
    return []


def expand_braces(pattern: str) -> list[str]:
    """``a-{000..002}.tar`` and ``{a,b}.tar`` as a shell expands them; nothing nested."""
    pieces = BRACES.split(pattern)
    choices = [[piece] if i % 2 == 0 else list(_choices(piece)) for i, piece in enumerate(pieces)]
    return ["".join(parts) for parts in product(*choices)]


def _choices(inside: str) -> Iterator[str]:
    if match := RANGE.fullmatch(inside):
        first, last = int(match[1]), int(match[2])
        width = len(match[1]) if match[1].startswith("0") else 0
        step = 1 if last >= first else -1
        yield from (f"{number:0{width}d}" for number in range(first, last + step, step))
    else:
        yield from inside.split(",")


def list_members(
    shards: Shards, cache_dir: Path, settings: Any, scan: Callable[[str], Members]
) -> tuple[list[Members], list[Stamp]]:
    """What each shard holds and its stamp: remembered where it is unchanged, else looked through, several at a time.

    Args:
        settings: what else the outcome of ``scan`` depends on.

    Raises:
        DataError: shards are not there.
    """
    stamps = _stamps(shards)
    with ThreadPoolExecutor(max(usable_cores(), shards.store.reads_at_once // 4)) as pool:
        members = pool.map(
            lambda pair: _members(shards, pair[0], pair[1], cache_dir, settings, scan),
            zip(shards.names, stamps, strict=True),
        )
        return list(members), stamps


def warnings_of(shards: Shards, members: Iterable[Members]) -> list[str]:
    """All that was odd, each with its shard."""
    return [f"{name} {text}" for name, held in zip(shards.names, members, strict=True) for text in held.warnings]


def _stamps(shards: Shards) -> list[Stamp]:
    stamps, missing, why = [], [], ""
    for name in shards.names:
        try:
            stamps.append(shards.store.stamp(shards.path(name)))
        except OSError as error:
            missing.append(name)
            why = str(error.strerror or error)
    if missing:
        raise DataError(
            f"{len(missing)} of {len(shards.names)} shards cannot be read.",
            where=described(shards.base),
            why=f"{why}: {some(missing)}",
            remedy="correct data.root, or fetch them again",
        )
    return stamps


def _members(
    shards: Shards, name: str, stamp: Stamp, cache_dir: Path, settings: Any, scan: Callable[[str], Members]
) -> Members:
    path = shards.path(name)
    key = digest_bytes(json.dumps([VERSION, path, settings]).encode("utf-8", "surrogateescape")).hex()[:16]
    file = cache_dir / INDEX_FOLDER / f"{key}.shard.idx"
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = unseal_json(file.read_bytes())
        if kept.pop("stamp") == stamp.tolist():
            return Members(**kept)
    started = time.time_ns()
    members = scan(path)
    unchanged = (shards.store.stamp(path) == stamp).all() and max(stamp[1], stamp[2]) <= started - SAFE_NS
    if unchanged:  # and was not written to a moment ago: it could change once more and look the same
        with suppress(OSError):  # it only saves time
            publish_file(file, seal_json({"stamp": stamp.tolist(), **asdict(members)}))
    return members
