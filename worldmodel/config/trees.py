"""Configurations as nested dicts, before they are validated: short forms, bases, overrides."""

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import yaml

from data_pipelines.errors import UserError
from data_pipelines.text_files import is_optional, is_text, kind_of_items, kind_of_key, parse_yaml, shown, type_hints
from worldmodel.config.kinds import as_key, choice_of, keys_of, list_of, member_for, members_of
from worldmodel.config.old import MOVED
from worldmodel.config.sections import Config


def expanded(tree: Mapping[str, Any], kind: Any = Config) -> dict[str, Any]:
    """Return a tree in which a choice that is given by its name alone is a dict: `encoder: mlp` -> {"name": "mlp"}."""
    hints = type_hints(kind)
    return {key: _expanded_part(part, hints.get(key)) for key, part in tree.items()}


def _expanded_part(part: Any, kind: Any) -> Any:
    choice = choice_of(kind)
    if choice is not None:
        if not isinstance(part, dict):
            return {choice.tag: part} if isinstance(part, str) else part
        member = member_for(kind, part)
        return part if member is None else expanded(part, member)
    return expanded(part, kind) if isinstance(part, dict) and hasattr(kind, "__dataclass_fields__") else part


def merged(base: Mapping[str, Any], tree: Mapping[str, Any], kind: Any = Config) -> dict[str, Any]:
    """Return `base` with the values of `tree`; dicts are merged, and a choice of another name drops foreign keys."""
    choice = choice_of(kind)
    result = dict(base)
    if choice is not None and choice.tag in tree:
        result = renamed(base, tree[choice.tag], kind)
    for key, part in tree.items():
        before = result.get(key)
        if isinstance(before, dict) and isinstance(part, dict):
            part = merged(before, part, kind_of_key(kind, key))
        result[key] = part
    return result


def renamed(tree: Mapping[str, Any], name: Any, kind: Any) -> dict[str, Any]:
    """Return the tree of a choice under a name, without keys that only choices of other names have."""
    choice, members = choice_of(kind), members_of(kind)
    assert choice is not None
    member = members.get(as_key(name))
    foreign = {key for other in members.values() for key in keys_of(other)} - set(keys_of(member) if member else ())
    if name != tree.get(choice.tag, choice.default):
        foreign.add("options")
    kept = {key: value for key, value in tree.items() if member is None or key not in foreign}
    return {**kept, choice.tag: name}


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one key of nested dicts from "a.b=value".

    The value of a key that holds text is that text, whatever it would be in YAML. Where it may also be a list, a list
    of valid items, which are texts or keys with values, is that list. For a key that may be null, `null` and the empty
    text are null. Any other value is YAML. A choice takes its name: "model.encoder=resnet" keeps the keys that resnet
    has, and drops the others.

    Raises:
        UserError: the override has another form, the key has moved, or the value is not valid YAML.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {shown(override)} must read key=value, such as train.steps=100")
    if key in MOVED:
        raise UserError(f"override {shown(override)}: {key} is now {MOVED[key]}")
    *parents, leaf = key.split(".")
    node: dict[str, Any] = tree
    kind: Any = Config
    for parent in parents:
        node, kind = node.setdefault(parent, {}), kind_of_key(kind, parent)
        if not isinstance(node, dict):
            raise UserError(f"override {shown(override)}: {shown(parent)} is a value, not a group of keys")
    choice, kind_of_leaf = choice_of(kind), kind_of_key(kind, leaf)
    if choice is not None and leaf == choice.tag:
        other = renamed(node, text, kind)
        node.clear()
        node.update(other)
    elif choice_of(kind_of_leaf) is not None and not text.startswith("{"):
        before = node.get(leaf)
        node[leaf] = renamed(before if isinstance(before, dict) else {}, text, kind_of_leaf)
    else:
        node[leaf] = _override_value(override, text, kind_of_leaf)


def _override_value(override: str, text: str, kind: Any) -> Any:
    if list_of(kind) is not None and text.startswith("["):
        with suppress(yaml.YAMLError):
            value = parse_yaml(text, kind)
            item = dict if dataclasses.is_dataclass(kind_of_items(kind)) else str
            if isinstance(value, list) and value and all(isinstance(part, item) for part in value):
                return value
    if is_text(kind):
        return None if is_optional(kind) and text in ("", "null") else text
    try:
        return parse_yaml(text, kind)
    except yaml.YAMLError as error:
        hint = ", put quotes around the whole override if it has spaces" if text.startswith(("{", "[")) else ""
        raise UserError(f"override {shown(override)}: the value is not valid YAML{hint}") from error


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
