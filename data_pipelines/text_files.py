"""Small text files from people or strangers, read within bounds; YAML typed by the dataclass that it fills."""

import dataclasses
import re
import reprlib
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from data_pipelines.errors import UserError
from data_pipelines.files import read_text

MAX_YAML_BYTES = 1 << 20
MAX_YAML_DEPTH = 32
MAX_YAML_NODES = 10_000
MAX_INT_CHARS = 40  # of a number in YAML; longer ones remain text

_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = _shortened.maxlong = 120
_shortened.maxlevel = 3


def shown(value: Any) -> str:
    """Return repr(value), shortened to fit in a message."""
    try:
        return _shortened.repr(value)
    except ValueError:  # more digits than Python writes out
        return f"<{type(value).__name__} of too many digits>"


def read_small(path: Path, max_bytes: int, name: str = "") -> str:
    """Return the text of a regular file of at most `max_bytes` bytes of UTF-8; a byte order mark is dropped.

    Messages call the file `name`, or by its path.

    Raises:
        UserError: no such file, a FIFO, device or folder, too many bytes, or text in another encoding.
    """
    try:
        return read_text(path, max_bytes)
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {name or path}: it is not UTF-8 text, save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"cannot read {name or path}: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in the name
        raise UserError(f"cannot read {name or path}: {error}") from error


# ---------------------------------------------------------------------------------------------------------- YAML


def read_yaml(path: Path, kind: Any = Any) -> Any:
    """Return the value that a YAML file holds, read as `parse_yaml` reads it.

    Raises:
        UserError: the file cannot be read, or is not valid YAML.
    """
    text = read_small(path, MAX_YAML_BYTES, f"config {path}")
    try:
        return parse_yaml(text, kind)
    except yaml.YAMLError as error:
        raise UserError(f"config {path} is not valid YAML: {_explained(error)}") from error


def parse_yaml(text: str, kind: Any = Any) -> Any:
    """Return the value of YAML text as dicts, lists, str, int, float, bool and None.

    `kind` is the type that the value is meant for: a dataclass, or the type of one of its fields. A plain scalar in
    place of text is that text: `2024-05-01`, `007` and `no` need no quotes. A null remains None.

    Raises:
        yaml.YAMLError: broken YAML, an anchor, an alias, a tag, a key that is given twice, or more values or deeper
            nesting than a configuration needs.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else _value(loader, node, kind)
    finally:
        loader.dispose()


def _explained(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    if not isinstance(error, yaml.MarkedYAMLError) or mark is None:
        return " ".join(str(error).split())
    words = " ".join(filter(None, [error.context, error.problem]))
    return f"line {mark.line + 1}, column {mark.column + 1}: {' '.join(words.split())}"


class _Loader(yaml.SafeLoader):
    """A loader of plain trees: no anchors, aliases or tags; scalars are numbers, flags, null and text only.

    Numbers are those of YAML 1.2: 1e-3 is one, 010 is ten, and 1:30 is text, as is a date. For PyYAML by itself these
    are text, eight and ninety.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in rules if tag.rpartition(":")[2] in ("null", "bool", "int", "float")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._num_nodes = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            self._refuse("anchors and aliases are not accepted: write the value out", event)
        if event.tag is not None:
            self._refuse(f"the tag {shown(event.tag)} is not accepted: leave it out", event)
        self._num_nodes += 1
        if self._num_nodes > MAX_YAML_NODES:
            self._refuse(f"more than {MAX_YAML_NODES:,} values", event)
        if self._depth == MAX_YAML_DEPTH:
            self._refuse(f"values nested more than {MAX_YAML_DEPTH} deep", event)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def _refuse(self, problem: str, at: Any) -> None:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


class _Dumper(yaml.SafeDumper):
    """A dumper that puts quotes around text which the loader would take for a number."""


for _kind, _pattern in (("float", r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), ("int", r"^[-+]?0[0-9_]+$")):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_pattern), list("-+0123456789"))


def dump_yaml(tree: Mapping[str, Any]) -> str:
    """Return nested dicts as YAML in their order. `parse_yaml` reads them back, up to its limits."""
    return yaml.dump(dict(tree), Dumper=_Dumper, sort_keys=False)


def _value(loader: _Loader, node: yaml.Node, kind: Any) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return _scalar(loader, node, kind)
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, part, kind_of_items(kind)) for part in node.value]
    assert isinstance(node, yaml.MappingNode)
    tree: dict[str, Any] = {}
    for key_node, part in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            loader._refuse("a key is not text", key_node)
        key = key_node.value
        if key in tree:
            loader._refuse(f"the key {shown(key)} is given twice", key_node)
        tree[key] = _value(loader, part, kind_of_key(kind, key))
    return tree


def _scalar(loader: _Loader, node: yaml.ScalarNode, kind: Any) -> Any:
    name = node.tag.rpartition(":")[2]
    if name == "null":
        return None
    is_time = name in ("int", "float") and ":" in node.value
    if name == "str" or is_text(kind) or is_time or (name == "int" and len(node.value) > MAX_INT_CHARS):
        return node.value
    try:
        return _integer(node.value) if name == "int" else loader.construct_object(node)
    except ValueError:  # such as 0x_
        return node.value


def _integer(text: str) -> int:
    """Return a number whose zeros in front mean nothing. Raises ValueError: it has no digits."""
    digits = text.replace("_", "")
    has_base = digits.lstrip("-+").lower().startswith(("0x", "0b"))
    return int(digits, 0 if has_base else 10)


# ---------------------------------------------------------------------------------------------- types of fields


def is_text(kind: Any) -> bool:
    """Return True if a scalar of a field of this type is text: str, Path, a Literal of str, one of these or None.

    A field may hold a list instead.
    """
    kind = _plain(kind)
    if get_origin(kind) in (Union, UnionType):
        scalars = [option for option in get_args(kind) if get_origin(_plain(option)) not in (list, tuple)]
        options = [option for option in scalars if option is not NoneType]
        return bool(options) and all(map(is_text, options))
    if get_origin(kind) is Literal:
        return all(isinstance(choice, str) for choice in get_args(kind))
    return isinstance(kind, type) and issubclass(kind, str | Path)


def is_optional(kind: Any) -> bool:
    """Return True if a field of this type may be None."""
    kind = _plain(kind)
    return get_origin(kind) in (Union, UnionType) and NoneType in get_args(kind)


_type_hints = cache(partial(get_type_hints, include_extras=True))


def type_hints(kind: Any) -> Mapping[str, Any]:
    """Return the types of the fields of a dataclass with their annotations, evaluated once per dataclass."""
    return MappingProxyType(_type_hints(kind))


def kind_of_key(kind: Any, key: str) -> Any:
    """Return the type of a key of a dataclass or dict, or of a union of these; Any where the type does not say."""
    kind = _plain(kind)
    if dataclasses.is_dataclass(kind):
        return type_hints(kind).get(key, Any)
    if get_origin(kind) in (Union, UnionType):
        kinds = (kind_of_key(option, key) for option in get_args(kind))
        return next((found for found in kinds if found is not Any), Any)
    arguments = get_args(kind) if get_origin(kind) is dict else ()
    return arguments[1] if arguments else Any


def kind_of_items(kind: Any) -> Any:
    """Return the type of the items of a list, or of a tuple with one type; Any if it is not stated."""
    kind = _plain(kind)
    if get_origin(kind) in (Union, UnionType):
        kind = next((_plain(option) for option in get_args(kind) if get_origin(_plain(option)) in (list, tuple)), Any)
    items = {item for item in get_args(kind) if item is not Ellipsis} if get_origin(kind) in (list, tuple) else set()
    return items.pop() if len(items) == 1 else Any


def _plain(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind
