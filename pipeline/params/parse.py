"""Text to plain values: YAML as people expect it of a params file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

# YAML 1.1 reads these words as numbers only with a dot and a sign: `1e-5` would be text.
EXPONENT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


class NotYamlError(Exception):
    """The text is not YAML, or uses what a params file has no use for; the message says what and where."""


@dataclass(frozen=True)
class Repeated:
    """A key that stands twice in one section, and the line (from 1) where it stands again."""

    key: str
    line: int


def parse_yaml(text: str) -> tuple[Any, list[Repeated]]:
    """The value that ``text`` holds, the last of repeated keys winning, and these keys.

    Raises:
        NotYamlError: with one sentence for the user.
    """
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data(), sorted(loader.repeated, key=lambda again: again.line)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        raise NotYamlError(_sentence(error)) from error
    except yaml.reader.ReaderError as error:
        raise NotYamlError(f"a character that no text file holds (U+{int(error.character):04X})") from error
    except ValueError as error:
        raise NotYamlError(str(error)) from error
    except RecursionError as error:
        raise NotYamlError("too many brackets in brackets") from error


def dump_yaml(value: Any) -> str:
    """YAML that `parse_yaml`, and readers that know dates but no `1e-5`, read back to an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Safe, without aliases (a few lines of them can stand for gigabytes) and without dates (they are names here)."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.repeated: list[Repeated] = []

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            problem = f"the alias *{event.anchor}, which params do without"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key that is not a word", key_node.start_mark)
            if key_node.value in seen:
                self.repeated.append(Repeated(key_node.value, key_node.start_mark.line + 1))
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what one reader or another would not read as text: dates and `1e-5`."""

    def ignore_aliases(self, data: Any) -> bool:
        return True  # two keys with one value are written out twice, since `parse_yaml` knows no aliases


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _reader_or_writer in (_Loader, _Dumper):
    _reader_or_writer.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))


def _sentence(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark
    place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    context = f"{error.context}: " if error.context else ""
    return f"{context}{error.problem}{place}"
