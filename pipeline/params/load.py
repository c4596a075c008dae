"""Read params.yaml and ``-s`` options into `Params`; collect every problem before raising."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import BackboneError, HeadError, ParamsError, PipelineError, Problem
from .names import problems_of_names
from .parse import NotYamlError, Repeated, dump_yaml, parse_yaml
from .problems import problems_of, section_at, short
from .sections import Params, is_url

PATH_KEYS = (
    "data.root",
    "data.images",
    "data.corrections",
    "backbone.weights",
    "cache.dir",
    "head.prompts",
    "runs.dir",
)
WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt")
OPTION = "-s"  # by which the command line gives overrides
LARGEST = 1 << 24  # bytes of a params file
Tree = dict[str, Any]


def load_params(
    path: Path | str | None = "params.yaml", overrides: Sequence[str] = (), *, kinds: Collection[str] = ()
) -> Params:
    """Params from a file and ``key.path=value`` overrides, later ones winning.

    Relative paths of the file, and defaults, are relative to it; those of overrides to the working directory.
    A section that the file leaves empty, and a mapping that an override gives to a section, change nothing else in it.

    Args:
        path: None: every default, relative to the working directory.
        kinds: of heads, all that there are: with them it is looked, too, whether there are such heads and such a
            backbone, as far as that can be known at once; see `names`.

    Raises:
        ParamsError: unknown or repeated keys, wrong types and impossible values, all of them at once.
        HeadError, BackboneError: one such name is all that is wrong.
    """
    file = Path("params.yaml" if path is None else path)
    tree, problems = _read_tree(file) if path is not None else ({}, [])
    _drop_empty_sections(tree)
    _anchor_paths(tree, Path(os.path.abspath(file.parent)))
    for override in overrides:
        _apply_override(tree, override, problems)
    try:
        params = Params.model_validate(tree)
    except ValidationError as error:
        problems.extend(problems_of(error))
    if kinds:
        names = problems_of_names(tree, kinds)
        if len(names) == 1 and not problems:
            raise _unknown(_with_origin(names[0], overrides), file)
        problems += names
    if problems:
        problems = [_with_origin(problem, overrides) for problem in problems]
        given = [problem.origin == OPTION or problem.key.startswith(f"{OPTION} ") for problem in problems]
        raise ParamsError(OPTION if all(given) else f"{file} and {OPTION}" if any(given) else file, problems)
    return params


def _unknown(problem: Problem, file: Path) -> PipelineError:
    """The one thing that is wrong, as those tell of it who would look the name up."""
    kind, what = (HeadError, "kind of head") if problem.key == "head.kind" else (BackboneError, "backbone")
    where = f"{OPTION} {problem.key}" if problem.origin else f"{problem.key} in {file}"
    return kind(f"There is no {what} {problem.got}.", where=where, remedy=problem.hint)


def _with_origin(problem: Problem, overrides: Sequence[str]) -> Problem:
    """The problem, marked where an override gave what is wrong: its key, one above it, or one below."""
    keys = [override.partition("=")[0] for override in overrides]
    given = any(f"{problem.key}.".startswith(f"{key}.") or key.startswith(f"{problem.key}.") for key in keys if key)
    return replace(problem, origin=OPTION) if given else problem


def dump_params(params: Params) -> str:
    """The resolved params as YAML, every key present; `load_params` reads it back to equal params."""
    return dump_yaml(params.model_dump(mode="json"))


def _read_tree(file: Path) -> tuple[Tree, list[Problem]]:
    try:
        with open(file, "rb") as content:  # bounded, for a device in its place never ends
            data = content.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise _not_params(file, f"must be at most {LARGEST} bytes", "more")
        tree, repeated = parse_yaml(data.decode("utf-8-sig"))
    except OSError as error:
        raise _not_params(file, "must be a readable file", str(error.strerror)) from error
    except UnicodeDecodeError as error:
        raise _not_params(file, "must be UTF-8 text", f"something else at byte {error.start}") from error
    except NotYamlError as error:
        raise _not_params(file, "must be YAML", str(error)) from error
    if not isinstance(tree, dict | None):
        raise _not_params(file, "must be sections of keys", short(tree))
    return tree or {}, _problems_of_repeated(repeated)


def _not_params(file: Path, rule: str, got: str) -> ParamsError:
    remedy = "name a params file with -p FILE, or make one; an empty one means every default"
    return ParamsError(file, [Problem("(file)", rule, got)], remedy=remedy)


def _problems_of_repeated(repeated: Sequence[Repeated]) -> list[Problem]:
    return [
        Problem(again.key, "must stand only once in its section", f"it again in line {again.line}")
        for again in repeated
    ]


def _drop_empty_sections(tree: Tree, parents: Sequence[str] = ()) -> None:
    """A section whose keys are all commented out reads as null, and means its defaults."""
    for name in list(tree):
        path = [*parents, str(name)]
        if section_at(path) and tree[name] is None:
            del tree[name]
        elif section_at(path) and isinstance(tree[name], dict):
            _drop_empty_sections(tree[name], path)


def _anchor_paths(tree: Tree, base: Path) -> None:
    """Make the relative paths among `PATH_KEYS`, given or left to their defaults, absolute."""
    for key in PATH_KEYS:
        section, name = key.split(".")
        values = tree.setdefault(section, {})
        if isinstance(values, dict):
            values[name] = _anchored(key, values.get(name, _default(section, name)), base)


def _default(section: str, name: str) -> str | None:
    value = getattr(getattr(Params(), section), name)
    return None if value is None else str(value)


def _anchored(key: str, value: Any, base: Path) -> Any:
    if not isinstance(value, str) or not value or is_url(value):
        return value
    if key == "backbone.weights" and not (os.sep in value or value.endswith(WEIGHTS_SUFFIXES)):
        return value
    return os.path.abspath(base / os.path.expanduser(value))


def _apply_override(tree: Tree, override: str, problems: list[Problem]) -> None:
    key, equals, text = override.partition("=")
    path = key.split(".")
    if not equals or not all(path):
        problems.append(Problem(f"{OPTION} {override}", "must look like key.path=value", repr(override)))
        return
    try:
        value, repeated = parse_yaml(text)
    except NotYamlError as error:
        problems.append(Problem(key, "must be a YAML value", f"{text!r}: {error}"))
        return
    problems.extend(_problems_of_repeated(repeated))
    _set(tree, path, value, problems)


def _set(tree: Tree, path: Sequence[str], value: Any, problems: list[Problem]) -> None:
    if section_at(path) and isinstance(value, dict):
        for name, item in value.items():
            _set(tree, [*path, str(name)], item, problems)
        return
    key = ".".join(path)
    node = tree
    for name in path[:-1]:
        if node.get(name) is None:
            node[name] = {}
        node = node[name]
        if not isinstance(node, dict):
            problems.append(Problem(key, f"cannot be set, because {name} is a value, not a section", short(node)))
            return
    node[path[-1]] = _anchored(key, value, Path.cwd()) if key in PATH_KEYS else value
