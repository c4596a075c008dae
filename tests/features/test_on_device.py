"""JPEGs decoded by torchvision on the device: near to Pillow's pixels, which stand in for all that it cannot read."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import load_run
from pipeline.backbones import jpeg
from pipeline.data.decode import BadImage, PixelBytes, PlainJpegsElsewhere
from pipeline.data.framing import Framing
from pipeline.data.pixels import ORIENTATION_TAG
from pipeline.errors import DeviceError
from pipeline.features.decoding import Decoding, DecodingOnDevice
from pipeline.features.verify import compare_features
from pipeline.features.views import PLAIN, View
from pipeline.params import Params, load_params
from pipeline.stages.extract import extract
from pipeline.stages.open import load_features, open_cache
from pipeline.stages.train_head import train_head

CPU = torch.device("cpu")
DECODER = PlainJpegsElsewhere((255, 255, 255), True, 10**6)
DIGEST = bytes(range(16))
SET = ("extract.device=cpu", "extract.precision=float32", "extract.decoder=torchvision")


def smooth(seed: int, size: tuple[int, int] = (180, 130)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(image: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    return saved(image, exif=exif)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images torchvision was given, call by call."""
    calls, plain = list[int](), jpeg._decode

    def decode(contents: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
        calls.append(len(contents))
        return plain(contents, device)

    monkeypatch.setattr(jpeg, "_decode", decode)
    return calls


@pytest.mark.parametrize("view", [PLAIN, View(1, 7), View(2, 7)])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("framing", [(80, 64), (None, 200), (70, 90), (300, 224)], ids=str)
def test_pixels_are_nearly_those_of_pillow(
    view: View, interpolation: str, framing: tuple[int | None, int], asked: list[int]
) -> None:
    decoding = Decoding(DECODER, view, Framing(*framing, interpolation))
    data = saved(smooth(1))
    expected, pixels = decoding(data, DIGEST), DecodingOnDevice(decoding, CPU)(data, DIGEST)
    assert asked == [1] and pixels.shape == expected.shape and pixels.dtype == np.uint8
    assert pixels.transpose(1, 2, 0).flags.c_contiguous
    difference = np.abs(pixels.astype(int) - expected)
    assert difference.mean() < 0.2
    # Where two pixels are equally near either may be the nearest; Pillow looks beyond the edge of a part.
    assert difference.max() <= 2 or interpolation == "nearest" or view.number


def test_squashed_and_grey_images_too(asked: list[int]) -> None:
    decoding = Decoding(DECODER, PLAIN, Framing(64, 64, "bicubic", squash=True))
    for image in (smooth(2), smooth(2).convert("L")):
        data = saved(image, progressive=True)
        pixels = DecodingOnDevice(decoding, CPU)(data, DIGEST)
        assert np.abs(pixels.astype(int) - decoding(data, DIGEST)).max() <= 2
    assert asked == [1, 1]


@pytest.mark.parametrize(
    "data",
    [
        saved(smooth(3), "PNG"),
        saved(smooth(3).convert("CMYK")),
        saved(smooth(3), keep_rgb=True),
        *(turned(smooth(3), orientation) for orientation in range(2, 9)),
        PixelBytes.of(smooth(3)),
    ],
    ids=["png", "cmyk", "rgb", *map(str, range(2, 9)), "pixels"],
)
def test_the_rest_is_as_pillow_has_it(data: bytes, asked: list[int]) -> None:
    decoding = Decoding(DECODER, PLAIN, Framing(80, 64, "bilinear"))
    assert np.array_equal(DecodingOnDevice(decoding, CPU)(data, DIGEST), decoding(data, DIGEST))
    assert not asked


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (saved(smooth(4))[:-300], "truncated"),
        (saved(smooth(4))[:500] + b"\xff\xd9", "truncated"),
        (b"\xff\xd8 nothing \xff\xd9", "not an image"),
        (b"", "empty"),
        (saved(smooth(4, (2000, 600))), "too many pixels"),
    ],
)
def test_damage_is_for_pillow_to_judge(data: bytes, reason: str) -> None:
    decoding = Decoding(DECODER, PLAIN, Framing(80, 64, "bilinear"))
    for decode in (decoding, DecodingOnDevice(decoding, CPU)):
        with pytest.raises(BadImage, match=reason):
            decode(data, DIGEST)


def test_threads_that_wait_are_served_together_and_one_bad_image_spoils_none(
    asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    framing = Framing(80, 64, "bilinear")
    decoder = jpeg.JpegDecoder(CPU, framing)
    turn = threading.Lock()
    monkeypatch.setattr(decoder, "_turn", turn)
    good, bad = [saved(smooth(seed)) for seed in range(6)], b"\xff\xd8\xff\xd9"
    frame = framing.frame((180, 130))
    alone = [decoder(data, frame) for data in good]
    asked.clear()
    with turn, ThreadPoolExecutor(7) as pool:
        futures = [pool.submit(decoder, data, frame) for data in (*good[:3], bad, *good[3:])]
        while decoder._waiting.qsize() < 7:
            pass
        turn.release()
        together = [future.result(60) for future in futures]
        turn.acquire()
    assert together.pop(3) is None
    assert all(np.array_equal(left, right) for left, right in zip(together, alone, strict=True))
    assert asked == [7, *[1] * 7]


def test_no_memory_is_no_fault_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(_contents: object, _device: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(jpeg, "_decode", decode)
    framing = Framing(80, 64, "bilinear")
    with pytest.raises(torch.OutOfMemoryError):
        jpeg.JpegDecoder(CPU, framing)(saved(smooth(1)), framing.frame((180, 130)))


@pytest.fixture
def params_of(tmp_path: Path) -> Callable[..., Params]:
    """Params of a folder of plain JPEGs, a turned one and a PNG."""
    for number in range(12):
        folder = tmp_path / "images" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image = smooth(number) if number % 2 else smooth(number).point(lambda value: value // 2)
        data = turned(image, 6) if number == 3 else saved(image)
        (folder / f"{number}.jpg").write_bytes(data)
    (tmp_path / "images" / "a" / "12.png").write_bytes(saved(smooth(12), "PNG"))
    (tmp_path / "params.yaml").write_text("")
    places = (f"data.root={tmp_path / 'images'}", f"cache.dir={tmp_path / 'cache'}", f"runs.dir={tmp_path / 'runs'}")
    return lambda *overrides: load_params(tmp_path / "params.yaml", (*places, *SET, *overrides))


def silent(_line: str) -> None:
    """Say nothing."""


def test_it_has_a_key_of_its_own_and_features_near_those_of_pillow(
    params_of: Callable[..., Params], asked: list[int]
) -> None:
    params = params_of()
    summary = extract(params, silent, quiet=True)
    assert summary["embedded"] == 13 and sum(asked) == 16 + 11  # the sample, and all but the turned one and the PNG
    ours, cache = load_features(params), open_cache(params)
    assert cache.store.spec.decoder == "torchvision-jpeg-1"
    pillow = params_of("extract.decoder=pillow")
    assert extract(pillow, silent, quiet=True)["key"] != summary["key"]
    theirs = load_features(pillow)
    assert ours.paths == theirs.paths
    assert compare_features(theirs.features, ours.features, theirs.features).cosines.min() > 0.999
    assert not cache.verify(sample=13, seed=0).problems
    asked.clear()
    assert extract(params, silent, quiet=True)["forwarded"] == 0 and not asked  # nor is the decoder tried again
    run = load_run(train_head(params_of("head.logistic.strengths=5", "head.folds=2"), silent)["run"])
    assert run.backbone.decoder.rule == "torchvision-jpeg-1"
    assert run.predict([saved(smooth(40))])[0].label in "ab" and asked


def test_a_backbone_that_feels_too_much_of_it_is_refused(
    params_of: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        jpeg, "_decode", lambda contents, _: [torch.zeros(3, 320, 320, dtype=torch.uint8)] * len(contents)
    )
    for _ in range(2):  # the second time by what was remembered
        with pytest.raises(DeviceError, match="feels too much of how cpu decodes JPEGs"):
            extract(params_of(), silent, quiet=True)
        monkeypatch.setattr(jpeg, "accept_decoder", None)
    assert not len(open_cache(params_of()).store.digests)


def test_a_torchvision_that_decodes_nothing_there_is_refused(
    params_of: Callable[..., Params], monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(_contents: object, _device: object) -> None:
        raise RuntimeError("decode_jpegs_cuda: torchvision not compiled with nvJPEG support\nand more")

    monkeypatch.setattr(jpeg, "_decode", decode)
    with pytest.raises(DeviceError, match="decodes no JPEG on cpu") as caught:
        extract(params_of(), silent, quiet=True)
    assert "not compiled with nvJPEG" in str(caught.value) and "extract.decoder=pillow" in str(caught.value)


def test_real_photographs(shared: Path, asked: list[int]) -> None:
    paths = sorted((shared / "data" / "hymenoptera_data" / "val").rglob("*.jpg"))[:12]
    decoding = Decoding(PlainJpegsElsewhere((255, 255, 255), True, 10**8), PLAIN, Framing(256, 224, "bilinear"))
    on_device = DecodingOnDevice(decoding, CPU)
    for path in paths:
        data = path.read_bytes()
        difference = np.abs(on_device(data, DIGEST).astype(int) - decoding(data, DIGEST))
        assert difference.max() <= 3 and difference.mean() < 0.2
    assert len(asked) >= 10


@pytest.mark.gpu
def test_a_gpu_decodes_nearly_the_same_and_whatever_the_company(cuda: torch.device) -> None:
    framing = Framing(256, 224, "bilinear")
    decoder = jpeg.JpegDecoder(cuda, framing)
    requests = [(data, framing.frame(size)) for data, size in jpeg.sample_jpegs()]
    together = decoder.decode(requests)
    for request, pixels in zip(requests, together, strict=True):
        alone = decoder(*request)
        assert alone is not None and np.array_equal(alone, pixels)
        expected = framing.pixels(DECODER(request[0]))
        assert np.abs(pixels.astype(int) - expected).mean() < 3


@pytest.mark.gpu
def test_features_of_images_that_a_gpu_decoded(params_of: Callable[..., Params], cuda: torch.device) -> None:
    params = params_of("extract.device=cuda")
    assert extract(params, silent, quiet=True)["embedded"] == 13
    assert not open_cache(params).verify(sample=13, seed=0).problems
