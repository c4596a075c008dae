"""Processes that decode give the pixels that a thread gives, and whatever happens to them, a thread can do without."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data.decode import BadImage, Decoder, PixelBytes, Reason
from pipeline.data.framing import Framing
from pipeline.features import decoding as module
from pipeline.features.decoding import MANY, Decoding, Helpers, decoding_beside
from pipeline.features.prepare import Decode
from pipeline.features.rounding import Features
from pipeline.features.views import PLAIN, View
from pipeline.files import digest_bytes
from pipeline.params import load_params
from pipeline.stages.extract import extract
from pipeline.stages.open import load_features

DECODER = Decoder((255, 255, 255), True, 10**6)
DECODING = Decoding(DECODER, View(1, 7), Framing(40, 36, "bilinear"))


def jpeg(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((60 + seed, 50), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


CONTENTS = [jpeg(seed) for seed in range(30)]


def wait_for(helpers: Helpers, count: int) -> None:
    give_up = time.monotonic() + 120
    while helpers.ready < count and time.monotonic() < give_up:
        time.sleep(0.02)
    assert helpers.ready == count


@pytest.fixture(scope="module")
def helpers() -> Iterator[Helpers]:
    started = Helpers(DECODING, 2)
    wait_for(started, 2)
    yield started
    started.close()


def test_pixels_are_those_of_a_thread(helpers: Helpers, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = [digest_bytes(data) for data in CONTENTS]
    expected = [DECODING(data, digest) for data, digest in zip(CONTENTS, digests, strict=True)]
    monkeypatch.setattr(helpers, "_decoding", None)  # nothing is decoded here
    with ThreadPoolExecutor(2) as pool:
        pixels = list(pool.map(helpers, CONTENTS, digests))
    assert all(np.array_equal(*pair) for pair in zip(pixels, expected, strict=True))
    assert pixels[0].transpose(1, 2, 0).flags.c_contiguous


@pytest.mark.parametrize(("data", "reason"), [(b"", Reason.EMPTY), (b"text", Reason.NOT_AN_IMAGE)])
def test_a_bad_image_is_told_as_ever(helpers: Helpers, data: bytes, reason: Reason) -> None:
    with pytest.raises(BadImage) as caught:
        helpers(data, bytes(16))
    assert caught.value.reason == reason and helpers.ready == 2


def test_pixels_of_a_program_are_no_file(helpers: Helpers) -> None:
    data = PixelBytes.of(Image.new("RGB", (50, 50), (1, 2, 3)))
    assert np.array_equal(helpers(data, bytes(16)), DECODING(data, bytes(16)))


def test_threads_decode_for_themselves_until_helpers_are_there_and_when_they_are_gone() -> None:
    started = Helpers(DECODING, 1)
    try:
        early = started(CONTENTS[0], bytes(16))
        wait_for(started, 1)
        os.kill(started._helpers[0]._process.pid, signal.SIGKILL)
        late, last = (started(CONTENTS[0], bytes(16)) for _ in range(2))
    finally:
        started.close()
    assert np.array_equal(early, late) and np.array_equal(late, last) and started.ready == 0


def test_a_content_that_ends_its_helper_is_quarantined_and_ends_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    started = Helpers(DECODING, 1)
    try:
        wait_for(started, 1)
        os.kill(started._helpers[0]._process.pid, signal.SIGKILL)
        monkeypatch.setattr(module, "find_killers", lambda contents, _decoder: dict.fromkeys(contents, "a crash"))
        with pytest.raises(BadImage) as caught:
            started(CONTENTS[0], bytes(16))
    finally:
        started.close()
    assert caught.value.reason == Reason.KILLS_DECODER


@pytest.mark.parametrize(
    ("images", "workers", "on_cpu", "apart"),
    [(MANY, 2, False, True), (MANY - 1, 2, False, False), (MANY, 1, False, False), (MANY, 2, True, False)],
)
def test_processes_are_for_many_images_beside_a_gpu(
    monkeypatch: pytest.MonkeyPatch, images: int, workers: int, on_cpu: bool, apart: bool
) -> None:
    closed: list[bool] = []

    class Stub:
        def __init__(self, *_: object) -> None: ...
        def close(self) -> None:
            closed.append(True)

    monkeypatch.setattr(module, "Helpers", Stub)
    plain = Decoding(DECODER, PLAIN, Framing(256, 224, "bilinear"))
    device = torch.device("cpu" if on_cpu else "meta")
    with decoding_beside(plain, images=images, workers=workers, device=device) as decode:
        assert (decode is not plain) == apart and not closed
    assert bool(closed) == apart


def test_a_helper_needs_no_torch() -> None:
    """Which would take it seconds to start and a quarter of a gigabyte."""
    code = "import sys, pipeline.features.decoding; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_features_are_the_same_bytes_whoever_decodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for number, data in enumerate(CONTENTS[:12]):
        (tmp_path / "images" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / "ab"[number % 2] / f"{number}.jpg").write_bytes(data)
    (tmp_path / "params.yaml").write_text("")
    own = (f"data.root={tmp_path / 'images'}", "backbone.name=starter", "extract.device=cpu", "extract.workers=2")

    def features(cache: str) -> Features:
        params = load_params(tmp_path / "params.yaml", (*own, f"cache.dir={tmp_path / cache}"))
        extract(params, lambda _line: None, quiet=True)
        return load_features(params).features

    expected, asked = features("threads"), list[bytes]()

    @contextmanager
    def beside(decoding: Decoding, **_: object) -> Iterator[Decode]:
        started = Helpers(decoding, 2)
        wait_for(started, 2)
        yield lambda data, digest: asked.append(digest) or started(data, digest)
        started.close()

    monkeypatch.setattr("pipeline.features.cache.decoding_beside", beside)
    assert np.array_equal(features("helpers"), expected) and len(asked) == 12
