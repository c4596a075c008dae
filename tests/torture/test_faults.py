"""Disks that are full, files that lie, clocks that go backwards: detected or harmless, and mended by the next run."""

from __future__ import annotations

import os
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import CacheError, PipelineError
from tests.stages.conftest import write_image

from . import jobs
from .children import run
from .conftest import IMAGES, Ground, Tally, mounted

Begin = Callable[[str], Tally]
FLIPS, CUTS = 240, 60
SEED = 20_260_103
NOBODY = 65_534


def outcome_job(settings: list[str]) -> dict[str, Any]:
    """Extract; the summary, or the error that was told."""
    try:
        return {"summary": jobs.extract_job(settings)}
    except PipelineError as error:
        return {"error": type(error).__name__, "told": str(error)}


def limited_job(settings: list[str], size: int) -> dict[str, Any]:
    """Extract where no file may grow beyond ``size`` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    told = outcome_job(settings)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return told


def unprivileged_job(settings: list[str]) -> dict[str, Any]:
    """Extract as a user who owns nothing here."""
    is_root = os.getuid() == 0
    if is_root:
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
    try:
        return outcome_job(settings)
    finally:
        if is_root:
            os.seteuid(0)
            os.setegid(0)


def backwards_job(settings: list[str], seconds: float) -> dict[str, Any]:
    """Extract with a clock that is ``seconds`` late."""
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() - seconds
    time.time_ns = lambda: now_ns() - int(seconds * 1e9)
    return outcome_job(settings)


def meddling_job(settings: list[str], doomed: str, changed: str) -> dict[str, Any]:
    """Extract; between scan and read one image vanishes and another becomes a third."""
    from pipeline.stages import open as opening

    opened = opening.open_images

    def open_and_meddle(*arguments: Any) -> Any:
        source = opened(*arguments)
        os.unlink(doomed)
        write_image(Path(changed), 999)
        return source

    opening.open_images = open_and_meddle
    return outcome_job(settings)


@pytest.fixture
def cache(ground: Ground, tmp_path: Path) -> Path:
    """A whole cache of the test's own."""
    shutil.copytree(ground.folder / "cache", tmp_path / "cache")
    return tmp_path / "cache"


def assert_mended(ground: Ground, cache: Path, tally: Tally, *, verify: bool = True) -> None:
    """The next extract ends well, the features are those of an uninterrupted run, and so says `cache verify`."""
    ground.run(jobs.extract_job, ground.settings(cache))
    ground.judge(cache, tally, complete=True)
    if verify:
        ground.run(jobs.verify_job, ground.settings(cache))


def test_a_file_size_limit_at_any_size(ground: Ground, tmp_path: Path, tally: Begin) -> None:
    count, draw = tally("no file may grow beyond some size"), random.Random(SEED)
    for number in range(24):
        cache = tmp_path / str(number) / "cache"
        cache.parent.mkdir()
        (cache.parent / "params.yaml").touch()
        told = ground.run(limited_job, ground.settings(cache), draw.choice((0, 10, 400, 2000, 4000, 8000, 16_000)))
        assert "summary" in told["result"] or told["result"]["error"] == CacheError.__name__, told
        count.tries += 1
        ground.judge(cache, count, complete=False)
        assert_mended(ground, cache, count, verify=number % 4 == 0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB."""
    with mounted(tmp_path / "disk", "200k") as disk:
        yield disk


def test_a_full_disk(ground: Ground, small_disk: Path, tally: Begin) -> None:
    count = tally("disk full")
    cache, ballast = small_disk / "cache", small_disk / "ballast"
    for size in range(0, 200_000, 20_000):
        (small_disk / "params.yaml").touch()
        ballast.write_bytes(bytes(min(size, shutil.disk_usage(small_disk).free)))
        told = ground.run(outcome_job, ground.settings(cache))
        assert "summary" in told["result"] or told["result"]["error"] == CacheError.__name__, told
        count.tries += 1
        ground.judge(cache, count, complete=False)
        ballast.unlink()
        assert_mended(ground, cache, count, verify=False)
        shutil.rmtree(cache)


def damage(cache: Path, draw: random.Random, *, cut: bool) -> Path:
    """Flip one bit of a file of the cache, or cut it; which."""
    files = [path for path in sorted(cache.rglob("*")) if path.is_file() and path.stat().st_size]
    path = draw.choice(files)
    data = bytearray(path.read_bytes())
    place = draw.randrange(len(data))
    if cut:
        del data[place:]
    else:
        data[place] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("fault", "tries"), [("bit flipped", FLIPS), ("cut short", CUTS)])
def test_damaged_files_of_the_cache(ground: Ground, cache: Path, tally: Begin, fault: str, tries: int) -> None:
    count = tally(f"a file of the cache {fault}")
    told = run(damage_often_job, str(cache), ground.settings(cache), tries, fault == "cut short", note=ground.note())
    assert told["exit"] == 0, told
    count.tries = told["result"]["tries"]
    for tally_row in told["result"]["rows"]:
        count.lost += tally_row["lost"]
        count.wrong += tally_row["wrong"]
    assert told["result"]["set_aside"] > tries // 10
    assert_mended(ground, cache, count)


def damage_often_job(cache: str, settings: list[str], tries: int, cut: bool) -> dict[str, Any]:
    """Damage a file, extract, compare; all in one process, for nobody is killed here."""
    from .conftest import read_rows

    draw, whole, rows, aside = random.Random(SEED), read_rows(Path(cache)), [], 0
    for _ in range(tries):
        damage(Path(cache), draw, cut=cut)
        jobs.extract_job(settings)
        found = read_rows(Path(cache))
        rows.append(
            {
                "lost": len(whole.keys() - found.keys()),
                "wrong": sum(whole.get(digest) != row for digest, row in found.items()),
            }
        )
        for path in Path(cache).rglob("damaged-*"):
            aside += 1
            path.unlink()
    return {"tries": tries, "rows": rows, "set_aside": aside}


def test_a_cache_that_cannot_be_written_is_told_and_can_be_read(
    ground: Ground, cache: Path, tmp_path: Path, tally: Begin
) -> None:
    count = tally("read-only cache")
    open_to_all(tmp_path, ground.root)
    empty = tmp_path / "empty" / "cache"
    empty.mkdir(parents=True)
    for folder in (cache, empty):
        (folder.parent / "params.yaml").touch()
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
    for folder, expected in ((cache, "summary"), (empty, "error")):
        told = ground.run(unprivileged_job, ground.settings(folder))["result"]
        assert expected in told, told
        count.tries += 1
    assert told["error"] == CacheError.__name__ and str(empty) in told["told"]
    assert not list(empty.iterdir())
    ground.judge(cache, count, complete=True)


def open_to_all(*folders: Path) -> None:
    """Let everybody pass through the folders above, which pytest makes private."""
    for folder in folders:
        for parent in [folder, *folder.parents]:
            if parent.stat().st_uid == os.getuid() and not parent.stat().st_mode & 0o005:
                parent.chmod(parent.stat().st_mode | 0o055)


def test_a_folder_without_permission_is_named_and_hides_no_other(ground: Ground, tmp_path: Path, tally: Begin) -> None:
    count = tally("folder without permission")
    root, cache = tmp_path / "images", tmp_path / "cache"
    shutil.copytree(ground.root, root)
    open_to_all(tmp_path, root)
    cache.mkdir(mode=0o777)
    cache.chmod(0o777)
    (tmp_path / "params.yaml").touch()
    (root / "train" / "cat").chmod(0o000)
    told = ground.run(unprivileged_job, ground.settings(cache, root=root))["result"]
    (root / "train" / "cat").chmod(0o755)
    count.tries += 1
    told_where = told.get("told", "")
    assert str(root / "train" / "cat") in told_where, told
    cache.chmod(0o755)
    assert_mended(ground, cache, count)


@pytest.mark.parametrize("seconds", [-3600.0, 3600.0, 4e8])
def test_a_clock_that_was_set_hides_no_change(ground: Ground, tmp_path: Path, tally: Begin, seconds: float) -> None:
    count = tally(f"clock {'late' if seconds > 0 else 'early'} by {abs(seconds):.0f} s, an image replaced")
    root, cache = tmp_path / "images", tmp_path / "cache"
    shutil.copytree(ground.root, root)
    settings = ground.settings(cache, root=root)
    for number in range(3):
        ground.run(backwards_job, settings, seconds)
        victim = sorted(root.rglob("*.jpg"))[number]
        replace_in_secret(victim, seed=100 + number)
        summary = ground.run(backwards_job, settings, seconds)["result"]["summary"]
        assert summary["forwarded"] == 1
        count.tries += 1
    assert_mended_against_fresh(ground, root, cache, count)


def replace_in_secret(path: Path, *, seed: int) -> None:
    """Another picture of equal size in bytes, with the old times."""
    before = path.stat()
    while write_image(path, seed) or path.stat().st_size > before.st_size:
        seed += 1000
    with open(path, "ab") as file:
        file.write(bytes(before.st_size - path.stat().st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns


def assert_mended_against_fresh(ground: Ground, root: Path, cache: Path, tally: Tally) -> None:
    """What the cache says of these images is what an empty cache comes to."""
    from .conftest import read_rows

    fresh = cache.parent / "fresh" / "cache"
    fresh.parent.mkdir()
    ground.run(jobs.extract_job, ground.settings(cache, root=root))
    ground.run(jobs.extract_job, ground.settings(fresh, root=root))
    mine, theirs = read_rows(cache), read_rows(fresh)
    tally.lost += len(theirs.keys() - mine.keys())
    tally.wrong += sum(mine.get(digest) != row for digest, row in theirs.items())
    ground.run(jobs.verify_job, ground.settings(cache, root=root))


def test_images_replaced_by_others_of_equal_size_and_times(ground: Ground, tmp_path: Path, tally: Begin) -> None:
    count = tally("image replaced, equal size and mtime")
    root, cache = tmp_path / "images", tmp_path / "cache"
    shutil.copytree(ground.root, root)
    settings = ground.settings(cache, root=root)
    ground.run(jobs.extract_job, settings)
    for number, victim in enumerate(sorted(root.rglob("*.jpg"))[:12]):
        replace_in_secret(victim, seed=200 + number)
        count.wrong += ground.run(jobs.extract_job, settings)["result"]["forwarded"] != 1
        count.tries += 1
    assert_mended_against_fresh(ground, root, cache, count)


def test_files_that_vanish_or_change_between_scan_and_read(ground: Ground, tmp_path: Path, tally: Begin) -> None:
    count = tally("file vanishes, file changes, between scan and read")
    root, cache = tmp_path / "images", tmp_path / "cache"
    shutil.copytree(ground.root, root)
    doomed, changed = root / "train" / "cat" / "02.jpg", root / "train" / "dog" / "01.jpg"
    told = ground.run(meddling_job, ground.settings(cache, root=root), str(doomed), str(changed))["result"]
    assert told["summary"]["embedded"] == IMAGES - 1
    count.tries += 2
    assert ground.run(jobs.extract_job, ground.settings(cache, root=root))["result"]["forwarded"] == 0
    assert_mended_against_fresh(ground, root, cache, count)


def test_odd_names_and_links_in_a_loop(ground: Ground, tmp_path: Path, tally: Begin) -> None:
    count = tally("odd names, links in a loop")
    root, cache = tmp_path / "images", tmp_path / "cache"
    shutil.copytree(ground.root, root)
    odd = (
        "with space.jpg",
        "new\nline.jpg",
        "tab\t'quote\".jpg",
        os.fsdecode(b"no utf-8 \xff\xfe.jpg"),
        "-r.jpg",
        "日本.jpg",
    )
    for number, (path, name) in enumerate(zip(sorted(root.rglob("*.jpg")), odd, strict=False)):
        path.rename(path.with_name(name))
        count.tries = number + 2
    (root / "train" / "cat" / "loop").symlink_to(root)
    (root / "train" / "dog" / "self").symlink_to("self")
    told = ground.run(jobs.extract_job, ground.settings(cache, root=root))["result"]
    assert (told["images"], told["embedded"]) == (IMAGES, IMAGES)
    assert_mended(ground, cache, count)
    assert ground.run(jobs.train_job, ground.settings(cache, root=root))["result"]["accuracy"] is not None


def test_a_hundred_thousand_files_in_one_folder(ground: Ground, tmp_path: Path, tally: Begin) -> None:
    count = tally("100 000 files in one folder")
    root, cache = tmp_path / "images", tmp_path / "cache"
    contents = [path.read_bytes() for path in sorted(ground.root.rglob("*.jpg"))]
    (root / "cat").mkdir(parents=True)
    for number in range(100_000):
        (root / "cat" / f"{number}.jpg").write_bytes(contents[number % len(contents)])
    settings = ground.settings(cache, root=root)
    first = ground.run(jobs.extract_job, settings)["result"]
    assert (first["images"], first["embedded"], first["duplicates"]) == (100_000, IMAGES, 100_000 - IMAGES)
    time.sleep(2.5)
    write_image(root / "cat" / "new.jpg", 777)
    assert ground.run(jobs.extract_job, settings)["result"]["forwarded"] == 1
    (root / "cat" / "new.jpg").unlink()
    count.tries = 1
    rows = ground.judge(cache, Tally("that one more"), complete=False)
    count.lost = len(ground.features.keys() - rows)
