"""The demo images: complete, the same bytes everywhere, and never written over."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.demo import DIGIT_NAMES, write_demo_data

COUNT = 1797


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo data") / "deep" / "demo"
    assert write_demo_data(folder) == COUNT
    return folder


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and modification time of every file, by relative name."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


def test_every_split_holds_every_class_in_fixed_shares(demo: Path) -> None:
    counts = {
        split: [len(list((demo / split / name).glob("*.png"))) for name in DIGIT_NAMES]
        for split in ("train", "val", "test")
    }
    assert sum(map(sum, counts.values())) == COUNT == len(files_of(demo))
    for split, share in (("train", 0.6), ("val", 0.2), ("test", 0.2)):
        shares = np.array(counts[split]) / np.sum(list(counts.values()), axis=0)
        np.testing.assert_allclose(shares, share, atol=0.01)


def test_the_images_show_the_digits(demo: Path) -> None:
    zero, one = (np.asarray(Image.open(demo / "train" / name)) for name in ("zero/0000.png", "one/0001.png"))
    assert zero.shape == one.shape == (32, 32)
    assert zero.dtype == np.uint8
    assert zero[14:18, 14:18].mean() < 40 < 150 < one[14:18, 14:18].mean()  # a zero is hollow, a one is not


def test_no_image_occurs_twice(demo: Path) -> None:
    assert len({content for content, _ in files_of(demo).values()}) == COUNT


def test_the_bytes_are_the_same_everywhere(demo: Path) -> None:
    content = {name: data for name, (data, _) in files_of(demo).items()}
    digest = hashlib.blake2b(b"".join(name.encode() + content[name] for name in sorted(content)), digest_size=16)
    assert digest.hexdigest() == "4fbb2b2c80f375c3500e6a88fc068b59"


def test_a_second_call_touches_nothing(demo: Path) -> None:
    before = files_of(demo)
    assert write_demo_data(demo) == 0
    assert files_of(demo) == before


def test_a_half_written_folder_is_completed_and_other_files_stay(tmp_path: Path, demo: Path) -> None:
    folder = tmp_path / "demo"
    kept = {"train/zero/0000.png": b"a picture of my own", "train/zero/mine.png": b"another", "notes.txt": b"text"}
    for name, data in kept.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    times = {name: (folder / name).stat().st_mtime_ns for name in kept}
    whole = files_of(demo)
    for name in sorted(whole)[20:]:  # all but twenty were written earlier, one of these without its content
        if name not in kept:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(whole[name][0] if name != "val/two/1084.png" else b"")
    assert write_demo_data(folder) == 21
    now = files_of(folder)
    assert {name: now[name] for name in kept} == {name: (data, times[name]) for name, data in kept.items()}
    assert {name: now[name][0] for name in whole if name not in kept} == {
        name: data for name, (data, _) in whole.items() if name not in kept
    }


def test_an_interrupted_first_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(100))

    def fail_later(pixels: object) -> bytes:
        if next(calls) == 50:
            raise OSError("No space left on device")
        return b"png"

    monkeypatch.setattr("pipeline.data.demo._png", fail_later)
    with pytest.raises(OSError, match="No space left"):
        write_demo_data(tmp_path / "demo")
    assert list(tmp_path.iterdir()) == []
