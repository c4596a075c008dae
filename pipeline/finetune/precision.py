"""The precision a training step runs in."""

from __future__ import annotations

import torch

from ..errors import DeviceError
from ..params.sections import Precision

NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_training_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the hardware multiplies in it (CUDA from Ampere on, CPUs with AMX), else float32.

    Raises:
        DeviceError: float16 on a CPU, whose gradients it cannot scale.
    """
    if precision == "auto":
        return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32
    if precision == "float16" and device.type != "cuda":
        raise DeviceError(
            f"Training in float16 does not work on {device.type}.",
            where="finetune.precision",
            remedy="use finetune.precision=auto",
        )
    return NAMES[precision]


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        # Without AMX, bfloat16 on a CPU is slower than float32. Older torch has no question for it: then float32.
        supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
        return bool(supported and supported())
    return False
