"""stable-worldmodel is not installed for the usual tests: its import is tested with a package of the same form.

The other tests run where it is installed: pip install --no-deps stable-worldmodel==0.1.1 loguru
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.errors import UserError
from data_pipelines.worlds import swm_two_room
from data_pipelines.worlds.digits import pixel_centroid
from data_pipelines.worlds.swm_two_room import SwmTwoRoomEnv, two_room
from tests.conftest import REPO, run_python

installed = pytest.mark.skipif(
    importlib.util.find_spec("stable_worldmodel") is None, reason=f"needs {swm_two_room.INSTALL}"
)

PACKAGE_FILES = {
    "__init__.py": "import lancedb_is_not_installed",
    "utils.py": "WHERE = 'utils'",
    "policy.py": "import torchvision_is_not_installed",
    "envs/__init__.py": "import gymnasium_robotics_is_not_installed",
    "envs/two_room/__init__.py": "from .expert_policy import ExpertPolicy",
    "envs/two_room/env.py": "import stable_worldmodel as swm\n"
    "class TwoRoomEnv:\n    where = lambda self: swm.utils.WHERE",
    "envs/two_room/expert_policy.py": "from stable_worldmodel.policy import BasePolicy\n"
    "class ExpertPolicy(BasePolicy):\n    def __init__(self):\n        super().__init__()",
}


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder from which stable_worldmodel is imported, and which does not hold it yet."""
    two_room.cache_clear()
    others = [place for place in sys.path if not Path(place, "stable_worldmodel").is_dir()]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *others])
    yield tmp_path
    two_room.cache_clear()
    importlib.invalidate_caches()


def write_package(folder: Path, **files: str) -> None:
    for name, text in {**PACKAGE_FILES, **files}.items():
        path = folder / "stable_worldmodel" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def loaded_modules() -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.startswith("stable_worldmodel")}


# --------------------------------------------------------------------------------------------- without the package


def test_only_the_modules_of_two_room_are_imported(in_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(in_place)
    loaded = ModuleType("stable_worldmodel.data")
    monkeypatch.setitem(sys.modules, loaded.__name__, loaded)  # by the rest of a program
    make_env, make_expert = two_room()
    assert make_env().where() == "utils" and isinstance(make_expert(), make_expert)
    assert loaded_modules() == {loaded.__name__: loaded}
    with pytest.raises(ImportError, match="lancedb_is_not_installed"):  # of the whole package
        importlib.import_module("stable_worldmodel")


def test_a_missing_package_is_told_with_the_way_to_install_it(in_place: Path) -> None:
    with pytest.raises(UserError, match=r"No module named 'stable_worldmodel'\): pip install --no-deps stable-world"):
        SwmTwoRoomEnv()
    write_package(in_place, **{"utils.py": "import loguru_is_missing"})
    importlib.invalidate_caches()
    with pytest.raises(UserError, match=r"No module named 'loguru_is_missing'\): pip install --no-deps .* loguru$"):
        SwmTwoRoomEnv()
    assert not loaded_modules()


def test_recording_without_the_package_ends_with_one_line(tmp_path: Path) -> None:
    write_package(tmp_path, **{"utils.py": "import loguru_is_missing"})
    env = f"data_pipelines.worlds.swm_two_room:{swm_two_room.ENV_ID}"
    arguments = ["-m", "worldmodel", "record", "--env", env, "--out", str(tmp_path / "out")]
    done = run_python(*arguments, PYTHONPATH=f"{tmp_path}:{REPO}")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: SwmTwoRoom needs stable_worldmodel") and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ with the package


@installed
def test_the_disc_moves_as_in_the_package_and_ends_with_it() -> None:
    env, theirs, rng = SwmTwoRoomEnv(), two_room()[0](), np.random.default_rng(0)
    _, info = env.reset(seed=1)
    theirs.reset(seed=5, options={"state": info["state"], "target_state": info["goal"]})
    heading, ends, stops = np.zeros(2, np.float32), 0, 0
    for _ in range(1000):
        heading = np.clip(0.95 * heading + 0.5 * rng.normal(size=2), -1.5, 1.5).astype(np.float32)
        before = info["state"]
        frame, reward, terminated, _, info = env.step(heading)
        _, _, theirs_ends, _, their_info = theirs.step(heading)
        assert (info["state"] == their_info["state"]).all()
        assert terminated == theirs_ends == info["is_success"] == (reward == 0)
        stops += bool(np.abs(info["state"] - before - 5 * np.clip(heading, -1, 1)).max() > 1e-3)
        ends += bool(terminated)
        if terminated:
            info = env.set_goal(env.draw_state())
            theirs._set_goal_state(info["goal"])
    assert ends >= 3 and stops > 50
    scaled = Image.fromarray(theirs.render()).resize((64, 64), Image.Resampling.BILINEAR)
    assert frame.shape == (64, 64, 3) and np.abs(frame.astype(int) - np.asarray(scaled)).max() <= 1


@installed
@pytest.mark.parametrize(
    ("start", "action", "expected"),
    [
        ((98, 120), (1, 0), (99.5, 120)),  # the wall is 107..117 px, the disc 7, and it stands off half a pixel
        ((126, 120), (-1, 0), (124.5, 120)),
        ((98, 49), (1, 0), (103, 49)),  # in the door
        ((24, 24), (-1, -1), (21, 21)),  # the border is 14 px
        ((60, 60), (3, -0.5), (65, 57.5)),
    ],
)
def test_walls_and_door(start: Any, action: Any, expected: Any) -> None:
    env = SwmTwoRoomEnv()
    env.reset(seed=0, options={"state": start, "goal": [200, 200]})
    assert np.array_equal(env.step(np.array(action, np.float32))[-1]["state"], np.array(expected, np.float32))


@installed
def test_a_goal_is_reached_within_16_px() -> None:
    env = SwmTwoRoomEnv()
    env.reset(seed=0, options={"state": [50, 50], "goal": [50, 150]})
    assert [env.set_state([50, 150 - away])["is_success"] for away in (15.9, 16, 0)] == [True, False, True]
    with pytest.raises(UserError, match=r"state=\[1\] must be 2 numbers \(x, y\)$"):
        env.set_state([1])


@installed
def test_positions_in_pictures_and_draws() -> None:
    env, starts = SwmTwoRoomEnv("rgb_array"), []
    empty = env.picture(np.array([-500, -500], np.float32)).astype(np.float32)
    for seed in range(200):
        _, info = env.reset(seed=seed)
        assert not info["is_success"]
        starts.append(info["state"])
        x, y = info["state"]
        if seed < 20 and 40 < y < 180 and min(abs(x - edge) for edge in (14, 112, 210)) > 30:
            red = torch.from_numpy(empty - env.render())[..., 1] / 255  # type: ignore[operator]
            np.testing.assert_allclose(pixel_centroid(red), env.state_px(info["state"]), atol=0.1)
    places = np.array(starts)
    assert places.min() >= 14 and places.max() <= 209 and (np.abs(places[:, 0] - 112) > 12).all()
    assert 0.4 < (places[:, 0] > 112).mean() < 0.6 and np.ptp(places, axis=0).min() > 180
    assert (env.goal_frame() == env.picture(info["goal"])).all()
    assert (SwmTwoRoomEnv().reset(seed=199)[1]["state"] == places[-1]).all()


@installed
def test_the_expert_goes_by_the_door_with_the_noise_of_the_packages_data() -> None:
    env = SwmTwoRoomEnv()
    assert list(env.policies()) == ["expert"]
    rng, again = np.random.default_rng(3), np.random.default_rng(3)
    policy = env.policies()["expert"](rng)
    for state, goal, towards in [
        ((40, 160), (200, 100), (112, 49)),
        ((110, 52), (200, 100), (200, 100)),
        ((150, 30), (200, 100), (200, 100)),
    ]:
        way = np.subtract(towards, state)
        expected = np.clip(way / np.linalg.norm(way) + again.normal(0, 2.0, 2), -1, 1)
        action = policy(None, {"state": np.array(state, np.float32), "goal": np.array(goal, np.float32)})
        np.testing.assert_allclose(action, expected, atol=1e-6)
    reached = 0
    for seed in range(5):
        _, info = env.reset(seed=seed)
        for _ in range(300):
            _, _, terminated, _, info = env.step(policy(None, info))
            if terminated:
                break
        reached += bool(terminated)
    assert reached == 5
