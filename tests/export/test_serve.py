"""recipes/serve.py on loopback: a prediction for an image, clear errors for what is none."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from ..conftest import PROJECT
from .conftest import IMAGES, Exported

PHOTO = IMAGES / "val" / "ants" / "24.png"


@pytest.fixture(scope="module")
def service(exported: Exported) -> Iterator[str]:
    """The address of a running service."""
    for module in ("fastapi", "uvicorn", "onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(PROJECT / "recipes"), "serve:app", "--port", str(port)]
    environment = {**os.environ, "MODEL": str(exported("logistic")[1])}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            _wait_for(port, process)
            yield f"http://127.0.0.1:{port}/predict"
        finally:
            process.terminate()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert process.poll() is None, "the service ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("the service did not start")


def post(address: str, data: bytes) -> tuple[int, Any]:
    request = urllib.request.Request(address, data, {"Content-Type": "application/octet-stream"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["detail"]


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises so many pixels."""
    small = io.BytesIO()
    Image.new("L", (1, 1)).save(small, "PNG")
    data = bytearray(small.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


def test_an_image_is_classified_as_by_the_run(service: str, exported: Exported) -> None:
    status, answer = post(service, PHOTO.read_bytes())
    (live,) = exported("logistic")[0].predict(PHOTO, top=3)
    assert (status, answer["label"]) == (200, live.label)
    assert answer["probabilities"] == pytest.approx(dict(live.top), abs=0.01)


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (b"garbage", 422, "no image"),
        (PHOTO.read_bytes()[:200], 422, "no image"),
        (b"", 422, "no image"),
        (bomb(30_000, 30_000), 413, "too large"),
        (bomb(9_000, 9_000), 413, "9000 x 9000 pixels"),
        (bomb(1, 1_000_000), 413, "1 x 1000000 pixels"),
        (bytes(20_000_001), 413, "more than 20,000,000 bytes"),
    ],
    ids=["garbage", "truncated", "empty", "bomb", "large", "strip", "bytes"],
)
def test_what_is_no_image_is_a_clear_error(service: str, data: bytes, status: int, words: str) -> None:
    code, detail = post(service, data)
    assert code == status and words in detail
    assert post(service, PHOTO.read_bytes())[0] == 200, "and the service goes on"
