"""Reading configurations: YAML files with their bases, validation, and messages about mistakes.

pydantic checks names, types and ranges; its findings and the contradictions between keys become one line that names the
key, the value and what is allowed.
"""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from data_pipelines.errors import UserError
from data_pipelines.text_files import kind_of_key, read_yaml, shown
from worldmodel.config.checks import contradictions
from worldmodel.config.kinds import OUTSIDE, Text, choice_of, keys_of, members_of
from worldmodel.config.old import converted
from worldmodel.config.sections import Config, outside_names
from worldmodel.config.trees import apply_override, expanded, flatten, merged

MAX_PROBLEMS = 5  # of a config, in a message
MAX_BASES = 8  # above one another
_BASE = TypeAdapter(Text)


def load_config(path: str | Path, overrides: Iterable[str] = (), *, trust_code: bool = False) -> Config:
    """Read a YAML file and the files that it names as its bases, apply overrides such as "train.lr=1e-3", validate.

    Args:
        trust_code: allow code from outside of the project, named as `package.module:Class`. It is imported when the
            config is used.

    Raises:
        UserError: no such file, broken YAML, an unknown key, a wrong type, a value out of range, or keys that
            contradict each other; the config names code from outside without `trust_code`.

    Examples:
        >>> config = load_config("configs/demo.yaml", ["train.steps=400", "model.encoder=vit_tiny"])
        >>> config.train.steps
        400
    """
    path = Path(path)
    tree = read_with_bases(path)
    for override in overrides:
        apply_override(tree, override)
    config = validate(tree, source=str(path))
    check_trust(config, trust_code, source=str(path))
    return config


def check_trust(config: Config, trust_code: bool, source: str) -> None:
    """Check that a config names no code from outside of the project unless the user allows it.

    Args:
        source: names the config in the error.

    Raises:
        UserError: it names such code without `trust_code`.
    """
    if not trust_code and (found := outside_names(config)):
        names = ", ".join(f"{key}={name}" for key, name in found.items())
        raise UserError(
            f"{source} names code from outside of the project, which runs only with trust_code=True (--trust-code): "
            f"{names}"
        )


def read_with_bases(path: Path, above: Sequence[str] = ()) -> dict[str, Any]:
    """Return the nested dicts of a config file, merged over those of its base, not yet validated.

    Args:
        above: the files that led to this one.

    Raises:
        UserError: a file cannot be read, or is its own base.
    """
    tree = read_tree(path)
    place = os.path.realpath(path)
    if place in above:
        raise UserError(f"config {path} is its own base: {' -> '.join(map(os.path.basename, [*above, place]))}")
    if "base" not in tree:
        return converted(tree)
    base = tree.pop("base")
    try:
        _BASE.validate_python(base, strict=True)
    except ValidationError:
        raise UserError(f"{path}: base={shown(base)} must be the name of a config file, relative to this one") from None
    if len(above) == MAX_BASES:
        raise UserError(f"config {path} is the base of {MAX_BASES} others, one above the other: merge some of them")
    return converted(merged(read_with_bases(path.parent / base, [*above, place]), tree))


def read_tree(path: Path) -> dict[str, Any]:
    """Return the nested dicts of one config file, not yet validated. A base is not read.

    Raises:
        UserError: no such file, or it does not hold keys and values in YAML.
    """
    tree = read_yaml(path, Config)
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold keys and values, not {type(tree).__name__}")
    return expanded(tree)


def validate(tree: Mapping[str, Any], source: str) -> Config:
    """Return the Config of nested dicts; `source` names them in errors.

    Raises:
        UserError: an unknown key, a wrong type, a value out of range, or keys that contradict each other.
    """
    try:
        config = TypeAdapter(Config).validate_python(converted(expanded(tree)))
    except ValidationError as error:
        raise _refusal(source, [_explain(entry) for entry in error.errors(include_url=False)]) from error
    empty = [f"{key} is empty: give it a value" for key, value in flatten(to_dict(config)).items() if value == ""]
    if problems := [*empty, *contradictions(config)]:
        raise _refusal(source, problems)
    return config


def _refusal(source: str, problems: Sequence[str]) -> UserError:
    more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
    return UserError(f"{source}: " + "; ".join([*problems[:MAX_PROBLEMS], *more]))


def to_dict(config: Config) -> dict[str, Any]:
    """Return nested dicts of types that YAML and JSON have: tuples become lists."""
    return _with_lists(dataclasses.asdict(config))


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML."""
    return dump(to_dict(config))


def dump(tree: Mapping[str, Any]) -> str:
    """Return nested dicts as YAML, in their order."""
    return yaml.safe_dump(dict(tree), sort_keys=False)


def _with_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_lists(part) for key, part in value.items()}
    return [_with_lists(part) for part in value] if isinstance(value, list | tuple) else value


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys of nested dicts that differ, with both values; None for a key that one does not have."""
    old, new = flatten(before), flatten(now)
    keys = dict.fromkeys([*old, *new])
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def choices(key: str) -> dict[str, type]:
    """Return the dataclasses of a choice such as "model.latent" by name, without that of outside code."""
    members = members_of(_kind_at(key.split(".")))
    return {name: member for name, member in members.items() if name != OUTSIDE}


def _kind_at(keys: Sequence[str]) -> Any:
    kind: Any = Config
    for key in keys:
        kind = kind_of_key(kind, key)
    return kind


# ------------------------------------------------------------------------------------------------------- messages


def _explain(entry: Any) -> str:
    """Return one error of pydantic as a phrase: key, value, what is allowed."""
    keys, owner, kind = _place(entry["loc"])
    key, value, choice = _words(".".join(keys)), entry["input"], choice_of(kind)
    if entry["type"] == "unexpected_keyword_argument":
        return f"unknown key {key}={shown(value)}; allowed here: {', '.join(keys_of(owner))}"
    if entry["type"] in ("missing", "missing_argument"):
        return f"missing key {key}"
    if choice is not None and entry["type"] in ("union_tag_invalid", "union_tag_not_found"):
        names = ", ".join(name if name == OUTSIDE else repr(name) for name in members_of(kind))
        if isinstance(value, Mapping):
            return f"{key}.{choice.tag}={shown(value.get(choice.tag))}: input should be one of {names}"
        return f"{key}={shown(value)}: input should be keys and values, or one of {names}"
    if entry["type"] == "string_pattern_mismatch":
        return f"{key}={shown(value)}: input should read {OUTSIDE}"
    message = entry["msg"].removeprefix("Value error, ")
    return f"{key}={shown(value)}: {message[0].lower()}{message[1:]}"


def _place(location: Sequence[Any]) -> tuple[list[str], Any, Any]:
    """Return the keys of an error's location, the type that has the last key, and the type of its value.

    In a location the key of a choice is followed by the choice's name, which is no key.
    """
    keys: list[str] = []
    owner: Any = Config
    kind: Any = Config
    for part in map(str, location):
        if choice_of(kind) is not None:
            kind = members_of(kind)[part]
        else:
            keys.append(part)
            owner, kind = kind, kind_of_key(kind, part)
    return keys, owner, kind


def _words(key: str) -> str:
    """Return the key, as Python would write it if it has characters that no key has."""
    return key if re.fullmatch(r"[\w.]{1,80}", key) else shown(key)
