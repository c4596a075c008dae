"""From an image's bytes to pixels: in the thread that asks, or in processes of their own.

Pillow lets go of the interpreter's lock inside its kernels, but what it does in Python around them holds it for some
0.5 ms an image, so that threads level off below 2,000 images a second on any number of cores. A CPU that
also computes the network is far from that; beside a GPU each thread has a helper process decode for it, with a lock of
its own. Bits are the same: the helper runs the same code. It loads no torch, so that it is soon there and small.

Or the device decodes JPEGs, which is another rule, as other pixels come out (`backbones.jpeg`).
"""

from __future__ import annotations

import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..data.decode import TORCHVISION_DECODER, BadImage, Decoder, Reason
from ..data.framing import Framing
from ..data.jpeg import plain_size
from ..data.trial import find_killers
from ..files import DIGEST_BYTES
from .views import View

if TYPE_CHECKING:
    import torch

Pixels = NDArray[np.uint8]
# Images from which on processes, each of which takes a second to start, are worth it.
MANY = 2000
LENGTH = struct.Struct("<Q")
# What a helper says: it is there, and after what may be pixels whether it had any.
READY, PIXELS, NONE = b"r", b"p", b"n"


@dataclass(frozen=True)
class Decoding:
    """Bytes and digest of an image to pixels (3, crop, crop) of a view; can be told to another process.

    Raises:
        BadImage: the content cannot be decoded.
    """

    decoder: Decoder
    view: View
    framing: Framing

    def __call__(self, data: bytes, digest: bytes) -> Pixels:
        return self.view.pixels(self.decoder(data), digest, self.framing)


class DecodingOnDevice:
    """`Decoding` with plain JPEGs decoded, resized and cropped on a device by torchvision, and all else by Pillow."""

    def __init__(self, decoding: Decoding, device: torch.device) -> None:
        from ..backbones.jpeg import JpegDecoder

        self._decoding, self._decode = decoding, JpegDecoder(device, decoding.framing)

    def __call__(self, data: bytes, digest: bytes) -> Pixels:
        """As `Decoding`."""
        decoding, size = self._decoding, None
        if type(data) is bytes:  # else pixels of a program's own
            size = plain_size(data, exif=decoding.decoder.exif)
        if size is None or size[0] * size[1] > decoding.decoder.max_pixels:
            return decoding(data, digest)
        pixels = self._decode(data, decoding.view.frame(size, digest, decoding.framing))
        return decoding(data, digest) if pixels is None else pixels


def as_the_rule_says(decoding: Decoding, device: torch.device) -> Decoding | DecodingOnDevice:
    """The decoding of an extraction on ``device``."""
    return DecodingOnDevice(decoding, device) if decoding.decoder.rule == TORCHVISION_DECODER else decoding


class Helpers:
    """The processes that decode for as many threads; until one is ready, and where one fails, the thread does it."""

    def __init__(self, decoding: Decoding, count: int) -> None:
        self._decoding = decoding
        self._free: SimpleQueue[_Helper] = SimpleQueue()
        self._helpers = [_Helper(decoding) for _ in range(count)]
        for helper in self._helpers:
            threading.Thread(target=self._welcome, args=(helper,), daemon=True).start()

    def __call__(self, data: bytes, digest: bytes) -> Pixels:
        """As `Decoding`. A content that ends its helper is tried apart, and refused where it does so again.

        Raises:
            BadImage: the content cannot be decoded, or kills its decoder.
        """
        if type(data) is not bytes:  # pixels of a program's own, which no file holds
            return self._decoding(data, digest)
        try:
            helper = self._free.get_nowait()
        except Empty:
            return self._decoding(data, digest)
        try:
            pixels = helper.pixels(data, digest)
        except OSError:  # it ended; threads decode for themselves where helpers are missing
            helper.close()
            if end := find_killers({digest: data}, self._decoding.decoder):
                raise BadImage(Reason.KILLS_DECODER, end[digest]) from None
            pixels = None
        else:
            self._free.put(helper)
        return self._decoding(data, digest) if pixels is None else pixels  # whose error is then the thread's own

    @property
    def ready(self) -> int:
        """How many wait for work."""
        return self._free.qsize()

    def close(self) -> None:
        """End the processes."""
        for helper in self._helpers:
            helper.close()

    def _welcome(self, helper: _Helper) -> None:
        with suppress(OSError):  # one that could not start is not missed
            helper.expect(READY)
            self._free.put(helper)


@contextmanager
def decoding_beside(
    decoding: Decoding, *, images: int, workers: int, device: torch.device
) -> Iterator[Decoding | DecodingOnDevice | Helpers]:
    """``decoding``, by processes where there are ``MANY`` images to decode for another device than the CPU."""
    on_device = decoding.decoder.rule == TORCHVISION_DECODER
    if on_device or device.type == "cpu" or images < MANY or workers < 2:
        yield as_the_rule_says(decoding, device)
        return
    helpers = Helpers(decoding, workers)
    try:
        yield helpers
    finally:
        helpers.close()


class _Helper:
    """A process, and this end of the socket to it."""

    def __init__(self, decoding: Decoding) -> None:
        self._side = decoding.framing.crop
        self._answer = 3 * self._side**2 + 1
        self._socket, theirs = socket.socketpair()
        # This package as it was found here, also where it is on no path of a new interpreter's own.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", __name__, str(theirs.fileno())]
        with theirs:
            # In a session of its own, as Ctrl-C is for this process alone; it ends when this one does.
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL, start_new_session=True
            )
        task = pickle.dumps(decoding)
        self._socket.sendall(LENGTH.pack(len(task)) + task)

    def pixels(self, data: bytes, digest: bytes) -> Pixels | None:
        """The pixels; None where the helper has none to give.

        Raises:
            OSError: the process has ended.
        """
        self._socket.sendall(LENGTH.pack(len(data)) + digest)
        self._socket.sendall(data)
        answer = np.empty(self._answer, np.uint8)  # in one piece, so that the lock is asked for once
        if self._socket.recv_into(answer.data, len(answer), socket.MSG_WAITALL) < len(answer):
            raise ConnectionError("the other end is gone")
        return None if answer[-1] == NONE[0] else answer[:-1].reshape(self._side, self._side, 3).transpose(2, 0, 1)

    def expect(self, sign: bytes) -> None:
        """Wait for a sign.

        Raises:
            OSError: the process has ended.
        """
        if _receive(self._socket, len(sign)) != sign:
            raise ConnectionError("another sign came")

    def close(self) -> None:
        """End the process, which does so by itself when nobody is at the other end."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._process.kill()
        self._process.wait()


def _receive(connection: socket.socket, size: int) -> bytes:
    data = connection.recv(size, socket.MSG_WAITALL) if size else b""
    if len(data) < size:
        raise ConnectionError("the other end is gone")
    return data


def _serve(connection: socket.socket) -> None:
    """The helper: pixels of each content that comes, until the other end is gone."""
    decoding: Decoding = pickle.loads(_receive(connection, *LENGTH.unpack(_receive(connection, LENGTH.size))))
    connection.sendall(READY)
    while True:
        head = _receive(connection, LENGTH.size + DIGEST_BYTES)
        data = _receive(connection, *LENGTH.unpack(head[: LENGTH.size]))
        try:
            pixels = decoding(data, head[LENGTH.size :])
        except Exception:  # noqa: BLE001 (whatever it is, the asking thread will meet it again, and knows what to do)
            connection.sendall(bytes(3 * decoding.framing.crop**2) + NONE)
        else:
            connection.sendall(pixels.transpose(1, 2, 0).tobytes() + PIXELS)


if __name__ == "__main__":
    with suppress(ConnectionError):
        _serve(socket.socket(fileno=int(sys.argv[1])))
