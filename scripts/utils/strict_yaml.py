"""YAML as a recipe needs it: safe, no surprises in scalars, no key given twice, and the line of every key."""

import re

import yaml


class StrictLoader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2, and a key given twice refused.

    PyYAML follows YAML 1.1, where `save_strategy: no` and `lang: no` (Norwegian) mean false, and 1e-5 is a text.
    """

    def construct_mapping(self, node, deep=False):
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if key.value in seen:
                message = f"the key {key.value} was given before, on line {seen[key.value]}"
                raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
            seen[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


_TAG = "tag:yaml.org,2002:"
StrictLoader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in resolvers if tag.removeprefix(_TAG) not in ("bool", "float", "timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
StrictLoader.add_implicit_resolver(f"{_TAG}bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
StrictLoader.add_implicit_resolver(f"{_TAG}float", _NUMBER, list("-+.0123456789"))


def key_lines(node: yaml.Node | None, key: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    """The line on which each key stands; list items share the key of their list."""
    lines: dict[tuple[str, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            lines[(*key, str(name.value))] = name.start_mark.line + 1
            lines |= key_lines(value, (*key, str(name.value)))
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            if isinstance(item, yaml.ScalarNode):
                lines[(*key, str(item.value))] = item.start_mark.line + 1
            lines |= key_lines(item, key)
    return lines
