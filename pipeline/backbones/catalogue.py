"""The backbones there are: every classification model of torchvision by name, and room for packaged ones."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.models import get_model, get_model_weights, list_models

from ..errors import BackboneError

# Weights that come with the package, by backbone name: (torchvision architecture, safetensors file). Such a file
# carries its transform in its metadata; `weights: DEFAULT` loads it, and nothing else has to know about it.
PACKAGED: dict[str, tuple[str, Path]] = {
    "starter": ("shufflenet_v2_x1_0", Path(__file__).parent / "starter" / "weights.safetensors"),
}

# What a builder must be told so that the model always is the one its weights were trained as: without auxiliary
# heads, and (googlenet, inception_v3) with the input renormalised inside, as torchvision does for its weights.
_BUILDER_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "transform_input": True, "init_weights": True},
    "inception_v3": {"aux_logits": False, "transform_input": True, "init_weights": True},
}
AUXILIARY_PREFIXES = ("aux1.", "aux2.", "AuxLogits.")


@dataclass(frozen=True)
class Architecture:
    """A backbone ``name``, the torchvision ``model`` it is built from, and a packaged weights file if it has one."""

    name: str
    model: str
    packaged: Path | None = None

    @property
    def weights(self) -> dict[str, Any]:
        """torchvision's weights of this model, aliases resolved, by enum name; none where the package has its own."""
        return {} if self.packaged else {item.name: item for item in get_model_weights(self.model)}

    @property
    def default_weights(self) -> str:
        """The enum name that ``DEFAULT`` stands for."""
        return "DEFAULT" if self.packaged else str(get_model_weights(self.model).DEFAULT.name)

    @property
    def has_image_size(self) -> bool:
        """Whether the model is built for one image size (position embeddings)."""
        return self.model.startswith("vit_")

    @property
    def downloads(self) -> Sequence[Any]:
        """torchvision's weights of the underlying model, plain ImageNet training (IMAGENET1K_V1) first."""
        return sorted(
            get_model_weights(self.model), key=lambda item: (item.name != "IMAGENET1K_V1", "E2E" in item.name)
        )


@dataclass(frozen=True)
class BackboneRow:
    """One line of the list of backbones; ``parameters`` without the classifier, ``input_size`` in pixels."""

    name: str
    feature_dim: int
    parameters: int
    weights: tuple[str, ...]
    input_size: int


@cache
def backbone_names() -> tuple[str, ...]:
    """All names, packaged ones first; quantised models are not among them."""
    return (*PACKAGED, *list_models(module=torchvision.models))


def find_architecture(name: str) -> Architecture:
    """The architecture of a backbone name.

    Raises:
        BackboneError: no such name; the nearest ones are given.
    """
    if name in PACKAGED:
        return Architecture(name, *PACKAGED[name])
    if name in backbone_names():
        return Architecture(name, name)
    near = difflib.get_close_matches(name, backbone_names(), n=3, cutoff=0.5)
    raise BackboneError(
        f"There is no backbone {name!r}.",
        where="backbone.name",
        remedy=(f"did you mean {' or '.join(near)}? " if near else "") + "`pipeline backbones` lists every name",
    )


def make_classifier(
    architecture: Architecture, *, image_size: int | None = None, initialise: bool = False
) -> nn.Module:
    """The whole torchvision model with its 1000-class head, in eval mode.

    Args:
        image_size: for models with position embeddings, the size of the images in pixels (default: the builder's).
        initialise: draw random weights from torch's generator; otherwise parameters stay on the meta device,
            to be replaced by loaded ones, and nothing is drawn.
    """
    options = dict(_BUILDER_OPTIONS.get(architecture.model, {}))
    if architecture.has_image_size and image_size is not None:
        options["image_size"] = image_size
    if initialise:
        model: nn.Module = get_model(architecture.model, **options)
    else:
        with _uninitialised():
            model = get_model(architecture.model, **options)
    return model.eval()


def classifier_path(model: nn.Module) -> str:
    """The name of the layer that maps features to class scores: the last Linear (squeezenet: its last convolution)."""
    for kind in (nn.Linear, nn.Conv2d):
        paths: list[str] = [path for path, module in model.named_modules() if isinstance(module, kind)]
        if paths:
            return paths[-1]
    raise BackboneError(f"{type(model).__name__} has no classifier.")


def feature_dim_of(model: nn.Module) -> int:
    """What goes into the classifier layer of a whole model."""
    layer = model.get_submodule(classifier_path(model))
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels
    assert isinstance(layer, nn.Linear)
    return layer.in_features


def list_backbones() -> list[BackboneRow]:
    """Every backbone with its size, from models without weights; takes a few seconds."""
    return [_row(find_architecture(name)) for name in backbone_names()]


@cache
def _row(architecture: Architecture) -> BackboneRow:
    model = make_classifier(architecture)
    head = model.get_submodule(classifier_path(model))
    parameters = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in head.parameters())
    names = ("DEFAULT",) if architecture.packaged else tuple(architecture.weights)
    return BackboneRow(architecture.name, feature_dim_of(model), parameters, names, _input_size(architecture))


def _input_size(architecture: Architecture) -> int:
    if architecture.packaged:
        from .checkpoint import read_checkpoint  # only here is a file read

        preset = read_checkpoint(architecture.packaged).transform
        if preset is not None:
            return preset.crop
    weights = architecture.weights.get(architecture.default_weights) or architecture.downloads[0]
    return int(weights.transforms().crop_size[0])


def image_size_of_tokens(model: nn.Module, tokens: int) -> int | None:
    """The image size for which a ViT has ``tokens`` position embeddings (one of them the class token's)."""
    side = math.isqrt(max(tokens - 1, 0))
    return side * int(model.get_parameter("conv_proj.weight").shape[-1]) if side * side == tokens - 1 > 0 else None


_INITIALISERS = (Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_, Tensor.erfinv_, Tensor.clamp_)


class _EmptyOnMeta(TorchFunctionMode):
    """`torch.empty`, from which layers take their parameters, gives tensors without storage; all else is real.

    Initialising what has no storage is skipped. Building under `torch.device("meta")` would also reach the
    arithmetic by which RegNet finds its widths.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        if func in _INITIALISERS and args and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **kwargs)


@contextmanager
def _uninitialised() -> Iterator[None]:
    """Build models fast and without touching the global generator (small tables are still drawn for real)."""
    with torch.random.fork_rng(devices=[]), _EmptyOnMeta():
        yield


def meta_images(size: int) -> Tensor:
    """One image (1, 3, size, size) without storage."""
    return torch.empty(1, 3, size, size, device="meta")
