"""Killed at any moment, the next run completes, computes nothing again, and ends with the same bytes."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.finetune.support import tiny_params

from . import jobs
from .children import Fate, fates, fates_of_phases
from .conftest import IMAGES, Ground, Tally

Begin = Callable[[str], Tally]
EXTRACT, CLOCK, TRAIN, BLOCKS, COLLECT, TUNE = 200, 40, 60, 24, 40, 20
EACH_PHASE = 4
SEED = 20_260_101
EARLY = 80  # events before a head is trained


def assert_complete(ground: Ground, settings: list[str], cache: Path, tally: Tally) -> None:
    """Run to the end: only what was not published is computed, and the whole is that of an uninterrupted run."""
    published = ground.judge(cache, tally, complete=False)
    summary = ground.run(jobs.extract_job, settings)["result"]
    assert summary["forwarded"] == IMAGES - len(published)
    assert summary["images"] == summary["embedded"] + summary["reused"] == IMAGES
    ground.judge(cache, tally, complete=True)


def test_extract_killed_at_any_event(ground: Ground, tmp_path: Path, tally: Begin) -> None:
    count, phases, draw = tally("extract killed at an event"), Counter[str](), random.Random(SEED)
    cache = tmp_path / "cache"
    settings = ground.settings(cache)
    each = fates_of_phases(SEED, EACH_PHASE, ground.phases)
    moments = iter([*each, *fates(SEED, 10 * EXTRACT, ground.events)])
    while count.tries < EXTRACT:
        told = ground.run(jobs.extract_job, settings, fate=next(moments))
        if told["exit"] == 0:  # what earlier ones had published left fewer events than this
            shutil.rmtree(cache)
            continue
        count.tries += 1
        phases[told["phase"]] += 1
        ground.judge(cache, count, complete=False)
        if count.tries <= len(each) or draw.random() < 0.4:  # otherwise the next one is killed on top
            assert_complete(ground, settings, cache, count)
            if draw.random() < 0.3:
                ground.run(jobs.verify_job, settings)
            shutil.rmtree(cache)
    assert {"scan", "index update", "weights", "read and decode", "forward", "part write"} <= set(phases), phases


def test_extract_killed_by_the_clock(ground: Ground, tmp_path: Path, tally: Begin) -> None:
    count, draw = tally("extract killed at a time"), random.Random(SEED)
    cache = tmp_path / "cache"
    settings = ground.settings(cache)
    for _ in range(CLOCK):
        count.tries += 1
        ground.run(jobs.extract_job, settings, fate=Fate(seconds=draw.uniform(0.05, 1.0)))
        if count.tries % 4 == 0:
            assert_complete(ground, settings, cache, count)
            ground.run(jobs.verify_job, settings)
            shutil.rmtree(cache)


def test_train_head_by_blocks_killed_at_any_event_starts_again(ground: Ground, tmp_path: Path, tally: Begin) -> None:
    count, phases = tally("train-head by blocks killed at an event"), Counter[str]()
    cache, runs = tmp_path / "cache", tmp_path / "runs"
    shutil.copytree(ground.folder / "cache", cache)
    settings = ground.settings(cache, "head.memory_mb=1")
    whole = ground.run(jobs.train_by_blocks_job, settings)
    # Most events are blocks that are read; among the first ones the file is made.
    for fate in [*fates(SEED, BLOCKS // 2, whole["events"]), *fates(SEED, BLOCKS // 2, EARLY)]:
        if count.tries % 2 == 0:
            for file in cache.glob("*/rows-*.npy"):
                file.unlink()
        phases[ground.run(jobs.train_by_blocks_job, settings, fate=fate)["phase"]] += 1
        count.tries += 1
        if count.tries % 2 == 0:
            assert ground.run(jobs.train_by_blocks_job, settings)["result"] == whole["result"]
            assert len(list(cache.glob("*/*rows-*.npy"))) == 1, "a half file is left"
        ground.judge(cache, count, complete=True)
    assert {"part write", "training"} <= set(phases), phases
    assert all((run / "report.html").exists() for run in runs.glob("[!.]*"))


def test_train_head_killed_at_any_event_publishes_a_whole_run_or_none(
    ground: Ground, tmp_path: Path, tally: Begin
) -> None:
    count, phases = tally("train-head killed at an event"), Counter[str]()
    shutil.copytree(ground.folder / "cache", tmp_path / "cache")
    settings, runs = ground.settings(tmp_path / "cache"), tmp_path / "runs"
    whole = ground.run(jobs.train_job, settings)
    images = [str(path) for path in sorted(ground.root.rglob("*.jpg"))[:3]]
    # Most events are the scan's; the last ones write the run.
    late = [Fate(at=max(1, whole["events"] - fate.at)) for fate in fates(SEED, TRAIN // 2, 40)]
    for fate in [*fates(SEED, TRAIN - len(late), whole["events"]), *late]:
        before = {path.name for path in runs.glob("[!.]*")}
        told = ground.run(jobs.train_job, settings, fate=fate)
        count.tries += told["exit"] == -9
        phases[told["phase"]] += 1
        for name in {path.name for path in runs.glob("[!.]*")} - before:
            assert ground.run(jobs.load_run_job, str(runs / name), images)["result"] == len(images)
    assert ground.run(jobs.train_job, settings)["result"] == whole["result"]
    ground.judge(tmp_path / "cache", count, complete=True)
    assert "run publish" in phases, phases


def test_gc_killed_at_any_event_removes_only_what_can_go(ground: Ground, tmp_path: Path, tally: Begin) -> None:
    count, phases = tally("gc killed at an event"), Counter[str]()
    cache = tmp_path / "cache"
    settings = ground.settings(cache)

    def with_garbage() -> None:
        shutil.rmtree(cache, ignore_errors=True)
        shutil.copytree(ground.folder / "cache", cache)
        (kept,) = cache.glob("*-*")
        old = cache / "resnet18-0123456789abcdef"
        shutil.copytree(kept, old)
        (kept / ".tmp-1-abcd-part").write_bytes(b"left behind")
        for path in [*old.iterdir(), old, kept / ".tmp-1-abcd-part"]:
            os.utime(path, (1e9, 1e9))

    with_garbage()
    events = ground.run(jobs.collect_job, settings)["events"]
    assert not list(cache.glob("resnet18-*"))
    for fate in fates(SEED, COLLECT, events):
        with_garbage()
        told = ground.run(jobs.collect_job, settings, fate=fate)
        count.tries += 1
        phases[told["phase"]] += 1
        for old in cache.glob("resnet18-*"):  # whole, or gone
            assert len(list(old.iterdir())) == len(list(next(cache.glob("mobilenet*")).glob("[!.]*")))
        assert ground.run(jobs.collect_job, settings)["result"] is None
        assert ground.run(jobs.extract_job, settings)["result"]["forwarded"] == 0
        shutil.rmtree(cache / "resnet18-0123456789abcdef", ignore_errors=True)
        ground.judge(cache, count, complete=True)
    assert "gc" in phases, phases


@pytest.mark.parametrize("minutes", [1e-9, 60.0])
def test_a_training_killed_at_any_event_ends_with_the_same_weights(
    ground: Ground, tmp_path: Path, tally: Begin, minutes: float
) -> None:
    count = tally(f"finetune killed, a checkpoint each {'batch' if minutes < 1 else 'epoch'}")
    phases = Counter[str]()
    params = tiny_params(ema=0.9, dropout=0.2, mixup=0.2, checkpoint_minutes=minutes).model_dump_json()
    whole = ground.run(jobs.finetune_job, str(tmp_path / "whole"), params)
    folder = tmp_path / "killed"
    for fate in fates(SEED, TUNE, whole["events"]):
        told = ground.run(jobs.finetune_job, str(folder), params, fate=fate)
        count.tries += 1
        phases[told["phase"]] += 1
        if count.tries % 4 == 0 or told["exit"] == 0:
            count.wrong += ground.run(jobs.finetune_job, str(folder), params)["result"] != whole["result"]
            shutil.rmtree(folder)
    assert "checkpoint" in phases, phases
