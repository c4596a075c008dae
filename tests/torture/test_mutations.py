"""Thousands of damaged images through the real decoders: no row moves, every failure has its reason."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.decode import Reason
from pipeline.files import digest_bytes
from tests.stages.conftest import FAST

from . import jobs
from .children import run
from .conftest import Tally, read_rows

MUTATIONS, LARGEST, RUNS = 5400, 60_000, 20
SEED = 20_260_102


def mutate(data: bytes, other: bytes, draw: random.Random) -> bytes:
    """Flip bits, overwrite or drop a stretch, cut the end, or go on with another file."""
    changed = bytearray(data)
    how = draw.randrange(5)
    if how == 0:
        for _ in range(draw.choice((1, 1, 2, 8, 64))):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        return bytes(changed)
    place = draw.randrange(len(changed))
    if how == 1:
        return bytes(changed[:place])
    if how == 2:
        return bytes(changed[:place]) + other[draw.randrange(len(other)) :]
    length = draw.choice((1, 4, 64, 1024))
    changed[place : place + length] = draw.randbytes(length) if how == 3 else b""
    return bytes(changed)


def write_mutations(shared: Path, root: Path) -> int:
    """Seeded mutations of the small awkward images and of a few photographs; how many files."""
    awkward = [path for path in sorted((shared / "data" / "awkward_images").rglob("*")) if path.is_file()]
    photographs = sorted((shared / "data" / "flowers5_128").rglob("*.jpg"))[::400]
    contents = [data for path in [*awkward, *photographs] if 0 < len(data := path.read_bytes()) <= LARGEST]
    draw = random.Random(SEED)
    for number in range(MUTATIONS):
        name = root / f"class{number % 7}" / f"{number:05}.jpg"
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_bytes(mutate(contents[number % len(contents)], draw.choice(contents), draw))
    return MUTATIONS


def isolated_rows(root: Path, settings: list[str]) -> dict[bytes, bytes | str]:
    """Content to its feature, or to the reason why it has none, each image decoded and forwarded alone."""
    from pipeline.data.decode import BadImage
    from pipeline.features.rounding import as_stored
    from pipeline.stages.open import open_backbone

    params = jobs.params_of(settings)
    backbone = open_backbone(params)
    rows: dict[bytes, bytes | str] = {}
    for path in sorted(root.rglob("*.jpg")):
        data = path.read_bytes()
        digest = digest_bytes(data)
        try:
            pixels = backbone.pixels(backbone.decoder(data))
        except BadImage as bad:
            rows[digest] = bad.reason.value
        else:
            rows[digest] = np.asarray(as_stored(backbone([pixels]), params.cache.dtype), np.float32).tobytes()
    return rows


def isolated_job(root: str, settings: list[str], target: str) -> None:
    """As `isolated_rows`, into an archive."""
    rows = isolated_rows(Path(root), settings)
    text = [row if isinstance(row, str) else row.hex() for row in rows.values()]
    np.savez(target, digests=np.array([digest.hex() for digest in rows]), rows=np.array(text))


def test_mutated_images_end_no_run_and_move_no_row(
    shared: Path, tmp_path: Path, tally: Callable[[str], Tally], capsys: pytest.CaptureFixture[str]
) -> None:
    count = tally("mutated image")
    root, cache = tmp_path / "images", tmp_path / "cache"
    count.tries = write_mutations(shared, root)
    settings = [*FAST, "extract.batch_size=8", f"data.root={root}", f"cache.dir={cache}", "data.max_pixels=20000000"]
    for _ in range(RUNS):  # a decoder that dies costs a run, and no more
        told = run(jobs.extract_job, settings, note=tmp_path / "note.json")
        if told["exit"] == 0:
            break
    summary = told["result"]
    assert summary["images"] == MUTATIONS
    assert summary["images"] == sum(summary[name] for name in ("embedded", "reused", "duplicates", "quarantined"))
    assert run(isolated_job, str(root), settings, str(tmp_path / "alone.npz"), note=tmp_path / "note.json")["exit"] == 0
    with np.load(tmp_path / "alone.npz") as archive:
        alone = {
            bytes.fromhex(digest): str(row) for digest, row in zip(archive["digests"], archive["rows"], strict=True)
        }
    rows = {digest: row.hex() for digest, row in read_rows(cache).items()}
    reasons = Counter(row for row in alone.values() if row in set(Reason))
    embedded = {digest: row for digest, row in alone.items() if row not in set(Reason)}
    count.lost = len(embedded.keys() - rows.keys())
    count.wrong = sum(embedded.get(digest) != row for digest, row in rows.items())
    assert len(alone) == summary["embedded"] + summary["reused"] + len(set(alone) - set(embedded))
    assert {Reason.TRUNCATED, Reason.CORRUPT, Reason.NOT_AN_IMAGE} <= set(reasons)
    with capsys.disabled():
        print("\nmutated images: embedded", len(embedded), dict(reasons))
