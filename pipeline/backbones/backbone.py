"""The backbone: known at once, loaded when it is first called. Carries all that determines a feature but the image."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..data.decode import DECODER, DRAFT_DECODER, TORCHVISION_DECODER, Decoder, PlainJpegsElsewhere
from ..errors import DeviceError, WeightsError
from ..params import BackboneParams, ExtractParams, TransformParams
from ..runtime.device import is_out_of_memory, on_device, resolve_device
from ..runtime.distributed import World
from .identity import BackboneIdentity, recall
from .memo import WeightsMemo
from .precision import (
    PrecisionChoice,
    Verdict,
    accept_precision,
    keep_choice,
    kept_choice,
    kind_of_device,
    reduced_precisions_of,
    verdict_key,
)
from .transform import Transform

# torch, and all that knows networks, is imported where one of them works: most commands find every feature there.
if TYPE_CHECKING:
    import torch
    from torch import nn

    from .build import BuiltNetwork
    from .pipe import Pipe
    from .zoo import FeatureNetwork

    Normalise = Callable[[torch.Tensor], torch.Tensor]

Pixels = NDArray[np.uint8]
Features = NDArray[np.float32]

WEIGHTS_MEMO = "weights.json"
DECODER_RULES = {"pillow": DECODER, "draft": DRAFT_DECODER, "torchvision": TORCHVISION_DECODER}
CPU_BATCH = 8
# On a GPU one batch is filled by the host while another is copied and a third is computed.
SLOTS = 3
# What a pixel of an image takes on a GPU in float32 between two layers, and the largest batch that gains anything.
GPU_BYTES_A_PIXEL, GPU_BATCH = 2048, 1024

logger = logging.getLogger(__name__)


class Forward:
    """One frozen module on one device, always called with the same shape so that a batch's company changes no bit.

    Args:
        load: gives the module, normalised images (n, 3, h, w) to features (n, d) on ``device``; called once, and only
            when there is an image to forward.
        normalise: uint8 images on the device to what the module takes.
        batch_size: images a call; short batches are padded. It is halved, aloud, where not even the first fits; one
            that does not fit later on is computed in parts, and the next is whole again.
        exact: computes the features again that come out as no finite number, as an overflow of float16 does.
        halved: told the new batch size.
    """

    def __init__(
        self,
        load: Callable[[], nn.Module],
        normalise: Normalise,
        device: torch.device,
        batch_size: int,
        *,
        exact: Forward | None = None,
        halved: Callable[[int], None] = lambda _size: None,
    ) -> None:
        self.normalise, self.device, self.batch_size, self.exact = normalise, device, batch_size, exact
        self._load, self._lock, self._halved, self._fits = load, threading.Lock(), halved, False
        self._module: nn.Module | None = None
        self._pipe: Pipe | None = None
        self._pipe_lock = threading.Lock()

    @property
    def module(self) -> nn.Module:
        """The module, loaded by whichever thread needs it first."""
        with self._lock:
            if self._module is None:
                self._module = self._load()
            return self._module

    def __call__(self, pixels: Sequence[Pixels]) -> Features:
        """Features (n, d), float32, of uint8 images (3, h, w) of one size."""
        rows: list[Features] = []
        done, size = 0, self.batch_size
        while done < len(pixels):
            computed = self._attempt(pixels[done : done + size], size)
            if computed is None:
                size = self._smaller(size)
                continue
            self._fits = True
            rows.append(computed)
            done += size
        features = np.concatenate(rows)
        lost = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if len(lost) and self.exact:
            features[lost] = self.exact([pixels[row] for row in lost.tolist()])
        return features

    def _attempt(self, pixels: Sequence[Pixels], size: int) -> Features | None:
        """Features of a batch; None where the device has too little memory for one of this size."""
        try:
            with on_device(self.device):
                return self._forward(pixels, size)
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        # Only out here is the traceback gone, whose frames hold what the layers gave.
        self._pipe = None
        gc.collect()
        if self.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()
        return None

    def _smaller(self, size: int) -> int:
        """Half of a size that did not fit: for good where none did yet, so that all features come of one shape."""
        half = size // 2
        if self._fits:
            logger.warning("%s is out of memory: a batch of %d images is computed in parts.", self.device, size)
            return half
        logger.warning("%s has too little memory for batches of %d images: they are of %d.", self.device, size, half)
        self.batch_size = min(self.batch_size, half)
        self._halved(self.batch_size)
        return half

    def _forward(self, pixels: Sequence[Pixels], size: int) -> Features:
        if self.device.type == "cuda" and size == self.batch_size:
            return self._piped(size, pixels[0].shape)(pixels)
        import torch

        from .pipe import stack_pixels

        batch = torch.zeros((size, *pixels[0].shape[1:], 3), dtype=torch.uint8)
        stack_pixels(pixels, batch)
        features = self._compute(batch.to(self.device).permute(0, 3, 1, 2))
        return np.asarray(features[: len(pixels)].cpu().numpy())

    def _compute(self, images: torch.Tensor) -> torch.Tensor:
        """Features (n, d), float32, of uint8 images (n, 3, h, w), both on the device."""
        import torch

        with torch.inference_mode():
            features: torch.Tensor = self.module(self.normalise(images).contiguous(memory_format=torch.channels_last))
            return features.float()

    def _piped(self, size: int, shape: tuple[int, ...]) -> Pipe:
        from .pipe import Pipe

        with self._pipe_lock:
            if self._pipe is None or (self._pipe.size, self._pipe.shape) != (size, shape):
                self._pipe = Pipe(self._compute, self.device, size, shape)
            return self._pipe


@dataclass(frozen=True)
class Backbone:
    """A frozen network with everything that determines its features: whoever holds it can forget nothing.

    Attributes:
        decoder: from an image's bytes to RGB.
        transform: from RGB to pixels, and from pixels to what the network takes.
        feature_dim: numbers in a feature.
        place: the device as the params name it, for the process ``world``.
        precision: of the forward pass, resolved; ``choice`` says why, where it was `auto`.
        batch: images in one forward pass, as the params or a run say it.
        source: loads the network.
        parameters: how many numbers the network has; ``None`` where that was not recorded.
        compiled: run it through torch.compile.
        notes: what the user should know of how the weights were read; there once the network was loaded.
        made_on: the device that ``batch`` was recorded on: on another kind the rule holds.
        memo: remembers what size of batches fits a device, where that of the rule does not.
    """

    identity: BackboneIdentity
    transform: Transform
    feature_dim: int
    decoder: Decoder
    place: str
    precision: str
    batch: int | Literal["auto"]
    source: Callable[[], BuiltNetwork] = field(repr=False)
    parameters: int | None = None
    world: World | None = None
    compiled: bool = False
    choice: PrecisionChoice | None = None
    notes: list[str] = field(default_factory=list, compare=False)
    made_on: str | None = None
    memo: WeightsMemo | None = field(default=None, repr=False, compare=False)

    @cached_property
    def device(self) -> torch.device:
        """Where the network runs.

        Raises:
            DeviceError: it is not on this machine.
        """
        return resolve_device(self.place, self.world)

    @cached_property
    def batch_size(self) -> int:
        """Images in one forward pass, by rule; ``forward`` knows whether so many fit."""
        wanted = self._wanted_batch
        if self.device.type == "cpu" or self.memo is None:
            return wanted
        fits = (self.memo.get(self._batch_key) or {}).get("fits")
        return fits if isinstance(fits, int) and 1 <= fits <= wanted else wanted

    @property
    def _wanted_batch(self) -> int:
        elsewhere = self.made_on is not None and not self.made_on.startswith(self.device.type)
        return batch_size("auto" if elsewhere else self.batch, self.device, self.transform.crop, self.precision)

    @property
    def _batch_key(self) -> dict[str, Any]:
        """What it depends on whether a batch fits."""
        return {
            "about": "batch size",
            "backbone": self.identity.as_dict(),
            "crop": self.transform.crop,
            "device": kind_of_device(self.device),
            "precision": self.precision,
            "wanted": self._wanted_batch,
        }

    def remember_fit(self, size: int) -> None:
        """Batches of the wanted size do not fit the device; those of ``size`` may."""
        self.__dict__["batch_size"] = size
        if self.memo is not None:
            self.memo.put(self._batch_key, {"fits": size})

    @cached_property
    def forward(self) -> Forward:
        """The network as a function of pixels with one shape; its weights are loaded when the first image comes."""
        from .prepare import REDUCED

        shape = (self.transform.normalise, self.device, self.batch_size)
        exact = Forward(lambda: self._prepare("float32"), *shape) if self.precision in REDUCED else None
        return Forward(lambda: self._prepare(self.precision), *shape, exact=exact, halved=self.remember_fit)

    def __call__(self, pixels: Sequence[Pixels]) -> Features:
        """Features (n, feature_dim), float32, of uint8 pixels (3, crop, crop), as `forward` computes them."""
        return self.forward(pixels)

    def pixels(self, image: Image.Image) -> Pixels:
        """uint8 pixels (3, crop, crop) of an RGB image.

        Raises:
            BadImage: the resized image would have too many pixels.
        """
        return self.transform.pixels(image)

    def confirm_decoder(self) -> None:
        """Refuse to decode on the device where features feel it more than they may a reduced precision; remembered.

        Raises:
            DeviceError: they do, or the device decodes no JPEG.
        """
        if self.decoder.rule != TORCHVISION_DECODER:
            return
        verdict = Verdict.from_dict(self.memo.get(self._decoder_key)) if self.memo else None
        if verdict is None:
            from .jpeg import accept_decoder

            verdict = accept_decoder(self)
            logger.info("%s", verdict)
            if self.memo is not None:
                self.memo.put(self._decoder_key, verdict.as_dict())
        if not verdict.accepted:
            raise DeviceError(
                f"{self.identity.name} feels too much of how {self.device} decodes JPEGs.",
                where="extract.decoder",
                why=str(verdict),
                remedy="set extract.decoder=pillow",
            )

    @property
    def _decoder_key(self) -> dict[str, Any]:
        """What the verdict on the decoder depends on."""
        return {
            **verdict_key(self.identity, self.transform.crop, device=self.device, precision=self.precision),
            "about": "decoder",
            "decoder": self.decoder.rule,
            "transform": self.transform.as_dict(),
        }

    def build(self) -> BuiltNetwork:
        """Load the network, a new one at each call, proven to be the one that was identified.

        Raises:
            WeightsError: the weights are others now, or cannot be read.
        """
        built = self.source()
        if built.identity.digest != self.identity.digest:
            raise WeightsError(
                "The weights changed while they were in use.",
                where=self.identity.name,
                why=f"their digest was {self.identity.digest} and is {built.identity.digest}",
                remedy="run the command again",
            )
        self.notes[:] = built.notes
        return built

    def trainable(self) -> FeatureNetwork:
        """A network of one's own to fine-tune, all parameters trainable; in eval mode it computes the same features."""
        from .build import trainable_module

        return trainable_module(self.build())

    def release(self) -> None:
        """Forget the loaded network; the next call loads it again."""
        self.__dict__.pop("forward", None)

    def _prepare(self, precision: str) -> nn.Module:
        import torch

        from .prepare import prepare_for_inference

        module: nn.Module = prepare_for_inference(
            self.build(), device=self.device, precision=precision, fuse=not self.compiled
        )
        return torch.compile(module) if self.compiled else module  # type: ignore[return-value]


def resolve_backbone(
    params: BackboneParams,
    transform: TransformParams,
    extract: ExtractParams,
    *,
    max_pixels: int,
    cache_dir: Path,
    cached_precision: Callable[[BackboneIdentity, Transform], str | None] = lambda _identity, _transform: None,
    begins: bool = False,
    world: World | None = None,
) -> Backbone:
    """The backbone that the params name; weights whose digest the cache remembers are neither loaded nor hashed, and
    where it remembers what the libraries said, these are not imported.

    Args:
        max_pixels: images with more are not decoded.
        cache_dir: where what was found out about weights is remembered, and what precision `auto` stands for.
        cached_precision: of most features of a network in a cache from before that was remembered there.
        begins: whether features will be computed, so that what `auto` stands for is decided for all machines.

    Raises:
        BackboneError, WeightsError, DeviceError: see their messages.
    """
    memo = WeightsMemo(cache_dir / WEIGHTS_MEMO)
    known = recall(params, transform, memo)
    if known is None:
        from .build import identify

        known = identify(params, transform, memo)
    identity, resolved = known.identity, known.transform
    if extract.device not in ("auto", "cpu"):  # say at once that it is not there
        resolve_device(extract.device, world)

    def source() -> BuiltNetwork:
        from .build import build_network

        return build_network(params, transform)

    choice = None
    if extract.precision == "auto":
        choice = kept_choice(cache_dir, identity, resolved)
        if choice is None and (most := cached_precision(identity, resolved)):
            choice = PrecisionChoice(most, "most features of this backbone in the cache are so")
        new = choice is None
        choice = choice or _choose_precision(identity, resolved, resolve_device(extract.device, world), source, memo)
        if begins:
            choice = replace(keep_choice(cache_dir, identity, resolved, choice), new=new)
    return Backbone(
        identity=identity,
        transform=resolved,
        feature_dim=known.feature_dim,
        decoder=make_decoder(resolved, max_pixels, DECODER_RULES[extract.decoder]),
        place=extract.device,
        precision=choice.precision if choice else extract.precision,
        batch=extract.batch_size,
        source=source,
        parameters=known.parameters,
        world=world,
        compiled=extract.compile,
        choice=choice,
        memo=memo,
    )


def make_decoder(transform: Transform, max_pixels: int, rule: str) -> Decoder:
    """The decoder of a rule, with what the transform says of it."""
    draft = transform.resize or transform.crop
    kind = PlainJpegsElsewhere if rule == TORCHVISION_DECODER else Decoder
    return kind(
        background=transform.background,
        exif=transform.exif,
        max_pixels=max_pixels,
        draft_size=(draft, draft) if rule == DRAFT_DECODER else None,
    )


def batch_size(wanted: int | Literal["auto"], device: torch.device, crop: int, precision: str = "float32") -> int:
    """The number asked for; by rule 8 on a CPU, where larger ones gain little, and on a GPU up to 1024.

    The GPU rule asks the size of its memory, never how much of that is free: features, a run's record of their shape
    and what `predict` repeats must be of one shape on one machine. It allows 2 kB a pixel and image in float32, half
    of that in 16 bits: on 80 GB batches of 512 and 1024 images of 224 pixels.
    """
    if wanted != "auto":
        return wanted
    if device.type != "cuda":
        return CPU_BATCH
    import torch

    from .prepare import REDUCED

    total = torch.cuda.get_device_properties(device).total_memory
    image = crop**2 * GPU_BYTES_A_PIXEL // (2 if precision in REDUCED else 1)
    return int(min(2 ** (int(max(total // image, 8)).bit_length() - 1), GPU_BATCH))


def _choose_precision(
    identity: BackboneIdentity,
    transform: Transform,
    device: torch.device,
    source: Callable[[], BuiltNetwork],
    memo: WeightsMemo,
) -> PrecisionChoice:
    """The first of the device's fast precisions that this backbone bears; verdicts are remembered."""
    began, verdicts = f"begun on {kind_of_device(device)}", list[Verdict]()
    for reduced in reduced_precisions_of(device):
        key = verdict_key(identity, transform.crop, device=device, precision=reduced)
        verdict = Verdict.from_dict(memo.get(key))
        if verdict is None:
            verdict = accept_precision(source(), device=device, precision=reduced)
            memo.put(key, verdict.as_dict())
        verdicts.append(verdict)
        if verdict.accepted:
            break
    precision = verdicts[-1].precision if verdicts and verdicts[-1].accepted else "float32"
    return PrecisionChoice(precision, ": ".join([began, *([", ".join(map(str, verdicts))] if verdicts else [])]))
