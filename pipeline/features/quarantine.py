"""Contents that cannot be decoded: remembered by digest and decoder rule, so that they are tried once and not again."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import PIL

from ..data.decode import DECODER, Decoder
from ..data.digests import Digests
from ..data.images import Images
from ..errors import CacheError
from ..files import DIGEST_BYTES, canonical_json, digest_bytes, publish_file

FOLDER, SUFFIX = "quarantine", ".notes"
PATTERNS = ("*.json", f"*{SUFFIX}")


@dataclass(frozen=True)
class BadContent:
    """One unreadable content: where it was met, the class of error, the decoder's words and what to do."""

    path: str
    reason: str
    detail: str
    remedy: str


class Quarantine:
    """The unreadable contents that a decoder ``rule`` has met, noted in immutable files under the cache folder.

    ``rule`` names everything that decides whether a content can be decoded (decoder, its version, limits): under
    another rule the contents are tried again.
    """

    def __init__(self, cache_dir: Path, rule: str) -> None:
        self._folder = cache_dir / FOLDER / digest_bytes(rule.encode()).hex()[:16]
        self._known: dict[bytes, BadContent] = {}
        self._unsaved: dict[bytes, BadContent] = {}
        self._lock = threading.Lock()
        for file in self._files():
            self._known |= _read(file)

    def get(self, digest: bytes) -> BadContent | None:
        """What is known against a content, if anything."""
        return self._known.get(digest)

    def add(self, digest: bytes, bad: BadContent) -> None:
        """Note a content as unreadable; `save` makes the notes last. Safe to call from many threads."""
        with self._lock:
            self._known[digest] = self._unsaved[digest] = bad

    def save(self) -> None:
        """Publish the notes added since the last time, as one file.

        Raises:
            CacheError: the cache folder cannot be written.
        """
        with self._lock:
            notes, self._unsaved = self._unsaved, {}
        if notes:
            self._publish(notes)

    def release(self, digests: Digests) -> int:
        """Forget what is known against the contents (n, 16), so that they are tried again; how many those were.

        Raises:
            CacheError: the cache folder cannot be written.
        """
        released = {row.tobytes() for row in digests} & set(self._known)
        if released:
            files = list(self._files())
            self._known = {digest: bad for digest, bad in self._known.items() if digest not in released}
            self._publish(self._known)
            for file in files:
                file.unlink(missing_ok=True)
        return len(released)

    def _files(self) -> Iterator[Path]:
        for pattern in PATTERNS:
            yield from sorted(self._folder.glob(pattern))

    def _publish(self, notes: dict[bytes, BadContent]) -> None:
        lines = (canonical_json({"digest": digest.hex(), **asdict(bad)}) + "\n" for digest, bad in notes.items())
        data = "".join(lines).encode()
        file = self._folder / f"{digest_bytes(data).hex()}{SUFFIX}"
        try:
            publish_file(file, data)
        except OSError as error:
            raise CacheError(
                "Unreadable images cannot be noted in the cache.",
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


def _read(file: Path) -> dict[bytes, BadContent]:
    """The notes in a file; none where it is damaged: its contents are tried again and noted anew."""
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        data = file.read_bytes()
        if file.suffix == SUFFIX:
            lines = data.splitlines() if digest_bytes(data).hex() == file.stem else []
            return dict(_note(json.loads(line)) for line in lines)
        # From before many notes went into one file: each in its own, called by its digest.
        return dict([_note({"digest": file.stem, **json.loads(data)})])
    return {}


def _note(values: dict[str, str]) -> tuple[bytes, BadContent]:
    digest, bad = bytes.fromhex(values.pop("digest")), BadContent(**values)
    if len(digest) != DIGEST_BYTES or not all(isinstance(text, str) for text in astuple(bad)):
        raise ValueError("this is no note")
    return digest, bad


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
