"""An object store that stumbles costs time, never a wrong byte; what cannot be read is told and tried again later."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data import stores
from pipeline.data.images import open_given
from pipeline.errors import DataError, ParamsError
from pipeline.params import DataParams, dump_params, load_params

from .test_archive import CLASSES, contents, images_of, make_tar, samples_of
from .test_folder import labels

fsspec = pytest.importorskip("fsspec")
memory = pytest.importorskip("fsspec.implementations.memory")


class Shaky(memory.MemoryFileSystem):  # type: ignore[misc]
    """A store in memory that fails as it is told to; ETags are counted, as a store that is no S3 may do."""

    protocol = "shaky"
    store: dict[str, Any] = {}
    pseudo_dirs: list[str] = [""]
    cachable = False
    etags: Counter[str] = Counter()
    fails: dict[str, list[BaseException]] = {}
    before_read: Any = None
    reads: Counter[str] = Counter()
    with_etags = True

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("shaky://", "memory://"))

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        return self._with_etag(super().info(path, **options))

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        found = super().ls(path, detail=True, **options)
        return [self._with_etag(info) for info in found] if detail else [info["name"] for info in found]

    def find(
        self, path: str, maxdepth: Any = None, withdirs: bool = False, detail: bool = False, **options: Any
    ) -> Any:
        found = super().find(path, maxdepth, withdirs, detail=True, **options)
        return {name: self._with_etag(info) for name, info in found.items()} if detail else sorted(found)

    def _with_etag(self, info: dict[str, Any]) -> dict[str, Any]:
        plain = {key: value for key, value in info.items() if key != "created"}
        return {**plain, "ETag": f'"{self.etags[info["name"]]}"'} if self.with_etags else plain

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        name = self._strip_protocol(path)
        self.reads[name] += 1
        if Shaky.before_read:
            Shaky.before_read(self, name)
        if self.fails.get(name):
            error = self.fails[name].pop(0)
            if isinstance(error, Cut):
                return bytes(super().cat_file(path, start=start, end=end, **options))[:2]
            raise error
        return bytes(super().cat_file(path, start=start, end=end, **options))

    def put(self, name: str, data: bytes) -> None:
        self.pipe_file(name, data)
        self.etags[self._strip_protocol(name)] += 1


class Cut(Exception):
    """The connection ends early, and nobody notices."""


@pytest.fixture
def shaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shaky]:
    """A store at shaky://bucket/photos with the images of `CLASSES`."""
    fsspec.register_implementation("shaky", Shaky, clobber=True)
    monkeypatch.setattr(stores, "FIRST_WAIT", 0.001)
    for name, value in {"store": {}, "pseudo_dirs": [""], "etags": Counter(), "fails": {}, "reads": Counter(),
                        "before_read": None, "with_etags": True}.items():  # fmt: skip
        monkeypatch.setattr(Shaky, name, value)
    store = Shaky()
    for name, data in CLASSES:
        store.put(f"/bucket/photos/{name}", data)
    return store


ROOT = "shaky://bucket/photos"
EXPECTED = dict(CLASSES)


def test_class_folders_in_a_store(shaky: Shaky, tmp_path: Path) -> None:
    images = images_of(ROOT, tmp_path)
    assert labels(images.samples) == {name: name[:4] for name in EXPECTED}
    assert contents(images) == EXPECTED and not images.failures
    assert images.path(0) == f"{ROOT}/ants/0.jpg" and images.position_of(f"{ROOT}/bees/2.jpg") == 5
    images.remember()
    again = images_of(ROOT, tmp_path)
    assert again.known.all() and shaky.reads.total() == 6
    shaky.put("/bucket/photos/ants/1.jpg", b"ants !")  # as long as before
    assert np.flatnonzero(~images_of(ROOT, tmp_path).known).tolist() == [1]


def test_what_can_pass_is_tried_again_and_what_cannot_is_told(shaky: Shaky, tmp_path: Path) -> None:
    first, *_ = names = [f"/bucket/photos/{name}" for name in EXPECTED]
    shaky.fails |= {
        names[0]: [TimeoutError("slow down"), ConnectionResetError(), ValueError("odd")],
        names[1]: [Cut()] * 3,
        names[2]: [Cut()] * 9,
        names[3]: [PermissionError(13, "no")],
        names[4]: [OSError("503")] * 9,
    }
    images = images_of(ROOT, tmp_path)
    images.read_unknown(quiet=True)
    assert np.flatnonzero(images.known).tolist() == [0, 1, 5] and sorted(images.failures) == [2, 3, 4]
    assert "cut short" in images.failures[2] and "after 4 attempts (OSError: 503)" in images.failures[4]
    assert shaky.reads[names[3]] == 1
    shaky.fails.clear()
    again = images_of(ROOT, tmp_path)
    again.read_unknown(quiet=True)
    assert again.known.all() and (again.digests[images.known] == images.digests[images.known]).all()
    assert shaky.reads[first] == 4


def test_a_store_that_is_away_is_not_waited_for_by_everyone(shaky: Shaky, tmp_path: Path) -> None:
    for number in range(60):
        shaky.put(f"/bucket/photos/ants/n{number}.jpg", b"x")
    images = images_of(ROOT, tmp_path)
    Shaky.before_read = lambda _store, _name: (_ for _ in ()).throw(OSError("away"))
    images.read_unknown(quiet=True)
    assert len(images.failures) == 66 and shaky.reads.total() < 66 + 3 * (stores.GIVEN_UP_AFTER + stores.READS_AT_ONCE)


def test_an_object_that_changes_while_it_is_read(shaky: Shaky, tmp_path: Path) -> None:
    target = "/bucket/photos/ants/1.jpg"

    def change_once(store: Shaky, name: str) -> None:
        if name == target and store.etags[name] == 1:
            store.put(name, b"newer!")

    images = images_of(ROOT, tmp_path)
    Shaky.before_read = change_once
    assert images.read(1) == b"newer!" and not images.is_unchanged(1)
    images.remember()
    assert images_of(ROOT, tmp_path).digest(1) == images.digest(1)
    Shaky.before_read = lambda store, name: store.put(name, f"{store.etags[name]:6}".encode())
    assert images.read(2) is None and "changed" in images.failures[2]


def test_without_etag_and_time_everything_is_read_anew(
    shaky: Shaky, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Shaky, "with_etags", False)
    images = images_of(ROOT, tmp_path)
    images.read_unknown(quiet=True)
    assert images.known.all() and not images_of(ROOT, tmp_path).known.any()


def test_many_reads_at_a_time_bounded_and_in_any_order(shaky: Shaky, tmp_path: Path) -> None:
    for number in range(200):
        shaky.put(f"/bucket/photos/ants/n{number:03}.jpg", f"{number}".encode())
    images = images_of(ROOT, tmp_path)
    lock, now, most = threading.Lock(), [0], [0]

    def slow(_store: Shaky, _name: str) -> None:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.005)
        with lock:
            now[0] -= 1

    Shaky.before_read = slow
    with images.reading_ahead(range(len(images))):
        time.sleep(0.3)
        assert shaky.reads.total() <= 2 * stores.READS_AT_ONCE
        found = [images.read(position) for position in [3, *range(3), *range(4, len(images))]]
    assert 8 < most[0] <= stores.READS_AT_ONCE and None not in found
    assert set(shaky.reads.values()) == {1}


def test_shards_and_tables_in_a_store(shaky: Shaky, tmp_path: Path) -> None:
    files = [item for n in range(4) for item in samples_of(str(n), "ab"[n % 2])]
    shaky.put("/bucket/s/x-0.tar", make_tar(tmp_path / "x.tar", files).read_bytes())
    shaky.put("/bucket/s/x-1.tar", make_tar(tmp_path / "y.tar", samples_of("9", "a")).read_bytes())
    for root in ("shaky://bucket/s", "shaky://bucket/s/x-{0..1}.tar"):
        images = images_of(root, tmp_path / root[-3:])
        assert labels(images.samples) == {f"x-0.tar/{n}.jpg": "ab"[n % 2] for n in range(4)} | {"x-1.tar/9.jpg": "a"}
        assert list(contents(images).values()) == [b"0", b"1", b"2", b"3", b"9"]
    shaky.put("/bucket/photos.csv", b"path,label\nants/0,x\nbees/1,y\n")
    images = images_of("shaky://bucket/photos.csv", tmp_path / "t", images=ROOT)
    assert labels(images.samples) == {"ants/0.jpg": "x", "bees/1.jpg": "y"} and images.read(1) == b"bees 1"
    given = open_given([ROOT, "shaky://bucket/s/x-1.tar"], DataParams(), tmp_path)
    assert given.path(6) == "shaky://bucket/s/x-1.tar/9.jpg" and given.read(6) == b"9" and given.read(0) == b"ants 0"
    assert given.position_of(given.path(2)) == 2


def test_a_parquet_in_a_store(shaky: Shaky, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from .test_parquet import image, write

    root = write(
        tmp_path / "x.parquet", {"image": [image(n) for n in range(9)], "label": [str(n % 2) for n in range(9)]}
    )
    shaky.put("/bucket/x.parquet", root.read_bytes())
    images = images_of("shaky://bucket/x.parquet", tmp_path)
    assert images.read(7) == b"image 7" and images.path(7) == "shaky://bucket/x.parquet/7"


def test_nothing_there_is_an_error(shaky: Shaky, tmp_path: Path) -> None:
    for url in ("shaky://bucket/none", "shaky://bucket/none.tar", "shaky://bucket/none.csv", "nosuch://x/y"):
        with pytest.raises(DataError) as error:
            images_of(url, tmp_path)
        assert url.partition(".")[0].rpartition("/")[0] in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "https://ada:PASSWORD@host/x",
        "https://host/x?X-Amz-Signature=PASSWORD&a=b",
        "https://host/c?sv=1&sig=PASSWORD",
        "s3://b/x?token=PASSWORD",
    ],
)
def test_a_url_with_a_secret_is_refused_and_not_repeated(url: str, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(f"data: {{root: '{url}'}}")
    with pytest.raises(ParamsError) as error:
        load_params(tmp_path / "p.yaml")
    assert "PASSWORD" not in str(error.value) and "PASSWORD" not in str(error.value.as_dict())
    with pytest.raises(DataError) as refused:
        open_given(url, DataParams(), tmp_path)
    assert "PASSWORD" not in str(refused.value)


def test_urls_survive_params_and_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("data: {root: 's3://bucket/a//b/', images: here}")
    params = load_params(tmp_path / "p.yaml", ["data.root=gs://other/x-{0..9}.tar"])
    assert params.data.root == "gs://other/x-{0..9}.tar" and params.data.images == tmp_path / "here"
    (tmp_path / "run.yaml").write_text(dump_params(params))
    assert load_params(tmp_path / "run.yaml") == params
    assert load_params(tmp_path / "p.yaml").data.root == "s3://bucket/a//b"
