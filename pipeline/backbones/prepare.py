"""Make a frozen backbone fast without changing what it computes: fold BatchNorm, channels last, precision.

The folded network is for running only. Identity and digest are those of the backbone it was made from.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from .build import Backbone

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class PreparedBackbone(nn.Module):
    """Normalised images (n, 3, h, w) of any float type to float32 features (n, feature_dim).

    One instance may be called from several threads at once.

    Attributes:
        folded: how many BatchNorm layers were folded away.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype, *, folded: int) -> None:
        super().__init__()
        self.network, self.dtype, self.folded = network, dtype, folded

    def forward(self, images: Tensor) -> Tensor:
        with torch.inference_mode():
            images = images.to(self.dtype, memory_format=torch.channels_last)
            features: Tensor = self.network(images).float()
        return features


def prepare_for_inference(backbone: Backbone, *, device: torch.device, precision: str) -> PreparedBackbone:
    """A copy of the backbone's network on ``device``, ready to run; the backbone is left as it is.

    Args:
        precision: ``float32``, ``bfloat16`` or ``float16``.
    """
    dtype = DTYPES[precision]
    network, folded = fold_batchnorm(copy.deepcopy(backbone.module.network).eval())
    network = network.to(device=device, dtype=dtype).to(memory_format=torch.channels_last)
    return PreparedBackbone(network.requires_grad_(False), dtype, folded=folded)


def fold_batchnorm(network: nn.Module) -> tuple[nn.Module, int]:
    """Fold each BatchNorm that directly follows a convolution or linear layer into it.

    Networks whose graph cannot be traced, and those without BatchNorm, come back as they are.

    Returns:
        The network (its layers are shared with the argument) and the number of layers folded.
    """
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        return network, 0
    try:
        traced = fx.symbolic_trace(network)
    except Exception:  # noqa: BLE001 (control flow on values fails to trace in many ways; the plain network works)
        return network, 0
    modules: dict[str, nn.Module] = dict(traced.named_modules())
    folded = 0
    for node in list(traced.graph.nodes):
        before = _foldable(node, modules)
        if before is not None:
            _set_module(traced, str(before.target), _fuse(modules[str(before.target)], modules[str(node.target)]))
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
            folded += 1
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced, folded


def _foldable(node: fx.Node, modules: dict[str, nn.Module]) -> fx.Node | None:
    """The call before a BatchNorm ``node`` into which it can be folded: used by nothing else, called once."""
    if node.op != "call_module" or not isinstance(modules[str(node.target)], (nn.BatchNorm1d, nn.BatchNorm2d)):
        return None
    before: Any = node.args[0]
    if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
        return None
    calls = sum(other.op == "call_module" and other.target == before.target for other in node.graph.nodes)
    return before if calls == 1 and isinstance(modules[str(before.target)], (nn.Conv2d, nn.Linear)) else None


def _fuse(layer: nn.Module, norm: nn.Module) -> nn.Module:
    assert isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d))
    if isinstance(layer, nn.Conv2d):
        return fuse_conv_bn_eval(layer, norm)
    assert isinstance(layer, nn.Linear)
    return fuse_linear_bn_eval(layer, norm)


def _set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
