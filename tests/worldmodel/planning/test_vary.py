"""Factors of variation: their texts, what they change in an environment, and which results belong to a value."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from data_pipelines.errors import UserError
from data_pipelines.worlds.camera import Camera
from worldmodel.planning.controls import RandomPolicy
from worldmodel.planning.protocol import PlanningProtocol, run_episodes
from worldmodel.planning.vary import Factor, check_factors, parse_factors, success_by_factor, varied
from worldmodel.runs.planning_metrics import Planned

ENV = "data_pipelines.worlds.two_rooms:worldmodel/TwoRooms-v0"


def protocol(env: str = ENV, **env_kwargs: Any) -> PlanningProtocol:
    return PlanningProtocol(env=env, env_kwargs=env_kwargs, seeds=1, episodes=3, budget=4, first_seed=0)


def test_values_are_yaml() -> None:
    texts = ["noise=0,10.5", "background=navy,[1, 2, 3],'#102030'"]
    assert parse_factors(texts) == [Factor("noise", [0, 10.5]), Factor("background", ["navy", [1, 2, 3], "#102030"])]
    assert parse_factors([]) == []


@pytest.mark.parametrize(
    ("texts", "tells"),
    [
        (["noise"], "factor 'noise' must read NAME=VALUE,VALUE,..., such as noise=10,20,40"),
        (["noise="], "must read NAME=VALUE"),
        (["=1"], "must read NAME=VALUE"),
        (["noise=1]"], "must read NAME=VALUE"),
        (["noise=1,,2"], "must read NAME=VALUE"),
        (["background=#102030"], "must read NAME=VALUE"),
        (["noise=1,2,1.0"], "the value 1 is given twice"),
        (["noise=0,5,0"], "the value 0 is given twice"),
        (["noise=1", "blur=1", "noise=2"], "factor 'noise' is given twice"),
    ],
)
def test_texts_that_cannot_be(texts: list[str], tells: str) -> None:
    with pytest.raises(UserError, match=tells):
        parse_factors(texts)


@pytest.mark.parametrize(
    ("factor", "tells"),
    [
        (Factor("colour", [1]), "factor 'colour' is unknown: the environment .*TwoRooms-v0 has blur, contrast, "
         "brightness, noise, agent_size, background, slip$"),
        (Factor("planning.horizon", [5]),
         "planning.horizon is not a factor: put overrides before the options, or after"),
        (Factor("noise", [5, 300]), "noise=300 must be a number within 0..255"),
        (Factor("agent_size", [0]), "agent_size=0 must be a number within 0.25..4"),
        (Factor("background", ["mauv"]), "background='mauv' must be a colour: a name such as navy"),
        (Factor("background", [[1, 2, 256]]), r"background=\[1, 2, 256\] must be a colour"),
        (Factor("slip", [[1]]), r"slip=\[1\] must be a number"),
    ],
)  # fmt: skip
def test_an_environment_names_its_factors_and_checks_their_values(factor: Factor, tells: str) -> None:
    check_factors(protocol(), [Factor("noise", [5]), Factor("slip", [0, 0.5])])
    with pytest.raises(UserError, match=tells):
        check_factors(protocol(), [factor])


def test_an_environment_without_factors_has_those_of_the_camera() -> None:
    with pytest.raises(UserError, match=r"CartPole-v1 has blur, contrast, brightness, noise$"):
        check_factors(protocol("CartPole-v1"), [Factor("slip", [1])])


def test_episodes_are_the_same_with_every_value() -> None:
    def ran(asked: PlanningProtocol) -> Any:
        return run_episodes(asked, 0, lambda envs: RandomPolicy(envs, 0), keep_frames=True)

    base = protocol(agent_size=1.5)
    plain, noisy, small = (ran(each) for each in (base, varied(base, "noise", 9), varied(base, "agent_size", 0.5)))
    for episode in range(3):
        for other in (noisy, small):
            assert np.array_equal(plain.states[episode], other.states[episode])
            assert np.array_equal(plain.goal_states[episode], other.goal_states[episode])
        red = noisy.frames[episode][:, 0].astype(int) - plain.frames[episode][:, 0]
        assert 2 < red.std() < 9 and len({frame.tobytes() for frame in red}) == len(red)
        assert small.goals[episode][1].sum() == pytest.approx(plain.goals[episode][1].sum() / 9, rel=0.05)
    assert not np.array_equal(noisy.goals[0], plain.goals[0])
    assert np.array_equal(ran(varied(base, "noise", 9)).frames[2], noisy.frames[2])


def test_one_factor_is_varied_at_a_time_and_the_present_value_is_not_planned_again() -> None:
    base, asked = dataclasses.replace(protocol(slip=0.2), camera=Camera(blur=1)), []

    def plan(varied: PlanningProtocol, label: str) -> Planned:
        asked.append((label, varied.env_kwargs, varied.camera))
        return Planned(success_rate=1 / len(asked))

    factors = [Factor("noise", [0, 20]), Factor("slip", [0.5, 0.2]), Factor("background", [[0, 0, 9]])]
    found = success_by_factor(base, factors, Planned(success_rate=0.125), plan)
    assert asked == [
        ("noise=20", {"slip": 0.2}, Camera(blur=1, noise=20)),
        ("slip=0.5", {"slip": 0.5}, Camera(blur=1)),
        ("background=[0, 0, 9]", {"slip": 0.2, "background": [0, 0, 9]}, Camera(blur=1)),
    ]
    assert [(entry["factor"], entry["present"]) for entry in found] == [
        *(("noise", 0.0), ("slip", 0.2), ("background", "black"))
    ]
    rates = [[(value["value"], value["success_rate"]) for value in entry["values"]] for entry in found]
    assert rates == [[(0, 0.125), (20, 1.0)], [(0.5, 0.5), (0.2, 0.125)], [("[0, 0, 9]", 1 / 3)]]
