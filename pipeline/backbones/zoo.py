"""What a zoo is: a library of networks that can be backbones, and what all zoos build theirs from.

A zoo is one file with a class that satisfies `Zoo`, and one entry in `catalogue.ZOOS`. It knows its networks; reading
files, strict loading, digests, identity and freezing are the same for every zoo and stand in `weights` and `build`.
"""

from __future__ import annotations

import copy
import difflib
import importlib
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import BackboneError
from .transform import Transform

Tensors = Mapping[str, Tensor]
# A zoo with more names than this is listed, or searched, only as far as it is asked for.
WALL = 150


@dataclass(frozen=True)
class WeightsSource:
    """Where weights come from, found without opening anything.

    Attributes:
        label: goes into the identity: a tag, ``file`` or ``random-SEED``.
        path: where the file lies; ``None``: nowhere yet, or there is none.
        tag: which of the zoo's pretrained weights these are; ``None``: the user's own file, or none.
        fetch: gives the path of the file, which is downloaded where it is not there yet; ``None`` where only the user
            can put it there.
        origin: what is fetched, where ``path`` does not tell before it is there.
        config: the ``config.json`` that Hugging Face puts beside such a file.
    """

    label: str
    path: Path | None = None
    tag: str | None = None
    fetch: Callable[[], Path] | None = field(default=None, compare=False)
    origin: str | None = None
    config: Path | None = None

    @property
    def drawn(self) -> bool:
        """Whether there is no file: the network begins as its zoo makes it, from the seed."""
        return self.path is None and self.fetch is None


class Published(NamedTuple):
    """What a library publishes of a network with its default weights.

    ``accuracy``: the share of ImageNet-1k's validation images whose first class is right; ``gflops``: billions of
    multiply-adds for one image; ``download_mb``: the size of the weights file in MB.
    """

    accuracy: float
    gflops: float
    download_mb: float


class Zoo(Protocol):
    """A library of networks by name. Names of one zoo are no other's; nothing but `make` and `make_classifier` is slow.

    Where a method takes ``tensors``, they are what the network is about to be given, under the names of their file:
    their shapes may decide on its sizes (position embeddings tell the image size). ``image_size`` is the side in
    pixels that is asked for; networks that take one size only are made for it, where they can be. ``initialise`` draws
    random weights from torch's generator; without it parameters need no storage (`without_storage`) and nothing is
    drawn.

    A zoo may say in an attribute ``packages`` which distributions its networks are determined by. What it said of one
    is then remembered together with their versions, and most commands begin without importing them.
    """

    def names(self) -> Sequence[str]:
        """The names that are listed; empty where the library is not installed."""
        ...

    def owns(self, name: str) -> bool:
        """Whether ``name`` is one of this zoo's networks, listed or not."""
        ...

    def version(self, name: str) -> str:
        """The library and its version: what, besides tensors, determines the network ``name``."""
        ...

    def code_digest(self, name: str) -> str | None:
        """Hex digest of the source file of the network ``name``, where that is the user's own; else ``None``."""
        ...

    def tags(self, name: str) -> Sequence[str]:
        """The names of its pretrained weights, aliases left out."""
        ...

    def resolve(self, name: str, weights: str) -> WeightsSource | None:
        """The pretrained weights of that name (a tag, an alias, ``DEFAULT``); ``None`` where there are none."""
        ...

    def licence(self, name: str) -> str | None:
        """The terms of its pretrained weights, as the library states them; ``None`` where it does not."""
        ...

    def published(self, name: str) -> Published | None:
        """Accuracy and cost, as the library publishes them; ``None`` where it does not."""
        ...

    def preset(self, name: str, source: WeightsSource, image_size: int | None = None) -> Transform:
        """The transform that the weights of ``source`` were evaluated with.

        Args:
            image_size: of a network that takes images of so many pixels only; ``None``: of any size.

        Raises:
            BackboneError: no `Transform` computes what these weights were evaluated with.
        """
        ...

    def make(
        self,
        name: str,
        *,
        layer: str | None = None,
        pooling: str = "default",
        image_size: int | None = None,
        tensors: Tensors | None = None,
        initialise: bool = False,
    ) -> FeatureNetwork:
        """The network from images to features, in eval mode, ready to be given its tensors by name.

        Raises:
            BackboneError: no such layer, a pooling that does not fit, or an image size that it cannot be made for.
        """
        ...

    def make_classifier(
        self, name: str, *, tensors: Tensors | None = None, initialise: bool = False
    ) -> tuple[FeatureNetwork, tuple[str, ...]]:
        """The network from images to class scores, and the names of its classes.

        Raises:
            BackboneError: the zoo has no classifier for this name.
        """
        ...

    def adapt(self, name: str, network: FeatureNetwork, tensors: Tensors) -> Tensors:
        """The tensors of a file under the names, and in the shapes, that ``network`` has for them.

        Prefixes that training programs put before names are gone already. What belongs to no part of the network
        (an auxiliary head, a text tower) is left out.

        Raises:
            BackboneError: they cannot be brought into the shapes of the network.
        """
        ...


class FeatureNetwork(nn.Module):
    """Images (n, 3, h, w), normalised, to features (n, feature_dim); trainable.

    Parameters and buffers are the zoo's own under ``model.``.

    Attributes:
        pooling: how features come about, in words.
        input_size: side of images, in pixels, that the network takes.
        only_size: it takes no other.
        classifier: name of the layer of the whole model that gives class scores; its tensors need not be here.
        shapes: of all tensors of the whole model by name, those of the features and those left out.
        trunk_key: networks of one name and weights that have an equal one compute the same before they pool; ``None``:
            not known to.
        blocks: for fine-tuning, the input's first: of each block the names of its modules and loose parameters;
            ``None``: found from the module tree.
    """

    def __init__(
        self,
        model: nn.Module,
        pool: nn.Module | None = None,
        *,
        pooling: str = "",
        input_size: int,
        only_size: bool = False,
        classifier: str | None = None,
        shapes: Mapping[str, torch.Size] | None = None,
        blocks: Sequence[Sequence[str]] | None = None,
        trunk_key: Hashable | None = None,
    ) -> None:
        super().__init__()
        self.model, self.trunk_key = model, trunk_key
        self.pool = pool if pool is not None else nn.Identity()
        self.pooling, self.input_size, self.only_size = pooling, input_size, only_size
        self.classifier, self.shapes = classifier, dict(shapes or {})
        self.blocks = None if blocks is None else tuple(tuple(f"model.{name}" for name in block) for block in blocks)

    @property
    def classifier_shape(self) -> torch.Size | None:
        """Of the classifier's weight: (classes, features) or (classes, features, 1, 1); ``None`` without one."""
        return self.shapes.get(f"{self.classifier}.weight")

    def trunk(self, images: Tensor) -> Any:
        """All that comes before the pooling."""
        return self.model(images)

    def pooled(self, output: Any) -> Tensor:
        """Features of what `trunk` gives."""
        features: Tensor = self.pool(output)
        return features

    def forward(self, images: Tensor) -> Tensor:
        return self.pooled(self.trunk(images))


def import_extra(module: str, extra: str) -> Any:
    """A library that only some users need.

    Raises:
        BackboneError: it is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackboneError(
            f"{module} is not installed.",
            where="backbone.name",
            why=str(error),
            remedy=f"pip install 'image-transfer-pipeline[{extra}]'",
        ) from error


# -- pooling ---------------------------------------------------------------------------------------------------------

POOLINGS = {
    "cls": "class token",
    "avg": "average over positions",
    "max": "maximum over positions",
    "cls_avg": "class token and average over positions",
}


class MapPool(nn.Module):
    """Pool a feature map over its positions ``dims``, by mean or maximum."""

    def __init__(self, kind: str, dims: tuple[int, int]) -> None:
        super().__init__()
        self.kind, self.dims = kind, dims

    def forward(self, x: Tensor) -> Tensor:
        return x.amax(self.dims) if self.kind == "max" else x.mean(self.dims)


class TokenPool(nn.Module):
    """Pool tokens (n, prefix + patches, c): the class token, the patches' mean or maximum, or class token and mean.

    Args:
        prefix: tokens before the patches, of which the first may be the class token; registers are the others.
        norm: what each pooled vector passes through.
    """

    def __init__(self, kind: str, prefix: int = 1, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.kind, self.prefix = kind, prefix
        self.norm = norm if norm is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "cls":
            return self.norm(x[:, 0])  # type: ignore[no-any-return]
        patches = x[:, self.prefix :]
        pooled: Tensor = self.norm(patches.amax(1) if self.kind == "max" else patches.mean(1))
        return torch.cat([self.norm(x[:, 0]), pooled], 1) if self.kind == "cls_avg" else pooled


def pool_for(
    name: str, layer: str, output: Any, pooling: str, *, class_token: bool = False, prefix: int = 1
) -> nn.Module | None:
    """The pooling of a layer's output by its shape: vectors stay, tokens and maps are pooled.

    Args:
        class_token: outputs (n, tokens, c) are tokens of which the first is the class token.
        prefix: tokens before those of the patches, where outputs are tokens.

    Raises:
        BackboneError: the pooling does not fit, or the output is none of these.
    """
    kind = "avg" if pooling == "default" else pooling
    shape = tuple(output.shape) if isinstance(output, Tensor) else ()
    if len(shape) == 3 and class_token:
        return TokenPool(kind)
    if kind in ("cls", "cls_avg"):
        raise pooling_error(name, pooling, f"the output of {layer} has no class token", "default, avg or max")
    if len(shape) == 2:
        return None
    if len(shape) == 4 and shape[2] == shape[3]:
        return MapPool(kind, (2, 3))
    if len(shape) == 4 and shape[1] == shape[2]:  # channels last, as inside Swin and ConvNeXt
        return MapPool(kind, (1, 2))
    raise BackboneError(
        f"The output of {layer} in {name} is no feature map, no tokens and no vector.",
        where="backbone.layer",
        why=f"its shape is {shape}" if shape else f"it is a {type(output).__name__}",
        remedy="choose the layer that contains it",
    )


def pooling_error(name: str, pooling: str, why: str, valid: str) -> BackboneError:
    """A pooling that does not fit the network ``name``."""
    return BackboneError(
        f"The pooling {pooling!r} does not fit {name}.", where="backbone.pooling", why=why, remedy=f"use {valid}"
    )


def layer_error(name: str, layer: str, names: Collection[str], why: str | None = None) -> BackboneError:
    """A layer that is not among the ``names`` of the network ``name``, or no output can be taken from."""
    near = [
        item for item in difflib.get_close_matches(layer, sorted(names), n=4, cutoff=0.4) if item not in ("", layer)
    ]
    top = sorted(item for item in names if item and "." not in item)
    return BackboneError(
        f"{name} has no layer {layer!r} to take features from.",
        where="backbone.layer",
        why=why,
        remedy=f"use {' or '.join(near or top)}",
    )


# -- networks without storage ----------------------------------------------------------------------------------------

_INITIALISERS = frozenset(
    {
        *(nn.init.constant_, nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_),
        *(Tensor.clamp_, Tensor.erfinv_, Tensor.fill_, Tensor.normal_, Tensor.uniform_, Tensor.zero_),
    }
)
_KEEPS_SHAPE = (nn.BatchNorm2d, nn.Dropout, nn.GELU, nn.Hardswish, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Sigmoid)


class _EmptyOnMeta(TorchFunctionMode):
    """`torch.empty`, from which layers take their parameters, gives tensors without storage; all else is real.

    Initialising what has no storage is skipped. Building under `torch.device("meta")` would also reach the
    arithmetic by which RegNet finds its widths.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _INITIALISERS:
            tensor = args[0] if args else (kwargs or {}).get("tensor")
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        if func is torch.empty and (kwargs or {}).get("device") is None:
            kwargs = {**(kwargs or {}), "device": "meta"}
        return func(*args, **(kwargs or {}))


@contextmanager
def without_storage() -> Iterator[None]:
    """Build models fast and without touching the global generator (small tables are still drawn for real)."""
    with torch.random.fork_rng(devices=[]), _EmptyOnMeta():
        yield


def run_on_meta(network: nn.Module, size: int) -> Any:
    """The output for one image of ``size`` pixels, in shape only: nothing is computed, ``network`` is left alone."""
    tensors = chain(network.parameters(), network.buffers())
    # Copies of the tensors that have no storage, so that what is copied is only the modules.
    shadow = copy.deepcopy(network, {id(tensor): _without_storage(tensor) for tensor in tensors}).eval()
    for module in list(shadow.modules()):
        for name, child in list(module.named_children()):
            if type(child) in _KEEPS_SHAPE:  # without them the pass is several times faster
                setattr(module, name, nn.Identity())
    with torch.no_grad():
        return shadow(torch.empty(1, 3, size, size, device="meta"))


def measure_features(network: FeatureNetwork, size: int, name: str) -> int:
    """The feature dimension for images of ``size`` pixels.

    Raises:
        BackboneError: the network ``name`` cannot take images of this size.
    """
    try:
        output = run_on_meta(network, size)
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        raise BackboneError(
            f"{name} cannot take images of {size} x {size} pixels.",
            where="transform.crop",
            why=" ".join(str(error).split())[:200],
            remedy=f"set transform.crop to {network.input_size}" if size != network.input_size else "leave it out",
        ) from error
    if not isinstance(output, Tensor) or output.dim() != 2:
        raise BackboneError(f"The output of {name} is not one feature vector an image.", where="backbone.layer")
    return int(output.shape[1])


def _without_storage(tensor: Tensor) -> Tensor:
    empty = tensor.detach().to("meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
