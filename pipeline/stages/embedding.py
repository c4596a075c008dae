"""Bring a source's missing features into a store: what extract, predict and evaluate have in common."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..data.decode import Reason, decoder_versions, read_bytes
from ..data.trial import find_killers
from ..errors import Interrupted
from ..features.digests import Digests, empty_digests, first_occurrences, locate, stack_digests
from ..features.drift import SAMPLES, PixelRecord, pixel_digest
from ..features.extractor import Clock, Forward, Pixels, extract_features
from ..features.journal import Journal, Suspect, journal, suspects_left_behind
from ..features.ledger import Outcome
from ..features.prepare import Preparation
from ..features.quarantine import BadContent, Quarantine
from ..features.rounding import Features
from ..features.store import FeatureStore
from ..features.writer import PartWriter
from ..files import digest_bytes
from ..runtime.distributed import World
from ..runtime.interrupt import stop_after_batch
from ..runtime.progress import ProgressBar
from .sources import Source, Transformation

MakeForward = Callable[[], Forward]
INDEX_SECONDS = 60.0


@dataclass
class Embedding:
    """One source, one store, and how to get from an image to a feature.

    Args:
        make_forward: loads the backbone; called only when something has to be forwarded.
    """

    source: Source
    store: FeatureStore
    quarantine: Quarantine
    transformation: Transformation
    make_forward: MakeForward
    workers: int
    part_seconds: float = 30.0
    quiet: bool = False

    def find_todo(
        self,
        world: World = World(),  # noqa: B008 - World is frozen
        among: NDArray[np.bool_] | None = None,
    ) -> NDArray[np.int64]:
        """Positions whose content is unknown, or known without a feature: one file of each content, our share.

        Args:
            among: bool (n,), to look at these files only.
        """
        books = self.source.books
        wanted = np.ones(len(books.known), bool) if among is None else among
        settled = self.store.contains(books.digests)
        settled |= locate(stack_digests(self.quarantine.digests), books.digests) >= 0
        repeated = np.zeros(len(settled), bool)
        known = np.flatnonzero(books.known & wanted)
        repeated[known] = ~first_occurrences(books.digests[known])
        return world.share(np.flatnonzero(wanted & (~books.known | ~(settled | repeated))))

    def run(self, todo: NDArray[np.int64]) -> Outcome:
        """Embed the files at ``todo``; with nothing to do, no weights are loaded and nothing is written.

        Raises:
            DriftError: images decode to other pixels than when the key was begun.
            CacheError: the cache cannot be written; what was published is kept.
            Interrupted: Ctrl-C; what was published is kept.
        """
        if not len(todo):
            return self._outcome(empty_digests(), Clock(), 0.0)
        forward = self.make_forward()
        with self.store.writing():
            self._check_drift()
            self._try_suspects()
            with journal(self.store.cache_dir, self.workers) as opened:
                return self._embed(todo, forward, opened)

    def _embed(self, todo: NDArray[np.int64], forward: Forward, opened: Journal) -> Outcome:
        computed: list[Digests] = []
        samples: dict[bytes, str] = {}
        preparation = self._preparation(samples, opened)
        writer = PartWriter(self.store.publish, self.part_seconds, after=self._remember_often())

        def sink(features: Features, digests: Digests) -> None:
            writer(features, digests)
            computed.append(digests)

        started = time.perf_counter()
        with stop_after_batch() as interruption, ProgressBar("embedding", len(todo), quiet=self.quiet) as bar:
            try:
                with writer:
                    clock = extract_features(
                        todo.tolist(),
                        preparation,
                        forward,
                        sink,
                        workers=self.workers,
                        interruption=interruption,
                        seen=lambda _content: bar.advance(),
                    )
            finally:
                self.source.save_index()
        seconds = time.perf_counter() - started
        clock.busy["write"] += writer.seconds
        PixelRecord(self.store.folder).record(decoder_versions(), samples)
        if interruption:
            raise _interrupted(writer.published, len(todo))
        return self._outcome(np.concatenate([empty_digests(), *computed]), clock, seconds)

    def _preparation(self, samples: dict[bytes, str], opened: Journal) -> Preparation:
        def crop(image: Image.Image, digest: bytes) -> Pixels:
            pixels = self.transformation.crop(image, digest)
            if len(samples) < SAMPLES:
                samples[digest] = pixel_digest(pixels)
            return pixels

        have = {row.tobytes() for row in self.store.digests}
        return Preparation(
            self.source.books,
            have,
            self.quarantine,
            decode=self.transformation.decode,
            crop=crop,
            in_hand=opened.in_hand,
        )

    def _remember_often(self) -> Callable[[], None]:
        """Save the index beside a part now and then, so that a kill does not cost reading everything again."""
        last = time.monotonic()

        def after() -> None:
            nonlocal last
            if time.monotonic() - last > INDEX_SECONDS:
                last = time.monotonic()
                self.source.save_index()

        return after

    def _try_suspects(self) -> None:
        """Try what earlier processes were decoding when they were killed, and quarantine what did it."""
        with suspects_left_behind(self.store.cache_dir) as suspects:
            present = {suspect.path: suspect.digest for suspect in suspects if self._is_present(suspect)}
            for path, end in find_killers(list(present), self.transformation.decode).items():
                reason = Reason.KILLS_DECODER
                self.quarantine.add(present[path], BadContent(str(path), reason.value, end, reason.remedy))

    def _is_present(self, suspect: Suspect) -> bool:
        """Whether the file is still what it was, and not known to be bad."""
        with suppress(OSError):
            held = digest_bytes(read_bytes(suspect.path)[0])
            return held == suspect.digest and not self.quarantine.get(suspect.digest)
        return False

    def _check_drift(self) -> None:
        record = PixelRecord(self.store.folder)
        versions = decoder_versions()
        if record.needs_check(versions) and not record.check(versions, self._pixels_of):
            self.store.warnings.append(
                f"The features of {self.store.folder.name} were made with other versions of the decoder, and none of "
                "the images kept for comparison is in this folder, so that equal pixels could not be confirmed."
            )

    def _pixels_of(self, digest: bytes) -> Pixels | None:
        """The pixels of a content of this scan, or None where no file holds it any more."""
        books = self.source.books
        for position in np.flatnonzero(books.known & (books.digests == np.frombuffer(digest, np.uint8)).all(axis=1)):
            data = books.read(int(position))
            if data is not None and books.digest(int(position)) == digest:
                return self.transformation.crop(self.transformation.decode(data), digest)
        return None

    def _outcome(self, computed: Digests, clock: Clock, seconds: float) -> Outcome:
        books = self.source.books
        return Outcome(books.digests, books.known, computed, dict(books.failures), clock, seconds)


def _interrupted(published: int, wanted: int) -> Interrupted:
    return Interrupted(
        f"Interrupted; {published} new features are safe in the cache.",
        why=f"{wanted} images were to be looked at",
        remedy="run the same command again: it goes on where this one stopped",
    )
