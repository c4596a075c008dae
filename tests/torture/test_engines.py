"""Ray, Dask and Spark with workers that are killed: nothing lost, nothing wrong; and their rows with a bit changed."""

from __future__ import annotations

import importlib
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from pipeline import Embedder, load_features
from pipeline.backbones import Forward
from pipeline.errors import PipelineError
from pipeline.params import Params
from pipeline.stages import embed
from pipeline.stages.cache import import_features
from tests.conftest import PROJECT
from tests.data.deadly import install_deadly_decoders

from . import jobs
from .conftest import IMAGES, Ground, Tally, read_rows

Begin = Callable[[str], Tally]
MUTATIONS = 2000
SEED = 20_260_103
# When a worker dies: before its batch, in the midst of it, and when its part is there but its rows are not yet.
MOMENTS = ("before", "forward", "after")
UNREADABLE = 2


class MortalEmbedder(Embedder):
    """Dies once at each moment for which there is a file beside the cache, in whichever worker finds it first."""

    def __call__(self, batch: Any) -> Any:
        """As an `Embedder`, if it lives."""
        self._meet("before")
        forward = Forward._forward

        def mortal(*arguments: Any) -> Any:
            features = forward(*arguments)
            self._meet("forward")
            return features

        Forward._forward = mortal  # type: ignore[method-assign]
        try:
            done = super().__call__(batch)
        finally:
            Forward._forward = forward  # type: ignore[method-assign]
        self._meet("after")
        return done

    def _meet(self, moment: str) -> None:
        fate = Path(embed._opened(self._params).store.cache_dir.parent, "fates", moment)
        try:
            fate.unlink()
        except FileNotFoundError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


def recipe(name: str) -> ModuleType:
    """A recipe as a module, its batches of three images."""
    module = importlib.import_module(name)
    module.BATCH = 3  # type: ignore[attr-defined]
    return module


@pytest.fixture
def job(ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Params, str, str]]:
    """Params, a list of images of which one occurs twice and two cannot be read, and a folder for rows."""
    monkeypatch.setenv("PYTHONPATH", f"{PROJECT}:{PROJECT / 'recipes'}")
    monkeypatch.syspath_prepend(PROJECT / "recipes")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    (tmp_path / "fates").mkdir()
    for moment in MOMENTS:
        (tmp_path / "fates" / moment).touch()
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 this is no photograph")
    paths = sorted(str(path) for path in ground.root.rglob("*.jpg"))
    lines = [*paths, paths[0], str(tmp_path / "broken.jpg"), str(tmp_path / "gone.jpg")]
    (tmp_path / "images.txt").write_text("\n".join(lines) + "\n")
    yield (
        jobs.params_of(ground.settings(tmp_path / "cache", "extract.workers=1")),
        str(tmp_path / "images.txt"),
        str(tmp_path / "rows"),
    )
    embed._opened.cache_clear()


def judge(ground: Ground, count: Tally, params: Params, rows: str) -> None:
    """Hold the shared cache and the rows against the uninterrupted run, and the ledger of the whole job."""
    cache = params.cache.dir
    assert not list((cache.parent / "fates").iterdir()), "all died who were to die"
    count.tries += len(MOMENTS)
    ground.judge(cache, count, complete=True)
    told = import_features(params, [Path(rows)], jobs.silent)
    assert (told["rows"], told["imported"], told["unreadable"]) == (IMAGES + 1 + UNREADABLE, 0, UNREADABLE)
    # Rows alone make the same cache elsewhere.
    other = params.model_copy(update={"cache": params.cache.model_copy(update={"dir": cache.parent / "other"})})
    assert import_features(other, [Path(rows)], jobs.silent)["imported"] == IMAGES
    ground.judge(cache.parent / "other", count, complete=True)
    assert read_rows(cache.parent / "other") == read_rows(cache)
    assert ground.run(jobs.extract_job, ground.settings(cache))["result"]["forwarded"] == 0
    assert len(load_features(params)) == IMAGES


def test_ray_workers_killed(ground: Ground, job: tuple[Params, str, str], tally: Begin) -> None:
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    count = tally("Ray workers killed")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        recipe("ray_extract").extract(*job, embedder=MortalEmbedder)
    finally:
        ray.shutdown()
    judge(ground, count, job[0], job[2])


def test_dask_workers_killed(ground: Ground, job: tuple[Params, str, str], tally: Begin) -> None:
    distributed = pytest.importorskip("distributed")
    pytest.importorskip("pandas")
    count = tally("Dask workers killed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        done = recipe("dask_extract").extract(client, *job, embedder=MortalEmbedder)
    assert done == IMAGES + 1 + UNREADABLE
    judge(ground, count, job[0], job[2])


def test_an_image_that_kills_its_worker_is_found_though_others_come_between(
    ground: Ground, job: tuple[Params, str, str], tmp_path: Path, tally: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, images, _ = job
    count = tally("an image that kills its worker")
    install_deadly_decoders(tmp_path, monkeypatch)
    contents = [Path(path).read_bytes() for path in Path(images).read_text().splitlines()[:6]]
    batches = [[*contents[:2], b"DEADLY crash", contents[2]], contents[3:]]
    (tmp_path / "job").write_bytes(pickle.dumps((Embedder(params), batches)))
    code = (
        "import pickle, sys; from pathlib import Path\n"
        "embedder, batches = pickle.loads(Path(sys.argv[1]).read_bytes())\n"
        "print(*map(bool, embedder({'bytes': batches[int(sys.argv[2])]})['reason']))"
    )
    ends = []
    for batch in (0, 1, 0):
        worker = [sys.executable, "-c", code, str(tmp_path / "job"), str(batch)]
        done = subprocess.run(worker, capture_output=True, text=True, timeout=240, check=False)
        ends.append((done.returncode, done.stdout.split()))
    assert ends[0][0] == -signal.SIGABRT and ends[1] == (0, ["False"] * 3)
    assert ends[2] == (0, ["False", "False", "True", "False"])
    assert not list((params.cache.dir / "journal").iterdir())
    count.tries += 1
    ground.judge(params.cache.dir, count, complete=False)


def test_an_import_of_mutated_rows_takes_what_is_true_or_nothing(
    ground: Ground, job: tuple[Params, str, str], tmp_path: Path, tally: Begin
) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    params, images, _ = job
    out = Embedder(params)({"path": Path(images).read_text().splitlines()})
    pq.write_table(pa.table({**out, "features": list(out["features"])}), tmp_path / "whole.parquet", compression="none")
    whole, draw, count = (tmp_path / "whole.parquet").read_bytes(), random.Random(SEED), tally("a bit of rows flipped")
    file, taken = tmp_path / "mutated.parquet", 0
    cache = params.cache.dir
    while count.tries < MUTATIONS:
        changed = bytearray(whole)
        for _ in range(draw.choice((1, 1, 8))):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        file.write_bytes(changed)
        for folder in cache.glob("*-*"):
            for part in folder.glob("part-*"):
                part.unlink()
        count.tries += 1
        try:
            import_features(params, [file], jobs.silent)
        except PipelineError:
            assert not read_rows(cache)
        else:  # what changed says nothing of a row
            taken += 1
            ground.judge(cache, count, complete=True)
    assert taken < MUTATIONS / 4
    shutil.rmtree(cache)
