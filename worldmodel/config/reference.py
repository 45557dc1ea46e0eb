"""The reference of all keys, generated from their types: docs/reference/config.md, and `worldmodel config`."""

import dataclasses
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic.fields import FieldInfo

from data_pipelines.errors import UserError, did_you_mean
from data_pipelines.text_files import is_optional, shown, type_hints
from worldmodel.config.kinds import OUTSIDE, choice_of, dotted_keys, keys_of, list_of, members_of
from worldmodel.config.sections import Config

HEADER = """# Configuration

A run is described by one YAML file. Any key can be set on the command line as `key=value`, such as `train.steps=400`.

- A choice is given by its name and its own keys: `encoder: {name: resnet, width: 0.5}`, or by the name alone:
  `encoder: resnet`. On the command line `model.encoder=resnet` keeps those keys of the file that `resnet` has, and
  drops the others.
- `base: other.yaml` reads that file first, relative to this one. Its sections are merged with this file's.
- Code from outside of the project is named as `package.module:Class`, with `options: {...}` for the class.
- Text is taken as it is, without quotes. `null` stands for no value.

This page is generated from the types in worldmodel/config.
"""
COLUMNS = ("key", "type", "default", "meaning")


def reference(key: str | None = None) -> str:
    """Return the reference of all keys as Markdown, or that of one section or key, such as "model" or "train.lr".

    Raises:
        UserError: there is no such key.
    """
    if key is not None:
        return "\n".join(_lines_of(key))
    hints = type_hints(Config)
    sections = [name for name, kind in hints.items() if _is_group(kind)]
    parts = ["\n".join(_lines(name, hints[name], "##")) for name in sections]
    return "\n".join([HEADER, *_lines_of_keys(Config, ""), *parts])


def _lines_of(key: str) -> Iterator[str]:
    """Yield the part of the reference about a dotted key: a section, a choice, or its row in each table that has it."""
    above, _, leaf = key.rpartition(".")
    owners: dict[str, type] = {"config": Config}
    place = ""
    for part in above.split(".") if above else ():
        place = f"{place}.{part}".lstrip(".")
        owners = {name: member for hint in _hints(owners, part) for name, member in _dataclasses_of(place, hint)}
    hints = _hints(owners, leaf)
    if not hints:
        known = list(dict.fromkeys(dotted_keys(Config)))
        names = ", ".join(name for name in known if "." not in name)
        raise UserError(f"there is no key {shown(key)} of the config{did_you_mean(key, known)}: it has {names}")
    if _is_group(hints[0]):
        yield from _lines(key, hints[0], "##")
        return
    for name, owner in owners.items():
        if leaf in keys_of(owner):
            yield f"## {name}\n"
            yield from _lines_of_keys(owner, f"{above}." if above else "", only=leaf)


def _hints(owners: Mapping[str, type], key: str) -> list[Any]:
    """Return the types of a key in the dataclasses that have it."""
    return [type_hints(owner)[key] for owner in owners.values() if key in keys_of(owner)]


def _dataclasses_of(key: str, kind: Any) -> Iterator[tuple[str, type]]:
    """Yield the dataclasses that the value of a key may be, with headings."""
    if choice_of(kind) is not None:
        members = members_of(kind)
        for member in dict.fromkeys(members.values()):
            yield f"{key}: {', '.join(name for name in members if members[name] is member)}", member
    elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
        yield key, kind


def _lines(key: str, kind: Any, heading: str) -> Iterator[str]:
    """Yield a section or a choice: a heading, what it is, a table of keys, and the choices within."""
    yield f"{heading} {key}\n"
    choice = choice_of(kind)
    if choice is None:
        yield f"{_one_line(kind.__doc__)}\n"
        yield from _lines_of_keys(kind, f"{key}.")
        for name, hint in type_hints(kind).items():
            if choice_of(hint) is not None:
                yield from _lines(f"{key}.{name}", hint, f"{heading}#")
        return
    yield f"A choice by `{key}.{choice.tag}`; the default is `{choice.default}`.\n"
    for name, member in _dataclasses_of(key, kind):
        yield f"{heading}# {name}\n"
        yield f"{_one_line(member.__doc__)}\n"
        yield from _lines_of_keys(member, f"{key}.")
    for name, hint in _groups_of(members_of(kind).values()).items():
        yield from _lines(f"{key}.{name}", hint, f"{heading}#")


def _groups_of(members: Iterable[type]) -> dict[str, Any]:
    """Return the groups of keys within the dataclasses of a choice, which several of them may share."""
    fields = [field for member in members for field in dataclasses.fields(member)]
    hints = {name: hint for member in members for name, hint in type_hints(member).items()}
    return {field.name: hints[field.name] for field in fields if _is_group(hints[field.name])}


def _lines_of_keys(kind: Any, prefix: str, only: str | None = None) -> Iterator[str]:
    """Yield a table of the keys of a dataclass that are no sections, or of one of them."""
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"| {' | '.join('---' for _ in COLUMNS)} |"
    hints = type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if only in (None, field.name) and (not _is_group(hint) or choice_of(hint) is not None):
            cells = f"`{prefix}{field.name}`", _type(hint), _default(field, hint), description(kind, field.name)
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""


def description(kind: type, key: str) -> str:
    """Return the docstring of a key of a dataclass, which may be inherited; "" if it has none."""
    fields = [vars(base).get("__pydantic_fields__", {}).get(key) for base in kind.__mro__]
    texts = [field.description for field in fields if field is not None and field.description]
    return _one_line(texts[0]) if texts else ""


def _default(field: Any, hint: Any) -> str:
    choice = choice_of(hint)
    if choice is not None:
        return f"`{choice.default}`"
    value = field.default
    if value is dataclasses.MISSING:
        value = None if field.default_factory is dataclasses.MISSING else field.default_factory()
        return "required" if value is None else f"`{value}`"
    if isinstance(value, FieldInfo):
        value = value.default
    if isinstance(value, bool) or value is None:
        return f"`{str(value).lower()}`" if isinstance(value, bool) else "`null`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def _type(hint: Any) -> str:
    """Return a type and its range in words."""
    if list_of(hint) is not None:
        options = ["text", _type(list_of(hint)), *(["null"] if is_optional(hint) else [])]
        return f"{', '.join(options[:-1])}, or {options[-1]}"
    if dataclasses.is_dataclass(hint):
        kinds = type_hints(hint)
        return ", ".join(f"`{name}`: {_type(kind)}" for name, kind in kinds.items())
    if choice_of(hint) is not None:
        return "choice: " + ", ".join(f"`{name}`" for name in members_of(hint))
    limits: list[Any] = []
    if get_origin(hint) is Annotated:
        hint, *marks = get_args(hint)
        limits = [limit for mark in marks if isinstance(mark, FieldInfo) for limit in mark.metadata]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if option is types.NoneType else _type(option) for option in arguments)
    if origin is tuple:
        count = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
        return f"list of {count}values: {_type(arguments[0])}"
    if origin is dict:
        return "keys and values"
    if any(getattr(limit, "pattern", None) for limit in limits):
        return f"`{OUTSIDE}`"
    name = {bool: "true or false", int: "integer", float: "number", str: "text"}[hint]
    return name + _range(hint, limits)


def _range(kind: type, limits: Iterable[Any]) -> str:
    least: Any = next((limit.ge for limit in limits if isinstance(limit, Ge)), None)
    above: Any = next((limit.gt for limit in limits if isinstance(limit, Gt)), None)
    most = next((limit.le for limit in limits if isinstance(limit, Le)), None)
    if kind is int and above is not None:
        least, above = above + 1, None
    if least is None and above is None:
        return ""
    if most is None:
        return f", {_number(least)} or more" if least is not None else f", above {_number(above)}"
    if least is not None:
        return f", {_number(least)} to {_number(most)}"
    return f", above {_number(above)}, at most {_number(most)}"


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _is_group(kind: Any) -> bool:
    return choice_of(kind) is not None or dataclasses.is_dataclass(kind)


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
