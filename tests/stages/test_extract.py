"""What extract promises: computed once, whatever happens to names, labels and splits; never lost, never misplaced."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import ImageChops

from pipeline.backbones import Forward
from pipeline.data.decode import BadImage, Decoder, Reason
from pipeline.errors import BadImagesError, CacheError, DriftError, MissingFeaturesError
from pipeline.params import Params
from pipeline.stages.extract import extract
from pipeline.stages.open import load_features
from pipeline.stages.train_head import train_head

from .conftest import FAST, write_image

Extract = Callable[..., dict[str, Any]]
MakeParams = Callable[..., Params]


def test_the_second_time_nothing_is_computed(run_extract: Extract) -> None:
    first, second = run_extract(), run_extract()
    assert (first["embedded"], first["forwarded"]) == (24, 24)
    assert (second["embedded"], second["forwarded"], second["reused"]) == (0, 0, 24)
    assert first["key"] == second["key"]


def test_no_weights_are_loaded_when_nothing_is_to_do(run_extract: Extract, monkeypatch: pytest.MonkeyPatch) -> None:
    run_extract()

    def refuse(*_args: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("pipeline.backbones.build.build_network", refuse)
    assert run_extract()["reused"] == 24


def test_one_new_image_is_one_forward(run_extract: Extract, root: Path) -> None:
    run_extract()
    write_image(root / "train" / "cat" / "new.jpg", 100)
    assert run_extract()["forwarded"] == 1


def test_renamed_moved_and_copied_images_are_not_computed_again(run_extract: Extract, root: Path) -> None:
    run_extract()
    for image in list(root.rglob("*.jpg")):
        image.rename(image.with_name(f"renamed {image.name}"))
    for image in sorted((root / "train" / "cat").iterdir())[:3]:
        image.rename(root / "train" / "dog" / image.name)
    copied = sorted((root / "val" / "cat").iterdir())[0]
    shutil.copy(copied, copied.with_name("copy.jpg"))
    summary = run_extract()
    assert (summary["forwarded"], summary["reused"], summary["duplicates"]) == (0, 24, 1)


def test_another_transform_is_another_key_beside_the_first(run_extract: Extract) -> None:
    first = run_extract()
    other = run_extract("transform.resize=34")
    assert other["key"] != first["key"]
    assert other["forwarded"] == 24
    assert run_extract()["forwarded"] == 0


def test_what_must_not_matter_does_not_change_the_key(run_extract: Extract) -> None:
    key = run_extract()["key"]
    same = ("extract.batch_size=3", "extract.workers=1", "extract.part_seconds=1", "data.seed=7", "head.kind=knn")
    assert run_extract(*same)["key"] == key


def test_rows_are_those_of_each_image_alone(
    run_extract: Extract, make_params: MakeParams, root: Path, tmp_path: Path
) -> None:
    run_extract()
    together = load_features(make_params())
    for position in range(0, 24, 5):
        alone = tmp_path / "alone" / str(position)
        (alone / "class").mkdir(parents=True)
        shutil.copy(root / together.paths[position], alone / "class")
        apart = (f"data.root={alone}", f"cache.dir={tmp_path / 'other'}")
        run_extract(*apart)
        np.testing.assert_array_equal(
            load_features(make_params(*apart)).features[0], together.features[position], strict=True
        )


def test_the_ledger_adds_up_with_bad_duplicate_and_vanishing_files(run_extract: Extract, root: Path) -> None:
    (root / "train" / "cat" / "broken.jpg").write_bytes(b"not an image")
    (root / "train" / "dog" / "broken too.jpg").write_bytes(b"not an image")
    (root / "train" / "dog" / "gone.jpg").symlink_to(root / "nowhere.jpg")
    summary = run_extract()
    assert summary["quarantined"] == 1
    assert summary["duplicates"] == 1
    assert summary["images"] == 26
    parts = ("embedded", "reused", "duplicates", "quarantined")
    assert summary["images"] == sum(summary[part] for part in parts)
    again = run_extract()
    assert (again["forwarded"], again["quarantined"], again["reused"]) == (0, 1, 24)


def test_a_bad_image_moves_no_label(run_extract: Extract, make_params: MakeParams, root: Path) -> None:
    run_extract()
    before = load_features(make_params())
    (root / "train" / "cat" / "00 broken.jpg").write_bytes(b"not an image")
    run_extract()
    after = load_features(make_params())
    assert after.paths == before.paths
    np.testing.assert_array_equal(after.targets, before.targets)
    np.testing.assert_array_equal(after.features, before.features)


def test_raise_names_every_bad_image_and_keeps_the_good_ones(
    run_extract: Extract, make_params: MakeParams, root: Path
) -> None:
    for name in ("one.jpg", "two.jpg"):
        (root / "train" / "cat" / name).write_bytes(name.encode())
    with pytest.raises(BadImagesError) as caught:
        run_extract("data.on_bad_image=raise")
    assert "one.jpg" in str(caught.value) and "two.jpg" in str(caught.value)
    assert run_extract()["forwarded"] == 0


def test_a_missing_feature_is_named(run_extract: Extract, make_params: MakeParams, root: Path) -> None:
    run_extract()
    write_image(root / "val" / "dog" / "new.jpg", 100)
    with pytest.raises(MissingFeaturesError, match=r"1 of 25 images") as caught:
        load_features(make_params())
    assert "new.jpg" in str(caught.value)


def test_a_corrupt_part_is_named_and_computed_again(run_extract: Extract, make_params: MakeParams) -> None:
    folder = Path(run_extract()["cache"])
    before = load_features(make_params()).features
    (part,) = folder.glob("part-*.h5")
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    lines: list[str] = []
    summary = extract(make_params(), lines.append, quiet=True)
    assert summary["forwarded"] == 24
    assert any(part.name in line for line in lines)
    np.testing.assert_array_equal(load_features(make_params()).features, before)


@pytest.mark.parametrize("delay", [0.05, 0.4])
def test_a_kill_loses_only_what_was_not_published(
    make_params: MakeParams, run_extract: Extract, root: Path, tmp_path: Path, delay: float
) -> None:
    for number in range(100, 300):
        write_image(root / "train" / "cat" / f"{number}.jpg", number)
    command = [sys.executable, "-m", "pipeline", "extract", "-p", str(tmp_path / "params.yaml"), "--json"]
    places = (f"data.root={root}", f"cache.dir={tmp_path / 'killed'}", "extract.part_seconds=0.01")
    for override in (*FAST, *places):
        command += ["-s", override]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while process.poll() is None and not list((tmp_path / "killed").glob("*/part-*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = make_params(*places)
    published = sum(len(np.asarray(d)) for d in _published(tmp_path / "killed"))
    summary = extract(killed, lambda _line: None, quiet=True)
    assert summary["reused"] == published > 0
    assert summary["forwarded"] == 224 - published
    run_extract()
    np.testing.assert_array_equal(load_features(killed).features, load_features(make_params()).features)


def _published(cache: Path) -> list[np.ndarray]:
    import h5py

    parts = []
    for part in cache.glob("*/part-*.h5"):
        with h5py.File(part, "r") as file:
            parts.append(file["digest"][:])
    return parts


def test_a_class_folder_alone_and_no_class_at_all_can_be_extracted(run_extract: Extract, tmp_path: Path) -> None:
    write_image(tmp_path / "one" / "only" / "a.jpg", 1)
    write_image(tmp_path / "none" / "b.jpg", 2)
    assert run_extract(f"data.root={tmp_path / 'one'}")["embedded"] == 1
    assert run_extract(f"data.root={tmp_path / 'none'}")["embedded"] == 1


def test_real_weights_keep_the_promises_on_real_images(
    run_extract: Extract, make_params: MakeParams, hymenoptera: Path, shared: Path
) -> None:
    real = (
        f"data.root={hymenoptera}",
        "backbone.name=mobilenet_v2",
        f"backbone.weights={shared / 'weights' / 'mobilenet_v2-imagenet.safetensors'}",
        "transform.resize=64",
        "transform.crop=64",
    )
    assert run_extract(*real)["forwarded"] == 24
    images = sorted(hymenoptera.rglob("*.jpg"))
    for image in images:
        image.rename(image.with_name(f"x{image.name}"))
    assert run_extract(*real)["forwarded"] == 0
    assert load_features(make_params(*real)).features.shape == (24, 1280)


def test_awkward_images_end_no_run_and_move_no_row(
    run_extract: Extract, make_params: MakeParams, root: Path, shared: Path, tmp_path: Path
) -> None:
    awkward = sorted((shared / "data" / "awkward_images").iterdir())
    for image in awkward:
        shutil.copy(image, root / "train" / "cat")
    everything = ("data.extensions=all",)
    summary = run_extract(*everything)
    assert summary["images"] == sum(summary[part] for part in ("embedded", "reused", "duplicates", "quarantined"))
    table = load_features(make_params(*everything))
    rows = {Path(path).name: row for path, row in zip(table.paths, table.features, strict=True)}
    embedded = [image for image in awkward if image.name in rows]
    assert len(embedded) > 60
    for image in embedded[::9]:
        alone = tmp_path / "alone" / image.stem
        (alone / "class").mkdir(parents=True)
        shutil.copy(image, alone / "class")
        apart = (f"data.root={alone}", f"cache.dir={tmp_path / 'other'}", *everything)
        run_extract(*apart)
        np.testing.assert_array_equal(load_features(make_params(*apart)).features[0], rows[image.name])


def test_two_processes_of_torchrun_share_the_work(make_params: MakeParams, root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "pipeline", "extract"]
    command += ["-p", str(tmp_path / "params.yaml"), "--json"]
    for override in (*FAST, f"data.root={root}", f"cache.dir={tmp_path / 'cache'}"):
        command += ["-s", override]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["embedded"], summary["forwarded"], summary["images"]) == (24, 24, 24)
    assert extract(make_params(), lambda _line: None, quiet=True)["forwarded"] == 0


def test_shards_of_a_job_array_complete_each_other(run_extract: Extract) -> None:
    first = run_extract("extract.shard=0/2")
    second = run_extract("extract.shard=1/2")
    assert (first["forwarded"], second["forwarded"]) == (12, 12)
    assert run_extract()["forwarded"] == 0


def decode_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new version of Pillow, whose pixels are others."""
    real = Decoder.__call__
    monkeypatch.setattr("pipeline.features.cache.decoder_versions", lambda: {"pillow": "99"})
    monkeypatch.setattr(Decoder, "__call__", lambda self, data: ImageChops.invert(real(self, data)))


def test_other_pixels_are_never_mixed_in_whatever_is_known_of_the_images(
    run_extract: Extract, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_extract()
    decode_otherwise(monkeypatch)
    write_image(tmp_path / "elsewhere" / "cat" / "new.jpg", 100)  # as on another machine: no path is known
    with pytest.raises(DriftError, match="other pixels"):
        run_extract(f"data.root={tmp_path / 'elsewhere'}")
    write_image(root / "train" / "cat" / "new.jpg", 101)
    with pytest.raises(DriftError, match="other pixels"):
        run_extract()
    assert run_extract("cache.dtype=float32")["forwarded"] == 25, "a key of its own begins with today's pixels"


def test_a_killed_first_extraction_goes_on_under_its_own_pixels_only(
    run_extract: Extract, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_arguments: Any, **_named: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.features.cache.extract_features", die)
        with pytest.raises(KeyboardInterrupt):
            run_extract()
    decode_otherwise(monkeypatch)
    with pytest.raises(DriftError, match="other pixels"):
        run_extract()


def test_a_file_system_without_locks_and_folder_syncs_is_said_and_works(
    make_params: MakeParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse_locks(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("fcntl.flock", refuse_locks)
    monkeypatch.setattr("os.fsync", refuse_folders)
    lines: list[str] = []
    assert extract(make_params(), lines.append, quiet=True)["embedded"] == 24
    assert any("has no locks" in line for line in lines)


def test_keys_of_views_stay_as_long_as_a_run_names_them(run_extract: Extract, make_params: MakeParams) -> None:
    summary = run_extract("extract.views=2")
    model = json.loads((Path(train_head(make_params("extract.views=2"), print)["run"]) / "model.json").read_text())
    assert model["feature_keys"] == [summary["key"], *(view["key"] for view in summary["views"])]


def test_views_of_cached_images_are_computed_and_counted(run_extract: Extract) -> None:
    run_extract()
    summary = run_extract("extract.views=1")
    assert (summary["embedded"], summary["reused"], summary["forwarded"]) == (0, 24, 16)
    assert summary["bound_by"] in ("read", "decode", "forward") and summary["images_per_second"] > 0
    assert run_extract("extract.views=1")["forwarded"] == 0


def test_the_plan_counts_the_views(make_params: MakeParams) -> None:
    lines: list[str] = []
    extract(make_params("extract.views=2"), lines.append, quiet=True)
    assert any("16 training images in 2 views" in line for line in lines)


def test_unreadable_images_are_tried_again_when_asked(
    make_params: MakeParams, run_extract: Extract, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_self: Decoder, _data: bytes) -> None:
        raise BadImage(Reason.CORRUPT, "a bad day")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "__call__", fail)
        assert run_extract()["quarantined"] == 24
    assert run_extract()["quarantined"] == 24
    summary = extract(make_params(), lambda _line: None, quiet=True, retry=True)
    assert (summary["embedded"], summary["quarantined"]) == (24, 0)


def test_what_overflows_in_float16_is_computed_in_float32(run_extract: Extract, make_params: MakeParams) -> None:
    tiny = ("transform.std=[0.00001, 0.00001, 0.00001]", "cache.dtype=float32")
    run_extract("extract.precision=float16", *tiny)
    reduced = load_features(make_params("extract.precision=float16", *tiny)).features
    run_extract("extract.precision=float32", *tiny)
    exact = load_features(make_params("extract.precision=float32", *tiny)).features
    assert np.isfinite(reduced).all() and (np.abs(exact).max(axis=1) > 0).all()
    assert (reduced == exact).all(axis=1).any(), "no image overflowed, so this shows nothing"


def test_not_a_number_is_never_cached(
    run_extract: Extract, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Forward._forward
    spoilt = ("bad.jpg", 100)
    write_image(root / "train" / "cat" / spoilt[0], spoilt[1], (500, 40))

    def forward(self: Forward, pixels: list[np.ndarray], size: int) -> np.ndarray:
        features = real(self, pixels, size)
        features[[each.mean() > 128 for each in pixels]] = np.nan
        return features

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Forward, "_forward", forward)
        with pytest.raises(CacheError, match=r"\d+ images hold NaN") as caught:
            run_extract()
    assert ".jpg" in str(caught.value) and "transform.std" in str(caught.value)
    again = run_extract()
    assert 0 < again["embedded"] < 25 and again["reused"] == 25 - again["embedded"], "the finite ones were kept"


def test_what_was_dropped_from_the_weights_is_said(make_params: MakeParams, tmp_path: Path) -> None:
    network = torchvision.models.mobilenet_v3_small(num_classes=5)
    torch.save(network.state_dict(), tmp_path / "five.pth")
    lines: list[str] = []
    extract(make_params(f"backbone.weights={tmp_path / 'five.pth'}"), lines.append, quiet=True)
    assert "Weights: the classifier of the weights (5 outputs) was dropped." in lines
