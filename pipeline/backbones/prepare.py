"""Make a frozen backbone fast without changing what it computes: fold BatchNorm, channels last, precision.

The folded network is for running only. Identity and digest are those of the backbone it was made from.
"""

from __future__ import annotations

import copy
import logging
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ..runtime.device import tf32
from .build import BuiltNetwork
from .onednn import EXACT_BIAS, can_fuse, fuse_convolutions
from .zoo import FeatureNetwork, MapPool, TokenPool

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REDUCED = ("bfloat16", "float16")  # what `auto` may stand for beside float32: of 16 bits

_POOLINGS = frozenset({nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d, torch.mean, "mean"})
_RESHAPES = frozenset({nn.Flatten, nn.Identity, nn.Dropout, torch.flatten, "flatten", "squeeze", "reshape", "view"})


class PreparedBackbone(nn.Module):
    """Normalised images (n, 3, h, w) of any float type to float32 features (n, feature_dim).

    One instance may be called from several threads at once.

    Attributes:
        folded: how many BatchNorm layers were folded away.
        tf32: float32 products of a GPU are of factors rounded to TF32; elsewhere it means nothing.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype, *, folded: int, tf32: bool = False) -> None:
        super().__init__()
        self.network, self.dtype, self.folded, self.tf32 = network, dtype, folded, tf32

    def forward(self, images: Tensor) -> Tensor:
        with torch.inference_mode(), tf32() if self.tf32 and images.is_cuda else nullcontext():
            images = images.to(self.dtype, memory_format=torch.channels_last)
            features: Tensor = self.network(images).float()
        return features


def prepare_for_inference(
    backbone: BuiltNetwork, *, device: torch.device, precision: str, fuse: bool = True
) -> PreparedBackbone:
    """A copy of the backbone's network on ``device``, ready to run; the backbone is left as it is.

    Args:
        precision: ``float32``, ``tf32``, ``bfloat16`` or ``float16``.
        fuse: on a CPU, also let oneDNN run convolutions together with what follows them. Leave it out for a
            network that is then compiled.
    """
    dtype = DTYPES[precision]
    network, folded = fold_batchnorm(copy.deepcopy(backbone.module.network).eval())
    if dtype != torch.float32:
        _prepare_rounding(network, dtype)
    network = network.to(device=device, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_(False)
    if fuse and folded and device.type == "cpu" and can_fuse(dtype):  # measured: without BatchNorm it is no gain
        network = _fused(network, backbone.transform.crop, dtype)
    if device.type == "cuda" and precision in REDUCED:
        pool_in_float32(network)
    return PreparedBackbone(network, dtype, folded=folded, tf32=precision == "tf32")


def pool_in_float32(network: nn.Module) -> bool:
    """Let the pooling that a network ends with read float32, so that features are not rounded to 16 bits again.

    Returns:
        Whether one was found: it is not where a forward pass cannot be traced or parameters follow the pooling.
    """
    if isinstance(network, FeatureNetwork):
        bare = isinstance(network.pool, (MapPool, TokenPool)) and not any(True for _ in network.pool.parameters())
        network.pool = nn.Sequential(_ToFloat32(), network.pool) if bare else network.pool
        return bare
    pooling = _last_pooling(network) if isinstance(network, fx.GraphModule) else None
    if pooling is None or not isinstance(network, fx.GraphModule):
        return False
    read = pooling.args[0]
    assert isinstance(read, fx.Node)
    with network.graph.inserting_before(pooling):
        pooling.replace_input_with(read, network.graph.call_method("float", (read,)))
    network.recompile()
    return True


class _ToFloat32(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


def _last_pooling(traced: fx.GraphModule) -> fx.Node | None:
    """The pooling after which nothing is computed any more."""
    modules = dict(traced.named_modules())
    node: Any = next(node for node in reversed(traced.graph.nodes) if node.op == "output").args[0]
    while isinstance(node, fx.Node) and node.op.startswith("call_"):
        if _is_one_of(node, modules, _POOLINGS):
            return node
        if not _is_one_of(node, modules, _RESHAPES):
            return None
        node = node.args[0]
    return None


def _is_one_of(node: fx.Node, modules: dict[str, nn.Module], kinds: frozenset[Any]) -> bool:
    return (type(modules[str(node.target)]) if node.op == "call_module" else node.target) in kinds


def diffuse_rounding(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Round each filter (first dimension) to ``dtype`` so that the sum of its values hardly changes.

    From the largest value down, what rounding took from one is given to the next. A depthwise filter sees nearly
    equal neighbours, so that an error in its sum is what its output shows: on an ImageNet mobilenet_v2 with folded
    BatchNorm, plain rounding of these filters is most of what bfloat16 costs.
    """
    values = weight.detach().float().flatten(1)
    order = values.abs().argsort(dim=1, descending=True)
    sorted_values, error = values.gather(1, order), torch.zeros(len(values), device=values.device)
    rounded = torch.empty_like(sorted_values)
    for column in range(values.shape[1]):
        wanted = sorted_values[:, column] + error
        rounded[:, column] = wanted.to(dtype).float()
        error = wanted - rounded[:, column]
    return torch.empty_like(values).scatter(1, order, rounded).view_as(weight)


def _prepare_rounding(network: nn.Module, dtype: torch.dtype) -> None:
    """Before a network is cast to ``dtype``: round depthwise filters with care, and keep exact biases at hand."""
    for module in network.modules():
        if not isinstance(module, nn.Conv2d):
            continue
        if module.groups > 1 and module.weight.shape[1] == 1:
            module.weight = nn.Parameter(diffuse_rounding(module.weight, dtype), requires_grad=False)
        if module.bias is not None:
            object.__setattr__(module, EXACT_BIAS, module.bias.detach().clone())


def _fused(network: nn.Module, crop: int, dtype: torch.dtype) -> nn.Module:
    """``network`` with fused convolutions where that works and computes the same, else ``network`` itself."""
    example = torch.linspace(-2, 2, 3 * crop * crop).view(1, 3, crop, crop)
    example = example.to(dtype, memory_format=torch.channels_last)
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    with torch.no_grad():
        expected = network(example).float()
        for exact_bias in (True, False) if dtype != torch.float32 else (False,):
            try:
                fused = fx.symbolic_trace(copy.deepcopy(network))
                fuse_convolutions(fused, example, exact_bias=exact_bias)
                difference = (fused(example).float() - expected).norm()
            except Exception as error:  # noqa: BLE001 (private operators fail in many ways; the plain network works)
                logger.debug("convolutions are not fused: %s", error)
                continue
            if difference <= tolerance * expected.norm():
                return fused
    return network


def fold_batchnorm(network: nn.Module) -> tuple[nn.Module, int]:
    """Fold each BatchNorm that directly follows a convolution or linear layer into it.

    Networks whose graph cannot be traced, and those without BatchNorm, come back as they are.

    Returns:
        The network and the number of layers folded.
    """
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
        return network, 0
    try:
        traced = fx.symbolic_trace(_without_activations(network))
    except Exception as error:  # noqa: BLE001 (control flow on values fails to trace in many ways)
        logger.debug("BatchNorm is not folded: %s", error)  # the plain network works
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


def _without_activations(network: nn.Module) -> nn.Module:
    """A copy in eval mode whose BatchNorms with an activation inside (timm's `BatchNormAct2d`) are two layers each."""
    split = copy.deepcopy(network).eval()
    for path, module in list(split.named_modules()):
        drop, act = getattr(module, "drop", None), getattr(module, "act", None)
        if isinstance(module, nn.BatchNorm2d) and isinstance(drop, nn.Module) and isinstance(act, nn.Module):
            norm = nn.BatchNorm2d(module.num_features, module.eps).eval()
            norm._parameters, norm._buffers = module._parameters, module._buffers
            _set_module(split, path, nn.Sequential(norm, drop, act))
    return split


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
