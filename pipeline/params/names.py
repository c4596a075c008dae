"""Names that can be known without torch, so that a typing error costs nothing: kinds of heads, torchvision's models.

Only plain words are judged. Names with a prefix or a dot (``timm/...``, ``module:function``, ``sklearn.svm.SVC``) are
left to the libraries that know them.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import Problem
from .problems import short

PACKAGED = ("starter",)
WORD = re.compile(r"\w+")
_REGISTERED = re.compile(r"^@register_model\((?:name=)?(?:[\"'](\w+)[\"'])?\)\n(?:@.*\n)*def (\w+)", re.MULTILINE)


def problems_of_names(tree: Mapping[str, Any], kinds: Collection[str]) -> list[Problem]:
    """Kinds of heads and backbones, in the sections of params, that nothing here is called."""
    named = _under(tree, "head", "kind")
    problems = [
        _problem("head.kind", "is no kind of head", kind, kinds)
        for kind in (named if isinstance(named, list) else [named])
    ]
    # A zoo of a program's own is there only where the zoos are imported already; none is imported for this.
    catalogue = sys.modules.get("pipeline.backbones.catalogue")
    zoos: Mapping[str, Any] = getattr(catalogue, "ZOOS", {})
    name = _under(tree, "backbone", "name")
    if not any(isinstance(name, str) and zoo.owns(name) for zoo in zoos.values()):
        problems.append(_problem("backbone.name", "is no backbone", name, (*PACKAGED, *torchvision_models())))
    return [problem for problem in problems if problem]


@cache
def torchvision_models() -> Sequence[str]:
    """torchvision's classification models; empty where it is not installed.

    What `torchvision.models.register_model` decorates is read from the source, as importing torchvision takes seconds.
    """
    spec = find_spec("torchvision")
    folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    files = (file for folder in folders for file in sorted(Path(folder, "models").glob("*.py")))
    found = (match for file in files for match in _REGISTERED.findall(file.read_text("utf-8")))
    return tuple(named or function for named, function in found)


def _problem(key: str, rule: str, name: object, known: Iterable[str]) -> Problem | None:
    known = list(dict.fromkeys(known))
    if not isinstance(name, str) or not WORD.fullmatch(name) or name in known or len(known) < 2:
        return None
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    lists = f"Known are {', '.join(known)}." if key == "head.kind" else "`pipeline backbones` lists them."
    return Problem(key, rule, short(name), f"Did you mean {' or '.join(near)}?" if near else lists)


def _under(tree: Mapping[str, Any], section: str, name: str) -> Any:
    values = tree.get(section)
    return values.get(name) if isinstance(values, Mapping) else None
