"""The features of some images under a backbone: what is there, what is missing, how it gets there. The one place where
images, backbone and store meet."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backbones import Backbone, Pixels
from ..data.decode import TORCHVISION_DECODER, Reason, decoder_versions
from ..data.digests import Digests, data_digest, empty_digests, first_occurrences, locate, stack_digests
from ..data.images import Images
from ..data.source import SPLITS, TEST, TRAIN, VAL
from ..data.trial import find_killers
from ..data.walk import read_file
from ..errors import DataError, Interrupted, MissingFeaturesError, NotFiniteError
from ..files import digest_bytes
from ..params import CacheParams, ExtractParams, Place
from ..runtime.cores import worker_count
from ..runtime.distributed import World, gather
from ..runtime.interrupt import stop_after_batch
from ..runtime.progress import ProgressBar, quiet_libraries
from .decoding import Decoding, decoding_beside
from .drift import PixelRecord
from .extractor import Clock, extract_features
from .journal import Journal, journal, suspects_left_behind
from .prepare import Decode, Preparation
from .quarantine import BadContent, Quarantine, decoding_rule
from .rounding import Features
from .rows import row_blocks, take_rows
from .spec import FeatureSpec
from .store import FeatureStore, PartWriter
from .verify import Recomputed, recompute
from .views import PLAIN, View

INDEX_SECONDS = 60.0
# Threads a core where a GPU decodes for them: the more wait, the more images it is given at once.
WAITING_A_CORE = 4
EXAMPLES = 5


@dataclass(frozen=True)
class FeatureTable:
    """Features as an experiment uses them, in the order of the images; unreadable images are absent.

    Attributes:
        features: float32 (n, d); `Rows`, which are looked up in a file, where they are too large for memory.
        targets: int (n,), index into ``class_names``; -1 where the image has no label, or is left out.
        paths: relative to ``root``.
        splits: int (n,), index into `SPLITS` (train, val, test).
        digests: uint8 (n, 16), BLAKE2b-128 of each image's bytes.
        groups: int (n,), equal for images that must stay on one side of any split.
        views: each (rows of train, d): augmented views of the training images, in their order.
        found: int (n,), the targets before the user's corrections; None without any.
    """

    root: Place
    class_names: tuple[str, ...]
    features: Features
    targets: NDArray[np.int64]
    paths: list[str]
    splits: NDArray[np.int8]
    digests: Digests
    groups: NDArray[np.int64]
    views: tuple[Features, ...] = ()
    found: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def train(self) -> NDArray[np.bool_]:
        """Which rows (n,) are trained on: of train, with a label."""
        return self.labelled(TRAIN)

    def labelled(self, split: int) -> NDArray[np.bool_]:
        """Which rows (n,) of a split have a label."""
        return np.equal(self.splits, split) & (self.targets >= 0)

    def take(self, rows: NDArray[np.bool_]) -> FeatureTable:
        """Without views, the images at ``rows`` (bool (n,))."""
        return replace(
            self,
            features=take_rows(self.features, rows),
            targets=self.targets[rows],
            paths=[self.paths[row] for row in np.flatnonzero(rows)],
            splits=self.splits[rows],
            digests=self.digests[rows],
            groups=self.groups[rows],
            found=None if self.found is None else self.found[rows],
            views=(),
        )

    def class_counts(self, rows: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Images of each class (c,) among ``rows`` (bool (n,))."""
        targets = self.targets[rows]
        return np.bincount(targets[targets >= 0], minlength=len(self.class_names))

    def training_rows(self) -> tuple[Features, NDArray[np.int64], NDArray[np.int64]]:
        """Features (n, d), targets and groups (n,) of train; with views features (1 + views, n, d), the plain first."""
        features = take_rows(self.features, self.train)
        features = np.stack([features, *self.views]) if self.views else features
        return features, self.targets[self.train], self.groups[self.train]

    def reported_split(self) -> int:
        """The split to report on: test where there is one, else val.

        Raises:
            DataError: fewer than two classes, a class without images in train, or nothing to report on.
        """
        counts = self.class_counts(self.train)
        if len(self.class_names) < 2:
            raise self._untrainable(f"it has {len(self.class_names)} class folder(s), and a classifier needs two")
        if empty := [name for name, count in zip(self.class_names, counts, strict=True) if not count]:
            raise self._untrainable(f"train has no usable image of {', '.join(empty)}")
        for split in (TEST, VAL):
            if self.labelled(split).any():
                return split
        raise self._untrainable("no image is left to report on: val and test are empty")

    def _untrainable(self, why: str) -> DataError:
        return DataError(
            "A head cannot be trained on this folder.",
            where=self.root,
            why=why,
            remedy="give each class a folder with several images; data.val_fraction sets some aside to report on",
        )

    @cached_property
    def data_digest(self) -> str:
        """Hex digest of contents, labels and splits, whatever the paths and the order."""
        labels = [self.class_names[target] if target >= 0 else "" for target in self.targets]
        return data_digest(self.digests, labels, [SPLITS[split] for split in self.splits])


@dataclass(frozen=True)
class Filled:
    """What `FeatureCache.fill` did, in all processes that worked together.

    Attributes:
        computed: uint8 (k, 16), contents that went through the backbone.
        clock: seconds of each step.
        seconds: from the first file opened to the last part published; that of the longest share.
    """

    computed: Digests
    clock: Clock
    seconds: float


class FeatureCache:
    """The features of ``images`` under ``backbone``, as one view shows them.

    Attributes:
        store: the rows on disk.
        quarantine: contents that the backbone's decoder cannot read.
    """

    def __init__(
        self,
        images: Images,
        backbone: Backbone,
        cache: CacheParams,
        extract: ExtractParams,
        *,
        view: View = PLAIN,
        world: World | None = None,
        quiet: bool = False,
    ) -> None:
        self.images, self.backbone, self.view = images, backbone, view
        self._params, self._extract, self._world, self._quiet = cache, extract, world or World(), quiet
        self.store = FeatureStore(cache.dir, _spec_of(backbone, cache.dtype, view), backbone.feature_dim)
        transform = backbone.transform
        rule = decoding_rule(backbone.decoder, transform.resize, transform.crop)
        self.quarantine = Quarantine(cache.dir, rule)

    def of(self, images: Images) -> FeatureCache:
        """The same features of other images; what is known of the store, and a loaded backbone, are known still."""
        other = copy(self)
        other.images = images
        return other

    def views(self) -> Iterator[FeatureCache]:
        """The caches of the augmented views that the params ask for, of the same images."""
        for number in range(1, self._extract.views + 1):
            yield self._with_view(View(number, self._extract.views_seed))

    def _with_view(self, view: View) -> FeatureCache:
        return FeatureCache(
            self.images,
            self.backbone,
            self._params,
            self._extract,
            view=view,
            world=self._world,
            quiet=self._quiet,
        )

    @property
    def key(self) -> str:
        """Of everything but the image that determines these features."""
        return self.store.spec.key

    @property
    def warnings(self) -> list[str]:
        """What the user should be told of the images and of what lies in the cache."""
        return [*self.images.warnings, *self.store.warnings]

    # -- what is there ----------------------------------------------------------------------------------------------

    @property
    def present(self) -> NDArray[np.bool_]:
        """Which images (n,) have a feature."""
        present: NDArray[np.bool_] = self.images.known & self.store.contains(self.images.digests)
        return present

    @property
    def quarantined(self) -> NDArray[np.bool_]:
        """Which images (n,) are known to be unreadable."""
        rows = locate(stack_digests(self.quarantine.digests), self.images.digests)
        bad: NDArray[np.bool_] = self.images.known & (rows >= 0)
        return bad

    @property
    def of_train(self) -> NDArray[np.bool_]:
        """Which images (n,) with a feature are of train."""
        rows = np.flatnonzero(self.present)
        train = np.zeros(len(self.images), bool)
        train[rows[self.images.splits_of(rows) == TRAIN]] = True
        return train

    def missing(
        self, among: NDArray[np.bool_] | None = None, *, beside: Sequence[FeatureCache] = ()
    ) -> NDArray[np.int64]:
        """Positions to look at: unknown images, and one image of each known content without a feature; our share.

        Args:
            among: bool (n,), to look at these images only.
            beside: caches of the same images, in which features may be missing too.
        """
        images = self.images
        wanted = np.ones(len(images), bool) if among is None else among
        repeated = np.zeros(len(images), bool)
        known = np.flatnonzero(images.known & wanted)
        repeated[known] = ~first_occurrences(images.digests[known])
        present = np.logical_and.reduce([cache.present for cache in (self, *beside)])
        return self._world.share(np.flatnonzero(wanted & ~(present | self.quarantined | repeated)))

    def read(self, digests: Digests, memory: int | None = None) -> Features:
        """Features (n, d), float32, of the contents ``digests`` (n, 16); `Rows` where they are more than ``memory``.

        Raises:
            MissingFeaturesError: some have none.
        """
        flat: Any = self.store.flat
        large = memory is not None and 4 * len(digests) * self.store.feature_dim > memory
        return flat(digests) if large else self.store.read(digests)

    def table(self, memory: int | None = None) -> FeatureTable:
        """All images that are not unreadable, with their augmented views; nothing is computed.

        Args:
            memory: bytes of features, without views, above which they stay in a file; None for no limit.

        Raises:
            MissingFeaturesError: an image has no feature, and is not known to be unreadable.
        """
        self.images.read_unknown(quiet=self._quiet)
        present = self.present
        missing = np.flatnonzero(~present & ~self.quarantined)
        if len(missing):
            raise self._missing(missing)
        rows = np.flatnonzero(present)
        table = self.table_of(rows, None if self._extract.views else memory)
        self.store.touch()
        return replace(table, views=tuple(view._view_of(table) for view in self.views()))

    def table_of(self, rows: NDArray[np.int64], memory: int | None = None) -> FeatureTable:
        """The images at ``rows``, each with a feature; above ``memory`` bytes their features stay in a file."""
        images, digests = self.images, self.images.digests[rows]
        features = self.read(digests, memory)
        blocks = row_blocks(features)
        finite = np.concatenate([np.ones(0, bool), *(np.isfinite(features[block]).all(axis=1) for block in blocks)])
        if not finite.all():  # from before such features were refused
            raise self._not_finite(digests[~finite], f"can be used: move {self.store.folder} away and extract again")
        return FeatureTable(
            root=images.root,
            class_names=images.class_names,
            features=features,
            targets=images.corrected_indices(rows),
            paths=[images.paths[row] for row in rows],
            splits=images.splits_of(rows),
            digests=digests,
            groups=images.groups_of(rows),
            found=None if images.corrections is None else images.class_indices(rows),
        )

    def _view_of(self, table: FeatureTable) -> Features:
        """This view of the table's training images."""
        try:
            features = self.store.read(table.digests[table.train])
        except MissingFeaturesError as error:
            raise MissingFeaturesError(
                f"View {self.view.number} of the training images is not in the cache: {error.what}",
                where=error.where,
                remedy="run `pipeline extract` with the same params (`pipeline train-head --extract` does both)",
            ) from error
        self.store.touch()
        return features

    def _missing(self, missing: NDArray[np.int64]) -> MissingFeaturesError:
        images = self.images
        examples = ", ".join(repr(images.paths[position]) for position in missing[:EXAMPLES])
        failures = [images.failures[position] for position in missing.tolist() if position in images.failures]
        return MissingFeaturesError(
            f"{len(missing)} of {len(images)} images have no feature yet.",
            where=f"{images.root}: {examples}{' ...' if len(missing) > EXAMPLES else ''}",
            why=f"unreadable now: {failures[0]}" if failures else f"{self.store.spec.folder_name} does not hold them",
            remedy="run `pipeline extract` with the same params (`pipeline train-head --extract` does both)",
        )

    # -- how it gets there ------------------------------------------------------------------------------------------

    def fill(self, positions: NDArray[np.int64] | None = None, *, beside: Sequence[FeatureCache] = ()) -> Filled:
        """Compute the features of the images at ``positions`` (all that is missing), together with other processes.

        With nothing to do, no weights are loaded and nothing is written.

        Args:
            beside: caches that differ in the pooling alone: they are filled in the same pass over the images.

        Raises:
            DriftError: images decode to other pixels than when the key was begun.
            DeviceError: the device decodes no JPEG, or to pixels whose features are too far from those of Pillow's.
            CacheError: the cache cannot be written; what was published is kept.
            Interrupted: Ctrl-C; what was published is kept.
        """
        positions = self.missing(beside=beside) if positions is None else positions
        caches = (self, *beside)
        computed = self._compute(positions, caches) if len(positions) else Filled(empty_digests(), Clock(), 0.0)
        filled = self._together(computed)
        for cache in caches:
            cache.store.refresh()
            cache.store.touch()
        return filled

    def ledger(self, filled: Filled) -> dict[str, int]:
        """``images = embedded + reused + duplicates + quarantined``, and ``failed`` files beside it.

        Embedded, reused and quarantined count distinct contents; duplicates count images whose bytes occurred earlier
        in the listing; forwarded counts images that went through the backbone.
        """
        read = self.images.digests[self.images.known]
        counts = count_contents(read, filled.computed, stack_digests(self.quarantine.digests))
        return {**counts, "forwarded": len(filled.computed), "failed": len(self.images.failures)}

    def verify(self, *, sample: int, seed: int) -> Recomputed:
        """Compute up to ``sample`` of the features here again, and compare."""
        return recompute(self.images, self.backbone, self.view, self.store, sample=sample, seed=seed)

    def _compute(self, positions: NDArray[np.int64], caches: Sequence[FeatureCache]) -> Filled:
        with ExitStack() as writing:
            for cache in caches:
                writing.enter_context(cache.store.writing())
                cache._confirm_pixels()
            self.backbone.confirm_decoder()
            self._try_suspects()
            with journal(self.store.cache_dir, self._workers) as opened:
                return self._embed(positions, opened, caches)

    @property
    def _workers(self) -> int:
        workers = worker_count(self._extract.workers, self._world)
        device_decodes = self.backbone.decoder.rule == TORCHVISION_DECODER and self.backbone.device.type != "cpu"
        return WAITING_A_CORE * workers if device_decodes and self._extract.workers == "auto" else workers

    def _embed(self, positions: NDArray[np.int64], opened: Journal, caches: Sequence[FeatureCache]) -> Filled:
        from ..backbones import forward_together

        computed: list[Digests] = []
        refused: list[Digests] = []
        pace, after = self._extract.part_seconds, self._remember_often()
        writers = [PartWriter(cache.store.publish, pace, after=after) for cache in caches]
        ends = np.cumsum([cache.backbone.feature_dim for cache in caches])[:-1]

        def sink(features: Features, digests: Digests) -> None:
            finite = np.isfinite(features).all(axis=1)
            for cache, writer, own in zip(caches, writers, np.split(features, ends, axis=1), strict=True):
                new = finite & ~cache.store.contains(digests)
                if new.any():
                    writer(np.ascontiguousarray(own[new]), digests[new])
            computed.append(digests[finite])
            refused.append(digests[~finite])

        started = time.perf_counter()
        with (
            stop_after_batch() as interruption,
            quiet_libraries(),
            ProgressBar("embedding", len(positions), quiet=self._quiet) as bar,
            self.images.reading_ahead(positions.tolist()),
        ):
            try:
                with ExitStack() as open_now:
                    decode = open_now.enter_context(self._decoding_beside(len(positions)))
                    for writer in writers:
                        open_now.enter_context(writer)
                    clock = extract_features(
                        positions.tolist(),
                        self._preparation(decode, opened, caches),
                        forward_together([cache.backbone for cache in caches]),
                        sink,
                        workers=self._workers,
                        interruption=interruption,
                        seen=lambda _content: bar.advance(),
                    )
            finally:
                self.images.remember()
                self.quarantine.save()
        seconds = time.perf_counter() - started
        clock.busy["write"] += sum(writer.seconds for writer in writers)
        if interruption:
            raise _interrupted(writers[0].published, len(positions))
        if len(lost := np.concatenate([empty_digests(), *refused])):
            raise self._not_finite(lost, "was put into the cache; those of the other images were")
        return Filled(np.concatenate([empty_digests(), *computed]), clock, seconds)

    def _not_finite(self, digests: Digests, put: str) -> NotFiniteError:
        rows = np.flatnonzero(self.images.known & (locate(digests, self.images.digests) >= 0))
        examples = ", ".join(repr(self.images.paths[row]) for row in rows[:EXAMPLES])
        return NotFiniteError(
            f"The features of {len(digests)} images hold NaN or infinity; none of them {put}.",
            where=f"{self.images.root}: {examples}{' ...' if len(rows) > EXAMPLES else ''}",
            why="the network overflows on them, in float32 too",
            remedy="check transform.mean and transform.std, and the weights file",
        )

    @property
    def _decoding(self) -> Decoding:
        return Decoding(self.backbone.decoder, self.view, self.backbone.transform.framing)

    def _decoding_beside(self, images: int) -> AbstractContextManager[Decode]:
        return decoding_beside(self._decoding, images=images, workers=self._workers, device=self.backbone.device)

    def _preparation(self, decode: Decode, opened: Journal, caches: Sequence[FeatureCache]) -> Preparation:
        return Preparation(
            self.images,
            lambda digest: all(cache.store.contains(stack_digests([digest]))[0] for cache in caches),
            self.quarantine,
            decode=decode,
            in_hand=opened.in_hand,
        )

    def _remember_often(self) -> Callable[[], None]:
        """Save index and quarantine beside a part now and then, so that a kill does not cost reading all again."""
        last = time.monotonic()

        def after() -> None:
            nonlocal last
            if time.monotonic() - last > INDEX_SECONDS:
                last = time.monotonic()
                self.images.remember()
                self.quarantine.save()

        return after

    def _together(self, filled: Filled) -> Filled:
        """What all processes did, each learning what the others have read now."""
        images, new = self.images, self.images.read_here
        shares = gather((new, images.digests[new], images.failures, filled), self._world)
        if len(shares) == 1:
            return filled
        clock = Clock()
        for positions, digests, failures, share in shares:
            images.learn(positions, digests, failures)
            clock.add(share.clock)
        computed = np.concatenate([share.computed for *_, share in shares])
        return Filled(computed, clock, max(share.seconds for *_, share in shares))

    def _try_suspects(self) -> None:
        """Try what earlier processes were decoding when they were killed, and quarantine what did it."""
        with suspects_left_behind(self.store.cache_dir) as suspects:
            paths = {suspect.digest: suspect.path for suspect in suspects}
            contents = {digest: data for digest in paths if (data := self._suspect(digest, paths[digest]))}
            for digest, end in find_killers(contents, self.backbone.decoder).items():
                reason = Reason.KILLS_DECODER
                self.quarantine.add(digest, BadContent(paths[digest], reason.value, end, reason.remedy))
            self.quarantine.save()
            # What was in a batch of another process, or in a store, is found again by whoever is given it next.
            known = {*contents, *self.quarantine.digests}
            suspects[:] = [each for each in suspects if each.digest in known or os.path.isabs(each.path)]

    def _suspect(self, digest: bytes, path: str) -> bytes | None:
        """The bytes of a suspect, if it still is what it was and is not known to be bad."""
        if self.quarantine.get(digest):
            return None
        with suppress(OSError):
            position = self.images.position_of(path)
            data = read_file(path)[0] if position is None else self.images.read(position)
            return data if data is not None and digest_bytes(data) == digest else None
        return None

    def _confirm_pixels(self) -> None:
        record = PixelRecord(self.store.folder)
        if not record.versions and len(self.store.digests):
            self.store.warnings.append(
                f"With which decoder the {len(self.store.digests)} features in {self.store.folder.name} were made"
                " is not recorded; `pipeline cache verify` computes some of them again."
            )
        record.confirm(decoder_versions(), self._pixels_of, self._bytes_of)

    def _pixels_of(self, data: bytes) -> Pixels:
        return self._decoding(data, digest_bytes(data))

    def _bytes_of(self, digest: bytes) -> bytes | None:
        """An image with this content; those whose content is not known are read to find it."""
        images = self.images
        images.read_unknown()
        same = images.known & (images.digests == np.frombuffer(digest, np.uint8)).all(axis=1)
        contents = (images.read(position) for position in np.flatnonzero(same).tolist())
        return next((data for data in contents if data is not None and digest_bytes(data) == digest), None)


def count_contents(digests: Digests, computed: Digests, quarantined: Digests) -> dict[str, int]:
    """The ledger of images with these contents (n, 16), of which some were computed now and some cannot be read."""
    first = first_occurrences(digests)
    embedded = first & (locate(computed, digests) >= 0)
    bad = first & ~embedded & (locate(quarantined, digests) >= 0)
    return {
        "images": len(digests),
        "embedded": int(embedded.sum()),
        "reused": int((first & ~embedded & ~bad).sum()),
        "duplicates": int((~first).sum()),
        "quarantined": int(bad.sum()),
    }


def _spec_of(backbone: Backbone, dtype: str, view: View) -> FeatureSpec:
    identity = backbone.identity
    return FeatureSpec(
        backbone=identity.name,
        weights_digest=identity.digest,
        layer=identity.layer,
        pooling=identity.pooling,
        transform=backbone.transform.as_dict(),
        decoder=backbone.decoder.rule,
        precision=backbone.precision,
        dtype=dtype,
        view=view.name,
        code=identity.code,
    )


def _interrupted(published: int, wanted: int) -> Interrupted:
    return Interrupted(
        f"Interrupted; {published} new features are safe in the cache.",
        why=f"{wanted} images were to be looked at",
        remedy="run the same command again: it goes on where this one stopped",
    )
