"""Four writers, a reader and a garbage collector at once on one cache; one of the writers is killed now and then."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from . import jobs
from .children import spawn
from .conftest import Ground, Tally

WRITERS, ROUNDS = 4, 12


def overlapping_folders(root: Path, target: Path) -> list[Path]:
    """Two thirds of the images for each writer, under names of its own."""
    images = sorted(root.rglob("*.jpg"))
    folders = []
    for writer in range(WRITERS):
        for number, image in enumerate(images):
            if number % 6 not in ((writer, writer + 1) if writer % 2 else (writer + 3, writer + 4)):
                copy = target / str(writer) / image.parent.name / f"{writer}-{image.name}"
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(image, copy)
        folders.append(target / str(writer))
    return folders


def leave_garbage(cache: Path) -> None:
    """Files that a collector may remove while others write: an old leftover and a damaged part."""
    for folder in cache.glob("mobilenet*-*"):
        for name in (".tmp-1-abcd-part", "damaged-part-0.h5"):
            (folder / name).write_bytes(b"garbage")
            os.utime(folder / name, (1e9, 1e9))


def test_writers_a_reader_and_a_collector_side_by_side(
    ground: Ground, reference: Path, tmp_path: Path, tally: Callable[[str], Tally]
) -> None:
    count, draw = tally(f"{WRITERS} writers, a reader and a gc at once, kills between"), random.Random(1)
    folders = overlapping_folders(ground.root, tmp_path / "folders")
    for number in range(ROUNDS):
        cache, stop = tmp_path / f"{number}" / "cache", tmp_path / f"stop-{number}"
        cache.mkdir(parents=True)
        settings = [ground.settings(cache, root=folder) for folder in folders]
        reader = spawn(
            jobs.read_often_job, ground.settings(cache), str(reference), str(stop), note=tmp_path / "reader.json"
        )
        collector = spawn(jobs.collect_often_job, ground.settings(cache), str(stop), note=tmp_path / "gc.json")
        writers = [spawn(jobs.extract_job, each, note=tmp_path / f"{i}.json") for i, each in enumerate(settings)]
        if number % 2:
            time.sleep(draw.uniform(0.2, 1.0))
            leave_garbage(cache)
            writers[0].kill()
        for writer in writers:
            writer.join(240)
        assert [writer.exitcode for writer in writers[1:]] == [0, 0, 0]
        ground.run(jobs.extract_job, settings[0])
        stop.touch()
        for other in (reader, collector):
            other.join(240)
            assert other.exitcode == 0
        count.tries += 1
        ground.judge(cache, count, complete=True)
        assert ground.run(jobs.extract_job, ground.settings(cache))["result"]["forwarded"] == 0
        ground.run(jobs.verify_job, ground.settings(cache))
        # No lock is stale: a collector alone in the cache is not refused.
        assert ground.run(jobs.collect_job, ground.settings(cache))["result"] is None
        shutil.rmtree(tmp_path / f"{number}")
