"""Say what pydantic found in the words of the params file: key, rule, what was got, nearest valid name."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from ..errors import Problem
from .sections import DEVICE_PATTERN, FREE_FORM, RUN_NAME_PATTERN, SHARD_PATTERN, UNFREEZE_PATTERN, Params

PATTERN_RULES = {
    DEVICE_PATTERN: "must be auto, cpu, mps, cuda or cuda:N",
    SHARD_PATTERN: "must be i/n, this job's number from 0 and the number of jobs",
    UNFREEZE_PATTERN: "must be none, all, gradual or last-N",
    RUN_NAME_PATTERN: "must be made of letters, digits, `.`, `_` and `-`, and not begin with a mark",
}
RULES = {
    "extra_forbidden": "is not a key of this section",
    "missing": "has too few values",
    "too_long": "has too many values: {max_length} are wanted",
    "model_type": "must be a section of keys",
    "model_attributes_type": "must be a section of keys",
    "dict_type": "must be keys with values",
    "invalid_key": "must be a word",
    "string_type": "must be text",
    "string_unicode": "must be text in UTF-8",
    "string_too_short": "must not be empty",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "path_type": "must be a path",
    "secret": "must be a URL without a password or a signature, which the store's own settings are for",
    "greater_than": "must be above {gt:.12g}",
    "greater_than_equal": "must be at least {ge:.12g}",
    "less_than": "must be below {lt:.12g}",
    "less_than_equal": "must be at most {le:.12g}",
}
HIDDEN = "one, which is not repeated here"
OF_THE_WHOLE_LIST = {"missing", "too_long"}


def problems_of(error: ValidationError) -> list[Problem]:
    """One problem a key: pydantic reports a union once per member, a reader wants it once."""
    by_key: dict[str, Problem] = {}
    for item in error.errors(include_url=False):
        kind, message, got = item["type"], item["msg"], item["input"]
        path = key_path(item["loc"])
        if kind in OF_THE_WHOLE_LIST and path[-1].isdigit():
            path = path[:-1]
        key, rule = ".".join(path) or "(file)", _rule(kind, message, item.get("ctx") or {})
        if kind == "value_error" and isinstance(got, dict):
            got = {name: value for name, value in got.items() if str(name) in rule}
        if kind == "secret":
            got = HIDDEN
        earlier = by_key.get(key)
        hint = nearest(path) if kind == "extra_forbidden" else _quotes(kind, got)
        by_key[key] = Problem(
            key, _either(earlier.rule, rule) if earlier else rule, got if got is HIDDEN else short(got), hint
        )
    return list(by_key.values())


def _rule(kind: str, message: str, context: dict[str, Any]) -> str:
    if kind == "literal_error":
        return f"must be {str(context['expected']).replace(chr(39), '')}"
    if kind == "string_pattern_mismatch":
        return PATTERN_RULES[context["pattern"]]
    if kind in RULES:
        return RULES[kind].format(**context)
    text = message.removeprefix("Value error, ").removeprefix("Input should be ")
    return text if kind == "value_error" else f"must be {text}"


def _either(first: str, second: str) -> str:
    if second in first:
        return first
    return f"{first}, or {second.removeprefix('must be ') if first.startswith('must be ') else second}"


def _quotes(kind: str, got: object) -> str | None:
    """YAML reads ``7``, ``no`` and ``1e5`` as something else than the text that was meant."""
    if kind in {"string_type", "path_type", "invalid_key"} and isinstance(got, (bool, int, float)):
        return "Put quotes around it."
    return None


def key_path(loc: Iterable[int | str]) -> list[str]:
    """The part of pydantic's location that a user wrote, without the names of union members."""
    path: list[str] = []
    section: type[BaseModel] | None = Params
    for item in loc:
        if item == "[key]" or (section is None and isinstance(item, str) and ".".join(path) not in FREE_FORM):
            break
        path.append(str(item))
        section = section_at(path)
    return path


def section_at(path: Sequence[str]) -> type[BaseModel] | None:
    """The section that a dotted path names; ``None`` where it names a value or nothing."""
    section: type[BaseModel] = Params
    for name in path:
        field = section.model_fields.get(name)
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        section = annotation
    return section


def nearest(path: Sequence[str]) -> str:
    """The valid names near an unknown key, also from other sections."""
    *parents, name = path
    section = section_at(parents) or Params
    close = difflib.get_close_matches(name, section.model_fields, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {'.'.join([*parents, close[0]])}?"
    elsewhere = [key for key in all_keys() if key.rpartition(".")[2] == name]
    if elsewhere:
        return f"Did you mean {' or '.join(elsewhere)}?"
    return f"Valid here: {', '.join(section.model_fields)}."


def all_keys(path: Sequence[str] = ()) -> list[str]:
    """Dotted names of all values below a section."""
    section = section_at(path)
    if section is None:
        return [".".join(path)]
    return [key for name in section.model_fields for key in all_keys([*path, name])]


def short(value: object) -> str:
    """``value`` in at most about 80 characters, however large it is."""
    printer = reprlib.Repr()
    printer.maxstring = printer.maxother = printer.maxlong = 60
    text = printer.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
