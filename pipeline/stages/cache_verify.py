"""Prove the feature cache: every byte of every part, and a random sample of features computed again from the images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.decode import BadImage
from ..errors import PipelineError, VerifyError
from ..features.digests import stack_digests
from ..features.extractor import Pixels
from ..features.inventory import key_folders, verify_key
from ..features.rounding import as_stored
from ..features.store import FeatureStore
from ..features.tolerance import TOLERANCES, Agreement, Tolerance, compare_features
from ..files import human_bytes
from ..params import Params
from .sources import (
    Origin,
    Source,
    Transformation,
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
    """Add to the key of these params what computing a few of its features again gave."""
    try:
        origin = resolve_origin(params)
        store = open_store(params, origin)
        if store.spec.folder_name not in keys:
            say(f"There are no features of these params ({store.spec.folder_name}); {BYTES_ONLY}.")
            return
        check = _check(params, origin, store, sample=sample, seed=seed)
    except VerifyError:
        raise
    except PipelineError as error:
        say(f"No features were computed again: {error}")
        return
    entry = keys[store.spec.folder_name]
    entry["recomputed"], entry["note"] = check.summary(), check.note
    entry["problems"] += check.problems
    say(f"{store.spec.folder_name}: {check.note}")
    others = len(keys) - 1
    if others:
        say(f"{others} other key(s): {BYTES_ONLY}.")


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


def _check(params: Params, origin: Origin, store: FeatureStore, *, sample: int, seed: int) -> _Check:
    source = open_folder(params.data, params.cache)
    paths, digests, pixels, problems = _choose(
        source, store, plain_view(origin.transform, params.data, params.extract), sample=sample, seed=seed
    )
    stored = store.read(stack_digests(digests))
    computed = as_stored(build_forward(params, origin)(pixels), store.spec.dtype) if pixels else stored
    agreement, tolerance = compare_features(stored, computed), TOLERANCES[origin.precision]
    problems += _disagreements(store, paths, agreement, tolerance)
    return _Check(paths, agreement, tolerance, problems)


def _choose(
    source: Source, store: FeatureStore, transformation: Transformation, *, sample: int, seed: int
) -> tuple[list[str], list[bytes], list[Pixels], list[str]]:
    """Up to ``sample`` different contents that have a feature: paths, digests, pixels; and what was wrong."""
    tree, books = source.tree, source.books
    expected, was_known = books.digests.copy(), books.known.copy()
    have = {row.tobytes() for row in store.digests}
    paths: list[str] = []
    digests: list[bytes] = []
    pixels: list[Pixels] = []
    problems: list[str] = []
    order = np.random.default_rng(seed).permutation(len(tree.paths))
    # Files in the index first: among them those with a feature are found without reading the others.
    promising = [row for row in order.tolist() if was_known[row] and expected[row].tobytes() in have]
    for row in [*promising, *(row for row in order.tolist() if not was_known[row])]:
        if len(digests) >= sample:
            break
        data = books.read(row)
        if data is None:
            continue
        digest, path = books.digest(row), tree.paths[row]
        unchanged = (books.stats[row] == tree.stats[row]).all()
        if was_known[row] and unchanged and digest != expected[row].tobytes():
            problems.append(f"{source.index_file} remembers another content of {path!r}; remove the index file.")
        if digest not in have or digest in digests:
            continue
        try:
            image = transformation.crop(transformation.decode(data), digest)
        except BadImage as bad:
            problems.append(f"{path!r} has a feature but no longer decodes: {bad}.")
            continue
        paths.append(path)
        digests.append(digest)
        pixels.append(image)
    return paths, digests, pixels, problems


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
