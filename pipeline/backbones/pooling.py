"""Pool feature maps and tokens to one vector an image."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MapPool(nn.Module):
    """Pool a feature map over its positions ``dims``, by mean or maximum."""

    def __init__(self, kind: str, dims: tuple[int, int]) -> None:
        super().__init__()
        self.kind, self.dims = kind, dims

    def forward(self, x: Tensor) -> Tensor:
        return x.amax(self.dims) if self.kind == "max" else x.mean(self.dims)


class TokenPool(nn.Module):
    """Pool tokens (n, 1 + patches, c): the class token, the patches' mean or maximum, or class token and mean."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "cls":
            return x[:, 0]
        patches = x[:, 1:]
        if self.kind == "max":
            return patches.amax(1)
        mean = patches.mean(1)
        return torch.cat([x[:, 0], mean], 1) if self.kind == "cls_avg" else mean
