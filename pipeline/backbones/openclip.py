"""Image towers of CLIP and SigLIP as a zoo, under ``openclip/MODEL.TAG`` (the extra `openclip`), and their text towers.

Features are what open_clip's `encode_image` gives, after the projection into the space that images share with texts;
``backbone.layer: pooled`` is what that projection is given. Read with open_clip 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..errors import BackboneError, WeightsError
from .timm import make_lightly, pooling_words, timm_blocks
from .transform import Transform
from .weights import hub_source
from .zoo import (
    POOLINGS,
    FeatureNetwork,
    Tensors,
    WeightsSource,
    import_extra,
    layer_error,
    pooling_error,
)

PREFIX = "openclip/"
POOLED = "pooled"
_WORDS = {"tok": POOLINGS["cls"], "avg": POOLINGS["avg"], "none": "attention pooling"}
_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_TOWER = "visual."


class OpenClipZoo:
    """Every image tower of open_clip by model and tag there; those with pretrained weights are listed."""

    packages = ("torch", "torchvision", "open_clip_torch")

    def names(self) -> Sequence[str]:
        """Without those whose activation open_clip itself says to be another than that of the weights."""
        try:
            pairs = _open_clip().list_pretrained()
        except BackboneError:
            return ()
        return tuple(f"{PREFIX}{model}.{tag}" for model, tag in pairs if _fits(model, tag))

    def owns(self, name: str) -> bool:
        return name.startswith(PREFIX)

    def version(self, name: str) -> str:
        return f"open_clip {_open_clip().__version__}"

    def code_digest(self, name: str) -> None:
        return None

    def tags(self, name: str) -> Sequence[str]:
        """The one in its name."""
        tag = _split(name)[1]
        return (tag,) if tag else ()

    def resolve(self, name: str, weights: str) -> WeightsSource | None:
        """``DEFAULT``, or the tag in the name, from where open_clip has them."""
        model, tag = _split(name)
        if tag is None or weights not in ("DEFAULT", tag):
            return None
        repo, _, file = _open_clip().get_pretrained_cfg(model, tag)["hf_hub"].rpartition("/")
        files = (f"{Path(file).stem}.safetensors", file) if file else _FILES
        return hub_source(tag, repo, files, extra="openclip")

    def licence(self, name: str) -> None:
        """open_clip states none: that of OpenAI's weights is MIT, others are on the cards of their repositories."""
        return None

    def published(self, name: str) -> None:
        return None

    def preset(self, name: str, source: WeightsSource, image_size: int | None = None) -> Transform:
        """As open_clip's `image_transform_v2` evaluates."""
        model, tag = _split(name)
        config = _open_clip().transform.merge_preprocess_dict(
            _open_clip().transform.PreprocessCfg(), _open_clip().get_pretrained_cfg(model, tag) if tag else {}
        )
        if config["resize_mode"] == "longest":
            raise BackboneError(f"{name} cannot be used: its images are padded.", where="backbone.name")
        size = image_size or _size(_open_clip().get_model_config(model)["vision_cfg"].get("image_size", 224))
        return Transform(
            resize=size,
            crop=size,
            interpolation=config["interpolation"],
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            resize_mode=config["resize_mode"],
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
        """The image tower, with its projection or without."""
        if pooling != "default":
            why = "the projection is made for one pooling"
            raise pooling_error(name, pooling, why, "default, or the same tower of the zoo timm (`backbones clip`)")
        if layer not in (None, POOLED):
            raise layer_error(name, layer, {POOLED}, "a tower gives its features before or after the projection")
        config = _open_clip().get_model_config(_split(name)[0])
        vision = config["vision_cfg"]
        if image_size and "timm_model_name" not in vision:  # timm's take what they can, as they are
            vision = {**vision, "image_size": image_size}
        build = _open_clip().model._build_vision_tower
        make = partial(build, config["embed_dim"], vision, config.get("quick_gelu", False))
        tower = make_lightly(make, initialise=initialise)
        shapes = {key: tensor.shape for key, tensor in tower.state_dict().items()}
        words = (
            pooling_words(tower.trunk) if hasattr(tower, "trunk") else _WORDS.get(getattr(tower, "pool_type", "none"))
        )
        if layer == POOLED:
            _drop_projection(name, tower)
        return FeatureNetwork(
            tower,
            pooling=f"{words}, {'before' if layer else 'after'} the projection",
            input_size=_size(vision.get("image_size", 224)),
            only_size="timm_model_name" not in vision,
            shapes=shapes,
            blocks=_blocks(tower),
        )

    def make_classifier(
        self, name: str, *, tensors: Tensors | None = None, initialise: bool = False
    ) -> tuple[FeatureNetwork, tuple[str, ...]]:
        raise BackboneError(
            f"{name} has no classifier whose classes have names.",
            where="backbone.name",
            remedy="head.kind: prompts names the classes of your own folder",
        )

    def adapt(self, name: str, network: FeatureNetwork, tensors: Tensors) -> Tensors:
        """The tower's own from a file of both towers, position embeddings in its size."""
        clip = SimpleNamespace(visual=network.model)
        state = dict(_open_clip().factory.convert_state_dict(clip, dict(tensors)))
        tower = {key.removeprefix(_TOWER): tensor for key, tensor in state.items() if key.startswith(_TOWER)} or state
        whole = {_TOWER + key: tensor for key, tensor in tower.items()}
        _open_clip().model.resize_pos_embed(whole, clip)
        return {key.removeprefix(_TOWER): tensor for key, tensor in whole.items()}


def text_features(name: str, weights: WeightsSource, prompts: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """Unit vectors (classes, features): the mean of each class's texts, as open_clip's zero-shot classifier makes them.

    The temperature that the model was trained with is their length.

    Args:
        prompts: of each class one or more texts.

    Raises:
        BackboneError: the tokenizer is not there. WeightsError: the weights hold no text tower.
    """
    open_clip = _open_clip()
    model_name = _split(name)[0]
    path = weights.path if weights.path and weights.path.is_file() else weights.fetch and weights.fetch()
    if not path:
        raise WeightsError("Random weights know no words.", where="backbone.weights", remedy="use pretrained ones")
    try:
        model = open_clip.create_model(model_name, load_weights=False, pretrained_text=False)
        open_clip.load_checkpoint(model, str(path))
        tokenize = open_clip.get_tokenizer(model_name)
    except (ImportError, OSError, RuntimeError, KeyError, AttributeError, ValueError) as error:
        raise WeightsError(
            f"The text tower of {name} cannot be loaded.", where=path, why=str(error)[:300], remedy="see the reason"
        ) from error
    rows = []
    with torch.inference_mode():
        for texts in prompts:
            mean = model.eval().encode_text(tokenize(list(texts)), normalize=True).mean(0)
            rows.append(mean / mean.norm() * model.logit_scale.exp())
    return np.asarray(torch.stack(rows).double().numpy())


# -- names, files ----------------------------------------------------------------------------------------------------


def _open_clip() -> Any:
    return import_extra("open_clip", "openclip")


@cache
def _split(name: str) -> tuple[str, str | None]:
    """Model and tag of a name.

    Raises:
        BackboneError: open_clip is not installed, has no such model or tag, or says that they do not fit together.
    """
    open_clip = _open_clip()
    model, _, tag = name.removeprefix(PREFIX).partition(".")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if model in open_clip.list_models() and (tag in tags or not tag) and (not tag or _fits(model, tag)):
        return model, tag or None
    near = [item for item in OpenClipZoo().names() if item.startswith(f"{PREFIX}{model}")]
    raise BackboneError(
        f"open_clip has no {name.removeprefix(PREFIX)!r}.",
        where="backbone.name",
        why=f"the weights {tag} were trained with another activation" if tag in tags else None,
        remedy=f"use {' or '.join(near[:4])}" if near else "`pipeline backbones openclip/` lists what there is",
    )


def _fits(model: str, tag: str) -> bool:
    """Whether the activation of the model is that of the weights; with the other one the features are silently off."""
    open_clip = _open_clip()
    config = open_clip.get_model_config(model) or {}
    return bool(open_clip.get_pretrained_cfg(model, tag).get("quick_gelu", False)) == bool(config.get("quick_gelu"))


def _size(size: Any) -> int:
    return int(size[0] if isinstance(size, (list, tuple)) else size)


def _drop_projection(name: str, tower: Any) -> None:
    """Take off what maps the pooled features into the space of texts."""
    trunk, head = getattr(tower, "trunk", None), getattr(tower, "head", None)
    projections = [child for child in ("proj", "mlp") if head is not None and hasattr(head, child)]
    if getattr(tower, "proj", None) is not None:
        tower.proj = None
    elif projections:
        setattr(head, projections[0], nn.Identity())
    elif trunk is not None and trunk.num_classes:
        trunk.reset_classifier(0)
    else:
        raise layer_error(name, POOLED, (), "its pooling and its projection are one")


def _blocks(tower: Any) -> tuple[tuple[str, ...], ...] | None:
    """Layers by depth: stem, transformer blocks, and with the last of them all that follows."""
    if hasattr(tower, "trunk"):
        inside = timm_blocks(tower.trunk) or (("",),)
        blocks = [tuple(f"trunk.{path}".rstrip(".") for path in block) for block in inside]
        return (*blocks[:-1], (*blocks[-1], "head"))
    if not hasattr(tower, "transformer"):
        return None
    count = len(tower.transformer.resblocks)
    blocks = [(f"transformer.resblocks.{number}",) for number in range(count)]
    stem = ("conv1", "class_embedding", "positional_embedding", "ln_pre")
    return (stem, *blocks[:-1], (*blocks[-1], "ln_post", "proj", "attn_pool", "attn_pool_contrastive"))
