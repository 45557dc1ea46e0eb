"""Types of keys: texts, bounded numbers, and choices, which are unions of dataclasses told apart by a name."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from functools import cache
from types import MappingProxyType, NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from data_pipelines.text_files import type_hints

KEYS = ConfigDict(extra="forbid", use_attribute_docstrings=True)
"""Of every dataclass of the configuration: no other keys, and docstrings of attributes are their descriptions."""


def _usable(text: Any) -> Any:
    """Refuse text that cannot be the name of any file, label or model."""
    if isinstance(text, str):
        if "\0" in text:
            raise ValueError("a name cannot hold a NUL character")
        try:
            parts = [part.encode() for part in text.split("/")]
        except UnicodeEncodeError:
            raise ValueError("a name must be UTF-8") from None
        if "://" not in text and max(map(len, parts)) > 255:
            raise ValueError("a part of a name has at most 255 bytes")
    return text


def _from_home(path: str) -> str:
    """Replace ~/, which a shell leaves as it is within an argument such as run_dir=~/runs/a."""
    return os.path.expanduser(path) if path.startswith("~/") else path


Text = Annotated[str, Field(max_length=2048), BeforeValidator(_usable)]
PathText = Annotated[Text, AfterValidator(_from_home)]
# Upper bounds are far above useful values, and below those that an allocator or a clock refuses. A Count is as large as
# the data, Samples are drawn or batched together, a Size is one side of a matrix, a Repeat happens within one step.
Count = Annotated[int, Field(strict=True, gt=0, le=10**9)]
CountFrom0 = Annotated[int, Field(strict=True, ge=0, le=10**9)]
CountFrom2 = Annotated[int, Field(strict=True, ge=2, le=10**9)]
CountFrom10 = Annotated[int, Field(strict=True, ge=10, le=10**9)]
Size = Annotated[int, Field(strict=True, gt=0, le=16_384)]
SizeFrom0 = Annotated[int, Field(strict=True, ge=0, le=16_384)]
Pixels = Annotated[int, Field(strict=True, gt=0, le=4_096)]
Repeat = Annotated[int, Field(strict=True, gt=0, le=1_024)]
RepeatFrom0 = Annotated[int, Field(strict=True, ge=0, le=1_024)]
Samples = Annotated[int, Field(strict=True, gt=0, le=2**20)]
SamplesFrom0 = Annotated[int, Field(strict=True, ge=0, le=2**20)]
SamplesFrom2 = Annotated[int, Field(strict=True, ge=2, le=2**20)]
Seed = Annotated[int, Field(strict=True, ge=0, le=10**18)]
Seconds = Annotated[float, Field(strict=True, gt=0, le=1e7, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
EmbeddingNorm = Literal["sphere", "standard", "white"]

OUTSIDE = "package.module:Class"
"""The form of a name that stands for code outside of the project."""
OutsideName = Annotated[Text, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$")]
Options = Annotated[dict[str, Any], Field(max_length=1_000)]


@dataclasses.dataclass(frozen=True)
class Choice:
    """Marks a union of dataclasses as a choice: `Annotated[ConfigA | ConfigB, Choice("a")]`.

    Each dataclass lists its names in the type of its field `tag`, as a Literal. One whose field has another type takes
    the names of outside code, those with a colon. Without a name the choice is `default`.
    """

    default: str
    tag: str = "name"

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Build pydantic's tagged union from the names of the dataclasses."""
        schemas: dict[Any, CoreSchema] = {}
        for member in get_args(source):
            schema = handler.generate_schema(member)
            schemas |= dict.fromkeys(self.names_of(member), schema)
        return core_schema.tagged_union_schema(schemas, self._discriminate)

    def names_of(self, member: type) -> tuple[str, ...]:
        """Return the names of one dataclass; OUTSIDE for that of outside code."""
        hint = type_hints(member)[self.tag]
        return get_args(hint) if get_origin(hint) is Literal else (OUTSIDE,)

    def _discriminate(self, value: Any) -> str | None:
        is_tree = isinstance(value, Mapping)
        name = value.get(self.tag, self.default) if is_tree else getattr(value, self.tag, None)
        return None if name is None else as_key(name)


@dataclasses.dataclass(frozen=True)
class TextOrList:
    """Marks a key that is a text or a list: `Annotated[Text | tuple[Item, ...], TextOrList()]`.

    With a third option it may be null: `Annotated[Text | tuple[Item, ...] | None, TextOrList()]`.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        options = get_args(source)
        text, items = map(handler.generate_schema, options[:2])
        schemas: dict[Any, CoreSchema] = {"text": text, "list": items}
        schema: CoreSchema = core_schema.tagged_union_schema(
            schemas, lambda value: "list" if isinstance(value, list | tuple) else "text"
        )
        return core_schema.nullable_schema(schema) if NoneType in options else schema


def list_of(kind: Any) -> Any:
    """Return the type of the list of a key that is a text or a list; None for other types."""
    is_marked = any(isinstance(mark, TextOrList) for mark in getattr(kind, "__metadata__", ()))
    return get_args(get_args(kind)[0])[1] if is_marked else None


def as_key(name: Any) -> str:
    """Return the name of a choice, or OUTSIDE for the name of outside code."""
    return OUTSIDE if isinstance(name, str) and ":" in name else str(name)


def choice_of(kind: Any) -> Choice | None:
    """Return the mark of a type that is a choice; None for other types."""
    found = (mark for mark in getattr(kind, "__metadata__", ()) if isinstance(mark, Choice))
    return next(found, None) if get_origin(kind) is Annotated else None


@cache
def members_of(kind: Any) -> Mapping[str, type]:
    """Return the dataclasses of a choice by name, that of outside code as OUTSIDE."""
    choice, members = choice_of(kind), get_args(get_args(kind)[0])
    assert choice is not None
    return MappingProxyType({name: member for member in members for name in choice.names_of(member)})


def member_for(kind: Any, tree: Mapping[str, Any]) -> type | None:
    """Return the dataclass of a choice that the name in `tree` selects; None where there is no such name."""
    choice = choice_of(kind)
    assert choice is not None
    return members_of(kind).get(as_key(tree.get(choice.tag, choice.default)))


def keys_of(member: type) -> list[str]:
    """Return the keys of a dataclass."""
    return [field.name for field in dataclasses.fields(member)]


def dotted_keys(kind: Any, prefix: str = "") -> Iterator[str]:
    """Yield all keys below a dataclass or a choice, whatever the choices: sections, choices and values."""
    members = members_of(kind) if choice_of(kind) is not None else {"": kind}
    for member in dict.fromkeys(members.values()):
        for key, hint in type_hints(member).items():
            if key in keys_of(member):
                yield f"{prefix}{key}"
                if choice_of(hint) is not None or dataclasses.is_dataclass(hint):
                    yield from dotted_keys(hint, f"{prefix}{key}.")
