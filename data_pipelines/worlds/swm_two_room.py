"""TwoRoom of stable-worldmodel (swm/TwoRoom-v1): a disc goes through a door to the place of a goal picture.

Physics, pictures, the goal's radius and the expert are the package's own code (PyPI stable-worldmodel 0.1.1), which is
imported when an environment is made. It is not an extra of this package, as it requires torchvision and lancedb, which
its TwoRoom does not use. Install it without them: pip install --no-deps stable-worldmodel==0.1.1 loguru

Different are:

- A picture of 224 px is scaled to 64 px, in the same way as videos of 224 px are by data.size_px.
- A state sets the environment, and is rounded to float32 as labels are. So recorded actions can be replayed exactly.
- Goals are drawn as starts are, outside the wall, and drawn again if the start meets them.

A state is the position (x, y) of the disc in px of 224, x to the right and y down, pixel centres at integers. Importing
this module registers "worldmodel/SwmTwoRoom-v0".
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

from data_pipelines.decoders import from_rgb
from data_pipelines.errors import UserError, one_line
from data_pipelines.worlds.policies import MakePolicy, Policy
from data_pipelines.worlds.shapes import SIZE_PX
from data_pipelines.worlds.states import Frame, State, StateEnv

ENV_ID = "worldmodel/SwmTwoRoom-v0"

PACKAGE = "stable_worldmodel"
INSTALL = "pip install --no-deps stable-worldmodel==0.1.1 loguru"
WITHOUT_INIT = (PACKAGE, f"{PACKAGE}.envs", f"{PACKAGE}.envs.two_room")
"""Packages whose __init__ imports all of stable-worldmodel, with torchvision and lancedb."""

GOAL_PX = 16.0
"""A goal is reached at a smaller distance than this, in px of 224."""
ACTION_NOISE, REPEAT_PROBABILITY = 2.0, 0.05
"""Of the expert in the package's script that records its data. The second has no effect in version 0.1.1."""

# ------------------------------------------------------------------------------------------------ the package


@lru_cache
def two_room() -> tuple[type[Any], type[Any]]:
    """Return TwoRoomEnv and ExpertPolicy of stable-worldmodel, without importing the rest of it.

    Raises:
        UserError: the package or loguru cannot be imported.
    """
    try:
        with _bare_packages():
            importlib.import_module(f"{PACKAGE}.utils")  # which spaces reads as an attribute of the package
            return (
                importlib.import_module(f"{PACKAGE}.envs.two_room.env").TwoRoomEnv,
                importlib.import_module(f"{PACKAGE}.envs.two_room.expert_policy").ExpertPolicy,
            )
    except ImportError as error:
        raise UserError(
            f"SwmTwoRoom needs {PACKAGE}, which cannot be imported ({one_line(error)}): {INSTALL}"
        ) from None


@contextmanager
def _bare_packages() -> Iterator[None]:
    """Let modules of stable-worldmodel be imported without the __init__ of the packages around them.

    The expert's base class, in a module that imports torchvision, is `object` here: nothing of it is used. Afterwards
    sys.modules is as before, so that a program that imports the whole package gets it.

    Raises:
        ImportError: the package is not installed.
    """
    before = _loaded()
    for name in before:
        del sys.modules[name]
    try:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise ImportError(f"No module named {PACKAGE!r}")
        (folder, *_) = spec.submodule_search_locations
        for name in WITHOUT_INIT:
            sys.modules[name] = package = ModuleType(name)
            package.__path__ = [str(Path(folder, *name.split(".")[1:]))]
        sys.modules[f"{PACKAGE}.policy"] = policy = ModuleType(f"{PACKAGE}.policy")
        policy.BasePolicy = object  # type: ignore[attr-defined]
        yield
    finally:
        for name in _loaded():
            del sys.modules[name]
        sys.modules.update(before)


def _loaded() -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.split(".")[0] == PACKAGE}


# ------------------------------------------------------------------------------------------------ the environment


class SwmTwoRoomEnv(StateEnv):
    """Go to a goal: reward 0 and termination within 16 px of it, -1 per step until then.

    An action in [-1, 1]^2 moves the disc by 5 px of 224 per axis. Observations are uint8 [64, 64, 3]. info: "state" and
    "goal" (float32 [2] px of 224) and "is_success".

    Starts and goals are uniform outside the wall, as the package draws starts. A goal that the start meets is drawn
    again. reset(options=...) sets "state" and "goal".

    Raises:
        UserError: stable-worldmodel cannot be imported, an option is unknown, a state is not valid.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    state_names, num_positions = ("x", "y"), 2

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode)
        make_env, _ = two_room()
        self._env = make_env()
        self._env.reset(seed=0)  # places the wall and the door, which are always the same
        self._picture = lru_cache(maxsize=2)(self._drawn)  # a step asks twice for the picture of its state

    def picture(self, state: State) -> Frame:
        return self._picture(*state.tolist()).copy()

    def _drawn(self, *position: float) -> Frame:
        self._env._set_state(position)
        return from_rgb(self._env.render(), 3, SIZE_PX).transpose(1, 2, 0)

    def reaches(self, state: State, goal: State) -> bool:
        return bool(torch.dist(torch.from_numpy(state), torch.from_numpy(goal)) < GOAL_PX)

    def draw_state(self) -> State:
        places = self._env.variation_space["agent"]["position"]
        places.seed(int(self.np_random.integers(2**31)))
        return np.asarray(places.sample(set_value=False), np.float32)

    def advance(self, action: NDArray[np.float32]) -> tuple[State, dict[str, Any]]:
        self._env._set_state(self._state)
        self._env.step(action)
        return self._env.agent_position.numpy().astype(np.float32), {}

    @staticmethod
    def state_px(states: NDArray[Any]) -> NDArray[Any]:
        """Return the position of the disc in the frames, [..., 2] px, for states [..., 2]."""
        image_px = two_room()[0].IMG_SIZE
        return (np.asarray(states, np.float64) + 0.5) * SIZE_PX / image_px - 0.5

    def policies(self) -> Mapping[str, MakePolicy]:
        """Return the policies for recording, by name."""
        return {"expert": self.expert}

    def expert(self, rng: np.random.Generator) -> Policy:
        """Return the package's expert with the noise of its data: by the door to info["goal"].

        Its actions are the direction at full length, plus normal noise (standard deviation 2), clipped to [-1, 1].
        """
        _, make_expert = two_room()
        expert = make_expert(action_noise=ACTION_NOISE, action_repeat_prob=REPEAT_PROBABILITY)
        expert.set_env(self._env)
        expert.rng = rng

        def act(observation: Any, info: Mapping[str, Any]) -> NDArray[np.float32]:
            action: NDArray[np.float32] = expert.get_action({"state": info["state"], "goal_state": info["goal"]})
            return action

        return act


if ENV_ID not in gymnasium.registry:
    gymnasium.register(ENV_ID, entry_point=f"{__name__}:SwmTwoRoomEnv", max_episode_steps=100)
