"""Run convolutions on the CPU together with the activation and the addition that follow them, by oneDNN.

torch keeps these operators for its own compiler. They are used where they are there and agree with the plain
network, which `prepare` checks; they hold no state, so that threads may share a network.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

_ADDITIONS = (operator.add, operator.iadd, torch.add)
EXACT_BIAS = "exact_bias"  # the attribute of a convolution that holds its bias in float32
Activation = tuple[str, list[float | None]]


class FusedConvolution(nn.Module):
    """A convolution with weights in oneDNN's own layout, then, optionally, an addition and an activation."""

    def __init__(self, conv: nn.Conv2d, activation: Activation, *, size: tuple[int, ...], adds: bool) -> None:
        super().__init__()
        # Lists, because the operators take integer lists; no parameters, because the packed weights cannot be moved.
        self.geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        packed = conv.weight.detach().to_mkldnn()
        self.weight: Tensor = torch.ops.aten.mkldnn_reorder_conv2d_weight(packed, *self.geometry, size)
        self.bias = None if conv.bias is None else conv.bias.detach()
        self.activation, self.adds = activation, adds

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        name, scalars = self.activation
        result: Tensor
        if other is None:
            result = torch.ops.mkldnn._convolution_pointwise(
                x, self.weight, self.bias, *self.geometry, name, scalars, ""
            )
        else:
            unary = None if name == "none" else name
            result = torch.ops.mkldnn._convolution_pointwise.binary(
                x, other, self.weight, self.bias, *self.geometry, "add", 1.0, unary, scalars, None
            )
        return result


def can_fuse(dtype: torch.dtype) -> bool:
    """Whether torch has the operators for this type on this CPU."""
    operators = torch.ops.mkldnn
    if not torch._C._has_mkldnn or not hasattr(operators, "_convolution_pointwise"):
        return False
    if dtype == torch.bfloat16:
        supported = getattr(operators, "_is_mkldnn_bf16_supported", None)
        return supported is not None and bool(supported())
    return dtype == torch.float32


def fuse_convolutions(traced: fx.GraphModule, example: Tensor, *, exact_bias: bool = False) -> int:
    """Replace the convolutions of a traced network, in place, by fused ones.

    Args:
        example: images (n, 3, h, w) of the usual shape, for the layout of the weights; others are taken too.
        exact_bias: add the biases kept in float32 under `EXACT_BIAS` rather than those in the network's type.

    Returns:
        The number of convolutions replaced.
    """
    sizes = _input_sizes(traced, example)
    modules: dict[str, nn.Module] = dict(traced.named_modules())
    _drop_identities(traced, modules)
    order = {node: number for number, node in enumerate(traced.graph.nodes)}
    count = 0
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or str(node.target) not in sizes:
            continue
        conv = modules[str(node.target)]
        assert isinstance(conv, nn.Conv2d)
        other = _absorb_addition(node, order)
        activation = _absorb_activation(node, modules, allowed=("relu",) if other is not None else None)
        fused = FusedConvolution(conv, activation, size=sizes[str(node.target)], adds=other is not None)
        fused.bias = getattr(conv, EXACT_BIAS, fused.bias) if exact_bias else fused.bias
        parent, _, name = str(node.target).rpartition(".")
        setattr(traced.get_submodule(parent), name, fused)
        count += 1
    traced.recompile()
    return count


def _input_sizes(traced: fx.GraphModule, example: Tensor) -> dict[str, tuple[int, ...]]:
    """The shape that reaches each plain convolution; those called more than once are left out."""
    sizes: dict[str, list[tuple[int, ...]]] = {}

    class Recorder(fx.Interpreter):
        def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            module = self.fetch_attr(target)
            if type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
                sizes.setdefault(str(target), []).append(tuple(args[0].shape))
            return super().call_module(target, args, kwargs)

        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            n.meta["shape"] = tuple(result.shape) if isinstance(result, Tensor) else None
            return result

    Recorder(traced).run(example)
    return {name: calls[0] for name, calls in sizes.items() if len(calls) == 1}


def _drop_identities(traced: fx.GraphModule, modules: dict[str, nn.Module]) -> None:
    """Take out what does nothing in eval mode and would stand between a convolution and what follows it."""
    for node in list(traced.graph.nodes):
        is_layer = node.op == "call_module" and isinstance(modules[str(node.target)], (nn.Dropout, nn.Identity))
        is_depth = node.op == "call_function" and getattr(node.target, "__name__", "") == "stochastic_depth"
        if is_layer or is_depth:
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)


def _absorb_addition(node: fx.Node, order: dict[fx.Node, int]) -> fx.Node | None:
    """Let the convolution ``node`` add what is added to its result, where that is there before it; that summand."""
    user = next(iter(node.users), None)
    if len(node.users) != 1 or user is None or user.target not in _ADDITIONS or len(user.args) != 2 or user.kwargs:
        return None
    left, right = user.args
    other = right if left is node else left
    if not isinstance(other, fx.Node) or other is node or order[other] > order[node]:
        return None
    if user.target is operator.iadd and left is not node and len(other.users) > 1:
        return None  # the summand is changed in place, and others see it changed
    if not _same_shape(other, node):
        return None
    node.args = (*node.args, other)
    user.replace_all_uses_with(node)
    node.graph.erase_node(user)
    return other


def _same_shape(first: fx.Node, second: fx.Node) -> bool:
    return first.meta.get("shape") is not None and first.meta.get("shape") == second.meta.get("shape")


def _absorb_activation(node: fx.Node, modules: dict[str, nn.Module], *, allowed: tuple[str, ...] | None) -> Activation:
    """Let the convolution ``node`` apply the activation that alone follows it; ``none`` where there is no such."""
    user = next(iter(node.users), None)
    activation = None if user is None or len(node.users) != 1 else _activation_of(user, modules)
    if user is None or activation is None or (allowed is not None and activation[0] not in allowed):
        return "none", []
    user.replace_all_uses_with(node)
    node.graph.erase_node(user)
    return activation


def _activation_of(node: fx.Node, modules: dict[str, nn.Module]) -> Activation | None:
    if node.op == "call_function":
        return ("relu", []) if node.target in (F.relu, torch.relu) else None
    if node.op != "call_module":
        return None
    module = modules[str(node.target)]
    if isinstance(module, nn.Hardtanh):  # ReLU6 is one
        return "hardtanh", [float(module.min_val), float(module.max_val)]
    names = {nn.ReLU: "relu", nn.Hardswish: "hardswish", nn.SiLU: "swish"}
    name = names.get(type(module))
    return None if name is None else (name, [])
