"""YAML as a recipe needs it: safe, scalars as they are written, no key given twice, and the line of every key."""

from typing import Any

import yaml

from utils.errors import UserError

_TAG = "tag:yaml.org,2002:"
# Values that aliases may add to those written out: a mix of 20 data sets, each `<<` the same 20 options, adds 779.
# 500 bytes of aliases of aliases can stand for tens of millions, and took 13 s and 1.3 GB to be refused.
MOST_BY_ALIASES = 10_000


class StrictLoader(yaml.SafeLoader):
    """Safe YAML that leaves every scalar but null a text; the recipe's schema knows which of them are numbers.

    PyYAML follows YAML 1.1, where `save_strategy: no` and `lang: no` (Norwegian) mean false, 1e-5 is a text, 010 is
    eight, 1:30 is ninety, and the folder 0012 or the commit 12e4567 would be read as numbers.
    """

    def construct_mapping(self, node, deep=False):
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key.start_mark)
            if key.value in seen:
                message = f"the key {key.value} was given before, on line {seen[key.value]}"
                raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
            seen[key.value] = key.start_mark.line + 1
            if key.tag == f"{_TAG}null":
                key.tag = f"{_TAG}str"
        return super().construct_mapping(node, deep)


StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in (f"{_TAG}null", f"{_TAG}merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
StrictLoader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.removeprefix(_TAG) in ("null", "str", "seq", "map")  # None: what refuses all others
}


def parse_yaml(text: str, source: str) -> tuple[Any, dict[tuple[str, ...], int]]:
    """The values of a YAML text, and the line on which each key stands; list items share the key of their list.

    Raises: UserError when it does not parse; with `source`, the line and the column.
    """
    try:
        loader = StrictLoader(text)
        node = loader.get_single_node()
        _refuse_many_aliases(node)
        lines = _key_lines(node)
        return (loader.construct_document(node) if node else None), lines
    except RecursionError:
        raise UserError(f"{source}: YAML does not parse: nested too deeply") from None
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        problem = f"the character {error.character:#04x} is not allowed"
    except yaml.MarkedYAMLError as error:
        line, column = error.problem_mark.line + 1, error.problem_mark.column + 1
        problem = error.problem.removeprefix("but ")
    raise UserError(f"{source} line {line}, column {column}: YAML does not parse: {problem}")


def _refuse_many_aliases(node: yaml.Node | None) -> None:
    """Count what the aliases stand for without following one twice.

    Raises: yaml.MarkedYAMLError at the first value that holds too many; RecursionError for one that holds itself.
    """
    sizes: dict[int, int] = {}  # of the nodes, by identity: an alias is the node that it names

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            inside = node.value if isinstance(node, yaml.CollectionNode) else ()
            children = [child for pair in inside for child in (pair if isinstance(pair, tuple) else (pair,))]
            sizes[id(node)] = 1 + sum(map(size, children))
            if sizes[id(node)] > len(sizes) + MOST_BY_ALIASES:
                problem = f"its aliases (*name) stand for more than {MOST_BY_ALIASES:,} values: write them out"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return sizes[id(node)]

    if node:
        size(node)


def _key_lines(node: yaml.Node | None, key: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    lines: dict[tuple[str, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            lines[(*key, str(name.value))] = name.start_mark.line + 1
            lines |= _key_lines(value, (*key, str(name.value)))
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            if isinstance(item, yaml.ScalarNode):
                lines[(*key, str(item.value))] = item.start_mark.line + 1
            lines |= _key_lines(item, key)
    return lines
