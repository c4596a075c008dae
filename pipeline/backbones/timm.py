"""timm's networks as a zoo, under ``timm/NAME.TAG`` (the extra `timm`).

timm's own functions say what a network computes (`forward_features`, `forward_head`, `forward_intermediates`), what its
weights expect (`pretrained_cfg`), how files of other programs become its tensors, and how its layers are grouped.
Read with timm 1.0.31.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights

from ..errors import BackboneError
from .transform import Transform
from .weights import checkpoint_file, download, hub_source
from .zoo import (
    POOLINGS,
    FeatureNetwork,
    Tensors,
    TokenPool,
    WeightsSource,
    import_extra,
    layer_error,
    pool_for,
    pooling_error,
    run_on_meta,
    without_storage,
)

PREFIX = "timm/"
# What timm raises where an image size or a pooling does not fit: mostly assertions.
UNFIT = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
_FILES = ("model.safetensors", "pytorch_model.bin")
_RESIZE_MODES = {"center": "shortest", "squash": "squash"}
_TOKENS = {"cls": "token"}  # our word: timm's, where they differ
_WORDS = {
    "token": POOLINGS["cls"],
    "avg": POOLINGS["avg"],
    "max": POOLINGS["max"],
    "avgmax": "mean of average and maximum over positions",
    "catavgmax": "average and maximum over positions",
    "map": "attention pooling",
}


class TimmZoo:
    """Every network of timm by its name and tag there; names with pretrained weights are listed."""

    packages = ("torch", "torchvision", "timm")

    def names(self) -> Sequence[str]:
        try:
            return tuple(PREFIX + name for name in _timm().list_pretrained())
        except BackboneError:
            return ()

    def owns(self, name: str) -> bool:
        return name.startswith(PREFIX)

    def version(self, name: str) -> str:
        return f"timm {_timm().__version__}"

    def code_digest(self, name: str) -> None:
        return None

    def tags(self, name: str) -> Sequence[str]:
        """The one in its name."""
        config = _config(name)
        return (config.tag or "DEFAULT",) if config.has_weights else ()

    def resolve(self, name: str, weights: str) -> WeightsSource | None:
        """``DEFAULT``, or the tag in the name, from where timm has them."""
        config = _config(name)
        if not config.has_weights or weights not in ("DEFAULT", config.tag):
            return None
        label = config.tag or "DEFAULT"
        if config.hf_hub_id:
            return hub_source(label, config.hf_hub_id, _FILES, extra="timm")
        path = checkpoint_file(config.url)
        return WeightsSource(label, path, label, partial(download, config.url, path, what=name))

    def licence(self, name: str) -> str | None:
        """As timm states it for the weights."""
        licence: str | None = _config(name).license
        return licence

    def published(self, name: str) -> None:
        return None

    def preset(self, name: str, source: WeightsSource, image_size: int | None = None) -> Transform:
        """As timm's `create_transform` evaluates; of a file from the ``config.json`` beside it, where there is one."""
        config = {**_config(name).to_dict(), **_stored_config(name, source.config)}
        height, width = config["input_size"][-2:]
        mode = _RESIZE_MODES.get(config["crop_mode"])
        if height != width or mode is None:
            raise BackboneError(
                f"{name} cannot be used: there is no transform like the one of its weights.",
                where="backbone.name",
                why=f"it takes images of {height} x {width} pixels, fitted in by {config['crop_mode']!r}",
            )
        crop = image_size or height
        return Transform(
            resize=math.floor(crop / config["crop_pct"]),
            crop=crop,
            interpolation=config["interpolation"],
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            resize_mode=mode,
        )

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
        """What timm's classifier is given, or an intermediate of `forward_intermediates`, pooled."""
        model, facts = _make_model(name, image_size, tensors or {}, initialise)
        if layer is not None:
            return _cut_at_layer(name, model, layer, pooling, facts)
        return _pooled(name, model, pooling, facts)

    def make_classifier(
        self, name: str, *, tensors: Tensors | None = None, initialise: bool = False
    ) -> tuple[FeatureNetwork, tuple[str, ...]]:
        """The whole model of weights for ImageNet's 1000 classes, with their names."""
        config = _config(name)
        if config.num_classes != 1000:
            raise BackboneError(
                f"{name} has no classifier whose classes have names.",
                where="backbone.name",
                why=f"its weights have {config.num_classes} classes" if config.num_classes else "it has no classifier",
                remedy="choose weights that end in in1k",
            )
        model, facts = _make_model(name, None, tensors or {}, initialise)
        categories = get_model_weights("resnet18")["IMAGENET1K_V1"].meta["categories"]
        return FeatureNetwork(model, **facts), tuple(categories)

    def adapt(self, name: str, network: FeatureNetwork, tensors: Tensors) -> Tensors:
        """As timm's own loader does: names and layouts of other programs, position embeddings of another size."""
        convert = _converter(name.removeprefix(PREFIX))
        try:
            return convert(dict(tensors), network.model) if convert else tensors
        except UNFIT:  # tensors of something else, whose names the caller will tell
            return tensors


class TimmNetwork(FeatureNetwork):
    """A timm model up to what its classifier is given (``pool`` unused), or pooled otherwise.

    Args:
        headed: features are those of the model's own head.
        intermediate: which of the model's intermediates is pooled; ``None``: its last output.
        prefixed: intermediates come with their class token and registers.
    """

    def __init__(
        self,
        model: nn.Module,
        pool: nn.Module | None = None,
        *,
        headed: bool = False,
        intermediate: int | None = None,
        prefixed: bool = False,
        **facts: Any,
    ) -> None:
        super().__init__(model, pool, blocks=timm_blocks(model), trunk_key=("timm", intermediate), **facts)
        self.headed, self.intermediate, self.prefixed = headed, intermediate, prefixed

    def trunk(self, images: Tensor) -> Any:
        """What timm's own head is given, or the intermediate."""
        if self.intermediate is not None:
            return self._intermediate(images)
        return self.model.forward_features(images)  # type: ignore[operator]

    def pooled(self, output: Any) -> Tensor:
        """By timm's own head, or by our pooling."""
        if self.headed:
            return self.model.forward_head(output, pre_logits=True)  # type: ignore[operator, no-any-return]
        return self.pool(output)  # type: ignore[no-any-return]

    def _intermediate(self, images: Tensor) -> Tensor:
        wanted: dict[str, Any] = {"output_fmt": "NLC", "return_prefix_tokens": True} if self.prefixed else {}
        outputs = self.model.forward_intermediates(  # type: ignore[operator]
            images, indices=[self.intermediate], stop_early=True, intermediates_only=True, **wanted
        )
        output: Any = outputs[0]
        return torch.cat([output[1], output[0]], 1) if isinstance(output, tuple) else output


# -- making ----------------------------------------------------------------------------------------------------------


def _timm() -> Any:
    return import_extra("timm", "timm")


@cache
def _every_name() -> dict[str, None]:
    """Also of networks without pretrained weights, in timm's order."""
    return dict.fromkeys(_timm().list_models(include_tags=True))


@cache
def _config(name: str) -> Any:
    """timm's `PretrainedCfg`.

    Raises:
        BackboneError: timm is not installed, or has no such name.
    """
    timm, names, known = _timm(), _every_name(), name.removeprefix(PREFIX)
    if known in names:
        return timm.models.get_pretrained_cfg(known)
    architecture = known.partition(".")[0]
    near = [item for item in names if item.partition(".")[0] == architecture] or timm.list_pretrained(f"*{known}*")
    raise BackboneError(
        f"timm has no {known!r}.",
        where="backbone.name",
        why="the name of its weights follows after a dot" if near and known == architecture else None,
        remedy=f"use {' or '.join(PREFIX + item for item in near[:4])}" if near else "`pipeline backbones timm/` lists",
    )


def _stored_config(name: str, file: Path | None) -> Mapping[str, Any]:
    """What the ``config.json`` beside weights that timm saved for Hugging Face says of them."""
    if file is None:
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackboneError("The config.json beside the weights cannot be read.", where=file, why=str(error)) from error
    if content.get("architecture") != name.removeprefix(PREFIX).partition(".")[0]:
        return {}
    stored: dict[str, Any] = content.get("pretrained_cfg", content)
    return {key: value for key, value in stored.items() if value is not None}


def _create(known: str, *, initialise: bool = False, **options: Any) -> nn.Module:
    """timm's model in eval mode, with random weights or without storage."""
    return make_lightly(partial(_timm().create_model, known, **options), initialise=initialise)


def make_lightly(make: Callable[[], nn.Module], *, initialise: bool = False) -> nn.Module:
    """What ``make`` gives, in eval mode, without storage where that works; ``initialise`` draws random weights."""
    if initialise:
        return make().eval()
    with suppress(RuntimeError, AttributeError):
        with without_storage():
            model = make().eval()
        if _fill_buffers(model):
            return model
    with torch.random.fork_rng(devices=[]):  # some run or copy parts of themselves to learn their sizes
        return make().eval()


def _fill_buffers(model: nn.Module) -> bool:
    """Give storage to buffers that are in no file but computed from the module's sizes; whether that was possible."""
    for module in model.modules():
        own = {key: module._buffers[key] for key in module._non_persistent_buffers_set}
        lost = {key: buffer for key, buffer in own.items() if buffer is not None and buffer.is_meta}
        for key, buffer in lost.items():
            module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
        if lost:
            module.init_non_persistent_buffers()  # type: ignore[operator]
        if any(module._buffers[key].is_meta for key in lost):  # type: ignore[union-attr]
            return False
    return True


def _make_model(
    name: str, image_size: int | None, tensors: Tensors, initialise: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """The whole model, for images of a size where it takes one size only, and what a `FeatureNetwork` tells of it."""
    config, known = _config(name), name.removeprefix(PREFIX)
    usual = config.input_size[-1]
    size = usual
    if config.fixed_input_size:
        size = image_size or _size_in(known, tensors) or usual
    try:
        options = {} if size == usual else {"img_size": size}
        model = _create(known, initialise=initialise, **options)
    except UNFIT as error:
        if size == usual:
            raise
        raise BackboneError(
            f"{name} cannot be made for images of {size} x {size} pixels.",
            where="transform.crop",
            why=" ".join(str(error).split())[:200],
            remedy=f"set transform.crop to {usual}, or to another multiple of its patches",
        ) from error
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    classifiers = _classifiers(config)
    facts = {
        "pooling": pooling_words(model),
        "input_size": size,
        "only_size": bool(config.fixed_input_size),
        "classifier": classifiers[0] if classifiers and f"{classifiers[0]}.weight" in shapes else None,
        "shapes": shapes,
    }
    return model, facts


def _size_in(known: str, tensors: Tensors) -> int | None:
    """The image size that position embeddings among ``tensors`` were made for, where it is not the model's own."""
    stored = next((tensor for key, tensor in tensors.items() if key.endswith("pos_embed")), None)
    if stored is None or stored.dim() != 3:
        return None
    model: Any = _create(known)
    own = getattr(model, "pos_embed", None)
    if not isinstance(own, Tensor) or own.shape == stored.shape or own.dim() != 3:
        return None
    rows, columns = model.patch_embed.grid_size
    side = math.isqrt(max(int(stored.shape[1]) - (int(own.shape[1]) - rows * columns), 0))
    return side * int(model.patch_embed.patch_size[0]) or None


def _classifiers(config: Any) -> tuple[str, ...]:
    found = config.classifier or ()
    return (found,) if isinstance(found, str) else tuple(found)


@cache
def _converter(known: str) -> Callable[..., Tensors] | None:
    """What timm passes the tensors of a file through before this model loads them.

    timm tells it to its own loader alone, so that another one stands in for that while a model is made.
    """
    found: list[Callable[..., Tensors] | None] = []

    def loader(*_args: Any, filter_fn: Callable[..., Tensors] | None = None, **_options: Any) -> None:
        found.append(filter_fn)

    with mock.patch.object(_timm().models._builder, "load_pretrained", loader):
        _create(known, pretrained=True)
    return found[-1] if found else None


# -- where the features are ------------------------------------------------------------------------------------------


def _pooled(name: str, model: Any, pooling: str, facts: dict[str, Any]) -> TimmNetwork:
    prefix = getattr(model, "num_prefix_tokens", None) or 0
    if pooling == "default":
        _drop_classifier(name, model)
        return TimmNetwork(model, headed=True, **facts)
    facts = {**facts, "pooling": POOLINGS[pooling]}
    if pooling in ("cls", "cls_avg") and not _has_class_token(model):
        raise pooling_error(name, pooling, "it has no class token", "default, avg or max")
    if prefix:  # timm's pooling of tokens, with the norm that follows it
        norm = getattr(model, "fc_norm", None)
        _drop_classifier(name, model)
        model.attn_pool = None
        return TimmNetwork(model, TokenPool(pooling, prefix, norm), **facts)
    try:
        model.reset_classifier(0, _TOKENS.get(pooling, pooling))
    except UNFIT as error:
        raise pooling_error(name, pooling, str(error) or "timm has no such pooling for it", "default") from error
    return TimmNetwork(model, headed=True, **facts)


def _cut_at_layer(name: str, model: Any, layer: str, pooling: str, facts: dict[str, Any]) -> TimmNetwork:
    names = _layers(model)
    if layer not in names or not hasattr(model, "forward_intermediates"):
        raise layer_error(name, layer, names)
    index = names.index(layer)
    prefix = getattr(model, "num_prefix_tokens", None) or 0
    prefixed = prefix > 0 and "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters
    model.prune_intermediate_layers([index], prune_norm=True, prune_head=True)
    facts = {**facts, "pooling": POOLINGS.get(pooling, POOLINGS["avg"])}
    network = TimmNetwork(model, intermediate=index, prefixed=prefixed, **facts)
    output = run_on_meta(network, facts["input_size"])
    if prefixed and pooling in ("cls", "cls_avg") and not _has_class_token(model):
        raise pooling_error(name, pooling, "it has no class token", "default, avg or max")
    pool = pool_for(name, layer, output, pooling, class_token=prefixed, prefix=prefix)
    network.pool = pool if pool is not None else nn.Identity()
    return network


def _drop_classifier(name: str, model: nn.Module) -> None:
    for path in _classifiers(_config(name)):
        parent, _, child = path.rpartition(".")
        if path in dict(model.named_modules()):
            setattr(model.get_submodule(parent), child, nn.Identity())


def _layers(model: Any) -> list[str]:
    """The names of what `forward_intermediates` gives, in its order."""
    info = model.feature_info
    return [entry["module"] for entry in getattr(info, "info", info)]


def _has_class_token(model: Any) -> bool:
    return getattr(model, "cls_token", None) is not None


def pooling_words(model: Any) -> str:
    """How the model's own head pools, in words."""
    owners = (model, getattr(model, "head", None))
    kinds = [getattr(owner, "global_pool", None) for owner in owners]
    found = next((kind for kind in (getattr(item, "pool_type", item) for item in kinds) if isinstance(kind, str)), "")
    if found == "token" and getattr(model, "dist_token", None) is not None:
        return "mean of class token and distillation token"
    return _WORDS.get(found, "its own head")


def timm_blocks(model: Any) -> tuple[tuple[str, ...], ...] | None:
    """Layers of a timm model by depth, as its `group_matcher` groups them: names of whole modules where a group has
    all of one, else of parameters; ``None`` where it has no such groups."""
    if not hasattr(model, "group_matcher"):
        return None
    groups = _timm().models.group_parameters(model, model.group_matcher(), reverse=True)

    def parts(module: nn.Module, path: str) -> Iterator[tuple[int, str]]:
        names = [path + name for name, _ in module.named_parameters()]
        inside = {groups[name] for name in names if name in groups}  # a shared one is named but once
        if len(inside) == 1 and path:
            yield inside.pop(), path[:-1]
            return
        loose = [path + name for name, _ in module.named_parameters(recurse=False)]
        yield from ((groups[name], name) for name in loose if name in groups)
        for name, child in module.named_children():
            yield from parts(child, f"{path}{name}.")

    blocks: dict[int, list[str]] = {}
    for group, path in parts(model, ""):
        blocks.setdefault(group, []).append(path)
    return tuple(tuple(blocks[group]) for group in sorted(blocks))
