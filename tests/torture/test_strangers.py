"""Run folders, weights and parts from strangers: they end in a message, run nothing, write nothing elsewhere."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from pipeline.features.parts import check_part, part_name
from pipeline.files import digest_bytes

from . import jobs
from .children import run
from .conftest import Ground, Tally

Begin = Callable[[str], Tally]
MUTATIONS = 500
SEED = 20_260_104
NUMBERS, TEXTS = (
    (None, True, -1, 0, 10**30, 1e308),
    ("", "x" * 100_000, "../../etc/passwd", "/dev/zero", "\x00", "\udcff"),
)
ODD = (*NUMBERS, *TEXTS, "os.system", [], {}, [[]], {"a": {}})


def mutate_json(value: Any, draw: random.Random) -> Any:
    """Another value somewhere in a tree, or a missing or an additional key."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(sorted(value))
        how = draw.random()
        if how < 0.1:
            return {name: item for name, item in value.items() if name != key}
        if how < 0.2:
            return {**value, "more": draw.choice(ODD)}
        return {**value, key: mutate_json(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        place = draw.randrange(len(value))
        return [*value[:place], mutate_json(value[place], draw), *value[place + 1 :]]
    return draw.choice(ODD)


def mutate_file(path: Path, draw: random.Random) -> None:
    """Change JSON by its structure, anything by its bytes; sometimes by a link or a folder in its place."""
    data = path.read_bytes()
    how = draw.random()
    if path.suffix == ".json" and how < 0.7:
        path.write_text(json.dumps(mutate_json(json.loads(data), draw)))
    elif how < 0.05:
        path.unlink()
    elif how < 0.08:
        path.unlink()
        path.mkdir()
    elif how < 0.11:
        path.unlink()
        path.symlink_to("/dev/zero")
    elif how < 0.3:
        path.write_bytes(data[: draw.randrange(len(data))])
    else:
        # Most of a weights file is numbers; its header, which tells what they are, comes first.
        place = draw.randrange(min(len(data), 400)) if draw.random() < 0.7 else draw.randrange(len(data))
        length = draw.choice((1, 1, 8, 200))
        path.write_bytes(data[:place] + draw.randbytes(length) + data[place + length :])


def tree_of(folder: Path) -> dict[str, bytes]:
    """All files below a folder with the digests of their contents."""
    return {str(path): digest_bytes(path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file()}


def use_strange_runs_job(runs: list[str], images: list[str], place: str) -> dict[str, Any]:
    """Mutate each run in turn, load it and predict; how each ended.

    Raises:
        Exception: anything but an error of this program's own.
    """
    from pipeline import load_run
    from pipeline.errors import PipelineError

    draw, ends = random.Random(SEED), {"message": 0, "predicted": 0}
    strange = Path(place) / "runs" / "strange"
    os.chdir(place)
    for number in range(MUTATIONS):
        shutil.rmtree(strange, ignore_errors=True)
        shutil.copytree(runs[number % len(runs)], strange)
        victims = [
            path for path in sorted(strange.iterdir()) if path.suffix in (".json", ".safetensors", ".skops", ".yaml")
        ]
        mutate_file(draw.choice(victims), draw)
        before = tree_of(strange)
        try:
            list(load_run(strange, [f"cache.dir={place}/cache"]).predict([Path(image) for image in images]))
            ends["predicted"] += 1
        except PipelineError:
            ends["message"] += 1
        assert tree_of(strange) == before
    return ends


def test_strange_run_folders_end_in_a_message(ground: Ground, tmp_path: Path, tally: Begin) -> None:
    count = tally("run folder of a stranger")
    shutil.copytree(ground.folder / "cache", tmp_path / "cache")
    settings = ground.settings(tmp_path / "cache")
    for kind in ("logistic", "mlp", "random_forest"):
        ground.run(jobs.train_job, [*settings, f"head.kind={kind}", "head.mlp.epochs=2", f"runs.name={kind}"])
    runs = [str(path) for path in sorted((tmp_path / "runs").glob("[!.]*"))]
    assert len(runs) == 3
    images = [str(next(ground.root.rglob("*.jpg")))]
    place = tmp_path / "place"
    place.mkdir()
    outside = tree_of(ground.root), tree_of(tmp_path / "runs")
    told = run(use_strange_runs_job, runs, images, str(place), note=ground.note())
    assert told["exit"] == 0, told
    assert told["result"]["message"] > MUTATIONS // 3
    assert (tree_of(ground.root), tree_of(tmp_path / "runs")) == outside
    assert {path.name for path in place.iterdir()} <= {"runs", "cache"}
    count.tries = MUTATIONS


KEY = "0123456789abcdef"


def strange_part(make: Callable[[h5py.File], None]) -> bytes:
    """The bytes of an HDF5 file that says it is a part of `KEY`."""
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.attrs["key"] = np.bytes_(KEY)
        file["digest"] = np.zeros((3, 16), np.uint8)
        make(file)
    return buffer.getvalue()


def external_link(file: h5py.File) -> None:
    """Features in another file."""
    file["features"] = h5py.ExternalLink("/etc/hostname", "features")


def external_storage(file: h5py.File) -> None:
    """Features whose bytes are another file's."""
    file.create_dataset("features", (3, 4), np.float32, external=[("/etc/hostname", 0, 48)])


def virtual(file: h5py.File) -> None:
    """Features assembled from another file."""
    layout = h5py.VirtualLayout((3, 4), np.float32)
    layout[:] = h5py.VirtualSource("/etc/hostname", "features", (3, 4))
    file.create_virtual_dataset("features", layout)


def endless(file: h5py.File) -> None:
    """Features that take a few bytes in the file, and terabytes in memory."""
    del file["digest"]
    file.create_dataset("features", (10**9, 4096), np.float32, chunks=(1024, 4096))
    file.create_dataset("digest", (10**9, 16), np.uint8, chunks=(1024, 16))


def objects(file: h5py.File) -> None:
    """Features that are texts."""
    file["features"] = np.array([["a"] * 4] * 3, dtype=h5py.string_dtype())


def long_text(file: h5py.File) -> None:
    """A key of variable length, in a heap on which libhdf5 can be led astray."""
    file["features"] = np.ones((3, 4), np.float16)
    file.attrs["key"] = KEY


@pytest.mark.parametrize("make", [long_text, external_link, external_storage, virtual, endless, objects])
def test_strange_parts_are_refused(make: Callable[[h5py.File], None], tally: Begin) -> None:
    count = tally(f"part of a stranger, {make.__name__.replace('_', ' ')}")
    data = strange_part(make)
    assert check_part(part_name(data), data, KEY, None) is not None
    count.tries = 1


def read_mutated_parts_job(part: str, tries: int) -> int:
    """Parts whose name fits their mutated bytes, so that libhdf5 gets to see them; how many were refused."""
    from pipeline.features.parts import part_of

    whole, draw, refused = Path(part).read_bytes(), random.Random(SEED), 0
    for _ in range(tries):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 2, 8))):
            data[draw.randrange(min(len(data), 3000))] ^= 1 << draw.randrange(8)
        if check_part(part_name(data), bytes(data), KEY, None):
            refused += 1
        else:
            part_of(Path(part), bytes(data))
    return refused


def test_mutated_parts_under_a_fitting_name(tmp_path: Path, tally: Begin) -> None:
    count = tally("part mutated, its name made to fit")
    good = strange_part(lambda file: file.create_dataset("features", data=np.ones((3, 4), np.float16)))
    assert check_part(part_name(good), good, KEY, None) is None
    (tmp_path / "part").write_bytes(good)
    told = run(read_mutated_parts_job, str(tmp_path / "part"), 2000, note=tmp_path / "note.json")
    assert told["exit"] == 0, told
    assert told["result"] > 50
    count.tries = 2000
