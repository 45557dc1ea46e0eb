"""Reading configurations: YAML files with their bases, validation, and messages about mistakes.

pydantic checks names, types and ranges; its findings and the contradictions between keys become one line that names the
key, the value and what is allowed.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from data_pipelines.errors import UserError
from data_pipelines.text_files import dump_yaml, kind_of_key, read_yaml, shown
from worldmodel.config.checks import contradictions
from worldmodel.config.data import VideosConfig
from worldmodel.config.kinds import OUTSIDE, Text, members_of
from worldmodel.config.mistakes import Problem, explained, refusal
from worldmodel.config.old import converted
from worldmodel.config.sections import Config, outside_names
from worldmodel.config.shipped import find_config
from worldmodel.config.trees import apply_override, expanded, flatten, merged

MAX_BASES = 8  # above one another
_BASE = TypeAdapter(Text)


def load_config(path: str | Path, overrides: Iterable[str] = (), *, trust_code: bool = False) -> Config:
    """Read a YAML file and the files that it names as its bases, apply overrides such as "train.lr=1e-3", validate.

    Args:
        path: of a file, or the name of a shipped config, such as "demo".
        trust_code: allow code from outside of the project, named as `package.module:Class`. It is imported when the
            config is used.

    Raises:
        UserError: no such config, broken YAML, an unknown key, a wrong type, a value out of range, or keys that
            contradict each other; the config names code from outside without `trust_code`.

    Examples:
        >>> config = load_config("demo", ["train.steps=400", "model.encoder=vit_tiny"])
        >>> config.train.steps
        400
    """
    path = find_config(path)
    tree, overrides = read_with_bases(path), list(overrides)
    for override in overrides:
        apply_override(tree, override)
    config = validate(tree, source=str(path), overrides=overrides)
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


def validate(tree: Mapping[str, Any], source: str, overrides: Sequence[str] = ()) -> Config:
    """Return the Config of nested dicts; `source` names them in errors.

    Args:
        overrides: have been applied to the dicts. An error names the override that it is about, in place of `source`.

    Raises:
        UserError: an unknown key, a wrong type, a value out of range, or keys that contradict each other.
    """
    try:
        config = TypeAdapter(Config).validate_python(converted(expanded(tree)))
    except ValidationError as error:
        problems = [explained(entry) for entry in error.errors(include_url=False)]
        raise refusal(source, overrides, problems) from error
    empty = [f"{key} is empty: give it a value" for key, value in flatten(to_dict(config)).items() if value == ""]
    if isinstance(config.data, VideosConfig) and not all(config.data.paths):
        empty = ["data.root is empty, or has an empty path: give it a value"]
    if phrases := [*empty, *contradictions(config)]:
        raise refusal(source, overrides, [Problem.of_phrase(phrase) for phrase in phrases])
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Return nested dicts of types that YAML and JSON have: tuples become lists."""
    return _with_lists(dataclasses.asdict(config))


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML."""
    return dump_yaml(to_dict(config))


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
