"""Messages about mistakes in a config: the key, the value, what is allowed, and the override that is to blame."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_origin

from data_pipelines.errors import UserError, did_you_mean
from data_pipelines.text_files import kind_of_items, kind_of_key, shown
from worldmodel.config.kinds import OUTSIDE, Text, choice_of, dotted_keys, keys_of, list_of, members_of
from worldmodel.config.old import MOVED
from worldmodel.config.sections import Config
from worldmodel.config.trees import flatten

MAX_PROBLEMS = 5  # of a config, in a message
MAX_MEANT = 3  # keys of the same last part, in a hint


class Problem(NamedTuple):
    """A phrase that says what is wrong, and the dotted keys that it is about."""

    phrase: str
    keys: tuple[str, ...]

    @classmethod
    def of_phrase(cls, phrase: str) -> "Problem":
        """Return the problem of a phrase that names all of its keys."""
        return cls(phrase, tuple(re.findall(r"\w+(?:\.\w+)*", phrase)))


def refusal(source: str, overrides: Sequence[str], problems: Sequence[Problem]) -> UserError:
    """Return the error of a config. A problem is that of the last override of one of its keys, otherwise `source`'s."""
    parts: list[str] = []
    last = None
    for phrase, keys in problems[:MAX_PROBLEMS]:
        at_fault = [override for override in overrides if any(_sets(override, key) for key in keys)]
        owner = f"override {shown(at_fault[-1])}" if at_fault else source
        parts.append(phrase if owner == last else f"{owner}: {phrase}")
        last = owner
    more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
    return UserError("; ".join([*parts, *more]))


def _sets(override: str, key: str) -> bool:
    """Return True if an override "key=value" sets this key. A choice may be set as `model.latent` or by its name."""
    name, _, value = override.partition("=")
    return _choice_key(name) == _choice_key(key) or (value.startswith("{") and key.startswith(f"{name}."))


def _choice_key(key: str) -> str:
    return re.sub(r"\.(name|source)$", "", key)


def explained(entry: Any) -> Problem:
    """Return one error of pydantic as a phrase: key, value, what is allowed."""
    keys, owner, kind = _place(entry["loc"])
    key, value, choice = _words(".".join(keys)), entry["input"], choice_of(kind)
    about = [".".join(keys)]
    if entry["type"] == "unexpected_keyword_argument":
        if isinstance(value, Mapping):
            about += [f"{about[0]}.{part}" for part in flatten(value)]
        hint = _meant(keys, owner) or f"; allowed here: {', '.join(keys_of(owner))}"
        phrase = f"unknown key {key}={shown(value)}{hint}"
    elif entry["type"] in ("missing", "missing_argument"):
        phrase = f"missing key {key}"
    elif choice is not None and entry["type"] in ("union_tag_invalid", "union_tag_not_found"):
        names = ", ".join(name if name == OUTSIDE else repr(name) for name in members_of(kind))
        if isinstance(value, Mapping):
            name = value.get(choice.tag)
            hint = did_you_mean(name, members_of(kind))
            phrase = f"{key}.{choice.tag}={shown(name)}: input should be one of {names}{hint}"
        else:
            phrase = f"{key}={shown(value)}: input should be keys and values, or one of {names}"
    elif entry["type"] == "string_pattern_mismatch":
        phrase = f"{key}={shown(value)}: input should read {OUTSIDE}"
    else:
        message = entry["msg"].removeprefix("Value error, ")
        hint = did_you_mean(value, _texts_of(kind))
        phrase = f"{key}={shown(value)}: {message[0].lower()}{message[1:]}{hint}"
    return Problem(phrase, tuple(about))


def _meant(keys: Sequence[str], owner: Any) -> str:
    """Return a hint at the keys that an unknown key may mean: of the same last part elsewhere, or a similar neighbour.

    `owner` is the type without the key. A key of an earlier version stands for the one that it has become.
    """
    *above, leaf = keys
    known = {key: key for key in dotted_keys(Config)} | MOVED
    same = {now: None for key, now in known.items() if key.split(".")[-1] == leaf and now != ".".join(keys)}
    if 0 < len(same) <= MAX_MEANT:
        return f" (did you mean {' or '.join(same)}?)"
    return did_you_mean(leaf, keys_of(owner), prefix="".join(f"{key}." for key in above))


def _texts_of(kind: Any) -> list[str]:
    """Return the texts that a key of this type accepts, if it lists them."""
    if get_origin(kind) is Literal:
        return [option for option in get_args(kind) if isinstance(option, str)]
    return [text for option in get_args(kind) for text in _texts_of(option)]


def _place(location: Sequence[Any]) -> tuple[list[str], Any, Any]:
    """Return the keys of an error's location, the type that has the last key, and the type of its value.

    In a location the key of a choice is followed by the choice's name, and that of a text or list by which of them it
    is; neither is a key.
    """
    keys: list[str] = []
    owner: Any = Config
    kind: Any = Config
    for part in map(str, location):
        if choice_of(kind) is not None:
            kind = members_of(kind)[part]
        elif list_of(kind) is not None and part in ("text", "list"):
            kind = list_of(kind) if part == "list" else Text
        elif part.isdecimal() and owner is not Config:
            keys.append(part)
            owner, kind = kind, kind_of_items(kind)
        else:
            keys.append(part)
            owner, kind = kind, kind_of_key(kind, part)
    return keys, owner, kind


def _words(key: str) -> str:
    """Return the key, as Python would write it if it has characters that no key has."""
    return key if re.fullmatch(r"[\w.]{1,80}", key) else shown(key)
