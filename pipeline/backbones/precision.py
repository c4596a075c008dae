"""Which reduced precision a device is fast in, and whether a backbone's features bear it.

The verdict comes from a built-in sample, never from the user's images, so that `auto` resolves to the same
precision for the same backbone, weights and kind of device. What the device of whoever begins makes of it is kept in
the cache, and every other machine follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.decode import TORCHVISION_DECODER
from ..files import canonical_json, digest_bytes, publish_file, seal_json, unseal_json
from ..runtime.seeds import make_generator
from .identity import BackboneIdentity
from .transform import Transform

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .build import BuiltNetwork

# Cosines between the features of float32 and of the reduced precision, over the sample. Measured: most backbones lie
# above 0.9999; a mobilenet_v2 at 0.9987 and 0.9965 made a probe worse (five flowers, exact McNemar p = 0.02, n = 834).
MEDIAN_COSINE, MINIMUM_COSINE = 0.999, 0.998
SAMPLE = "smooth-noise-1"  # changes when the sample does
_IMAGES, _BATCH = 16, 4
CHOICES_FOLDER = "precision"


@dataclass(frozen=True)
class Verdict:
    """Whether ``precision`` (or a decoder of that name) is good enough, with the cosines that say so."""

    precision: str
    accepted: bool
    median_cosine: float
    minimum_cosine: float

    def __str__(self) -> str:
        word = "accepted" if self.accepted else "not accepted"
        exact = "Pillow" if self.precision == TORCHVISION_DECODER else "float32"
        cosines = f"cosine to {exact}: median {self.median_cosine:.4f}, minimum {self.minimum_cosine:.4f}"
        return f"{self.precision} {word} ({cosines})"

    def as_dict(self) -> dict[str, Any]:
        """JSON values for a `WeightsMemo`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> Verdict | None:
        """The verdict that was remembered; ``None`` where it is absent or of another shape."""
        if not isinstance(values, Mapping) or set(values) != set(cls.__dataclass_fields__):
            return None
        numbers = (values["median_cosine"], values["minimum_cosine"])
        if not isinstance(values["accepted"], bool) or not all(isinstance(item, (int, float)) for item in numbers):
            return None
        return cls(str(values["precision"]), values["accepted"], float(numbers[0]), float(numbers[1]))


@dataclass(frozen=True)
class PrecisionChoice:
    """What precision `auto` stands for, and why; ``new``: it was decided just now."""

    precision: str
    why: str
    new: bool = False

    def __str__(self) -> str:
        return f"{self.precision} ({self.why})"


def kept_choice(cache_dir: Path, identity: BackboneIdentity, transform: Transform) -> PrecisionChoice | None:
    """What `auto` stands for in a cache for this network, decided by whoever began; None where nobody has."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        kept = unseal_json(_choice_file(cache_dir, identity, transform).read_bytes())
        if kept["precision"] in ("float32", "bfloat16", "float16"):
            return PrecisionChoice(kept["precision"], str(kept["why"]))
    return None


def keep_choice(
    cache_dir: Path, identity: BackboneIdentity, transform: Transform, choice: PrecisionChoice
) -> PrecisionChoice:
    """Keep a choice in the cache, for every machine to follow; the one that is kept, should another have been first."""
    content = {"backbone": identity.as_dict(), "precision": choice.precision, "why": choice.why}
    file = _choice_file(cache_dir, identity, transform)
    is_damaged = file.exists() and kept_choice(cache_dir, identity, transform) is None
    with suppress(OSError):  # another was first, or the cache cannot be written, which is for its writer to report
        publish_file(file, seal_json(content), replace=is_damaged)
    return kept_choice(cache_dir, identity, transform) or choice


def _choice_file(cache_dir: Path, identity: BackboneIdentity, transform: Transform) -> Path:
    name = digest_bytes(canonical_json([identity.as_dict(), transform.as_dict()]).encode()).hex()[:16]
    return cache_dir / CHOICES_FOLDER / f"{name}.json"


def reduced_precisions_of(device: torch.device) -> tuple[str, ...]:
    """The precisions that ``device`` computes faster than float32, in the order in which they are to be tried.

    On a GPU bfloat16 overflows nowhere, and float16, as fast, is eight times as exact.
    """
    import torch

    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return ("bfloat16", "float16") if major >= 8 else ("float16",)
    return ("bfloat16",) if device.type == "cpu" and _cpu_has_bfloat16() else ()


def accept_precision(backbone: BuiltNetwork, *, device: torch.device, precision: str) -> Verdict:
    """Compare the features of ``precision`` with float32 on the built-in sample (some seconds on a CPU).

    Remember the verdict under `verdict_key`.
    """
    images = sample_images(backbone.transform.crop)
    exact = _features(backbone, images, device, "float32")
    return judge(precision, exact, _features(backbone, images, device, precision))


def judge(name: str, exact: Tensor, other: Tensor) -> Verdict:
    """Whether features (n, d) that were made by ``name`` can stand for the exact ones."""
    import torch
    from torch.nn import functional as F

    cosines = F.cosine_similarity(exact.double(), other.double(), dim=1)
    cosines = torch.where(torch.isfinite(other).all(1), cosines, torch.tensor(-1.0, dtype=torch.float64))
    median, minimum = float(cosines.median()), float(cosines.min())
    return Verdict(name, median >= MEDIAN_COSINE and minimum >= MINIMUM_COSINE, median, minimum)


def verdict_key(identity: BackboneIdentity, crop: int, *, device: torch.device, precision: str) -> dict[str, Any]:
    """What a verdict depends on: the key to remember it under."""
    import torch
    import torchvision

    return {
        "about": "precision",
        # On CUDA float32 was TF32 once, and pooling was in the reduced precision.
        **({"float32": "ieee"} if device.type == "cuda" else {}),
        "backbone": identity.as_dict(),
        "crop": crop,
        "device": kind_of_device(device),
        "precision": precision,
        "rule": [SAMPLE, MEDIAN_COSINE, MINIMUM_COSINE],
        "versions": [torch.__version__, torchvision.__version__],
    }


def sample_images(crop: int) -> Tensor:
    """16 fixed images, uint8 (16, 3, crop, crop): smooth colours from coarse to fine, with some noise."""
    import torch
    from torch.nn import functional as F

    images = np.empty((_IMAGES, 3, crop, crop), dtype=np.uint8)
    for index in range(_IMAGES):
        generator = make_generator(SAMPLE, index)
        cells = 2 + 2 * index
        coarse = torch.from_numpy(generator.normal(size=(1, 3, cells, cells)).astype(np.float32))
        smooth = F.interpolate(coarse, size=(crop, crop), mode="bicubic", align_corners=False)[0].numpy()
        noise = generator.normal(size=smooth.shape)
        brightness, contrast = generator.uniform(80, 170), generator.uniform(25, 70)
        images[index] = np.clip(brightness + contrast * smooth + 6 * noise, 0, 255).astype(np.uint8)
    return torch.from_numpy(images)


def _features(backbone: BuiltNetwork, images: Tensor, device: torch.device, precision: str) -> Tensor:
    import torch

    from .prepare import prepare_for_inference

    prepared = prepare_for_inference(backbone, device=device, precision=precision)
    batches = (backbone.transform.normalise(batch.to(device)) for batch in torch.split(images, _BATCH))
    return torch.cat([prepared(batch).cpu() for batch in batches])


def _cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 natively (AVX-512-bf16 or AMX)."""
    import torch

    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in checks)


def kind_of_device(device: torch.device) -> str:
    """The kind of hardware, so far as it decides how numbers are rounded."""
    import torch

    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type
