"""Code from outside of the project: classes that a config names as `package.module:Class`.

The functions that read a config or load a run check that the user allows this code (`check_trust` in
worldmodel/config/reading.py). A Config in memory is the user's own, and its classes are imported here.
"""

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import nn

from data_pipelines.errors import UserError


def load_class(key: str, name: str) -> type:
    """Import the class `package.module:Class` that a key of the config names.

    Raises:
        UserError: there is no such module, or no such class in it.
    """
    module_name, _, class_name = name.partition(":")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # a module that the user's own code imports
        raise UserError(
            f"{key}={name}: there is no module {error.name!r}: install its package, or start in the folder that has it"
        ) from None
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        raise UserError(f"{key}={name}: {module.__file__ or module_name} has no class {class_name!r}")
    return found


def make(key: str, name: str, options: Mapping[str, Any], kind: type, **arguments: Any) -> Any:
    """Return an object of the class that a key of the config names: Class(**arguments, **options).

    Args:
        kind: the Protocol whose members the object must have.

    Raises:
        UserError: as `load_class`; the class does not accept the arguments; the object lacks a member.
    """
    outside, section = load_class(key, name), key.rpartition(".")[0]
    if twice := sorted(options.keys() & arguments.keys()):
        raise UserError(f"{section}.options.{twice[0]}: the project gives {twice[0]} to the class: remove this option")
    check_members(key, name, outside, sorted(getattr(outside, "__abstractmethods__", ())))
    _check_call(key, name, outside, {**arguments, **options})
    made = outside(**arguments, **options)
    check_members(key, name, made, members_of(kind))
    return made


def make_module(key: str, name: str, options: Mapping[str, Any], kind: type, **arguments: Any) -> Any:
    """Return an nn.Module of the class that a key of the config names, as `make` does.

    Raises:
        UserError: as `make`; the class is not an nn.Module.
    """
    made = make(key, name, options, kind, **arguments)
    if not isinstance(made, nn.Module):
        raise UserError(f"{key}={name}: the class is not a torch.nn.Module: derive it from one")
    return made


def members_of(kind: type) -> list[str]:
    """Return the public names that a Protocol, or a base class, defines itself."""
    return sorted(name for name in {*vars(kind), *inspect.get_annotations(kind)} if not name.startswith("_"))


def check_members(key: str, name: str, thing: object, members: list[str]) -> None:
    """Check that a class or an object has these members.

    Raises:
        UserError: some are missing.
    """
    if missing := [member for member in members if not _has(thing, member)]:
        raise UserError(f"{key}={name}: the class lacks {', '.join(missing)} (docs/extending.md)")


def _has(thing: object, member: str) -> bool:
    found = getattr(thing, member, None)
    if getattr(found, "__isabstractmethod__", False):
        return False
    # Each nn.Module has a forward, which fails unless a subclass replaces it.
    return hasattr(thing, member) and getattr(found, "__func__", found) is not nn.Module.forward


def _check_call(key: str, name: str, outside: type, arguments: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(outside)
    except ValueError:  # a class of compiled code may have none
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise UserError(
            f"{key}={name}: the class does not accept the arguments {', '.join(arguments)}: {error}"
        ) from None
