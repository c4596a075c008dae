"""The texts of the classes as a matrix, made once by the text tower that belongs to the backbone."""

from __future__ import annotations

from collections.abc import Sequence

from safetensors.numpy import save

from ..backbones import Backbone
from ..errors import HeadError
from ..files import canonical_json, digest_bytes, publish_file
from ..heads.prompts import TEXTS, read_prompts
from ..params import HeadParams, Params


def with_texts(params: Params, backbone: Backbone, class_names: Sequence[str]) -> HeadParams:
    """``params.head``; where a kind is ``prompts``, with the matrix of its texts, kept in the cache, in place of them.

    Raises:
        HeadError: the backbone has no texts, or the file of prompts lacks a class.
        WeightsError: the text tower cannot be loaded.
    """
    head, identity = params.head, backbone.identity
    if "prompts" not in head.kinds:
        return head
    from ..backbones.catalogue import locate_weights
    from ..backbones.openclip import PREFIX, text_features

    if not identity.name.startswith(PREFIX) or identity.layer is not None:
        raise HeadError(
            "Prompts need a backbone whose features lie in one space with texts.",
            where="head.kind",
            why=f"the backbone is {identity.name}, its layer {identity.layer or 'the last'}",
            remedy=f"set backbone.name={PREFIX}... (`pipeline backbones {PREFIX}` lists them) and backbone.layer=null",
        )
    prompts = read_prompts(head.prompts, class_names)
    key = digest_bytes(canonical_json([identity.as_dict(), prompts]).encode()).hex()[:16]
    file = params.cache.dir / "prompts" / f"{key}.safetensors"
    if not file.exists():
        source = locate_weights(identity.name, params.backbone.weights, seed=params.backbone.seed)
        publish_file(file, save({TEXTS: text_features(identity.name, source, prompts)}))
    return head.model_copy(update={"prompts": file})
