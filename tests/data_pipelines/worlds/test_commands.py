"""Commands with two outcomes: the law, the held-out combinations and the pictures."""

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from data_pipelines.errors import UserError
from data_pipelines.worlds import commands
from data_pipelines.worlds.commands import (
    ALL_THINGS,
    COMMANDS,
    ENV_ID,
    HIGH_PX,
    LOW_PX,
    STEP_PX,
    CommandsEnv,
    Thing,
    draw,
    outcomes,
    probability,
    things_of,
)


def test_it_is_an_environment_of_gymnasium() -> None:
    check_env(gymnasium.make(ENV_ID, render_mode="rgb_array").unwrapped, skip_render_check=True)


def test_half_as_many_combinations_are_held_out_as_seen_and_every_value_is_in_both() -> None:
    seen, unseen = things_of("seen"), things_of("unseen")
    assert len(seen) == 48 and len(unseen) == 24 and set(seen) | set(unseen) == set(ALL_THINGS)
    for kept in (seen, unseen):
        assert [len({thing[attribute] for thing in kept}) for attribute in range(3)] == [4, 3, 6]
    drawn = set()
    for seed in range(300):
        info = CommandsEnv(combinations="unseen").reset(seed=seed)[1]
        drawn.add(Thing(info["shape"], info["size"], info["colour"]))
    assert drawn == set(unseen)


def test_outcomes_are_a_step_ahead_or_to_the_right_hand_side() -> None:
    middle = np.array([30.0, 31.0])
    right_hand = {"left": (0, -1), "right": (0, 1), "up": (1, 0), "down": (-1, 0)}
    for number, (name, aside) in enumerate(right_hand.items()):
        obeyed, deflected = outcomes(middle, number)
        np.testing.assert_allclose(obeyed, middle + STEP_PX * np.array(COMMANDS[number]), err_msg=name)
        np.testing.assert_allclose(deflected, middle + STEP_PX * np.array(aside), err_msg=name)


def test_moves_are_reflected_at_the_borders() -> None:
    reached = outcomes(np.array([[LOW_PX + 2, 30], [30, HIGH_PX - 1]]), np.array([0, 3]))
    np.testing.assert_allclose(reached[:, 0], [[LOW_PX + 4, 30], [30, HIGH_PX - 5]])


def test_commands_are_obeyed_as_often_as_the_law_says() -> None:
    env = CommandsEnv()
    env.reset(seed=3)
    env._thing = Thing(0, 2, 0)
    obeyed, expected = [], []
    for number in range(4000):
        before = env._place
        place = env.step(np.int64(number % 4))[-1]["state"]
        apart = np.abs(outcomes(before, number % 4) - place).max(axis=-1)
        assert apart.min() < 1e-4
        if np.ptp(outcomes(before, number % 4), axis=0).max() > 1e-3:  # the outcomes differ
            obeyed.append(apart[0] < 1e-4)
            expected.append(float(probability(before, 2)))
    assert min(expected) >= 0.6 and max(expected) <= 0.9 + 1e-9
    spread = np.sqrt(np.mean(np.array(expected) * (1 - np.array(expected))) / len(expected))
    assert abs(np.mean(obeyed) - np.mean(expected)) < 4 * spread
    low, high = (
        np.mean(np.array(obeyed)[np.array(expected) < 0.75]),
        np.mean(np.array(obeyed)[np.array(expected) > 0.75]),
    )
    assert high > low + 0.05


def test_pictures_show_place_size_shape_and_colour() -> None:
    place = np.array([20.3, 41.8])
    areas = {}
    for thing in ALL_THINGS:
        picture = draw(place, thing).astype(float)
        cover = np.abs(picture - commands.TABLE).sum(axis=-1) / np.abs(
            np.subtract(commands.COLOURS[thing.colour], commands.TABLE)
        ).sum()  # fmt: skip
        centre = (commands._PIXELS * cover[..., None]).sum(axis=(0, 1)) / cover.sum()
        np.testing.assert_allclose(centre, place, atol=0.05)
        areas[thing] = cover.sum()
    radii = np.array(commands.RADII_PX)
    for shape, area in enumerate(
        [np.pi * radii**2, (1.7 * radii) ** 2, 2 * (1.2 * radii) ** 2, np.pi * (1.0 - 0.25) * radii**2]
    ):
        found = [areas[Thing(shape, size, 0)] for size in range(3)]
        np.testing.assert_allclose(found, area, rtol=0.05)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"combinations='new' is unknown: use seen, unseen, all"):
        CommandsEnv(combinations="new")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"render_mode='human' is unknown"):
        CommandsEnv(render_mode="human")
