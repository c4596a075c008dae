"""Small parts are merged in passing: killed at it, read meanwhile, or with the disk full, no row is lost or wrong."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from . import jobs
from .children import Fate, fates, spawn
from .conftest import IMAGES, Ground, Tally, mounted

Begin = Callable[[str], Tally]
MERGES, TIMES, DISKS, SEED = 60, 25, 24, 20_260_102


@pytest.fixture
def small_parts(ground: Ground, tmp_path: Path) -> Path:
    """A cache in which every row has a part of its own."""
    cache = tmp_path / "small" / "cache"
    shutil.copytree(ground.folder / "cache", cache)
    assert ground.run(jobs.split_job, ground.settings(cache))["result"] == IMAGES
    return cache


def test_killed_while_merging(ground: Ground, small_parts: Path, tmp_path: Path, tally: Begin) -> None:
    count, phases, cache = tally("killed while merging"), Counter[str](), tmp_path / "cache"
    settings = ground.settings(cache)
    shutil.copytree(small_parts, cache)
    whole = ground.run(jobs.merge_job, settings)
    assert whole["result"] < IMAGES
    # Most events are those of opening; the last ones merge.
    late = [Fate(at=max(1, whole["events"] - fate.at)) for fate in fates(SEED, 2 * MERGES // 3, 80)]
    for fate in [*fates(SEED, MERGES - len(late), whole["events"]), *late]:
        shutil.rmtree(cache)
        shutil.copytree(small_parts, cache)
        phases[ground.run(jobs.merge_job, settings, fate=fate)["phase"]] += 1
        count.tries += 1
        ground.judge(cache, count, complete=True)
        if count.tries % 4 == 0:
            assert ground.run(jobs.extract_job, settings)["result"]["forwarded"] == 0
            ground.run(jobs.verify_job, settings)
    assert phases["merge"] > MERGES // 4, phases


def test_read_while_parts_are_merged(ground: Ground, small_parts: Path, reference: Path, tally: Begin) -> None:
    count, settings, stop = (
        tally("read while parts are merged"),
        ground.settings(small_parts),
        reference.parent / "stop",
    )
    reader = spawn(jobs.read_often_job, settings, str(reference), str(stop), note=reference.parent / "reader.json")
    extractor = spawn(jobs.extract_job, settings, note=reference.parent / "extract.json")
    ground.run(jobs.split_and_merge_job, settings, TIMES)
    stop.touch()
    for process in (reader, extractor):
        process.join(240)
        assert process.exitcode == 0
    count.tries += TIMES
    ground.judge(small_parts, count, complete=True)
    assert ground.run(jobs.extract_job, settings)["result"]["forwarded"] == 0


def test_a_full_disk_while_merging(ground: Ground, small_parts: Path, tmp_path: Path, tally: Begin) -> None:
    count = tally("disk full while merging")
    with mounted(tmp_path / "disk", "600k") as disk:
        cache, ballast, few = disk / "cache", disk / "ballast", 0
        (disk / "params.yaml").touch()
        for number in range(DISKS):
            shutil.copytree(small_parts, cache)
            ballast.write_bytes(bytes(max(shutil.disk_usage(disk).free - 8192 * number, 0)))
            few += ground.run(jobs.merge_job, ground.settings(cache))["result"] < IMAGES
            count.tries += 1
            ground.judge(cache, count, complete=True)
            ballast.unlink()
            assert ground.run(jobs.merge_job, ground.settings(cache))["result"] < IMAGES
            ground.judge(cache, count, complete=True)
            shutil.rmtree(cache)
        assert 0 < few < DISKS
