"""The backbone: known at once, loaded when it is first called. Carries all that determines a feature but the image."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from ..data.decode import DECODER, DRAFT_DECODER, Decoder
from ..errors import WeightsError
from ..params import BackboneParams, ExtractParams, TransformParams
from ..runtime.device import resolve_device
from ..runtime.distributed import World
from .build import BackboneIdentity, BuiltNetwork, build_network, identify_network, make_module, trainable_module
from .memo import WeightsMemo
from .precision import (
    PrecisionChoice,
    Verdict,
    accept_precision,
    keep_choice,
    kept_choice,
    kind_of_device,
    reduced_precision_of,
    verdict_key,
)
from .prepare import prepare_for_inference
from .transform import Transform
from .zoo import FeatureNetwork

Pixels = NDArray[np.uint8]
Features = NDArray[np.float32]
Normalise = Callable[[torch.Tensor], torch.Tensor]

WEIGHTS_MEMO = "weights.json"
DECODER_RULES = {"pillow": DECODER, "draft": DRAFT_DECODER}
CPU_BATCH = 8


class Forward:
    """One frozen module on one device, always called with the same shape so that a batch's company changes no bit.

    Args:
        load: gives the module, normalised images (n, 3, h, w) to features (n, d) on ``device``; called once, and only
            when there is an image to forward.
        normalise: uint8 images on the device to what the module takes.
        batch_size: images a call; short batches are padded. On a GPU that runs out of memory it is halved.
        exact: computes the features again that come out as no finite number, as an overflow of float16 does.
    """

    def __init__(
        self,
        load: Callable[[], nn.Module],
        normalise: Normalise,
        device: torch.device,
        batch_size: int,
        *,
        exact: Forward | None = None,
    ) -> None:
        self.normalise, self.device, self.batch_size, self.exact = normalise, device, batch_size, exact
        self._load, self._lock = load, threading.Lock()
        self._module: nn.Module | None = None

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
        done = 0
        while done < len(pixels):
            size = self.batch_size
            try:
                rows.append(self._forward(pixels[done : done + size], size))
                done += size
            except torch.cuda.OutOfMemoryError:
                if size == 1:
                    raise
                torch.cuda.empty_cache()
                self.batch_size = min(self.batch_size, size // 2)
        features = np.concatenate(rows)
        lost = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if len(lost) and self.exact:
            features[lost] = self.exact([pixels[row] for row in lost.tolist()])
        return features

    def _forward(self, pixels: Sequence[Pixels], size: int) -> Features:
        shape = (size, *pixels[0].shape)
        batch = torch.zeros(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        np.stack(pixels, out=batch[: len(pixels)].numpy())
        with torch.inference_mode():
            images = self.normalise(batch.to(self.device, non_blocking=True))
            features = self.module(images.contiguous(memory_format=torch.channels_last))
            return np.asarray(features[: len(pixels)].float().cpu().numpy())


@dataclass(frozen=True)
class Backbone:
    """A frozen network with everything that determines its features: whoever holds it can forget nothing.

    Attributes:
        decoder: from an image's bytes to RGB.
        transform: from RGB to pixels, and from pixels to what the network takes.
        feature_dim: numbers in a feature.
        precision: of the forward pass, resolved; ``choice`` says why, where it was `auto`.
        batch_size: images in one forward pass.
        source: loads the network.
        compiled: run it through torch.compile.
        notes: what the user should know of how the weights were read; there once the network was loaded.
    """

    identity: BackboneIdentity
    transform: Transform
    feature_dim: int
    decoder: Decoder
    device: torch.device
    precision: str
    batch_size: int
    source: Callable[[], BuiltNetwork] = field(repr=False)
    compiled: bool = False
    choice: PrecisionChoice | None = None
    notes: list[str] = field(default_factory=list, compare=False)

    @cached_property
    def forward(self) -> Forward:
        """The network as a function of pixels with one shape; its weights are loaded when the first image comes."""
        shape = (self.transform.normalise, self.device, self.batch_size)
        exact = None if self.precision == "float32" else Forward(lambda: self._prepare("float32"), *shape)
        return Forward(lambda: self._prepare(self.precision), *shape, exact=exact)

    def __call__(self, pixels: Sequence[Pixels]) -> Features:
        """Features (n, feature_dim), float32, of uint8 pixels (3, crop, crop), as `forward` computes them."""
        return self.forward(pixels)

    def pixels(self, image: Image.Image) -> Pixels:
        """uint8 pixels (3, crop, crop) of an RGB image.

        Raises:
            BadImage: the resized image would have too many pixels.
        """
        return self.transform.pixels(image)

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
        return trainable_module(self.build())

    def release(self) -> None:
        """Forget the loaded network; the next call loads it again."""
        self.__dict__.pop("forward", None)

    @property
    def parameters(self) -> int:
        """Numbers in the network, told without its weights."""
        network, _ = make_module(self.identity.name, layer=self.identity.layer, pooling=self.identity.pooling)
        return sum(parameter.numel() for parameter in network.parameters())

    def _prepare(self, precision: str) -> nn.Module:
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
    """The backbone that the params name; weights whose digest the cache remembers are neither loaded nor hashed.

    Args:
        max_pixels: images with more are not decoded.
        cache_dir: where what was found out about weights is remembered, and what precision `auto` stands for.
        cached_precision: of most features of a network in a cache from before that was remembered there.
        begins: whether features will be computed, so that what `auto` stands for is decided for all machines.

    Raises:
        BackboneError, WeightsError, DeviceError: see their messages.
    """
    memo = WeightsMemo(cache_dir / WEIGHTS_MEMO)
    identity, resolved, feature_dim = identify_network(params, transform, memo)
    device = resolve_device(extract.device, world)

    def source() -> BuiltNetwork:
        return build_network(params, transform)

    choice = None
    if extract.precision == "auto":
        choice = kept_choice(cache_dir, identity, resolved)
        if choice is None and (most := cached_precision(identity, resolved)):
            choice = PrecisionChoice(most, "most features of this backbone in the cache are so")
        new = choice is None
        choice = choice or _choose_precision(identity, resolved, device, source, memo)
        if begins:
            choice = replace(keep_choice(cache_dir, identity, resolved, choice), new=new)
    return Backbone(
        identity=identity,
        transform=resolved,
        feature_dim=feature_dim,
        decoder=make_decoder(resolved, max_pixels, DECODER_RULES[extract.decoder]),
        device=device,
        precision=choice.precision if choice else extract.precision,
        batch_size=batch_size(extract.batch_size, device, resolved.crop),
        source=source,
        compiled=extract.compile,
        choice=choice,
    )


def make_decoder(transform: Transform, max_pixels: int, rule: str) -> Decoder:
    """The decoder of a rule, with what the transform says of it."""
    draft = transform.resize or transform.crop
    return Decoder(
        background=transform.background,
        exif=transform.exif,
        max_pixels=max_pixels,
        draft_size=(draft, draft) if rule == DRAFT_DECODER else None,
    )


def batch_size(wanted: int | Literal["auto"], device: torch.device, crop: int) -> int:
    """The number asked for; by rule 8 on a CPU, where larger ones gain little, and on a GPU what fits, up to 256.

    The GPU rule allows 4 kB a pixel and image, generous for every torchvision classifier.
    """
    if wanted != "auto":
        return wanted
    if device.type != "cuda":
        return CPU_BATCH
    free, _ = torch.cuda.mem_get_info(device)
    fitting = max(free // (crop**2 * 4096), 8)
    return int(min(2 ** (int(fitting).bit_length() - 1), 256))


def _choose_precision(
    identity: BackboneIdentity,
    transform: Transform,
    device: torch.device,
    source: Callable[[], BuiltNetwork],
    memo: WeightsMemo,
) -> PrecisionChoice:
    """The reduced precision that the device is fast in, where this backbone bears it; the verdict is remembered."""
    reduced, began = reduced_precision_of(device), f"begun on {kind_of_device(device)}"
    if reduced is None:
        return PrecisionChoice("float32", began)
    key = verdict_key(identity, transform.crop, device=device, precision=reduced)
    verdict = Verdict.from_dict(memo.get(key))
    if verdict is None:
        verdict = accept_precision(source(), device=device, precision=reduced)
        memo.put(key, verdict.as_dict())
    return PrecisionChoice(reduced if verdict.accepted else "float32", f"{began}: {verdict}")
