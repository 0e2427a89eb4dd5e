"""Strict YAML 1.2 without 1.1's surprises: `2e-4` is a number, `no` and `on` are text, no key occurs twice."""

import re
from typing import Any

import yaml

MOST_CHARACTERS = 65_536  # PyYAML reads about 50,000 a second, and a recipe has 2,000
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


class YamlError(ValueError):
    """A document that a recipe can't be; the text names the line."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema, unique keys, and neither anchors nor tags."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own class attribute)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            raise _error("anchors and aliases are not allowed, write the value out", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise _error(f"the tag {event.tag} is not allowed, write a plain value", event.start_mark)
        if isinstance(event, yaml.ScalarEvent) and (odd := CONTROL.search(event.value)):
            raise _error(f"the character U+{ord(odd[0]):04X} is not allowed, remove it", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error("a key must be plain text", key.start_mark)
            if key.value in seen:
                raise _error(f"the key {key.value} occurs twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, _pattern in {
    "null": r"^(?:~|null|Null|NULL|)$",
    "bool": r"^(?:true|True|TRUE|false|False|FALSE)$",
    "int": r"^[-+]?[0-9]+$",
    "float": r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$",
}.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), None)
# PyYAML's int constructor reads a leading zero as octal; YAML 1.2 does not
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def parse(text: str, name: str) -> Any:
    """The value of a document. Raises YamlError, whose text begins with `name` and the line."""
    if len(text) > MOST_CHARACTERS:
        raise YamlError(f"{name}: {len(text):,} characters, the limit is {MOST_CHARACTERS:,}; shorten it")
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise YamlError(f"{name}{line}: {error.problem or error.context}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise YamlError(f"{name}: not a recipe's value: {str(error).splitlines()[0]}") from error
    except yaml.YAMLError as error:
        raise YamlError(f"{name}: {error}") from error


def _error(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)
