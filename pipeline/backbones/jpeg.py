"""Decode, resize and crop JPEGs on the device with torchvision, for all threads that ask at once.

On CUDA nvJPEG decodes, whose colours are smoothed in another way than libjpeg's: features differ a little from those of
Pillow's pixels. How much a backbone feels of it is measured on a built-in sample, as for a reduced precision.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ..data.decode import TORCHVISION_DECODER
from ..data.framing import Frame, Framing
from ..errors import DeviceError
from ..runtime.device import is_out_of_memory, on_device
from .precision import Verdict, judge, sample_images

if TYPE_CHECKING:
    from .backbone import Backbone, Pixels

# Pillow's nearest pixel is torch's "exact" one.
MODES = {
    "nearest": InterpolationMode.NEAREST_EXACT,
    "bilinear": InterpolationMode.BILINEAR,
    "bicubic": InterpolationMode.BICUBIC,
}
SAMPLE_SIDE, SAMPLE_QUALITY = 320, 90

Request = tuple[bytes, Frame]


class JpegDecoder:
    """The bytes of plain JPEGs to pixels (3, crop, crop) of a frame; None for those that torchvision cannot decode.

    Beside a GPU whichever thread comes when it is free decodes for all that wait by then; on a CPU each for itself.
    """

    def __init__(self, device: torch.device, framing: Framing) -> None:
        self._device, self._framing = device, framing
        self._waiting: SimpleQueue[tuple[Request, Future[Pixels | None]]] = SimpleQueue()
        self._turn: AbstractContextManager[Any] = threading.Lock() if device.type != "cpu" else nullcontext()

    def __call__(self, data: bytes, frame: Frame) -> Pixels | None:
        """One image, in company of others; its pixels do not depend on them."""
        answer: Future[Pixels | None] = Future()
        self._waiting.put(((data, frame), answer))
        with self._turn:
            if waiting := list(self._take()):
                self._answer(waiting)
        return answer.result()

    def decode(self, requests: Sequence[Request]) -> list[Pixels]:
        """Several at once.

        Raises:
            RuntimeError: torchvision cannot decode one of them, or none at all here.
        """
        contents = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data, _ in requests]
        with on_device(self._device), torch.inference_mode():
            images = _decode(contents, self._device)
            framed = [self._framed(image, frame) for image, (_, frame) in zip(images, requests, strict=True)]
            rows = torch.stack(framed).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return [row.transpose(2, 0, 1) for row in rows]

    def _take(self) -> Iterator[tuple[Request, Future[Pixels | None]]]:
        while True:
            try:
                yield self._waiting.get_nowait()
            except Empty:
                return

    def _answer(self, waiting: Sequence[tuple[Request, Future[Pixels | None]]]) -> None:
        try:
            decoded: Sequence[Pixels | None] = self.decode([request for request, _ in waiting])
        except Exception as error:  # noqa: BLE001 - whoever asked for the image alone is told, whatever it is
            if len(waiting) == 1:
                _refuse(waiting[0][1], error)
                return
            for one in waiting:  # the others are as good as before
                self._answer([one])
            return
        for (_, answer), pixels in zip(waiting, decoded, strict=True):
            answer.set_result(pixels)

    def _framed(self, image: Tensor, frame: Frame) -> Tensor:
        crop, (width, height), (left, top) = self._framing.crop, frame.size, frame.corner
        if frame.box is not None:
            image = image[:, frame.box[1] : frame.box[3], frame.box[0] : frame.box[2]]
        if image.shape[1:] != (height, width):
            image = F.resize(image, [height, width], MODES[self._framing.interpolation], antialias=True)
        image = F.crop(image, top, left, crop, crop)  # black beyond the image
        return image.flip(2) if frame.mirrored else image


def _decode(contents: list[Tensor], device: torch.device) -> list[Tensor]:
    """RGB images uint8 (3, h, w) on the device."""
    from torchvision.io import ImageReadMode, decode_jpeg

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision 0.29 recommends its successor, which not everybody has
        images: list[Tensor] = decode_jpeg(contents, ImageReadMode.RGB, device)
    return images


def _refuse(answer: Future[Any], error: Exception) -> None:
    """Damage is for Pillow to judge; a lack of memory says nothing of the image."""
    if isinstance(error, RuntimeError) and not is_out_of_memory(error):
        answer.set_result(None)
    else:
        answer.set_exception(error)


def sample_jpegs() -> Iterator[tuple[bytes, tuple[int, int]]]:
    """The built-in sample of smooth colours as JPEGs with halved colour resolution, as photographs have it; its size.

    Some are grey, some progressive.
    """
    for number, pixels in enumerate(sample_images(SAMPLE_SIDE)):
        buffer, image = io.BytesIO(), Image.fromarray(pixels.permute(1, 2, 0).numpy())
        grey, progressive = number % 4 == 2, number % 4 == 3
        image = image.convert("L") if grey else image
        image.save(buffer, "JPEG", quality=SAMPLE_QUALITY, subsampling=-1 if grey else 2, progressive=progressive)
        yield buffer.getvalue(), image.size


def accept_decoder(backbone: Backbone) -> Verdict:
    """Compare features of pixels by `JpegDecoder` with those by Pillow, on the built-in sample.

    Raises:
        DeviceError: torchvision decodes no JPEG on this device.
    """
    framing = backbone.transform.framing
    sample = list(sample_jpegs())
    try:
        pixels = JpegDecoder(backbone.device, framing).decode([(data, framing.frame(size)) for data, size in sample])
    except (RuntimeError, ImportError, AttributeError) as error:
        raise DeviceError(
            f"torchvision decodes no JPEG on {backbone.device}.",
            where="extract.decoder",
            why=str(error).partition("\n")[0],
            remedy="set extract.decoder=pillow, or install a torchvision that was built for your GPU",
        ) from error
    exact = backbone([framing.pixels(backbone.decoder(data)) for data, _ in sample])
    return judge(TORCHVISION_DECODER, *(torch.from_numpy(np.asarray(rows)) for rows in (exact, backbone(pixels))))
