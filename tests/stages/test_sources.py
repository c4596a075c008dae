"""Wherever the same images lie, their features are computed once, and every verb works on them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pipeline import load_run
from pipeline.artifacts import read_metrics, read_predictions
from pipeline.params import Params
from pipeline.stages.evaluate import evaluate_run
from pipeline.stages.finetune import finetune
from pipeline.stages.open import open_cache
from pipeline.stages.train_head import train_head
from tests.data.test_archive import make_tar

from .conftest import FAST

Extract = Callable[..., dict[str, Any]]
MakeParams = Callable[..., Params]
QUICK = ("head.logistic.strengths=3", "head.folds=2", "finetune.epochs=1", "finetune.batch_size=8")
KINDS = ("table", "tar", "shards", "zip", "parquet", "bucket")


def files_of(root: Path) -> list[tuple[str, bytes]]:
    return [(str(path.relative_to(root)), path.read_bytes()) for path in sorted(root.rglob("*.jpg"))]


def as_table(root: Path, folder: Path) -> Path:
    rows = [f"{name},{name.split('/')[1]},{name.split('/')[0]}\n" for name, _ in files_of(root)]
    (folder / "labels.csv").write_text("path,label,split\n" + "".join(rows))
    return folder / "labels.csv"


def as_shards(root: Path, folder: Path) -> str:
    for split in ("train", "val"):
        files = [(name.split("/"), data) for name, data in files_of(root) if name.startswith(split)]
        pairs = [[(f"{name[:2]}.jpg", data), (f"{name[:2]}.cls", label.encode())] for (_, label, name), data in files]
        make_tar(folder / f"{split}-0.tar", [item for pair in pairs for item in pair])
    return f"{folder}/{{train,val}}-0.tar"


def as_zip(root: Path, folder: Path) -> Path:
    with zipfile.ZipFile(folder / "photos.zip", "w") as zipped:
        for name, data in files_of(root):
            zipped.writestr(f"photos/{name}", data)
    return folder / "photos.zip"


def as_parquet(root: Path, folder: Path) -> Path:
    pytest.importorskip("pyarrow")
    from tests.data.test_parquet import write

    files = files_of(root)
    columns = {
        "image": [{"bytes": data, "path": name} for name, data in files],
        "label": [int(name.split("/")[1] == "dog") for name, _ in files],
        "split": [name.split("/")[0] for name, _ in files],
    }
    return write(folder / "x.parquet", columns, classes={"label": ["cat", "dog"]}, row_group_size=5)


def as_bucket(root: Path, folder: Path) -> str:
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    for name, data in files_of(root):
        store.pipe_file(f"{folder}/{name}", data)
    return f"memory://{folder}"


def place_of(kind: str, root: Path, folder: Path) -> str:
    """The images of ``root`` again, as another kind of source in ``folder``."""
    folder.mkdir()
    makers: dict[str, Callable[[], Path | str]] = {
        "table": lambda: as_table(root, folder),
        "tar": lambda: make_tar(folder / "all.tar", files_of(root)),
        "shards": lambda: as_shards(root, folder),
        "zip": lambda: as_zip(root, folder),
        "parquet": lambda: as_parquet(root, folder),
        "bucket": lambda: as_bucket(root, folder),
    }
    return str(makers[kind]())


def test_the_same_images_elsewhere_forward_nothing(run_extract: Extract, root: Path, tmp_path: Path) -> None:
    first = run_extract()
    for kind in KINDS:
        if (kind == "parquet" and not find_spec("pyarrow")) or (kind == "bucket" and not find_spec("fsspec")):
            continue
        place = place_of(kind, root, tmp_path / kind)
        again = run_extract(f"data.root={place}", *([f"data.images={root}"] if kind == "table" else []))
        assert (again["key"], again["images"], again["reused"], again["forwarded"]) == (first["key"], 24, 24, 0)


@pytest.mark.parametrize("kind", ["shards", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k != "shards")])
def test_every_verb_takes_them(
    kind: str, run_extract: Extract, make_params: MakeParams, root: Path, tmp_path: Path
) -> None:
    run_extract()
    place = place_of(kind, root, tmp_path / "other")
    there = [f"data.root={place}", *([f"data.images={root}"] if kind == "table" else [])]
    assert run_extract(*there)["forwarded"] == 0
    params = make_params(*QUICK, *there)
    here, elsewhere = (train_head(p, lambda _line: None) for p in (make_params(*QUICK), params))
    assert elsewhere["metrics"] == here["metrics"] and elsewhere["n"] == 8
    run = load_run(elsewhere["run"])
    assert run.params == params.model_copy(update={"runs": run.params.runs})
    assert evaluate_run(run).metrics == read_metrics(Path(here["run"])).metrics
    recomputed = open_cache(params).verify(sample=3, seed=0)
    assert len(recomputed.paths) == 3 and not recomputed.problems
    paths = read_predictions(run.folder).paths
    prefix = {"tar": "all.tar/", "zip": "photos.zip/photos/", "parquet": "x.parquet/"}.get(kind, "")
    assert all(path.startswith(prefix) for path in paths)
    if kind != "table":  # which does not name its images relative to itself
        predictions = run.predict(place)
        assert len(predictions) == 24 and all(prediction.error is None for prediction in predictions)
        assert len({prediction.path for prediction in predictions}) == 24


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tar", "parquet", "bucket"])
def test_fine_tuning_reads_from_anywhere(
    kind: str, run_extract: Extract, make_params: MakeParams, root: Path, tmp_path: Path
) -> None:
    place = place_of(kind, root, tmp_path / "other")
    run_extract(f"data.root={place}")
    params = make_params(*QUICK, f"data.root={place}", "finetune.image_cache_mb=0")
    train_head(params, lambda _line: None)
    assert finetune(params, lambda _line: None, quiet=True)["n"] == 8


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A bucket of moto's server on this machine."""
    server = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "ACCESS-KEY",
        "AWS_SECRET_ACCESS_KEY": "SECRET-KEY",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    import s3fs

    store = s3fs.S3FileSystem(skip_instance_cache=True)
    store.mkdir("photos")
    yield store
    running.stop()


@pytest.mark.slow
def test_a_bucket_killed_in_the_middle_and_resumed(
    bucket: Any, run_extract: Extract, make_params: MakeParams, root: Path, tmp_path: Path
) -> None:
    for number in range(10):
        for name, data in files_of(root):
            bucket.pipe_file(f"photos/{name[:-4]}-{number}.jpg", data + b"\0" * number)
    places = ("data.root=s3://photos", f"cache.dir={tmp_path / 'cache'}", "extract.part_seconds=0.01")
    options = [item for text in (*FAST, *places) for item in ("-s", text)]
    command = [sys.executable, "-m", "pipeline", "extract", "-p", str(tmp_path / "params.yaml"), *options]
    (tmp_path / "params.yaml").touch()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ.copy())
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache").glob("*/part-*.h5")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    summary = run_extract("data.root=s3://photos")
    assert summary["images"] == 240 and summary["embedded"] + summary["reused"] == 240
    assert summary["reused"] > 0
    again = run_extract("data.root=s3://photos")
    assert again["forwarded"] == 0 and again["images"] == 240
    for file in (tmp_path / "cache").rglob("*"):
        assert not file.is_file() or b"SECRET-KEY" not in file.read_bytes()
