"""The parts that a config chooses: networks, objectives, sources, planners, of the project or from outside of it.

Each choice of the config names its class as `built_by`, `package.module:Class`. For a part from outside, that is the
name that the user gave. The class is imported when it is used, so that the config imports no network.

To add a part to the project, write its class in a file, and its entry in worldmodel/config/: a dataclass with the keys
and `built_by`, in the union of its kind.

The functions that read a config or load a run check that the user allows code from outside (`check_trust` in
worldmodel/config/reading.py). A Config in memory is the user's own, and its classes are imported here.
"""

import dataclasses
import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

from torch import nn

from data_pipelines.errors import UserError


class Part(Protocol):
    """A choice of the config: a dataclass whose keys are for its class."""

    @property
    def built_by(self) -> str:
        """`package.module:Class`; in the project also a function that returns the part."""


def build(key: str, part: Part, kind: type, /, **offered: Any) -> Any:
    """Return the part that the config chooses: an object of its class.

    The class gets those of the `offered` arguments that its constructor names. A class of the project also gets those
    keys of the choice that it names, a class from outside all of `options`.

    Args:
        key: of the config, which names the choice.
        kind: the Protocol whose members the object must have.

    Raises:
        UserError: as `make`.
    """
    if hasattr(part, "options"):
        return make(key, part.built_by, part.options, kind, **offered)
    return make(key, part.built_by, {}, kind, **offered, **keys_for(part))


def build_module(key: str, part: Part, kind: type, /, **offered: Any) -> Any:
    """Return the nn.Module that the config chooses, as `build` does.

    Raises:
        UserError: as `make`; the class is not an nn.Module.
    """
    made = build(key, part, kind, **offered)
    if not isinstance(made, nn.Module):
        raise UserError(f"{key}={part.built_by}: the class is not a torch.nn.Module: derive it from one")
    return made


def keys_for(part: Any) -> dict[str, Any]:
    """Return the keys of a choice and their values."""
    return {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}


def load(key: str, name: str) -> Callable[..., Any]:
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
    if not callable(found):
        raise UserError(f"{key}={name}: {module.__file__ or module_name} has no class {class_name!r}")
    return found


def make(key: str, name: str, options: dict[str, Any], kind: type, /, **offered: Any) -> Any:
    """Return an object of the class that a key of the config names, given `options` and what it names of `offered`.

    Args:
        kind: the Protocol whose members the object must have.

    Raises:
        UserError: as `load`; the class does not accept the arguments; the object lacks a member.
    """
    made_by, section = load(key, name), key.rpartition(".")[0]
    if twice := sorted(options.keys() & offered.keys()):
        raise UserError(f"{section}.options.{twice[0]}: the project gives {twice[0]} to the class: remove this option")
    check_members(key, name, made_by, sorted(getattr(made_by, "__abstractmethods__", ())))
    signature = inspect.signature(made_by)
    arguments = {name: value for name, value in offered.items() if name in signature.parameters} | options
    try:
        signature.bind(**arguments)
    except TypeError as error:
        names = ", ".join([*offered, *options])
        raise UserError(f"{key}={name}: the class does not accept the arguments {names}: {error}") from None
    made = made_by(**arguments)
    check_members(key, name, made, members_of(kind))
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
