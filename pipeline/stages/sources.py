"""Open what a stage works on: the scanned images with their digests, the backbone, and the features' store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import PIL
import torch
from torch import nn

from ..backbones import BackboneIdentity, BuiltNetwork, Transform, WeightsMemo, build_network, identify_network
from ..backbones.precision import Verdict, accept_precision, reduced_precision_of, verdict_key
from ..backbones.prepare import prepare_for_inference
from ..data.decode import DECODER, Decoder
from ..data.index import DigestIndex, index_file
from ..data.scan import ImageTree, list_images, scan_folder
from ..errors import WeightsError
from ..features.extractor import Forward
from ..features.prepare import Books, Crop
from ..features.quarantine import Quarantine
from ..features.spec import PLAIN_VIEW, FeatureSpec
from ..features.store import FeatureStore
from ..features.views import view_pixels
from ..files import canonical_json
from ..params import CacheParams, DataParams, ExtractParams, Params
from ..runtime.device import resolve_device, usable_cores
from ..runtime.distributed import World, world_from_environment

WEIGHTS_MEMO = "weights.json"
CPU_BATCH = 8


@dataclass
class Source:
    """Images on disk: the scan, the books of what is known of each file, and where the index remembers it."""

    tree: ImageTree
    books: Books
    index_file: Path
    warnings: list[str] = field(default_factory=list)

    def save_index(self) -> None:
        """Remember the digests learned since the scan, beside what other processes have remembered meanwhile.

        An index only saves time, so that one which cannot be written is worth a warning, not an end.
        """
        books = self.books
        try:
            index = DigestIndex.load(self.index_file).updated(
                self.tree.paths, books.stats, books.digests, books.known, read_ns=books.read_ns
            )
            index.save(self.index_file)
        except OSError as error:
            self.warnings.append(
                f"The next run reads every image again: {self.index_file} cannot be written ({error})."
            )


def open_folder(data: DataParams, cache: CacheParams) -> Source:
    """Scan ``data.root`` and look its files up in the index."""
    tree = scan_folder(data.root, layout=data.layout, extensions=data.extensions)
    return _open(tree, index_file(cache.dir, [data.root]))


def open_paths(paths: Sequence[Path], data: DataParams, cache: CacheParams) -> Source:
    """List files and folders given on the command line and look them up in the index."""
    tree = list_images(paths, extensions=data.extensions)
    return _open(tree, index_file(cache.dir, paths))


def _open(tree: ImageTree, file: Path) -> Source:
    index = DigestIndex.load(file)
    digests, known = index.lookup(tree.paths, tree.stats)
    warnings = [*tree.warnings, *([index.warning] if index.warning else [])]
    return Source(tree, Books(tree, digests, known), file, warnings)


@dataclass(frozen=True)
class Transformation:
    """From a file's bytes to an RGB image, and from the image (and its digest) to uint8 pixels (3, h, w)."""

    decode: Decoder
    crop: Crop


def plain_view(transform: Transform, data: DataParams, extract: ExtractParams) -> Transformation:
    """The transform of the weights, without randomness."""
    return Transformation(_decode(transform, data, extract), lambda image, _digest: transform.pixels(image))


def augmented_view(transform: Transform, data: DataParams, extract: ExtractParams, number: int) -> Transformation:
    """A random crop and flip that seed, number of the view and the image's content determine."""
    crop = partial(view_pixels, transform=transform, seed=extract.views_seed, view=number)
    return Transformation(_decode(transform, data, extract), lambda image, digest: crop(image, digest))


def _decode(transform: Transform, data: DataParams, extract: ExtractParams) -> Decoder:
    draft = transform.resize or transform.crop
    return Decoder(
        background=transform.background,
        exif=transform.exif,
        max_pixels=data.max_pixels,
        draft_size=(draft, draft) if extract.decoder == "draft" else None,
    )


@dataclass(frozen=True)
class Origin:
    """Where features come from: a resolved backbone and transform, not necessarily loaded, on a device."""

    identity: BackboneIdentity
    transform: Transform
    feature_dim: int
    device: torch.device
    precision: str
    decoder: str = DECODER
    verdict: Verdict | None = None

    def spec(self, dtype: str, view: str = PLAIN_VIEW) -> FeatureSpec:
        """The feature spec that these give for one storage dtype and view."""
        return FeatureSpec(
            backbone=self.identity.name,
            weights_digest=self.identity.digest,
            layer=self.identity.layer,
            pooling=self.identity.pooling,
            transform=self.transform.as_dict(),
            decoder=self.decoder,
            precision=self.precision,
            dtype=dtype,
            view=view,
        )


def resolve_origin(params: Params) -> Origin:
    """Everything the key depends on, without loading or hashing weights whose digest is remembered."""
    memo = WeightsMemo(params.cache.dir / WEIGHTS_MEMO)
    identity, transform, feature_dim = identify_network(params.backbone, params.transform, memo)
    device = resolve_device(params.extract.device, world_from_environment())
    decoder = DECODER if params.extract.decoder == "pillow" else f"{DECODER}-{params.extract.decoder}"
    origin = Origin(identity, transform, feature_dim, device, "float32", decoder)
    if params.extract.precision != "auto":
        return replace(origin, precision=params.extract.precision)
    return _with_auto_precision(origin, params, memo)


def _with_auto_precision(origin: Origin, params: Params, memo: WeightsMemo) -> Origin:
    """The reduced precision that the device is fast in, where this backbone bears it; the verdict is remembered."""
    reduced = reduced_precision_of(origin.device)
    if reduced is None:
        return origin
    key = verdict_key(origin.identity, origin.transform.crop, device=origin.device, precision=reduced)
    verdict = Verdict.from_dict(memo.get(key))
    if verdict is None:
        backbone = build_network(params.backbone, params.transform)
        verdict = accept_precision(backbone, device=origin.device, precision=reduced)
        memo.put(key, verdict.as_dict())
    return replace(origin, precision=reduced if verdict.accepted else "float32", verdict=verdict)


def open_store(params: Params, origin: Origin, view: str = PLAIN_VIEW) -> FeatureStore:
    """The cached features of an origin."""
    return FeatureStore(params.cache.dir, origin.spec(params.cache.dtype, view), origin.feature_dim)


def open_quarantine(params: Params, transform: Transform) -> Quarantine:
    """The unreadable contents under today's decoder, its version and its limits."""
    rule = {
        "decoder": DECODER,
        "pillow": PIL.__version__,
        "max_pixels": params.data.max_pixels,
        "resize": transform.resize,
        "crop": transform.crop,
    }
    return Quarantine(params.cache.dir, canonical_json(rule))


def build_forward(params: Params, origin: Origin) -> Forward:
    """The origin's backbone as a function of pixels; the weights are loaded when the first image comes."""

    def load() -> BuiltNetwork:
        backbone = build_network(params.backbone, params.transform)
        if backbone.identity.digest != origin.identity.digest:
            raise WeightsError(
                "The weights changed while they were in use.",
                where=params.backbone.weights,
                why=f"their digest was {origin.identity.digest} and is {backbone.identity.digest}",
                remedy="run the command again",
            )
        return backbone

    return forward_of(load, origin, batch_size(params.extract, origin), compiled=params.extract.compile)


def forward_of(load: Callable[[], BuiltNetwork], origin: Origin, size: int, *, compiled: bool = False) -> Forward:
    """A backbone, prepared for the origin's device and precision, as a function of pixels with one forward shape."""

    def prepare() -> nn.Module:
        module: nn.Module = prepare_for_inference(
            load(), device=origin.device, precision=origin.precision, fuse=not compiled
        )
        return torch.compile(module) if compiled else module  # type: ignore[return-value]

    return Forward(prepare, origin.transform.normalise, origin.device, size)


def batch_size(extract: ExtractParams, origin: Origin) -> int:
    """The number asked for; by rule 8 on a CPU, where larger ones gain little, and on a GPU what fits, up to 256.

    The GPU rule allows 4 kB a pixel and image, generous for every torchvision classifier.
    """
    if extract.batch_size != "auto":
        return extract.batch_size
    if origin.device.type != "cuda":
        return CPU_BATCH
    free, _ = torch.cuda.mem_get_info(origin.device)
    fitting = max(free // (origin.transform.crop**2 * 4096), 8)
    return int(min(2 ** (int(fitting).bit_length() - 1), 256))


def worker_count(extract: ExtractParams, world: World | None = None) -> int:
    """Threads that decode: as asked for, or this process's share of the usable cores."""
    if extract.workers != "auto":
        return extract.workers
    return max(usable_cores() // (world.size if world else 1), 1)
