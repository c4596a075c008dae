"""Networks of the user's own as a zoo: ``package.module:function``, importable where the program is started.

The function takes no arguments and returns the network, or the network and its transform::

    def build():
        return MyNetwork(), {"resize": 256, "crop": 224}

What the network gives for images (n, 3, h, w) is pooled by its shape: vectors stay as they are.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from ..errors import BackboneError
from ..files import digest_bytes
from .transform import Transform
from .zoo import POOLINGS, FeatureNetwork, Tensors, WeightsSource, layer_error, pool_for, run_on_meta

_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class OwnZoo:
    """Whatever can be imported by ``module:function``; the import happens when the network is asked for."""

    def names(self) -> Sequence[str]:
        """None: they are not known before they are named."""
        return ()

    def owns(self, name: str) -> bool:
        return _NAME.fullmatch(name) is not None

    def version(self, name: str) -> str:
        return f"{name} {self.code_digest(name)}"

    def code_digest(self, name: str) -> str:
        """Of the module's source file; other files that it imports are not part of it."""
        with _importing(name) as module:
            return digest_bytes(Path(str(module.__file__)).read_bytes()).hex()

    def tags(self, name: str) -> Sequence[str]:
        return ()

    def resolve(self, name: str, weights: str) -> WeightsSource | None:
        """``DEFAULT``: the network as the function returns it."""
        return WeightsSource("DEFAULT") if weights == "DEFAULT" else None

    def licence(self, name: str) -> None:
        return None

    def published(self, name: str) -> None:
        return None

    def preset(self, name: str, source: WeightsSource, image_size: int | None = None) -> Transform:
        """The one that the function returns beside the network; without one the usual one of ImageNet."""
        return _call(name)[1]

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
        """The network as the function returns it; one of its layers cannot be asked for."""
        if layer is not None:
            raise layer_error(name, layer, (), "a network of your own gives its features itself")
        model, transform = _call(name)
        output = run_on_meta(model, image_size or transform.crop)
        pool = pool_for(name, "the network", output, pooling)
        words = "its own" if pool is None else POOLINGS.get(pooling, POOLINGS["avg"])
        shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
        return FeatureNetwork(model, pool, pooling=words, input_size=transform.crop, shapes=shapes, trunk_key="own")

    def make_classifier(
        self, name: str, *, tensors: Tensors | None = None, initialise: bool = False
    ) -> tuple[FeatureNetwork, tuple[str, ...]]:
        raise BackboneError(
            f"{name} has no classifier whose classes have names.",
            where="backbone.name",
            remedy="train a head on it and use `pipeline predict`",
        )

    def adapt(self, name: str, network: FeatureNetwork, tensors: Tensors) -> Tensors:
        return tensors


@contextmanager
def _importing(name: str) -> Iterator[Any]:
    """The module that ``name`` is in, also from the working directory, with errors told as the user's."""
    module = name.partition(":")[0]
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        yield importlib.import_module(module)
    except (ImportError, SyntaxError) as error:
        _fail(name, f"{type(error).__name__}: {error}", f"it must be importable from {here}, or set PYTHONPATH")
    finally:
        sys.path.remove(here)


def _call(name: str) -> tuple[nn.Module, Transform]:
    with _importing(name) as module:
        build = getattr(module, name.partition(":")[2], None)
        if not callable(build):
            _fail(name, f"{module.__file__} has no such function", "name a function of that module")
        result = build()
    model, transform = result if isinstance(result, tuple) and len(result) == 2 else (result, Transform())
    if isinstance(transform, Mapping):
        transform = Transform.from_dict(transform, where=module.__file__)
    if not isinstance(model, nn.Module) or not isinstance(transform, Transform):
        kinds = f"{type(model).__name__} and {type(transform).__name__}"
        _fail(name, f"it returned {kinds}", "return a torch module, or a torch module and a mapping of its transform")
    return model.eval(), transform


def _fail(name: str, why: str, remedy: str) -> NoReturn:
    raise BackboneError(f"The network {name} cannot be built.", where="backbone.name", why=why, remedy=remedy)
