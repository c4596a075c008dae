"""Contents that cannot be decoded: remembered by digest and decoder rule, so that they are tried once and not again."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import PIL

from ..data.decode import DECODER, Decoder
from ..data.images import Images
from ..errors import CacheError
from ..files import DIGEST_BYTES, canonical_json, digest_bytes, publish_file

FOLDER = "quarantine"


@dataclass(frozen=True)
class BadContent:
    """One unreadable content: where it was met, the class of error, the decoder's words and what to do."""

    path: str
    reason: str
    detail: str
    remedy: str


class Quarantine:
    """The unreadable contents that a decoder ``rule`` has met, one small file each under the cache folder.

    ``rule`` names everything that decides whether a content can be decoded (decoder, its version, limits): under
    another rule the contents are tried again.
    """

    def __init__(self, cache_dir: Path, rule: str) -> None:
        self._folder = cache_dir / FOLDER / digest_bytes(rule.encode()).hex()[:16]
        self._known: dict[bytes, BadContent] = {}
        with suppress(FileNotFoundError):
            for file in self._folder.glob("*.json"):
                self._read(file)

    def _read(self, file: Path) -> None:
        """A damaged note is passed over: its content is tried again and the note written anew."""
        with suppress(OSError, ValueError, TypeError, RecursionError):
            digest, bad = bytes.fromhex(file.stem), BadContent(**json.loads(file.read_bytes()))
            if len(digest) == DIGEST_BYTES and all(isinstance(text, str) for text in astuple(bad)):
                self._known[digest] = bad

    def get(self, digest: bytes) -> BadContent | None:
        """What is known against a content, if anything."""
        return self._known.get(digest)

    def add(self, digest: bytes, bad: BadContent) -> None:
        """Remember a content as unreadable, durably.

        Raises:
            CacheError: the cache folder cannot be written.
        """
        self._known[digest] = bad
        file = self._folder / f"{digest.hex()}.json"
        try:
            publish_file(file, (canonical_json(asdict(bad)) + "\n").encode())
        except OSError as error:
            raise CacheError(
                "An unreadable image cannot be noted in the cache.",
                where=file,
                why=str(error),
                remedy="free space or give write permission, or set cache.dir to another folder",
            ) from error

    def problem_with(self, images: Images, position: int) -> str:
        """Why an image could not be used, in words."""
        bad = self.get(images.digest(position)) if images.known[position] else None
        return f"{bad.reason}: {bad.remedy}" if bad else images.failures.get(position, "not read")

    @property
    def digests(self) -> list[bytes]:
        """All contents in quarantine."""
        return list(self._known)


def decoding_rule(decoder: Decoder, resize: int | None, crop: int) -> str:
    """What decides whether a content can be read: the decoder, its version and its limits."""
    rule = {
        "decoder": DECODER,
        "pillow": PIL.__version__,
        "max_pixels": decoder.max_pixels,
        "resize": resize,
        "crop": crop,
    }
    return canonical_json(rule)
