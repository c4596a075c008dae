"""Prove the feature cache: every byte of every part, and a random sample of features computed again from the images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..data.decode import BadImage
from ..errors import PipelineError, VerifyError
from ..features.digests import stack_digests
from ..features.extractor import Forward, Pixels, single_threaded_torch
from ..features.inventory import key_folders, verify_key
from ..features.rounding import as_stored
from ..features.store import FeatureStore
from ..features.tolerance import TOLERANCES, Agreement, Tolerance, compare_features
from ..features.views import view_name
from ..files import human_bytes
from ..params import Params
from .sources import (
    Origin,
    Source,
    Transformation,
    augmented_view,
    build_forward,
    open_folder,
    open_store,
    plain_view,
    resolve_origin,
)

Say = Callable[[str], None]
BYTES_ONLY = "made with other params, so only their bytes could be verified"


def verify_cache(params: Params, say: Say, *, sample: int = 8, seed: int = 0) -> dict[str, Any]:
    """Verify all keys of ``cache.dir`` by their bytes, and the key of these params by computing features again too.

    Damaged parts are set aside and named; nothing is removed.

    Args:
        sample: how many features are computed again from the images of ``data.root``.
        seed: of the choice of these images.

    Raises:
        VerifyError: something is wrong; it carries the report.
    """
    keys: dict[str, dict[str, Any]] = {}
    for folder in key_folders(params.cache.dir):
        proof = verify_key(folder)
        keys[folder.name] = {
            "folder": str(folder.absolute()),
            "parts": proof.parts,
            "rows": proof.rows,
            "bytes": proof.size,
            "problems": list(proof.problems),
            "recomputed": None,
            "note": BYTES_ONLY,
        }
        found = f", problems: {len(proof.problems)}" if proof.problems else ""
        say(f"{folder.name}: {human_bytes(proof.size)} read, {proof.rows} rows in {proof.parts} whole part(s){found}")
    if sample and keys:
        _recompute(params, keys, say, sample=sample, seed=seed)
    problems = [problem for key in keys.values() for problem in key["problems"]]
    report = {"cache": str(params.cache.dir.absolute()), "keys": list(keys.values()), "problems": problems}
    if problems:
        raise _verify_error(report)
    say(f"{len(keys)} key(s) verified, nothing is wrong.")
    return report


def _recompute(params: Params, keys: dict[str, dict[str, Any]], say: Say, *, sample: int, seed: int) -> None:
    """Add to the keys of these params what computing a few of their features again gave."""
    checked = 0
    try:
        origin = resolve_origin(params)
        views = [view for view in _views(params, origin) if view[0].spec.folder_name in keys]
        if views:
            source, forward = open_folder(params.data, params.cache), build_forward(params, origin)
        for store, transformation in views:
            chosen = _choose(source, store, transformation, sample=sample, seed=seed)
            check = _check(chosen, store, forward)
            entry = keys[store.spec.folder_name]
            entry["recomputed"], entry["note"] = check.summary(), check.note
            entry["problems"] += check.problems
            say(f"{store.spec.folder_name}: {check.note}")
            checked += 1
    except PipelineError as error:
        say(f"Not every feature that was chosen could be computed again. {error}")
    if checked < len(keys):
        say(f"{len(keys) - checked} of {len(keys)} key(s): {BYTES_ONLY}.")


def _views(params: Params, origin: Origin) -> Iterator[tuple[FeatureStore, Transformation]]:
    """The store and the way to pixels of each view of the images that these params give."""
    yield open_store(params, origin), plain_view(origin.transform, params.data, params.extract)
    for number in range(1, params.extract.views + 1):
        store = open_store(params, origin, view_name(number, params.extract.views_seed))
        yield store, augmented_view(origin.transform, params.data, params.extract, number)


@dataclass(frozen=True)
class _Sample:
    """Contents that have a feature, and what was wrong with those looked at: paths, digests, pixels, problems."""

    paths: list[str] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    pixels: list[Pixels] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Check:
    """How a sample of stored features compares with features computed again."""

    paths: list[str]
    agreement: Agreement
    tolerance: Tolerance
    problems: list[str]

    @property
    def note(self) -> str:
        if not self.paths:
            return "no image of data.root has a feature here, so only the bytes could be verified"
        return (
            f"{len(self.paths)} features computed again; cosine at least {self.agreement.cosines.min():.6f}"
            f" (tolerance {self.tolerance.min_cosine}), largest relative difference"
            f" {self.agreement.differences.max():.2g} (tolerance {self.tolerance.max_difference})"
        )

    def summary(self) -> dict[str, Any]:
        """The result as JSON."""
        values = {
            "min_cosine": self.agreement.cosines.min(initial=1.0),
            "max_difference": self.agreement.differences.max(initial=0.0),
        }
        finite = {name: float(value) if np.isfinite(value) else None for name, value in values.items()}
        return {"images": len(self.paths), **finite, "tolerance": vars(self.tolerance)}


def _check(chosen: _Sample, store: FeatureStore, forward: Forward) -> _Check:
    tolerance = TOLERANCES[store.spec.precision]
    stored = store.read(stack_digests(chosen.digests))
    # As extract runs it, so that on the machine that stored them features come out equal to the bit.
    with single_threaded_torch(forward.device.type == "cpu"):
        computed = as_stored(forward(chosen.pixels), store.spec.dtype) if chosen.pixels else stored
    agreement = compare_features(stored, computed)
    problems = [*chosen.problems, *_disagreements(store, chosen.paths, agreement, tolerance)]
    return _Check(chosen.paths, agreement, tolerance, problems)


def _choose(source: Source, store: FeatureStore, transformation: Transformation, *, sample: int, seed: int) -> _Sample:
    """Up to ``sample`` different contents that have a feature, in a random order that the seed gives."""
    tree, books = source.tree, source.books
    have = {row.tobytes() for row in store.digests}
    chosen = _Sample()
    for row in _candidates(source, have, seed):
        if len(chosen.digests) >= sample:
            break
        remembered = books.digest(row) if books.known[row] else None
        data = books.read(row)
        if data is None:
            continue
        digest, path = books.digest(row), tree.paths[row]
        if remembered not in (None, digest) and (books.stats[row] == tree.stats[row]).all():
            chosen.problems.append(f"{source.index_file} remembers another content of {path!r}; remove the index file.")
        if digest not in have or digest in chosen.digests:
            continue
        try:
            pixels = transformation.crop(transformation.decode(data), digest)
        except BadImage as bad:
            chosen.problems.append(f"{path!r} has a feature but no longer decodes: {bad}.")
            continue
        chosen.paths.append(path)
        chosen.digests.append(digest)
        chosen.pixels.append(pixels)
    return chosen


def _candidates(source: Source, have: set[bytes], seed: int) -> list[int]:
    """Files that the index knows to have a feature, in random order; then those that would have to be read first."""
    books = source.books
    order = np.random.default_rng(seed).permutation(len(source.tree.paths)).tolist()
    promising = [row for row in order if books.known[row] and books.digest(row) in have]
    return [*promising, *(row for row in order if not books.known[row])]


def _disagreements(store: FeatureStore, paths: list[str], agreement: Agreement, tolerance: Tolerance) -> list[str]:
    return [
        f"{store.spec.folder_name}: the feature of {paths[row]!r} comes out differently when computed again"
        f" (cosine {agreement.cosines[row]:.6f}, largest relative difference {agreement.differences[row]:.2g})."
        for row in np.flatnonzero(~agreement.within(tolerance)).tolist()
    ]


def _verify_error(report: dict[str, Any]) -> VerifyError:
    problems = report["problems"]
    return VerifyError(
        f"The feature cache has {len(problems)} {'problem' if len(problems) == 1 else 'problems'}.",
        where=report["cache"],
        why="\n    " + "\n    ".join(problems),
        remedy="run extract again: it computes what was set aside; where features come out differently, software or"
        " hardware is at fault: move that folder away",
        report=report,
    )
