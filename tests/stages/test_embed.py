"""Batches of images through one picklable function: the same digests and features, however the images are given."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import Embedder
from pipeline.backbones import Forward
from pipeline.errors import CacheError, DataError, UsageError
from pipeline.features.inventory import key_folders
from pipeline.features.parts import Proofs, part_names, stored_rows
from pipeline.features.sealed import checksum
from pipeline.files import digest_bytes
from pipeline.params import Params, load_params
from pipeline.stages import embed
from pipeline.stages.cache import import_features
from pipeline.stages.open import load_features

from .conftest import FAST, write_images

Make = Callable[..., Params]
FLOAT32 = "extract.precision=float32"


@pytest.fixture(autouse=True)
def nothing_open() -> Iterator[None]:
    embed._opened.cache_clear()
    yield
    embed._opened.cache_clear()


@pytest.fixture
def make_params(make_params: Make) -> Make:
    """In the precision that need not be tried for each cache anew."""
    return partial(make_params, FLOAT32)


@pytest.fixture
def paths(root: Path) -> list[str]:
    return [str(path) for path in sorted(root.rglob("*.jpg"))]


def rows_of(out: dict[str, Any]) -> list[tuple[str, bytes, str]]:
    return [
        (digest, row.tobytes(), reason)
        for digest, row, reason in zip(out["digest"], out["features"], out["reason"], strict=True)
    ]


def test_bytes_paths_and_urls_give_the_rows_of_a_plain_extract(
    make_params: Make, run_extract: Callable[..., dict[str, Any]], paths: list[str], root: Path, tmp_path: Path
) -> None:
    fsspec = pytest.importorskip("fsspec")
    run_extract()
    table = load_features(make_params())
    expected = {
        digest.tobytes().hex(): row.tobytes() for digest, row in zip(table.digests, table.features, strict=True)
    }
    memory = fsspec.filesystem("memory")
    urls = [f"memory://engine/{Path(path).name}" for path in paths]
    for path, url in zip(paths, urls, strict=True):
        memory.pipe(url, Path(path).read_bytes())
    batches: list[dict[str, Any]] = [
        {"bytes": [Path(path).read_bytes() for path in paths]},
        {"path": [*paths[:12], *(Path(path).relative_to(root) for path in paths[12:])]},
        {"path": np.array(urls, object)},
        {"bytes": [Path(paths[0]).read_bytes(), *[None] * 23], "path": ["s3://name/only", *paths[1:]]},
    ]
    for number, batch in enumerate(batches):
        elsewhere = make_params(f"cache.dir={tmp_path / str(number)}", "cache.dtype=float16")
        out = Embedder(elsewhere)(batch)
        assert dict(zip(out["digest"], map(bytes, out["features"]), strict=True)) == expected
        assert set(out["reason"]) == {""} and out["features"].dtype == np.float32


def test_what_the_cache_holds_is_not_computed_and_what_is_new_is_published(
    make_params: Make,
    run_extract: Callable[..., dict[str, Any]],
    paths: list[str],
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forwarded: list[int] = []
    forward = Forward.__call__
    monkeypatch.setattr(
        Forward, "__call__", lambda self, pixels: forwarded.append(len(pixels)) or forward(self, pixels)
    )
    embedder = Embedder(make_params())
    first = embedder({"path": paths[:10]})
    assert sum(forwarded) == 10
    again = embedder({"bytes": [Path(path).read_bytes() for path in paths[:14]]})
    assert sum(forwarded) == 14 and rows_of(again)[:10] == rows_of(first)
    assert embed._opened.cache_info().misses == 1, "opened once"
    assert run_extract()["reused"] == 14, "parts for everybody"


def test_it_pickles_without_its_backbone_and_runs_in_another_process(
    make_params: Make, paths: list[str], tmp_path: Path
) -> None:
    embedder = Embedder(make_params())
    here = embedder({"path": paths[:3]})
    data = pickle.dumps(embedder)
    assert len(data) < 10_000
    (tmp_path / "embedder").write_bytes(data)
    code = (
        "import json, pickle, sys; from pathlib import Path\n"
        f"out = pickle.loads(Path({str(tmp_path / 'embedder')!r}).read_bytes())({{'path': {paths[:3]!r}}})\n"
        "print(json.dumps([list(out['checksum']), list(out['key'])]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert json.loads(done.stdout) == [list(here["checksum"]), list(here["key"])]


def test_unreadable_images_are_rows_with_a_reason_and_the_ledger_adds_up(
    make_params: Make, paths: list[str], tmp_path: Path
) -> None:
    (tmp_path / "broken.jpg").write_bytes(Path(paths[0]).read_bytes()[:200])
    good = Path(paths[1]).read_bytes()
    unreadable: list[Any] = [
        *(str(tmp_path / "broken.jpg"), str(tmp_path / "gone.jpg"), str(tmp_path), "nul\0.jpg", None, float("nan"), ""),
        *("nosuch://bucket/1.jpg", "memory://engine/gone.jpg", "https://me:secret@host/1.jpg"),
    ]
    batch = {
        "path": [*unreadable, paths[1], "good.jpg", "x" * 70_000],
        "bytes": [*[None] * (len(unreadable) + 1), good, good],
        "label": list(range(len(unreadable) + 3)),
    }
    pytest.importorskip("fsspec")
    out = Embedder(make_params())(batch)
    assert out["label"] == batch["label"] and "bytes" not in out
    bad = np.array([bool(reason) for reason in out["reason"]])
    assert bad.tolist() == [True] * len(unreadable) + [False] * 3
    assert np.isnan(out["features"][bad]).all() and np.isfinite(out["features"][~bad]).all()
    assert out["digest"][0] == digest_bytes((tmp_path / "broken.jpg").read_bytes()).hex()
    assert not any(out["digest"][1 : len(unreadable)]) and set(out["digest"][~bad]) == {digest_bytes(good).hex()}
    for word, reason in (("truncated", 0), ("No such file", 1), ("neither bytes nor a path", 4), ("known", 7)):
        assert word in out["reason"][reason]
    assert not any("secret" in reason for reason in out["reason"])
    assert out["checksum"].tolist() == [
        checksum(*row) for row in zip(out["key"], out["digest"], out["features"], out["reason"], strict=True)
    ]


def test_features_that_are_no_numbers_are_rows_with_a_reason(
    make_params: Make, paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = Forward.__call__

    def overflow(self: Forward, pixels: Any) -> Any:
        features = forward(self, pixels)
        features[1] = np.inf
        return features

    monkeypatch.setattr(Forward, "__call__", overflow)
    out = Embedder(make_params())({"path": paths[:4]})
    assert [bool(reason) for reason in out["reason"]] == [False, True, False, False]
    assert "overflows" in out["reason"][1]


def test_a_data_frame_comes_back_as_one(make_params: Make, paths: list[str]) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"path": paths[:3], "bytes": None, "label": [1, 2, 3]}, index=[7, 8, 9])
    out = Embedder(make_params())(frame)
    assert list(out.columns) == ["path", "label", "digest", "features", "reason", "key", "checksum"]
    assert out.index.tolist() == [7, 8, 9] and out["features"].iloc[0].dtype == np.float32


def test_a_batch_may_be_empty_but_not_without_images(make_params: Make) -> None:
    embedder = Embedder(make_params())
    out = embedder({"bytes": []})
    assert out["features"].shape == (0, 1024) or len(out["features"]) == 0
    with pytest.raises(DataError, match="label"):
        embedder({"label": [1]})
    with pytest.raises(UsageError, match="One pooling"):
        Embedder(make_params("backbone.pooling=[avg, max]"))({"bytes": []})
    with pytest.raises(CacheError, match="cannot be written"):
        Embedder(make_params("cache.dir=/proc/nothing"))({"bytes": [b"image"]})


# -- rows that come back ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The cache of another machine, and its rows: a dozen images, one of them twice, and one unreadable."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "params.yaml").touch()
    params = load_params(folder / "params.yaml", [*FAST, FLOAT32, f"cache.dir={folder / 'cache'}"])
    paths = [str(path) for path in sorted(write_images(folder).rglob("*.jpg"))[:12]]
    return folder / "cache", Embedder(params)({"path": [*paths, paths[0], "gone.jpg"]})


@pytest.fixture
def written(elsewhere: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """These rows as Parquet."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "rows").mkdir()
    columns = elsewhere[1] | {"features": list(elsewhere[1]["features"])}
    pq.write_table(pa.table(columns), tmp_path / "rows" / "0.parquet")
    return tmp_path / "rows"


def stored(params: Params) -> dict[bytes, bytes]:
    """Content to the bytes of its features, of all whole parts."""
    return {
        bytes(digest): row.tobytes()
        for folder in key_folders(params.cache.dir)
        for name in part_names(folder)
        for part in [Proofs(folder).open(folder / name, folder.name[-16:], None)]
        for digest, row in zip(part.digests, stored_rows((folder / name).read_bytes()), strict=True)
    }


def silent(_line: str) -> None:
    pass


def test_imported_rows_are_those_of_a_plain_extract(
    make_params: Make, run_extract: Callable[..., dict[str, Any]], written: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    params = make_params(f"cache.dir={tmp_path / 'imported'}")
    summary = import_features(params, [written], lines.append)
    assert lines == ["14 rows = 12 imported + 1 there already + 1 unreadable"]
    assert summary["keys"] == [run_extract()["key"]]
    plain, imported = stored(make_params()), stored(params)
    assert len(imported) == 12 and imported.items() <= plain.items()
    again = import_features(params, [written / "0.parquet"], silent)
    assert (again["imported"], again["present"]) == (0, 13)
    assert run_extract(f"cache.dir={tmp_path / 'imported'}")["forwarded"] == 12


@pytest.mark.parametrize("kind", ["list<double>", "fixed_size_list", "large_list"])
def test_whichever_list_an_engine_wrote_is_taken(
    make_params: Make, elsewhere: tuple[Path, Any], written: Path, tmp_path: Path, kind: str
) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pq.read_table(written / "0.parquet")
    width = len(table["features"][0])
    kinds = {
        "list<double>": pa.list_(pa.float64()),
        "fixed_size_list": pa.list_(pa.float32(), width),
        "large_list": pa.large_list(pa.float32()),
    }
    features = pa.array(table["features"].to_pylist(), kinds[kind])
    place = table.column_names.index("features")
    pq.write_table(table.set_column(place, "features", features), tmp_path / "other.parquet", row_group_size=5)
    params = make_params(f"cache.dir={tmp_path / 'imported'}")
    assert import_features(params, [tmp_path / "other.parquet"], silent)["imported"] == 12
    assert stored(params) == stored(make_params(f"cache.dir={elsewhere[0]}"))


@pytest.mark.parametrize("column", ["key", "digest", "features", "reason", "checksum"])
def test_a_value_that_changed_is_refused_and_nothing_enters(
    make_params: Make, written: Path, tmp_path: Path, column: str
) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    whole = pq.read_table(written / "0.parquet")
    values = whole[column].to_pylist()
    values[3] = [*values[3][:-1], 0.5] if column == "features" else values[3][:-1] + "x" if values[3] else "gone"
    changed = whole.set_column(whole.column_names.index(column), column, pa.array(values, whole[column].type))
    pq.write_table(changed, written / "1.parquet")
    params = make_params(f"cache.dir={tmp_path / 'imported'}")
    with pytest.raises(CacheError, match="row 3 does not match its checksum"):
        import_features(params, [written], silent)
    assert not stored(params)


def test_rows_of_an_unknown_key_are_refused(
    make_params: Make, elsewhere: tuple[Path, Any], written: Path, tmp_path: Path
) -> None:
    params = make_params(f"cache.dir={tmp_path / 'imported'}", "transform.resize=48")
    with pytest.raises(CacheError, match="not known here"):
        import_features(params, [written], silent)
    assert not stored(params)
    # What lies here already is known, whatever the params.
    other = make_params(f"cache.dir={elsewhere[0]}", "transform.resize=48")
    assert import_features(other, [written], silent)["present"] == 13


def test_what_holds_no_rows_is_refused(make_params: Make, written: Path, tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(CacheError, match="no column digest"):
        import_features(make_params(), [tmp_path / "other.parquet"], silent)
    (tmp_path / "no.parquet").write_bytes(b"PAR1")
    (tmp_path / "empty").mkdir()
    for file in ("no.parquet", "empty"):
        with pytest.raises(DataError):
            import_features(make_params(), [tmp_path / file], silent)
