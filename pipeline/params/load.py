"""Read params.yaml and ``-s`` options into `Params`; collect every problem before raising."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ..errors import ParamsError, Problem
from .sections import DEVICE_PATTERN, RUN_NAME_PATTERN, SHARD_PATTERN, UNFREEZE_PATTERN, Params

PATH_KEYS = ("data.root", "backbone.weights", "cache.dir", "runs.dir")
PATTERN_RULES = {
    DEVICE_PATTERN: "must be auto, cpu, mps, cuda or cuda:N",
    SHARD_PATTERN: "must be i/n, this job's number from 0 and the number of jobs",
    UNFREEZE_PATTERN: "must be none, all, gradual or last-N",
    RUN_NAME_PATTERN: "must be made of letters, digits, `.`, `_` and `-`, and not begin with a mark",
}
WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt")


class _Loader(yaml.SafeLoader):
    """YAML where `1e-5` is a number (YAML 1.1 reads it as text) and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (dict, list)):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_params(path: Path | str = "params.yaml", overrides: Sequence[str] = ()) -> Params:
    """Params from a file and ``key.path=value`` overrides, later ones winning.

    Relative paths of the file are relative to it; those of overrides to the working directory.

    Raises:
        ParamsError: unknown keys, wrong types and impossible values, all of them at once.
    """
    file = Path(path)
    tree = _read_tree(file)
    problems: list[Problem] = []
    _anchor_paths(tree, file.parent.resolve())
    for override in overrides:
        _apply_override(tree, override, problems)
    try:
        params = Params.model_validate(tree)
    except ValidationError as error:
        problems.extend(_problems_of(error))
    if problems:
        raise ParamsError(file, problems)
    return params


def dump_params(params: Params) -> str:
    """The resolved params as YAML, every key present; `load_params` reads it back to equal params."""
    return yaml.safe_dump(params.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_tree(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ParamsError(file, [Problem("(file)", "must be a readable UTF-8 text file", str(error))]) from error
    tree = _parse(text, file)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ParamsError(file, [Problem("(file)", "must be sections of keys", type(tree).__name__)])
    return tree


def _parse(text: str, where: object) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ParamsError(where, [Problem("(file)", "must be YAML", " ".join(str(error).split()))]) from error


def _anchor_paths(tree: dict[str, Any], base: Path) -> None:
    """Make the relative paths among `PATH_KEYS`, given or left to their defaults, absolute."""
    for key in PATH_KEYS:
        section, name = key.split(".")
        if tree.get(section) is None:
            tree[section] = {}
        values = tree[section]
        if isinstance(values, dict):
            value = values.get(name, _default(section, name))
            values[name] = _anchored(key, value, base) if isinstance(value, str) else value


def _default(section: str, name: str) -> str:
    return str(_section(section).model_fields[name].default)


def _anchored(key: str, value: str, base: Path) -> str:
    if key == "backbone.weights" and not (os.sep in value or value.endswith(WEIGHTS_SUFFIXES)):
        return value
    return os.path.abspath(base / Path(value).expanduser())


def _apply_override(tree: dict[str, Any], override: str, problems: list[Problem]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        problems.append(Problem(f"-s {override}", "must look like key.path=value", repr(override)))
        return
    try:
        value = _parse(text, f"-s {override}")
    except ParamsError as error:
        problems.append(Problem(key, "must be a YAML value", error.problems[0].got))
        return
    if key in PATH_KEYS and isinstance(value, str):
        value = _anchored(key, value, Path.cwd())
    *parents, last = key.split(".")
    node = tree
    for name in parents:
        if node.get(name) is None:
            node[name] = {}
        node = node[name]
        if not isinstance(node, dict):
            problems.append(Problem(key, f"cannot be set, because {name} is a value, not a section", repr(node)))
            return
    node[last] = value


def _problems_of(error: ValidationError) -> list[Problem]:
    """One problem a key: pydantic reports a union once per member, a reader wants it once."""
    by_key: dict[str, Problem] = {}
    for item in error.errors(include_url=False):
        path = _key_path(item["loc"])
        key = ".".join(path) or "(file)"
        rule, hint = _rule(item["type"], item["msg"], item.get("ctx") or {}, path)
        got = _short(item["input"])
        if key in by_key and rule not in by_key[key].rule:
            rule = f"{by_key[key].rule}, or {rule}"
        by_key[key] = Problem(key, rule, got, hint)
    return list(by_key.values())


def _key_path(loc: Iterable[int | str]) -> list[str]:
    """The part of pydantic's location that a user wrote, without the names of union members."""
    path: list[str] = []
    model: type[BaseModel] | None = Params
    for item in loc:
        if model is None and isinstance(item, str) and not _is_free_form(path):
            break
        path.append(str(item))
        field = model.model_fields.get(str(item)) if model else None
        annotation = field.annotation if field else None
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return path


def _is_free_form(path: Sequence[str]) -> bool:
    """Free-form mappings, where what follows the key was written by the user."""
    return ".".join(path) in {"head.sklearn.params", "head.search"}


def _rule(kind: str, message: str, context: dict[str, Any], path: list[str]) -> tuple[str, str | None]:
    if kind == "extra_forbidden":
        return "is not a key of this section", _nearest(path)
    if kind == "literal_error":
        return f"must be {context['expected']}", None
    if kind == "string_pattern_mismatch":
        return PATTERN_RULES[context["pattern"]], None
    if kind == "missing":
        return "must be given too", None
    if kind in {"model_type", "model_attributes_type", "dict_type"}:
        return "must be a section of keys", None
    text = message.removeprefix("Value error, ").removeprefix("Input should be ")
    return (text if kind == "value_error" else f"must be {text}"), None


def _nearest(path: list[str]) -> str:
    """The valid names near an unknown key, also from other sections."""
    model: type[BaseModel] = Params
    for name in path[:-1]:
        annotation = model.model_fields[name].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        model = annotation
    here = list(model.model_fields)
    close = difflib.get_close_matches(path[-1], here, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {'.'.join([*path[:-1], close[0]])}?"
    elsewhere = [
        f"{section}.{path[-1]}" for section in Params.model_fields if path[-1] in _section(section).model_fields
    ]
    if elsewhere:
        return f"Did you mean {' or '.join(elsewhere)}?"
    return f"Valid here: {', '.join(here)}."


def _section(name: str) -> type[BaseModel]:
    annotation = Params.model_fields[name].annotation
    assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return annotation


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
