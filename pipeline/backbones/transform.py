"""From an RGB image to the pixels a backbone was trained on, exactly as torchvision's preset makes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..data.framing import RESAMPLING, Framing
from ..errors import BackboneError, WeightsError
from ..params import TransformParams

if TYPE_CHECKING:
    import torch
    from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RESIZE_MODES = ("shortest", "squash")
_MAX_SIDE = 16_384


@dataclass(frozen=True)
class Transform:
    """Resize the shorter side to ``resize`` pixels (``None``: not at all), crop ``crop`` x ``crop`` from the centre.

    ``resize_mode`` may be ``squash`` instead of ``shortest``: both sides become ``resize``, whatever the image's shape.
    ``exif`` and ``background`` belong to decoding: whether the orientation tag is applied, and the colour under
    transparent pixels.
    """

    resize: int | None = 256
    crop: int = 224
    interpolation: str = "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    exif: bool = True
    background: tuple[int, int, int] = (255, 255, 255)
    resize_mode: str = "shortest"

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """The pixels (3, crop, crop) of an RGB image: those of torchvision's `ImageClassification` before scaling.

        Their memory is in the order of the image: height, width, channel. They cannot be written to.

        Raises:
            BadImage: the resized image would have too many pixels.
        """
        return self.framing.pixels(image)

    @property
    def framing(self) -> Framing:
        """The part that makes pixels of an image, which needs no torch."""
        return Framing(self.resize, self.crop, self.interpolation, squash=self.resize_mode == "squash")

    def normalise(self, batch: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """uint8 pixels (n, 3, h, w) to normalised ``dtype`` (float32), on the batch's device, computed in float32."""
        import torch

        dtype = dtype or torch.float32
        if batch.device.type == "cuda":  # one pass over the images, whose memory is what takes the time
            scale = tuple(1 / (255 * std) for std in self.std)
            shift = tuple(-mean / std for mean, std in zip(self.mean, self.std, strict=True))
            return torch.addcmul(_constant(shift, batch.device), batch, _constant(scale, batch.device)).to(dtype)
        mean, std = (_constant(values, batch.device, batch.shape[-1]) for values in (self.mean, self.std))
        return (batch.to(torch.float32) / 255).sub_(mean).div_(std).to(dtype)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back. The usual resize mode is left out: keys from before hold."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return {key: value for key, value in values.items() if (key, value) != ("resize_mode", "shortest")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: object = None) -> Transform:
        """A transform from JSON values; absent keys take their defaults.

        Raises:
            WeightsError: unknown keys or impossible values, as a file that was not written by this program may hold.
        """
        problem = _problem_of(values)
        if problem:
            raise WeightsError(
                "The transform that is stored there cannot be used.",
                where=where,
                why=problem,
                remedy="write it again, or leave the key `transform` out and set the section transform of the params",
            )
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**fields)


@cache
def _constant(values: tuple[float, ...], device: torch.device, width: int = 1) -> Tensor:
    """Float32 (1, 3, 1, width) on the device, made once: to copy to a GPU is to wait for all that it has to do.

    In channels-last memory a row of an image and one of constants run side by side, where a CPU is fast.
    """
    import torch

    with torch.inference_mode(False):
        row = torch.tensor(values, device=device).view(1, 3, 1, 1).expand(1, 3, 1, width)
        return row.contiguous(memory_format=torch.channels_last)


def adjust_transform(preset: Transform, params: TransformParams) -> Transform:
    """``preset`` with what the params set.

    Setting only one of resize and crop leaves the other as the preset has it. Where the crop would then exceed the
    resized image, and be framed in black, this is an error; setting both is taken as meant.

    Raises:
        BackboneError: the crop does not fit into the resized image.
    """
    given = {name: value for name, value in params.model_dump().items() if value is not None}
    transform = Transform(**{**asdict(preset), **given})
    if transform.resize is not None and transform.crop > transform.resize and ("resize" in given) != ("crop" in given):
        key, other = ("crop", "resize") if "crop" in given else ("resize", "crop")
        ratio = transform.crop / preset.crop if key == "crop" else transform.resize / (preset.resize or transform.crop)
        fitting = round(ratio * (getattr(preset, other) or transform.crop))
        raise BackboneError(
            f"A crop of {transform.crop} pixels does not fit into images resized to {transform.resize}.",
            where=f"transform.{key}",
            why=f"transform.{other} is {getattr(transform, other)}, from the preset of the weights",
            remedy=f"set transform.{other} too, for example to {fitting}",
        )
    return transform


def _problem_of(values: Mapping[str, Any]) -> str | None:
    """What is wrong with stored values, in a few words; ``None`` when nothing is."""
    if not isinstance(values, Mapping):
        return f"it is a {type(values).__name__}, not an object"
    unknown = sorted(set(values) - set(Transform.__dataclass_fields__))
    if unknown:
        return f"unknown key {unknown[0]!r}"
    for key, value in values.items():
        if not _is_valid(key, value):
            return f"{key} cannot be {str(value)[:60]!r}"
    return None


def _is_valid(key: str, value: Any) -> bool:
    if key == "exif":
        return isinstance(value, bool)
    if key in ("interpolation", "resize_mode"):
        return value in (tuple(RESAMPLING) if key == "interpolation" else RESIZE_MODES)
    if key in ("resize", "crop"):
        return (key == "resize" and value is None) or (_is_number(value, whole=True) and 1 <= value <= _MAX_SIDE)
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        return False
    if key == "background":
        return all(_is_number(item, whole=True) and 0 <= item <= 255 for item in value)
    low = 1e-6 if key == "std" else -1e6
    return all(_is_number(item) and low <= item <= 1e6 for item in value)


def _is_number(value: Any, *, whole: bool = False) -> bool:
    return isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
