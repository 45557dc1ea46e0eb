"""Success against factors of variation: one factor at a time, each of its values in the same episodes.

Factors of any environment are those of its camera (data_pipelines.worlds.camera.Camera). An environment has more if its
attribute `factors` names arguments of gymnasium.make; it has each of them as an attribute with its present value.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from data_pipelines.errors import UserError
from data_pipelines.text_files import parse_yaml, shown
from worldmodel.planning.protocol import PlanningProtocol, env_hook
from worldmodel.runs.planning_metrics import FactorValue, Planned, VariedFactor, VariedValue


@dataclass(frozen=True)
class Factor:
    """A factor of variation and the values to plan with."""

    name: str
    values: Sequence[Any]


def parse_factors(texts: Sequence[str]) -> list[Factor]:
    """Parse ["noise=0,10", "background=gray,[0,0,64]"]. Values are YAML.

    Raises:
        UserError: a text has another form, or a factor or a value is given twice.
    """
    factors = [_parse_factor(text) for text in texts]
    names = [factor.name for factor in factors]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"factor {shown(name)} is given twice: list all of its values at once, such as {name}=1,2")
    return factors


def _parse_factor(text: str) -> Factor:
    name, _, listed = text.partition("=")
    try:
        values = parse_yaml(f"[{listed}]")
    except yaml.YAMLError:
        values = []
    if not name or not isinstance(values, list) or not values or None in values:
        raise UserError(f"factor {shown(text)} must read NAME=VALUE,VALUE,..., such as noise=10,20,40")
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"factor {shown(text)}: the value {shown(value)} is given twice")
    return Factor(name, values)


def check_factors(protocol: PlanningProtocol, factors: Sequence[Factor]) -> None:
    """Check that the environment has these factors, and takes their values.

    Raises:
        UserError: it has no such factor, or does not take a value.
    """
    present = present_values(protocol)
    for factor in factors:
        if factor.name.startswith("planning."):
            raise UserError(f"{factor.name} is not a factor: put overrides before the options, or after --")
        if factor.name not in present:
            raise UserError(
                f"factor {shown(factor.name)} is unknown: the environment {protocol.env} has {', '.join(present)}"
            )
        for value in factor.values:
            varied(protocol, factor.name, value).make_env().close()


def present_values(protocol: PlanningProtocol) -> dict[str, Any]:
    """Return the values that the factors of a protocol have if they are not varied, by name."""
    env = protocol.make_env()
    env.close()
    own = {name: getattr(env.unwrapped, name) for name in own_factors(protocol)}
    return {**dataclasses.asdict(protocol.camera), **own}


def own_factors(protocol: PlanningProtocol) -> Sequence[str]:
    """Return the names of the environment's own factors."""
    return env_hook(protocol, "factors") or ()


def varied(protocol: PlanningProtocol, name: str, value: Any) -> PlanningProtocol:
    """Return the protocol with another value of one factor: the same episodes, in another environment.

    Raises:
        UserError: a camera does not take the value.
    """
    if name in own_factors(protocol):
        return dataclasses.replace(protocol, env_kwargs={**protocol.env_kwargs, name: value})
    return dataclasses.replace(protocol, camera=dataclasses.replace(protocol.camera, **{name: value}))


def success_by_factor(
    protocol: PlanningProtocol,
    factors: Sequence[Factor],
    undisturbed: Planned,
    plan: Callable[[PlanningProtocol, str], Planned],
) -> list[VariedFactor]:
    """Plan with each value of each factor, all other factors as they are.

    `plan` plans the episodes of a protocol, under a label of the progress. The present value of a factor is not planned
    with again: its scores are those of `undisturbed`.
    """
    present = present_values(protocol)

    def scores(name: str, value: Any) -> Planned:
        if value == present[name]:
            return undisturbed
        return plan(varied(protocol, name, value), f"{name}={value}")

    return [
        VariedFactor(
            factor=name,
            present=plain_value(present[name]),
            values=[VariedValue(value=plain_value(value), **scores(name, value)) for value in values],
        )
        for name, values in ((factor.name, factor.values) for factor in factors)
    ]


def plain_value(value: Any) -> FactorValue:
    """Return the value of a factor as a number, otherwise as text."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    return value if isinstance(value, str) else json.dumps(value)
